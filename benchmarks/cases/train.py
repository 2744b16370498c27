"""Train steps: AdamW, all parameters, float32 masters."""

from benchmarks.harness.case import Case

_PEERS = {'mc_llava': 'transformers SigLIP + Phi', 'pheye': 'transformers CLIP + Phi',
          'llava_hr': 'transformers CLIP, LLaMA + timm', 'ps3': 'ps3-torch 0.1.3'}
# Weights are trained, not frozen; channels-last is for the convolutions of a ConvNeXt.
_FORMS = {'mc_llava': ('eager', 'compile', 'autotune'), 'pheye': ('eager', 'compile', 'autotune'),
          'llava_hr': ('eager', 'eager-channels', 'compile', 'compile-channels',
                       'autotune-channels'),
          'ps3': ('eager', 'compile')}


def _case(system: str, size: str, picture: int, rows: int, text: int) -> Case:
  tiny = size == 'tiny'
  return Case(
    name=f'train_step_{system}_{size}',
    title=f'train step, {system}, {size}, {rows} rows, {picture} pixels'
    + (', 10 steps in a row' if tiny else ''),
    ours='ours.train:TrainStep', peer='peers.train:step', peer_name=_PEERS[system],
    variants=_FORMS[system],
    settings={'system': system, 'size': size, 'rows': rows, 'text': text, 'picture': picture},
    target=1.0 if tiny else {'avx2': 1.0, 'avx512': 1.1},
    memory_target=None if tiny else 1.1, rounds=15 if tiny else 7, calls=10 if tiny else 1,
    group='train_step', bound=not tiny)


CASES = [
  _case('mc_llava', 'tiny', 120, 8, 48), _case('mc_llava', '100m', 448, 2, 128),
  _case('pheye', 'tiny', 120, 8, 48), _case('pheye', '100m', 448, 2, 128),
  _case('llava_hr', 'tiny', 256, 8, 48), _case('llava_hr', '100m', 512, 2, 128),
  _case('ps3', 'tiny', 160, 4, 0), _case('ps3', '100m', 896, 2, 0),
]
