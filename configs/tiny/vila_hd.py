"""A tiny VILA-HD: 40 pixels of the whole image, then a quarter of it at 160 as the question asks.

Command:  hrvlm tiny --config configs/tiny/vila_hd.py
          (writes the task and the tower under runs/tiny, then trains; after that also
          hrvlm train --config configs/tiny/vila_hd.py --workdir DIR)
Hardware: 2 CPU cores.
Result:   loss 1.585, accuracy 53.2% (chance 4.3%), 500 steps.
"""

import dataclasses

from hrvlm_jax.lab import tiny
from hrvlm_jax.lab.glyphs import GlyphConfig
from hrvlm_jax.lab.needle import NeedleConfig
from hrvlm_jax.lab.scenes import SceneConfig
from hrvlm_jax.lab.symbols import SymbolsConfig
from hrvlm_jax.systems.fusion import TwoPassFusion
from hrvlm_jax.systems.vila_hd.config import tiny as vila_hd

# The tower learns to read beforehand and stays frozen; where to look is learned here, from the box
# of the sign that the first question of a row is about.
GROUPS = (
  dict(pattern=r'vision/ps3/(tower|residual)/.*', frozen=True),
  dict(pattern=r'vision/ps3/(pool_head/.*|selection/prior_prompt)', frozen=True),  # never read
  dict(pattern=r'.*/(bias|scale)', decay=False),
  dict(pattern=r'.*'),
)
BASE = vila_hd(vocab_size=tiny.VOCABULARY)
# One look at 4 of the 25 cells at 80 pixels and at 6 of them at 160.
MODEL = dataclasses.replace(
  BASE, fusion=TwoPassFusion(selection_weight=1.0),
  encoder=dataclasses.replace(BASE.encoder, select_layer=-1, budgets=(16, 96)))


def get_config(builtin='needle'):
  return tiny.config(
    'vila_hd', MODEL, builtin=builtin, task='square_one_turn', lengths=(64, 96, 128), groups=GROUPS,
    train_fresh=(r'(?!vision/ps3/(tower|residual)/|language/).*',), data=dict(boxes=True),
    steps=500, batch_size=32, eval_every=500, checkpoint_every=100, objective='two_pass')


def preparation(builtin='needle'):
  encoder, task = MODEL.encoder, NeedleConfig.square(builtin)
  # The tower reads crops at full size first, then selected patches at both scales.
  tower = GlyphConfig(needle=task, vision=encoder.tower.vision, window=40, last_tokens=25,
                      colour_weight=1.0, steps=1200, mean=encoder.tower.mean, std=encoder.tower.std)
  scenes = SceneConfig(needle=task, encoder=encoder, steps=500)
  # It answers from lists of signs before it sees one, as real language models do.
  symbols = SymbolsConfig(needle=task, text=MODEL.text, steps=1200, slots=(25,), batch_size=16)
  # Rows of one question: each has its box.
  return tiny.Preparation(
    task=task, towers={'vision/ps3/tower': tower, 'vision': scenes, 'language': symbols}, turns=1,
    train_images=8000)
