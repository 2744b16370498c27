"""What the tables of LLaVA-HR share: the two stages of a row, and what its start is made of.

A row is an encoder, as it is in stage 2. Stage 1 has its low resolution and no adapters; what joins
the towers and the language model is new there, in stage 2 the adapters are.
"""

import dataclasses

from hrvlm_jax.core.config import to_dict
from hrvlm_jax.systems.llava_hr.config import VICUNA_7B, VICUNA_13B, model
from hrvlm_jax.training.recipe import evaluate, words

STAGES = ('stage1', 'stage2')
TEXTS = {'7b': VICUNA_7B, '13b': VICUNA_13B}
# Never read: the ConvNeXt's classifier and CLIP's final norm.
UNREAD = 'vision/(slow/head|fast/post_norm)/.*'
JOINS = 'projector/.*|vision/(align|resampler)/.*'
# Places of text behind the visual tokens in the buckets of a stage.
TEXT_ROOM = {'stage1': (64, 192, 448, 2048), 'stage2': (256, 512, 1024, 2048, 2560)}


def low(encoder):
  """The encoder of stage 1: 384 pixels, 336 of a ViT alone, which CLIP was made for."""
  side = 384 if encoder.slow else 336
  return dataclasses.replace(encoder, image_size=side, adapters=None, aspect='square')


def parts(encoder, size='7b', slow='CONVNEXT_L'):
  """The parts of the start of a row, by the towers it has."""
  found = [f'language=VICUNA_{size.upper()}']
  if encoder.fast:
    found.append('vision/fast=CLIP_' + ('L_336' if encoder.fast.width == 1024 else 'G'))
  if encoder.slow:
    found.append('vision/slow=' + ('CONVNEXT_XXL' if encoder.slow.widths[-1] == 3072 else slow))
  return tuple(found)


def recipe(table, argument, rows, size=lambda row: '7b'):
  """The run config of ROW[,STAGE] of a table."""
  row, stage = words(argument, rows, STAGES[::-1])
  encoder, text = rows[row][0], TEXTS[size(row)]
  config = evaluate(f'llava_hr:{size(row)},{stage}')
  chosen = low(encoder) if stage == 'stage1' else encoder
  config.model = to_dict(model(chosen, text, chat='plain' if stage == 'stage1' else 'vicuna_v1'))
  config.data.lengths = tuple(chosen.tokens + room for room in TEXT_ROOM[stage])
  if stage == 'stage1':
    config.training.init_from = f'weights/{table}_{row}_start'
    config.training.init_allow = (JOINS, UNREAD)
    config.training.groups = (
      dict(pattern=UNREAD, frozen=True), dict(pattern=JOINS, decay=False),
      dict(pattern='.*', decay=False, frozen=True))
  else:
    config.training.init_from = f'runs/{table}/{row}/stage1'
    config.training.init_allow = ('vision/adapters/.*',) if chosen.adapters else ()
  return config
