"""The model code of `hrvlm export --for transformers`, beside the originals and beside ours.

The side under test is `ours` of a case: its ratio is the other's time over that of the export.
"""

import dataclasses

from benchmarks.cases import vision

_SIDES = {'ps3_4k': 'PS3', 'ps3_low': 'PS3', 'siglip_13': 'Siglip', 'clip_h_10': 'Pheye',
          'llava_hr_1024': 'LlavaHR'}
_EAGER = {'clip_h_10': ('eager-merged',)}  # the sets of the export are merged as well


def _beside(case, other: bool):
  """A case of `cases.vision` with the export as its first side."""
  title = f'export for transformers: {case.title}'
  made = dataclasses.replace(
    case, name=f'torch_export_{case.name}', title=title, ours=f'ours.export:{_SIDES[case.name]}',
    variants=_EAGER.get(case.name, ('eager',)), target=1.0, gpu_target=None,
    memory_target=0.5 if case.name == 'ps3_4k' else 1.0, bound=False, rounds=2,
    group='torch_export', backends=('cpu',), ours_torch=True)
  if not other:
    return made
  return dataclasses.replace(
    made, name=f'{made.name}_jax', title=f'{title}; peer: this library in JAX', peer=case.ours,
    peer_side='ours', peer_name='hrvlm_jax', variants=('eager',), target=None, memory_target=None)


CASES = [_beside(case, other) for case in vision.CASES if case.name in _SIDES
         for other in (False, True)]
