"""Every pair of sides at tiny sizes: do they still agree? Seconds, no row in the tables."""

import dataclasses

from benchmarks.cases import alone, decode, export, vision

_SETTINGS = {
  'ps3_4k': {'size': 160, 'budgets': (12, 16), 'looks': 1},
  'ps3_low': {'size': 160, 'budgets': (12, 16), 'looks': 0},
  'siglip_13': {'views': 3},
  'clip_h_10': {'level': 2},
  'llava_hr_1024': {'size': 256},
  'phi_decode': {'prompt': 9, 'new': 8},
  'pheye_generate': {'prompt': 9, 'new': 8},
  'vila_hd_two_pass': {'question': 9},
}



def _sizes(case):
  """The small settings of a case; those of exports have the encoders' own."""
  return _SETTINGS.get(case.name.removeprefix('torch_export_').removesuffix('_jax'))


CASES = [
  dataclasses.replace(
    case, name=f'tiny_{case.name}', title=f'tiny sizes: {case.title}', group='tiny', shown=False,
    settings={**_sizes(case), 'tiny': True}, target=None, memory_target=None,
    bound=False, rounds=2,
    variants=tuple(v for v in case.variants if v.startswith(('eager', 'onednn'))))
  for case in (*vision.CASES, *decode.CASES, *export.CASES) if _sizes(case)
]
_ALONE = {
  'ps3_growth': {'sizes': (80, 160), 'from': 80, 'rounds': 2},
  'growth_mc_llava': {'sizes': (128, 256), 'time_below': 1e9, 'rounds': 1,
                      'systems': alone.SYSTEMS},
}
CASES += [
  dataclasses.replace(case, name=f'tiny_{case.name}', group='tiny', shown=False, settings={
    **case.settings, **_ALONE[case.name], 'tiny': True})
  for case in alone.CASES if case.name in _ALONE
]
