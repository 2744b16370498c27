"""A tiny LLaVA-HR: a ViT on 64 pixels, a ConvNeXt on 256, adapters between.

Command:  hrvlm tiny --config configs/tiny/llava_hr.py
          (writes the task and the ConvNeXt under runs/tiny, then trains; after that also
          hrvlm train --config configs/tiny/llava_hr.py --workdir DIR)
Hardware: 2 CPU cores.
Result:   not run yet.
"""

from hrvlm_jax.systems.llava_hr.config import tiny as llava_hr
from hrvlm_jax.training import tiny
from hrvlm_jax.training.glyph_scenes import SceneConfig

# As in stage 2 everything learns; what is never read stays where it is.
GROUPS = (
  dict(pattern=r'vision/(slow/head|fast/post_norm)/.*|vision/fast/class_token', frozen=True),
  dict(pattern=r'.*/(bias|scale|layer_scale)|vision/fast/pos_embed', decay=False),
  dict(pattern=r'.*'),
)
MODEL = llava_hr(vocab_size=tiny.VOCABULARY)


def get_config():
  return tiny.config('llava_hr', MODEL, lengths=(128, 160, 192), groups=GROUPS,
                     train_fresh=(r'(?!vision/slow/).*',))


def preparation():
  scenes = SceneConfig(needle=tiny.Preparation().task, encoder=MODEL.encoder, steps=1000)
  return tiny.Preparation(towers={'vision': scenes})
