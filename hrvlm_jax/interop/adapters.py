"""LoRA sets on the way out and in: merged into the kernels, or as an adapter folder of peft.

An adapter folder (huggingface/peft: `adapter_config.json`, `adapter_model.safetensors`) names its
tensors `base_model.model.<module>.lora_A.weight` [r, in] and `lora_B.weight` [out, r]. Only sets
without a name are meant here: they act at every call, so that they can be merged. Pheye's two named
sets act on different views of one tower and are part of its own layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import json
import pathlib
import re
from typing import Any

import numpy as np

from hrvlm_jax.checkpoint.folders import Renamed
from hrvlm_jax.checkpoint.formats import ADAPTER
from hrvlm_jax.checkpoint.hf import TensorFolder, read_json
from hrvlm_jax.checkpoint.rows import Row, Table, conv1x1, conv_kernel, transpose
from hrvlm_jax.checkpoint.settings import Reader, account
from hrvlm_jax.core import paths
from hrvlm_jax.core.errors import UserError, raise_all, shortened
from hrvlm_jax.core.layers import LoRA
from hrvlm_jax.interop.account import Told
from hrvlm_jax.systems.contract import ModelConfig

FOLDER = 'adapter'  # beside the weights of a released folder
CONFIG, WEIGHTS = 'adapter_config.json', 'adapter_model'
BESIDE = 'non_lora_trainables.bin'  # LLaVA's trainer: the projector and others, whole
_PREFIX = 'base_model.model.'
_LEAVES = ('lora_a', 'lora_b')

Read = Callable[[str, int | None], np.ndarray]


def lora_sets(config: ModelConfig) -> dict[str, tuple[LoRA, ...]]:
  """All LoRA sets of a model by the prefix of the paths they act below."""
  found = {'language/': () if config.text is None else config.text.lora}
  vision: tuple[LoRA, ...] = ()
  for field in dataclasses.fields(config.encoder):
    value = getattr(config.encoder, field.name)
    if isinstance(value, LoRA):
      vision += (value,)
    vision += tuple(getattr(value, 'lora', ()))
  return {prefix: sets for prefix, sets in (found | {'vision/': vision}).items() if sets}


def without_sets(config: ModelConfig) -> ModelConfig:
  """The model after its sets were merged."""
  text = None if config.text is None else dataclasses.replace(config.text, lora=())
  changes = {}
  for field in dataclasses.fields(config.encoder):
    value = getattr(config.encoder, field.name)
    if getattr(value, 'lora', ()):
      changes[field.name] = dataclasses.replace(value, lora=())
  return dataclasses.replace(
    config, text=text, encoder=dataclasses.replace(config.encoder, **changes))


def with_set(config: ModelConfig, spec: LoRA) -> ModelConfig:
  """The model with one LoRA set on its language model."""
  return dataclasses.replace(config, text=dataclasses.replace(config.text, lora=(spec,)))


def mergeable(config: ModelConfig, *, what: str) -> dict[str, LoRA]:
  """The one set to merge below each prefix.

  Raises:
    UserError: no set at all, or named sets.
  """
  sets = lora_sets(config)
  if not sets:
    raise UserError(f'{what}: the model has no LoRA sets; leave --merge-lora out')
  named = sorted({spec.name for group in sets.values() for spec in group if spec.name})
  if named:
    raise UserError(f'{what}: the LoRA sets {", ".join(named)} act on different views of the same '
                    f'kernels and cannot be merged into one; leave --merge-lora out (the '
                    f'layout of {config.system} holds them apart)')
  return {prefix: group[0] for prefix, group in sets.items()}


def merged_reader(read: Read, flat: Mapping[str, Any], sets: Mapping[str, LoRA]) -> Read:
  """Reads kernels with their set added: kernel + scale * a @ b, in float32, cast back.

  Args:
    read: (path, layer or None) -> array.
    flat: the parameters there are, by path.
    sets: path prefix -> set, see `mergeable`.
  """
  def reader(path: str, layer: int | None = None) -> np.ndarray:
    value = read(path, layer)
    folder, _, leaf = path.rpartition('/')
    low, high = (f'{folder}/{name}' for name in _LEAVES)
    if leaf != 'kernel' or low not in flat:
      return value
    spec = next(spec for prefix, spec in sets.items() if path.startswith(prefix))
    a, b = (np.asarray(read(p, layer), np.float32) for p in (low, high))
    delta = (a @ b) * np.float32(spec.scale)
    return (value.astype(np.float32) + delta.reshape(value.shape)).astype(value.dtype)

  return reader


def is_adapter(path: str) -> bool:
  """Whether a parameter belongs to a set without a name."""
  return path.rpartition('/')[2] in _LEAVES


def adapter_table(base: Table, abstract: Mapping[str, Any], *, theirs: str = '',
                  dotted: bool = False) -> Table:
  """Rows of an adapter folder, all optional (an adapter may leave modules out).

  Args:
    base: table of the model without its sets.
    abstract: parameters of the model with them.
    theirs: put in front of every name.
    dotted: the model's names are those of sub-folders (`llm/model.layers...`); its adapter names
      the modules of the joined model (`llm.model.layers...`).
  """
  flat = paths.flatten(abstract)
  rows = []
  for row in base.rows:
    if not isinstance(row.ours, str) or not row.ours.endswith('/kernel'):
      continue
    folder, module = row.ours.rpartition('/')[0], row.names[0].removesuffix('.weight')
    module = module.replace('/', '.') if dotted else module
    down, up = (conv_kernel, conv1x1) if row.op is conv_kernel else (transpose, transpose)
    for leaf, name, op in zip(_LEAVES, ('lora_A', 'lora_B'), (down, up), strict=True):
      if f'{folder}/{leaf}' in flat:
        rows.append(Row(f'{folder}/{leaf}', f'{theirs}{_PREFIX}{module}.{name}.weight', op,
                        indices=row.indices, optional=True))
  return Table(tuple(rows))


def adapter_config(spec: LoRA, names: list[str], base: str) -> dict[str, Any]:
  """`adapter_config.json` of a set.

  Args:
    names: tensor names of the adapter.
    base: name of the model that it belongs to.
  """
  modules = sorted({name.removeprefix(_PREFIX).rsplit('.lora_', 1)[0] for name in names})
  return {'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'base_model_name_or_path': base,
          'r': spec.rank, 'lora_alpha': spec.alpha, 'lora_dropout': spec.dropout, 'bias': 'none',
          'target_modules': modules, 'inference_mode': True, 'fan_in_fan_out': False}


def read_adapter_config(folder: pathlib.Path, told: Told | None = None) -> LoRA:
  """The set that an adapter folder describes.

  Args:
    told: gets what became of every key.

  Raises:
    UserError: no `adapter_config.json`, or a kind of adapter that is not plain LoRA (all reasons).
  """
  values = read_json(folder / CONFIG)
  # Every version of peft has more options; it writes them all, those that are off as null.
  found = account(values, ADAPTER, unset='null: an option that is off')
  problems = list(found.problems)
  if values.get('peft_type') != 'LORA':
    problems.append(f"peft_type is {values.get('peft_type')!r}, expected 'LORA'")
  for key, plain in (('bias', 'none'), ('use_dora', False), ('use_rslora', False),
                     ('fan_in_fan_out', False), ('rank_pattern', {}), ('alpha_pattern', {}),
                     ('modules_to_save', None)):
    if values.get(key) not in (plain, None):
      problems.append(f'{key} is {json.dumps(values[key])}, expected {json.dumps(plain)}')
  read = Reader(values, problems=problems)
  rank = values.get('r')
  if not isinstance(rank, int) or isinstance(rank, bool) or not 0 < rank < 1 << 16:
    problems.append(f'r is {rank!r}, expected a positive integer')
  alpha = values.get('lora_alpha')
  if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not abs(alpha) < 1e9:
    problems.append(f'lora_alpha is {alpha!r}, expected a number')
  dropout = read.number('lora_dropout', 0.0, null=True)
  raise_all(str(folder / CONFIG), problems)
  if told is not None:
    told.add(f'{folder.name}/{CONFIG}', found)
  return read.build(lambda: LoRA(rank=rank, alpha=float(alpha), dropout=dropout))


def open_adapter(folder: pathlib.Path) -> TensorFolder:
  """The tensors of an adapter folder, without what LLaVA keeps beside them."""
  for name in (f'{WEIGHTS}.safetensors', f'{WEIGHTS}.bin'):
    if (folder / name).is_file():
      return TensorFolder(folder / name, strict=False)
  return TensorFolder(folder, strict=False)


def open_beside(folder: pathlib.Path, base: Any, problems: list[str]) -> Renamed | None:
  """What LLaVA's LoRA training keeps beside the adapter: other parts that it trained, whole.

  Source: `haotian-liu/LLaVA: llava/model/builder.py` (`non_lora_trainables`).

  Args:
    base: tensors of the base, whose names the parts have once the trainer's wrappers are off.
    problems: gets names that the base does not have.

  Returns:
    The tensors by the base's names; None where there is no such file.
  """
  path = folder / BESIDE
  if not path.is_file():
    return None
  try:
    tensors = TensorFolder(path)
  except UserError as error:
    problems.append(str(error))
    return None
  known = {name.replace('/', '.'): name for name in base}
  names = {}
  for name in tensors:
    short = name
    while short not in known and short.startswith(('base_model.', 'model.', 'module.')):
      short = short.partition('.')[2]
    if short in known:
      names[known[short]] = name
    else:
      problems.append(f'{BESIDE}: {name}: the base has no tensor of this name')
  return Renamed(tensors, names)


def halves(folder: pathlib.Path, tensors: Any, base: Table, depth: int, *, dotted: bool
           ) -> list[str]:
  """What an adapter lacks: one of two tensors of a module, modules that it says it adapts.

  Args:
    base: table of the model without its sets.
    depth: layers of the language model.
  """
  if tensors.problems:
    return []  # what a damaged file lacks is said there
  found: dict[str, set[str]] = {}
  for name in tensors:
    module, mark, rest = name.removeprefix(_PREFIX).rpartition('.lora_')
    if mark:
      found.setdefault(module, set()).add(rest.partition('.')[0])
  problems = [f'{WEIGHTS}: {module}: has lora_{"".join(sides)} alone, expected lora_A and lora_B'
              for module, sides in sorted(found.items()) if len(sides) == 1]
  targets = read_json(folder / CONFIG).get('target_modules')
  fits = _target(targets)
  if fits is None:
    return [*problems, f'{CONFIG}: target_modules is {targets!r}, expected a list of names or a '
                       'regular expression']
  missing = []
  for row in base.rows:
    if not isinstance(row.ours, str) or not row.ours.endswith('/kernel') or (
        not row.ours.startswith('language/')):
      continue
    name = row.names[0].removesuffix('.weight')
    name = name.replace('/', '.') if dotted else name
    places = (row.indices or range(depth)) if '{i}' in name else (0,)
    missing += [module for module in (name.replace('{i}', str(i)) for i in places)
                if module not in found and fits(module)]
  if missing:
    problems.append(f'{WEIGHTS}: has no tensors of {shortened(missing)}, which target_modules of '
                    f'{CONFIG} names')
  return problems


def _target(targets: Any) -> Callable[[str], bool] | None:
  """Whether peft adapts a module, by its name; None for something that names none."""
  if targets is None:
    return lambda module: False
  if targets == 'all-linear':
    return lambda module: not module.endswith('lm_head')
  if isinstance(targets, str):
    try:
      pattern = re.compile(targets)
    except (re.error, RecursionError, OverflowError):
      return None
    return lambda module: pattern.fullmatch(module) is not None
  if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
    return None
  return lambda module: any(module == name or module.endswith(f'.{name}') for name in targets)
