"""A tiny Pheye: a global view and four tiles of 80 pixels, read by cross-attention.

Command:  hrvlm tiny --config configs/tiny/pheye.py
          (writes the task and the tower under runs/tiny, then trains; after that also
          hrvlm train --config configs/tiny/pheye.py --workdir DIR)
Hardware: 2 CPU cores.
Result:   not run yet.
"""

import dataclasses

from hrvlm_jax.systems.pheye.config import PheyeConfig, model, tiny as pheye
from hrvlm_jax.training import tiny
from hrvlm_jax.training.glyphs import GlyphConfig

# As the released models: the tower is frozen but for its LoRA sets. The language model has no
# pre-training to keep and learns too. What is never read stays where it is.
GROUPS = (
  dict(pattern=r'vision/(norm3|tower/post_norm)/.*', frozen=True),
  dict(pattern=r'vision/tower/(?!.*lora).*', frozen=True),
  dict(pattern=r'.*/(bias|scale)|vision/sub_image/embedding', decay=False),
  dict(pattern=r'.*'),
)
BASE = pheye(vocab_size=tiny.VOCABULARY)
# At 40 pixels a border would cut most letters.
MODEL = model(PheyeConfig(vision=dataclasses.replace(BASE.encoder.vision, image_size=80)),
              BASE.text, interval=2)


def get_config():
  return tiny.config('pheye', MODEL, task='square_one_turn', lengths=(64, 96, 128), groups=GROUPS,
                     train_fresh=(r'(?!vision/tower/).*', r'vision/tower/.*lora.*'))


def preparation():
  encoder, task = MODEL.encoder, tiny.Preparation().task
  # A tile of the enlarged image is as many pixels of the canvas, which has the same side.
  tower = GlyphConfig(
    needle=task, vision=encoder.vision, window=80, last_tokens=encoder.vision.grid**2, steps=1000,
    mean=encoder.mean, std=encoder.std)
  # Pheye's template has one question and one answer.
  return tiny.Preparation(towers={'vision/tower': tower}, turns=1, train_images=8000)
