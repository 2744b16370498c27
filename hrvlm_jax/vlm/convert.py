"""Original weights -> checkpoint, checkpoint -> the original's layout; complete or refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
import json
import os
import pathlib
from typing import Any

import numpy as np

from hrvlm_jax.checkpoint import hf, store
from hrvlm_jax.checkpoint.rows import Table, export_tensors, import_tensors
from hrvlm_jax.core import paths
from hrvlm_jax.core.config import to_dict
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.language.tokenizer import FILES as TOKENIZER_FILES
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.vlm import model as vlm
from hrvlm_jax.vlm.answer import find_tokenizer, model_config


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
  tensors = hf.TensorFolder(source)
  table = registry.get(config.system).table(config)
  params = import_tensors(tensors, table, vlm.build(config).abstract, what=f'folder {source}',
                          dtype=dtype)
  files = {f'tokenizer/{name}': (source / name).read_bytes()
           for name in TOKENIZER_FILES if (source / name).exists()}
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
  files |= find_tokenizer(checkpoint).files
  files['README.md'] = model_card(config, table)
  settings = json.loads(files.pop('config.json'))
  hf.write_folder(target, _cast(export_tensors(params, table), dtype), config=settings,
                  extra_files=files, manifest=manifest(config, table, checkpoint))


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
