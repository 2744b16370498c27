"""Claims of the papers in miniature, on the systems of needle_tiny.py and variants of them.

Command:  hrvlm compare --config configs/compare/claims_tiny.py --out runs/compare_tiny
          In the folder of needle_tiny.py its trained systems are used; elsewhere they are trained
          first. `--only NAMES` works on some systems; claims appear as soon as all they need is
          there.
Hardware: 2 CPU cores.
Expected: claims.json, claims.md and claims.png beside the table: every number with the paper's,
          whether the order of the numbers is the paper's or not. Accuracies here are those of a
          reading task with one letter per sign, the papers' those of their benchmarks; only the
          order can be compared. The kept results are from before LLaVA-HR started silent and
          VILA-HD's tower was adapted for 900 steps instead of 300 (needle_tiny.py).

Not here: the order in recall of top-down, bottom-up and random selection, which belongs to PS3's
own pre-training (configs/tiny/ps3.py).
"""

import dataclasses
import pathlib
import runpy

from hrvlm_jax.core.config import to_dict

BASE = runpy.run_path(str(pathlib.Path(__file__).with_name('needle_tiny.py')))
VIEW, VISION = BASE['VIEW'], BASE['VISION']
TABLE_1 = 'PS3, table 1, average of 7 benchmarks'


def systems():
  """Further models, all trained like those of needle_tiny.py."""
  vila_hd, llava_hr = BASE['vila_hd'], BASE['llava_hr']
  blind = vila_hd()
  tower = dataclasses.replace(blind.encoder.tower, low_context=False)
  return {
    'llava_hr_no_high': llava_hr(slow=None, adapters=None, image_size=2 * VIEW, fast_size=None,
                                 select_layer=-1),
    'llava_hr_no_low': llava_hr(fast=None, adapters=None, fast_size=None),
    # 24 tokens as at 160 pixels: nearly all of the 100 patches.
    'vila_hd_80': vila_hd(scales=(VIEW, 2 * VIEW), cells=24),
    'vila_hd_2_cells': vila_hd(cells=2),
    'vila_hd_no_context': dataclasses.replace(
      blind, encoder=dataclasses.replace(blind.encoder, tower=tower)),
  }


def point(label, system, paper=None, **options):
  return dict(label=label, system=system, paper=paper, **options)


def claims():
  cells = lambda n: {'budgets': (16 * n,)}
  crops = lambda n: {'max_crops': n, 'num_tokens': BASE['LAST_TOKENS'] * (1 + n)}
  return {
    'more_crops': dict(
      says='More crops help small targets (MC-LLaVA, at test time)', order='rises',
      source='model card and blog: no table over crops',
      points=[point(f'{n} crops', 'mc_llava', encoder=crops(n), size='small')
              for n in (4, 9, 16, 25)]),
    'gain_by_size': dict(
      says='The gain over one view grows as targets shrink (Pheye)', order='falls',
      source='Pheye, section 3.3: gain of 672 over 448 pixels by tertile, values not at hand',
      minus='single_view',
      points=[point(size, 'pheye', size=size) for size in ('small', 'medium', 'large')]),
    'two_paths': dict(
      says='Without one of its paths LLaVA-HR is worse, most without the high-resolution one',
      order='falls', source='LLaVA-HR, table 3, TextVQA',
      points=[point('both', 'llava_hr', 64.4), point('no low', 'llava_hr_no_low', 64.6),
              point('no high', 'llava_hr_no_high', 59.4)]),
    'constant_tokens': dict(
      says='Higher resolution helps at a constant number of tokens (PS3)', order='rises',
      source=TABLE_1,
      points=[point('one view', 'single_view', 49.9),
              point('2 x, 24 tokens', 'vila_hd_80', 56.2),
              point('4 x, 24 tokens', 'vila_hd', 58.2)]),
    'more_tokens': dict(
      says='More tokens help at a fixed resolution (PS3)', order='rises', source=TABLE_1,
      points=[point('2 of 25 cells', 'vila_hd_2_cells', 58.2),
              point('6 of 25 cells', 'vila_hd', 61.0)]),
    'more_tokens_at_test': dict(
      says='More tokens at test time alone help (PS3, trained with 2 of 25 cells)',
      order='rises', source=f'{TABLE_1}: trained with 20 %',
      points=[point('2 cells', 'vila_hd_2_cells', 58.2),
              point('6 cells', 'vila_hd_2_cells', 59.4, encoder=cells(6)),
              point('12 cells', 'vila_hd_2_cells', encoder=cells(12))]),
    'low_context': dict(
      says='Looks that see the low-resolution keys and values do better (PS3)', order='rises',
      source='PS3, design ablation: +8.8 on the average',
      points=[point('without', 'vila_hd_no_context', 0.0), point('with', 'vila_hd', 8.8)]),
  }


def get_config(size='full'):
  config = BASE['get_config'](size)
  for name, made in systems().items():
    config.systems[name] = to_dict(made)
  for name in ('vila_hd_80', 'vila_hd_no_context'):
    config.adapt[name] = config.adapt.vila_hd.to_dict()
  config.adapt['vila_hd_2_cells'] = dict(like='vila_hd')
  config.adapt['llava_hr_no_low'] = dict(like='llava_hr')
  config.claims = claims()
  return config
