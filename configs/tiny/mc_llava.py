"""A tiny MC-LLaVA: fifteen overlapping crops of a panorama, two tokens of each view.

Command:  hrvlm tiny --config configs/tiny/mc_llava.py
          (writes the task and the tower under runs/tiny, then trains; after that also
          hrvlm train --config configs/tiny/mc_llava.py --workdir DIR)
Hardware: 2 CPU cores.
Result:   not run yet.
"""

from hrvlm_jax.cli import quickstart
from hrvlm_jax.training import tiny
from hrvlm_jax.training.glyphs import GlyphConfig

# The tower was pre-trained; the quickstart trains the same model.
GROUPS = (
  dict(pattern='vision/tower/.*', frozen=True),
  dict(pattern='.*/(bias|scale)', decay=False),
  dict(pattern='.*'),
)


def get_config():
  return tiny.config('mc_llava', quickstart.model(quickstart.RUNS['multi_crop']), task='panorama',
                     lengths=(128, 192), groups=GROUPS, train_fresh=('(?!vision/tower/).*',))


def preparation():
  tower = GlyphConfig(needle=quickstart.task(), vision=quickstart.VISION, window=quickstart.WINDOW,
                      last_tokens=quickstart.LAST_TOKENS, steps=1500)
  return tiny.Preparation(task=quickstart.task(), towers={'vision/tower': tower})
