"""A tiny MC-LLaVA: fifteen overlapping crops of a panorama, two tokens of each view.

Command:  hrvlm tiny --config configs/tiny/mc_llava.py
          (writes the task, the tower and the language model under runs/tiny, then trains;
          after that also
          hrvlm train --config configs/tiny/mc_llava.py --workdir DIR)
Hardware: 2 CPU cores.
Result:   loss 0.007, accuracy 99.4% (chance 4.3%), 300 steps.
"""

import dataclasses

from hrvlm_jax.lab import quickstart, tiny
from hrvlm_jax.lab.glyphs import GlyphConfig
from hrvlm_jax.lab.needle import NeedleConfig
from hrvlm_jax.lab.symbols import SymbolsConfig

# The model of the quickstart, with rows for the tokenizer that the tiny configs share.
_QUICKSTART = quickstart.model(quickstart.CROPS['multi_crop'])
MODEL = dataclasses.replace(
  _QUICKSTART, text=dataclasses.replace(_QUICKSTART.text, vocab_size=tiny.VOCABULARY))
# The tower was pre-trained, and the language model to answer from lists of signs; only the tower
# stays as it is.
GROUPS = (
  dict(pattern='vision/tower/.*', frozen=True),
  dict(pattern='.*/(bias|scale)', decay=False),
  dict(pattern='.*'),
)


def get_config(builtin='needle'):
  return tiny.config(
    'mc_llava', MODEL, builtin=builtin, task='panorama', lengths=(128, 192), groups=GROUPS,
    train_fresh=('(?!vision/tower/|language/).*',), steps=300, batch_size=16, eval_every=300,
    checkpoint_every=100)


def preparation(builtin='needle'):
  task = NeedleConfig.panorama(builtin)
  tower = GlyphConfig(needle=task, vision=quickstart.VISION, window=quickstart.WINDOW,
                      last_tokens=quickstart.LAST_TOKENS, steps=1500)
  symbols = SymbolsConfig(needle=dataclasses.replace(task, turns=3), text=MODEL.text, steps=1000,
                          slots=(MODEL.encoder.num_tokens,), batch_size=16)
  return tiny.Preparation(task=task, towers={'vision/tower': tower, 'language': symbols})
