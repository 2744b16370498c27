"""The golden texts of the published recipes: what each resolves to, and its table of parameters.

  python -m tests.configs.golden            names the texts that differ
  python -m tests.configs.golden --write    writes them anew; look at `git diff` before committing

A text holds every key of the resolved config, then every parameter with its shape, type, count,
group and cut (the axes of the recipe's mesh, on the devices of the stated hardware).
"""

import argparse
import difflib
import functools
import json
import pathlib
import sys

from hrvlm_jax.cli import params
from hrvlm_jax.core.config import to_dict
from hrvlm_jax.training import run_config
from hrvlm_jax.training.config import RunConfig

FOLDER = pathlib.Path(__file__).parent / 'golden'
CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'

# Recipe -> devices of its hardware.
RECIPES = {
  **{f'pheye:{variant},{stage}': 8 for variant in ('x2_448', 'x2_672', 'x4_448', 'x4_672')
     for stage in ('stage1', 'stage2', 'stage3')},
  'pheye:x4_448,stage1,code': 8, 'pheye:x2_672,stage2,v5e:4x4': 16,
  **{f'mc_llava:{stage},one_view': 8 for stage in ('full', 'lora', 'projector')},
  'mc_llava:full': 8, 'mc_llava:full,one_view,v5e:8x8': 64,
  **{f'llava_hr:{size},{stage}': 8 for size in ('7b', 'x_13b', '13b')
     for stage in ('stage1', 'stage2')},
  'llava_hr:7b,stage2,v5e:16x16': 256, 'llava_hr:7b,stage2,v5p:4x4x4': 64,
  'llava_hr:7b,stage2,v6e:16x16': 256, 'llava_hr:7b,stage2,2xv5e:16x16': 512,
  **{f'vila_hd:{size},{stage}': 64 for size in ('1_5k', '4k')
     for stage in ('align', 'tower', 'pretrain', 'sft')},
  'vila_hd:1_5k,sft,siglip2': 64, 'vila_hd:1_5k,sft,cradio_v2': 64,
  'vila_hd:4k,sft,v5e:16x16': 256, 'vila_hd:4k,sft,v5p:4x4x4': 64,
  'vila_hd:4k,sft,v6e:16x16': 256, 'vila_hd:4k,sft,2xv5e:16x16': 512,
  'ps3:1_5k': 128, 'ps3:4k': 128, 'ps3:1_5k,siglip2': 128, 'ps3:4k,cradio_v2_l': 128,
  'ps3:4k,script': 8, 'ps3:4k,v5e:16x16': 256,
}


def load(spec: str) -> RunConfig:
  """The run config of a recipe."""
  name, _, argument = spec.partition(':')
  return run_config.load(RunConfig, f'{CONFIGS / name}.py:{argument}')


def lines(values, prefix: str = '') -> list[str]:
  """`key.path = value` of every leaf of nested values."""
  if isinstance(values, dict) and values:
    return [line for key, value in values.items() for line in lines(value, f'{prefix}.{key}')]
  if isinstance(values, list) and any(isinstance(value, dict) for value in values):
    return [line for i, value in enumerate(values) for line in lines(value, f'{prefix}[{i}]')]
  return [f'{prefix[1:]} = {json.dumps(values)}']


@functools.cache
def text(spec: str) -> str:
  """The golden text of a recipe."""
  config = load(spec)
  leaves, notes = params.of_config(config, devices=RECIPES[spec])
  table = params.table(leaves, notes)
  rows = [*lines(json.loads(json.dumps(to_dict(config)))), '', f'on {RECIPES[spec]} devices:',
          *table]
  return '\n'.join(rows) + '\n'


def path_of(spec: str) -> pathlib.Path:
  """Where the golden text of a recipe is kept."""
  return FOLDER / f'{spec.translate(str.maketrans(":,", "__"))}.txt'


def difference(spec: str) -> str:
  """What differs from the kept text, as a unified diff; '' where nothing does."""
  path = path_of(spec)
  kept = path.read_text() if path.exists() else ''
  return ''.join(difflib.unified_diff(
    kept.splitlines(True), text(spec).splitlines(True), f'kept {path.name}', f'now {spec}', n=1))


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--write', action='store_true', help='write the texts that differ')
  write = parser.parse_args().write
  differ = [spec for spec in RECIPES if difference(spec)]
  if write:
    FOLDER.mkdir(exist_ok=True)
    for spec in differ:
      path_of(spec).write_text(text(spec))
    for path in set(FOLDER.glob('*.txt')) - {path_of(spec) for spec in RECIPES}:
      path.unlink()
      print(f'removed {path.name}')
  for spec in differ:
    print(f'{"wrote" if write else "differs:"} {path_of(spec).name}')
  return 0 if write or not differ else 1


if __name__ == '__main__':
  sys.exit(main())
