"""A tiny LLaVA-HR: a ViT on 80 pixels, a ConvNeXt on 160, adapters between.

Command:  hrvlm tiny --config configs/tiny/llava_hr.py
          (writes the task and the ViT under runs/tiny, then trains; after that also
          hrvlm train --config configs/tiny/llava_hr.py --workdir DIR)
Hardware: 2 CPU cores.
Result:   not run yet.
"""

from hrvlm_jax.language import config as language
from hrvlm_jax.systems.llava_hr.config import LlavaHRConfig, model
from hrvlm_jax.training import tiny
from hrvlm_jax.training.glyphs import GlyphConfig
from hrvlm_jax.vision.convnext import ConvNeXtConfig
from hrvlm_jax.vision.vit import ViTConfig

# As in stage 2 everything learns; what is never read stays where it is.
GROUPS = (
  dict(pattern=r'vision/(slow/head|fast/post_norm)/.*|vision/fast/class_token', frozen=True),
  dict(pattern=r'.*/(bias|scale|layer_scale)|vision/fast/pos_embed', decay=False),
  dict(pattern=r'.*'),
)
FAST = ViTConfig(image_size=40, patch_size=8, width=96, depth=4, heads=4, mlp_width=384,
                 activation='quick_gelu', norm_eps=1e-5, class_token=True, patch_bias=False,
                 pre_norm=True)
SLOW = ConvNeXtConfig(depths=(1, 1, 2, 1), widths=(24, 48, 96, 192), classes=3)
TEXT = language.llama(vocab_size=tiny.VOCABULARY, width=128, depth=2, heads=4, mlp_width=384,
                      max_positions=512, init_std=0.09)
MODEL = model(LlavaHRConfig(image_size=160, fast_size=80, fast=FAST, slow=SLOW), TEXT)


def get_config():
  return tiny.config('llava_hr', MODEL, lengths=(160, 192, 224), groups=GROUPS, steps=800,
                     batch_size=16, eval_every=800, checkpoint_every=200,
                     train_fresh=(r'(?!vision/fast/).*',))


def preparation():
  encoder, task = MODEL.encoder, tiny.Preparation().task
  # Crops at the scale at which the ViT sees the whole canvas: half.
  tower = GlyphConfig(
    needle=task, vision=FAST, window=80, last_tokens=FAST.grid**2, colour_weight=1.0, steps=1200,
    mean=encoder.mean, std=encoder.std)
  return tiny.Preparation(towers={'vision/fast': tower})
