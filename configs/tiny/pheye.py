"""A tiny Pheye: a global view and four tiles of 40 pixels, read by cross-attention.

Command:  hrvlm tiny --config configs/tiny/pheye.py
          (writes the task and the tower under runs/tiny, then trains; after that also
          hrvlm train --config configs/tiny/pheye.py --workdir DIR)
Hardware: 2 CPU cores.
Result:   loss 0.048, accuracy 90.6% (chance 4.3%), 800 steps.
"""

from hrvlm_jax.core.layers import LoRA
from hrvlm_jax.lab import tiny
from hrvlm_jax.lab.glyphs import GlyphConfig
from hrvlm_jax.lab.needle import NeedleConfig
from hrvlm_jax.language import config as language
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.systems.fusion import CrossAttentionFusion
from hrvlm_jax.systems.pheye.config import PheyeConfig
from hrvlm_jax.vision.vit import ViTConfig

# As the released models: the tower is frozen but for its LoRA sets. The language model has no
# pre-training to keep and learns too. What is never read stays where it is.
GROUPS = (
  dict(pattern=r'vision/(norm3|tower/post_norm)/.*', frozen=True),
  dict(pattern=r'vision/tower/(?!.*lora).*', frozen=True),
  dict(pattern=r'.*/(bias|scale)|vision/sub_image/embedding', decay=False),
  dict(pattern=r'.*'),
)
VISION = ViTConfig(image_size=40, patch_size=8, width=96, depth=3, heads=4, mlp_width=384,
                   activation='quick_gelu', norm_eps=1e-5, class_token=True, patch_bias=False,
                   pre_norm=True)
TEXT = language.phi(vocab_size=tiny.VOCABULARY, width=128, depth=2, heads=4, mlp_width=512,
                    max_positions=512, init_std=0.09)


def model():
  # Dropout of the LoRA sets is for millions of examples. Pheye's own template knows one question;
  # the task asks three about an image.
  lora = lambda name, rank: LoRA(rank=rank, alpha=2.0 * rank, name=name)
  encoder = PheyeConfig(vision=VISION, first=lora('first', 8), second=lora('second', 16))
  return ModelConfig(system='pheye', encoder=encoder, text=TEXT, image_token=None,
                     fusion=CrossAttentionFusion(width=VISION.width, interval=1))


def get_config(builtin='needle'):
  return tiny.config('pheye', model(), builtin=builtin, lengths=(64, 96, 128), groups=GROUPS,
                     steps=800, batch_size=16, eval_every=800, checkpoint_every=200,
                     train_fresh=(r'(?!vision/tower/).*', r'vision/tower/.*lora.*'))


def preparation(builtin='needle'):
  encoder, task = model().encoder, NeedleConfig.square(builtin)
  # A tile shows 80 pixels of the canvas at half size.
  tower = GlyphConfig(
    needle=task, vision=VISION, window=80, last_tokens=VISION.grid**2, colour_weight=1.0,
    steps=1200, mean=encoder.mean, std=encoder.std)
  return tiny.Preparation(task=task, towers={'vision/tower': tower})
