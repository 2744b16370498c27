"""Every pair of sides at tiny sizes: do they still agree? Seconds, no row in the tables."""

import dataclasses

from benchmarks.cases import vision

_SETTINGS = {
  'ps3_4k': {'size': 160, 'budgets': (12, 16), 'looks': 1},
  'ps3_low': {'size': 160, 'budgets': (12, 16), 'looks': 0},
  'siglip_13': {'views': 3},
  'clip_h_10': {'level': 2},
  'llava_hr_1024': {'size': 256},
}

CASES = [
  dataclasses.replace(
    case, name=f'tiny_{case.name}', title=f'tiny sizes: {case.title}', group='tiny', shown=False,
    settings={**_SETTINGS[case.name], 'tiny': True}, target=None, memory_target=None, bound=False,
    variants=tuple(v for v in case.variants if v.startswith('eager')))
  for case in vision.CASES
]
