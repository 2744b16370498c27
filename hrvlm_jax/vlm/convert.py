"""Original weights -> checkpoint, checkpoint -> the original's layout; complete or refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
import itertools
import json
import os
import pathlib
from typing import Any

import numpy as np

from hrvlm_jax.checkpoint import files as store_files, hf, store
from hrvlm_jax.checkpoint.rows import Table, export_tensors, import_tensors
from hrvlm_jax.core import paths
from hrvlm_jax.core.config import to_dict
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.language.tokenizer import FILES as TOKENIZER_FILES
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.vlm import model as vlm
from hrvlm_jax.vlm.answer import find_tokenizer, model_config

TEXT_FOLDER = 'llm'  # holds the tokenizer in layouts of several folders


def recognise(folder: str | os.PathLike) -> ModelConfig:
  """The model of a released folder, by its config.json alone.

  Raises:
    UserError: no config.json, or none of our systems' layouts.
  """
  path = pathlib.Path(folder) / 'config.json'
  if not path.exists():
    raise UserError(f'{folder}: no config.json; expected the folder of a released model')
  try:
    values = json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:
    raise UserError(f'{path}: not valid JSON ({error})') from error
  for name in registry.names():
    if (config := registry.get(name).from_release(values)) is not None:
      return config
  raise UserError(f'{path}: model_type {values.get("model_type")!r} and its settings fit none of '
                  f'the systems {registry.names()}')


def convert(source: str | os.PathLike, target: str | os.PathLike, *, dtype=None) -> ModelConfig:
  """A released folder -> a checkpoint of ours; nothing is written unless all tensors fit.

  Args:
    dtype: of the stored parameters; default: that of the file, tensor by tensor.

  Raises:
    UserError: unknown layout; every missing, unexpected or misshapen tensor in one message.
  """
  source = pathlib.Path(source)
  config = recognise(source)
  system = registry.get(config.system)
  tensors = Folders(source, system.folders) if system.folders else hf.TensorFolder(source)
  table = system.table(config)
  text = source / TEXT_FOLDER if TEXT_FOLDER in system.folders else source
  files = {f'tokenizer/{name}': (text / name).read_bytes()
           for name in TOKENIZER_FILES if (text / name).exists()}
  # Stacked leaves are assembled on the target's disk: the model may be larger than memory.
  with store_files.scratch_arrays(pathlib.Path(target).absolute().parent) as allocate:
    params = import_tensors(tensors, table, vlm.build(config).abstract, what=f'folder {source}',
                            dtype=dtype, allocate=allocate, finite=True)
    store.save_params(target, params, {'model': to_dict(config)}, extra_files=files)
  return config


def export(checkpoint: str | os.PathLike, target: str | os.PathLike, *, dtype=None) -> None:
  """A checkpoint -> a folder in the original's layout, with tokenizer, manifest and model card.

  Args:
    dtype: of the written tensors; default: as stored.

  Raises:
    UserError: no checkpoint, tensors that do not fit its config, no tokenizer, target not empty.
  """
  config = model_config(checkpoint)
  system = registry.get(config.system)
  params = store.load_params(checkpoint, vlm.build(config).abstract)
  table = system.table(config)
  files = {name: json.dumps(value, indent=2) + '\n'
           for name, value in system.to_release(config).items()}
  place = f'{TEXT_FOLDER}/' if TEXT_FOLDER in system.folders else ''
  files |= {f'{place}{name}': data for name, data in find_tokenizer(checkpoint).files.items()}
  files['README.md'] = model_card(config, table)
  settings = json.loads(files.pop('config.json'))
  if system.folders:
    tensors = _cast(export_tensors(params, table), dtype)
    return _write_folders(target, tensors, system.folders, {'config.json': settings, **files},
                          manifest(config, table, checkpoint))
  hf.write_folder(target, _cast(export_tensors(params, table), dtype), config=settings,
                  extra_files=files, manifest=manifest(config, table, checkpoint))


class Folders(Mapping):
  """The tensors of several sub-folders, named `folder/name`, read only when asked for.

  Attributes:
    shapes: by name, known without reading a tensor.

  Raises:
    UserError: a sub-folder is missing or holds no weights.
  """

  def __init__(self, source: pathlib.Path, folders: Sequence[str]):
    self._parts = {name: hf.TensorFolder(source / name) for name in folders}
    self.shapes = {f'{folder}/{name}': shape for folder, part in self._parts.items()
                   for name, shape in part.shapes.items()}

  def __getitem__(self, name: str) -> np.ndarray:
    folder, _, rest = name.partition('/')
    return self._parts[folder][rest]

  def __iter__(self):
    return iter(self.shapes)

  def __len__(self) -> int:
    return len(self.shapes)


def _write_folders(target, tensors, folders: Sequence[str], extra: Mapping[str, Any],
                   facts: Mapping[str, Any]) -> None:
  """Writes weights of several sub-folders, then all other files, whole or not at all.

  `tensors` come folder by folder, so that only one is in memory.
  """
  with store_files.staged_folder(target) as stage:
    for folder, group in itertools.groupby(tensors, lambda item: item[0].partition('/')[0]):
      if folder not in folders:
        raise ValueError(f'tensor folder {folder!r} is none of {tuple(folders)}')
      (stage / folder).mkdir()
      hf.write_weights(stage / folder, ((name.partition('/')[2], x) for name, x in group))
    hf.write_extra(stage, extra)
    hf.write_manifest(stage, facts)


def _cast(tensors: Iterable[tuple[str, np.ndarray]], dtype) -> Iterable[tuple[str, np.ndarray]]:
  for name, array in tensors:
    yield name, array if dtype is None else array.astype(dtype)


def manifest(config: ModelConfig, table: Table, source: str | os.PathLike) -> dict[str, Any]:
  """Where the tensors came from, and which are tied, unused or left out."""
  return {
    'system': config.system,
    'source': pathlib.Path(source).name,
    'unused': dict(table.unused),
    'ignored': dict(table.ignored),
    'aliases': [row.names for row in table.rows if len(row.names) > 1],
  }


def model_card(config: ModelConfig, table: Table) -> str:
  """README.md of an exported folder."""
  unused = ''.join(f'- `{pattern}`: {reason}\n' for pattern, reason in table.unused.items())
  return (
    f'# {config.system}\n\n'
    f'Exported by hrvlm_jax: system `{config.system}`, language model family '
    f'`{config.text.family}` ({config.text.depth} layers, width {config.text.width}).\n\n'
    'The licences of the language model and of the vision tower this model started from apply to '
    'its weights.\n\n'
    + (f'Parameters kept for completeness:\n\n{unused}' if unused else ''))


def parameter_table(params: Mapping[str, Any]) -> list[tuple[str, tuple[int, ...], str]]:
  """(path, shape, dtype) of every parameter, in the order of the tree."""
  return [(path, tuple(leaf.shape), str(leaf.dtype))
          for path, leaf in paths.flatten(params).items()]
