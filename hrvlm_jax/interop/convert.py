"""Original weights -> checkpoint; complete or refused. The way back is `vlm.export`."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np

from hrvlm_jax import __version__
from hrvlm_jax.checkpoint import files as store_files, folders, hf, store
from hrvlm_jax.checkpoint.rows import entries, find_problems, import_tensors, joined, widened
from hrvlm_jax.checkpoint.safetensors import dtype_name
from hrvlm_jax.core import paths
from hrvlm_jax.core.config import to_dict
from hrvlm_jax.core.errors import UserError, shortened
from hrvlm_jax.core.module import Functional
from hrvlm_jax.interop import adapters, folder as transformers_folder, hub, layouts
from hrvlm_jax.interop.export import TEXT_FOLDER
from hrvlm_jax.language.tokenizer import FILES as TOKENIZER_FILES
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.vlm import model as vlm


def recognise(folder: str | os.PathLike) -> ModelConfig:
  """The model of a released folder, by its config.json alone.

  Raises:
    UserError: no config.json, or none of our systems' layouts.
  """
  path = pathlib.Path(folder) / 'config.json'
  if not path.exists():
    raise UserError(f'{folder}: no config.json; expected the folder of a released model')
  values = hf.read_json(path)
  if (config := transformers_folder.recognise(values)) is not None:
    return config
  if (config := layouts.recognise(values)) is not None:
    return config
  for name in registry.names():
    if (config := registry.get(name).from_release(values)) is not None:
      return config
  raise UserError(f'{path}: model_type {values.get("model_type")!r} and its settings fit none of '
                  f'the systems {registry.names()}')


class Release:
  """A released folder: its model, its tensors and the table between the two.

  Args:
    adapter: an adapter folder of peft for the language model; default: the sub-folder `adapter`,
      which export writes.

  Attributes:
    config, table: of the whole model, the LoRA set of an adapter included.
    tensors: name -> array, read when asked for; sub-folders are part of the names.
    files: weight files and config.json.

  Raises:
    UserError: no layout of ours, no weights, an adapter that is not plain LoRA.
  """

  def __init__(self, folder: str | os.PathLike, *, adapter: str | os.PathLike | None = None):
    self.folder = pathlib.Path(folder)
    self.config = recognise(self.folder)
    system = registry.get(self.config.system)
    values = hf.read_json(self.folder / 'config.json')
    ours, own = values.get('layout') == transformers_folder.LAYOUT, layouts.is_own(values)
    parts = () if ours or own else system.folders
    self.tensors: Mapping[str, np.ndarray] = (
      folders.open_folders(self.folder, parts) if parts
      else hf.TensorFolder(self.folder, strict=False))
    self.table = (transformers_folder.table(self.config) if ours else
                  layouts.table(self.config, own=own))
    self.files = [self.folder / 'config.json', *self.tensors.files]
    adapter = self.folder / adapters.FOLDER if adapter is None else pathlib.Path(adapter)
    if adapter != self.folder / adapters.FOLDER or adapter.is_dir():
      self._add(adapter, dotted=bool(parts))
    text = self.folder / TEXT_FOLDER if TEXT_FOLDER in parts else self.folder
    self.tokenizer = {name: text / name for name in TOKENIZER_FILES if (text / name).exists()}

  def params(self, *, dtype=None, say: Callable[[str], None] = lambda text: None,
             allocate: Callable[..., np.ndarray] = np.empty) -> tuple[dict[str, Any], list[str]]:
    """(parameters of `vlm.build(self.config)`, the paths that no tensor gives and that start
    fresh); arguments as of `convert` and `rows.import_tensors`.

    Raises:
      UserError: every damaged, missing, unexpected, misshapen or non-finite tensor.
    """
    fn = vlm.build(self.config)
    flat = paths.flatten(import_tensors(
      self.tensors, self.table, fn.abstract, what=f'folder {self.folder}', dtype=dtype,
      allocate=allocate, finite=True))
    fresh = [path for path in paths.flatten(fn.abstract) if path not in flat]
    if fresh:
      say(f'{len(fresh)} parameters are in no file and start fresh: {shortened(fresh)}')
      flat |= fresh_leaves(fn, fresh, dtype=dtype)
    return paths.unflatten({path: flat[path] for path in paths.flatten(fn.abstract)}), fresh

  def _add(self, adapter: pathlib.Path, *, dotted: bool) -> None:
    """Joins an adapter's tensors, named `adapter/...`, and its set to the model."""
    if self.config.text is None:
      raise UserError(f'{adapter}: {self.config.system} has no language model to adapt')
    self.config = adapters.with_set(self.config, adapters.read_adapter_config(adapter))
    part = hf.TensorFolder(adapter, strict=False)
    prefix = f'{adapters.FOLDER}/'
    rows = adapters.adapter_table(self.table, vlm.build(self.config).abstract, theirs=prefix,
                                  dotted=dotted)
    self.tensors = folders.Joined({'': self.tensors, prefix: part})
    self.table = joined(self.table, rows)
    self.files += [adapter / adapters.CONFIG, *part.files]


def convert(
  source: str | os.PathLike, target: str | os.PathLike, *, dtype=None,
  revision: str | None = None, adapter: str | os.PathLike | None = None,
  say: Callable[[str], None] = lambda text: None,
) -> ModelConfig:
  """A released folder -> a checkpoint of ours; nothing is written unless all tensors fit.

  Args:
    source: a folder, or a name on the Hugging Face hub with its commit (see `checkpoint.hub`).
    dtype: of the stored parameters; default: that of the file, tensor by tensor.
    adapter: an adapter folder of peft for the language model, kept as a LoRA set of its own.
    say: told about parameters that no tensor gives and that start fresh.

  Raises:
    UserError: unknown layout; every damaged, missing, unexpected, misshapen or non-finite tensor
      in one message; disk full; no permission.
  """
  folder, origin = hub.resolve(source, revision=revision)
  release = Release(folder, adapter=adapter)
  config = release.config
  # Stacked leaves are assembled on the target's disk: the model may be larger than memory.
  with store_files.scratch_arrays(pathlib.Path(target).absolute().parent) as allocate:
    params, fresh = release.params(dtype=dtype, say=say, allocate=allocate)
    facts = {'origin': origin} | source_facts(
      release, vlm.build(config).abstract, fresh)
    extra: dict[str, str | bytes] = {
      f'tokenizer/{name}': path.read_bytes() for name, path in release.tokenizer.items()}
    extra[hub.SOURCE] = json.dumps(facts, indent=2) + '\n'
    store.save_params(target, params, {'model': to_dict(config)}, extra_files=extra)
  return config


def source_facts(release: Release, abstract: Mapping[str, Any], fresh: list[str]) -> dict[str, Any]:
  """What a checkpoint was made from: checksums, table version, dtypes, what was left out."""
  tensors, table = release.tensors, release.table
  present, _ = find_problems(table, abstract, tensors.shapes)
  described = store_files.describe(release.files, release.folder)
  missing = [name for entry in entries(table, abstract) for name in entry.names
             if not any(alias in tensors.shapes for alias in entry.names)]
  return {
    'sha256': store_files.digest(described), 'files': described,
    'table': table.fingerprint(), 'hrvlm_jax': __version__,
    'dtype': dict(collections.Counter(dtype_name(kind) for kind in tensors.dtypes.values())),
    'widened': {name: kind.name for name, kind in widened(present, tensors.dtypes).items()},
    'missing': missing, 'fresh': fresh,
    'ignored': sorted(name for name in tensors.shapes if table.is_ignored(name))}


def fresh_leaves(fn: Functional, wanted: list[str], *, dtype=None, seed: int = 0
                 ) -> dict[str, np.ndarray]:
  """Some parameters as the model draws them, without making the others."""
  def draw(key: jax.Array) -> dict[str, jax.Array]:
    flat = paths.flatten(fn.init(key))
    return {path: flat[path] for path in wanted}

  drawn = jax.device_get(jax.jit(draw)(jax.random.key(seed)))
  return {path: x if dtype is None else x.astype(dtype) for path, x in drawn.items()}
