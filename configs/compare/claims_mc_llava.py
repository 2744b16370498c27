"""MC-LLaVA's claims for claims.py: crops, tokens of a crop, training with varied crops.

The model card and the article have no table over crops; the article's example is a logo of 30 x 90
pixels: not read with 100 crops and 728 tokens, half right with 200 crops, right with 200 crops and
1456 tokens. On V*'s hardest part "increasing the number of crops leads to better performance".
"""

import pathlib
import runpy

BASE = runpy.run_path(str(pathlib.Path(__file__).with_name('needle_tiny.py')))
MOST = 25  # crops that the canvas is cut into at half of its size
TOKENS = BASE['LAST_TOKENS'] * (1 + MOST)  # of an image then
ARTICLE = 'article on MC-LLaVA, no table'

NOTE = """What 9 crops lack is nothing that was trained here. Crops overlap by half whatever their
number, and every letter is whole in one of them; but 9 crops are windows of 100 pixels, 16 of 90
and 25 of 80, all shown at 40, and the ViT stays frozen after it has learned on windows of 80. A
model trained with 9 crops alone reads 31.0 ± 2.1 % too. So the rows on the number of crops tell
the size of what is shown and whether the ViT knows that size, not the number alone. A ViT that
has learned on windows of all these sizes is the follow-up; it was not run."""


def systems():
  """Two windows of other sizes at the same number of tokens; one trained with a drawn number."""
  return {
    'mc_llava_9': BASE['mc_llava'](9, tokens=50),
    'mc_llava_4': BASE['mc_llava'](4, tokens=50),
    'mc_llava_varied': BASE['mc_llava'](MOST),
  }


def encoders():
  return {}


def adapt():
  return {}


def changes():
  """Dynamic K: the number of tokens stays, a view gives the more the fewer crops there are."""
  return {'mc_llava_varied': dict(draw={'max_crops': (4, MOST)})}


def point(label, system='mc_llava', crops=None, tokens=None, **options):
  encoder = {} if crops is None else {'max_crops': crops, 'num_tokens': tokens or TOKENS}
  return dict(label=label, system=system, encoder=encoder, **options)


def claims():
  return {
    'mc_crops': dict(
      paper='MC-LLaVA', task='needle', order='rises', source=ARTICLE,
      says='More crops at test time help small targets (two tokens a view)',
      points=[point(f'{n} crops', crops=n, tokens=2 * (1 + n), size='small')
              for n in (4, 9, 16, 25)]),
    'mc_crops_or_tokens_test': dict(
      paper='MC-LLaVA', task='needle', order='rises',
      source=f'{ARTICLE}: 100 crops and 728 tokens against 200 and 728',
      says='At a constant number of tokens more crops (K) with fewer tokens each (N / K) are '
           'better, at test time',
      points=[point(f'{n} x {TOKENS // (1 + n)}', crops=n) for n in (4, 9, 16, 25)]),
    'mc_crops_or_tokens': dict(
      paper='MC-LLaVA', task='needle', order='rises',
      source=f'{ARTICLE}: 100 crops and 728 tokens against 200 and 728',
      says='The same for models trained with their numbers (50, 50 and 52 tokens)',
      points=[point('4 x 10', 'mc_llava_4'), point('9 x 5', 'mc_llava_9'),
              point('25 x 2', 'mc_llava')]),
    'mc_both_knobs': dict(
      paper='MC-LLaVA', task='needle', order='rises',
      source=f'{ARTICLE}: a logo with 100 crops and 728 tokens (wrong), 200 and 728 (half right), '
             '200 and 1456 (right)',
      says='More crops, then more tokens for them, read smaller targets, at test time',
      points=[point('9 crops, 50 tokens', crops=9, tokens=50, size='small'),
              point('25 crops, 52 tokens', crops=25, tokens=52, size='small'),
              point('25 crops, 104 tokens', crops=25, tokens=104, size='small')]),
    'mc_varied_few': dict(
      paper='MC-LLaVA', task='needle', order='rises',
      source=f'{ARTICLE}: trained on many resolutions, so that it takes any number of crops',
      says='Trained with a varied number of crops (4 to 25), 9 crops at test are read better than '
           'by a model that was trained with 25',
      points=[point('trained with 25', crops=9),
              point('trained with 4 to 25', 'mc_llava_varied', crops=9)], note=NOTE),
    'mc_varied_many': dict(
      paper='MC-LLaVA', task='needle', order='rises',
      source=f'{ARTICLE}: any number of crops and of tokens at test time',
      says='A model trained with a varied number of crops gains from more of them at test time',
      points=[point(f'{n} crops', 'mc_llava_varied', crops=n) for n in (4, 9, 16, 25)]),
  }
