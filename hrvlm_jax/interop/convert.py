"""Original weights -> checkpoint; complete or refused. The way back is `vlm.export`."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping
import dataclasses
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np

from hrvlm_jax import __version__
from hrvlm_jax.checkpoint import files as store_files, folders, hf, settings, store
from hrvlm_jax.checkpoint.rows import entries, find_problems, import_tensors, joined, widened
from hrvlm_jax.checkpoint.safetensors import dtype_name
from hrvlm_jax.core import paths
from hrvlm_jax.core.config import to_dict
from hrvlm_jax.core.errors import UserError, raise_all, shortened
from hrvlm_jax.core.module import Functional
from hrvlm_jax.interop import account, adapters, folder as transformers_folder, hub, layouts, native
from hrvlm_jax.interop.account import Told, config_keys
from hrvlm_jax.interop.export import TEXT_FOLDER
from hrvlm_jax.language.config import config_from_hf
from hrvlm_jax.language.generation import FILE as GENERATION_FILE, read_generation
from hrvlm_jax.language.tokenizer import FILES as TOKENIZER_FILES, load_tokenizer
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.contract import HOUSE, ModelConfig
from hrvlm_jax.vlm import model as vlm
from hrvlm_jax.vlm.answer import text_of


def recognise(folder: str | os.PathLike, told: Told | None = None) -> ModelConfig:
  """The model of a released folder, by its config.json alone.

  Args:
    told: gets what became of every key.

  Raises:
    UserError: no config.json, none of our systems' layouts, settings that are not here.
  """
  path = pathlib.Path(folder) / 'config.json'
  if not path.exists():
    raise UserError(f'{folder}: no config.json; expected the folder of a released model')
  values = hf.read_json(path)
  if (config := transformers_folder.recognise(values)) is not None:
    found = settings.account(values, transformers_folder.KEYS)
    raise_all(str(path), [*found.problems, *transformers_folder.contradictions(values, config)])
    if told is not None:
      told.add('config.json', found)
    return config
  if (config := layouts.recognise(values)) is not None:
    found = settings.account(values, HOUSE)
    raise_all(str(path), found.problems)
    if told is not None:
      told.add('config.json', found)
    return config
  for name in registry.names():
    system, problems = registry.get(name), []
    try:
      config = system.from_release(values)
    except UserError as error:
      config, problems = None, [str(error)]
    if config is None and not problems:
      continue
    found = config_keys(values, system, config)
    raise_all(str(path), problems + found.problems)
    if told is not None:
      told.add('config.json', found)
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
    parts: sub-folders with tensors; none in layouts of ours, whatever the system's own layout is.
    native: the folder is of a class of transformers (see `interop.native`).
    told: what became of every key and every file.

  Raises:
    UserError: no layout of ours, no weights, an adapter that is not plain LoRA, keys or files that
      nothing here reads.
  """

  def __init__(self, folder: str | os.PathLike, *, adapter: str | os.PathLike | None = None):
    self.folder = pathlib.Path(folder)
    self.told = Told()
    self.config = recognise(self.folder, self.told)
    system = registry.get(self.config.system)
    values = hf.read_json(self.folder / 'config.json')
    ours, own = values.get('layout') == transformers_folder.LAYOUT, layouts.is_own(values)
    parts = self.parts = () if ours or own else system.folders
    self.tensors: Mapping[str, np.ndarray] = (
      folders.open_folders(self.folder, parts) if parts
      else hf.TensorFolder(self.folder, strict=False))
    self.native = ours and native.is_native(values)
    if self.native:
      self.tensors, self.table = native.renamed(self.tensors), native.table(self.config)
    else:
      self.table = (transformers_folder.table(self.config) if ours else
                    layouts.table(self.config, own=own))
    self.files = [self.folder / 'config.json', *self.tensors.files]
    text = self.folder / TEXT_FOLDER if TEXT_FOLDER in parts else self.folder
    self.tokenizer = {name: text / name for name in TOKENIZER_FILES if (text / name).is_file()}
    account.folder(self.told, self.folder, folders=parts, config=self.config, read=self.files,
                   tokenizer=self.tokenizer.values(), own=_nested(system))
    adapter = self.folder / adapters.FOLDER if adapter is None else pathlib.Path(adapter)
    if adapter != self.folder / adapters.FOLDER or adapter.is_dir():
      self._add(adapter, parts)
    self.told.problems += _text_folder(self.folder, self.config, parts)
    raise_all(f'folder {self.folder}', self.told.problems)
    self._check_tokenizer(text)

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

  def _add(self, adapter: pathlib.Path, parts: tuple[str, ...]) -> None:
    """Joins an adapter's tensors, named `adapter/...`, and its set to the model; what was trained
    beside the set (LLaVA's projector) takes the place of the base's tensors."""
    if self.config.text is None:
      raise UserError(f'{adapter}: {self.config.system} has no language model to adapt')
    plain, name = self.config, adapter.name
    self.config = adapters.with_set(plain, adapters.read_adapter_config(adapter, self.told))
    part = adapters.open_adapter(adapter)
    prefix = f'{adapters.FOLDER}/'
    base = native.modules(self.table) if self.native else self.table
    rows = adapters.adapter_table(base, vlm.build(self.config).abstract, theirs=prefix,
                                  dotted=bool(parts))
    problems = adapters.halves(adapter, part, base, plain.text.depth, dotted=bool(parts))
    beside = adapters.open_beside(adapter, self.tensors, problems)
    if beside is not None:
      self.told.lines.append(f'{name}/{adapters.BESIDE}: takes the place of '
                             f'{shortened(sorted(beside))}')
      self.tensors = folders.Over(self.tensors, beside)
    if (adapter / 'config.json').is_file():
      problems += _other_settings(adapter, plain)
    self.told.problems += [f'{name}/{problem}' for problem in problems]
    self.tensors = folders.Joined({'': self.tensors, prefix: part})
    self.table = joined(self.table, rows)
    own = [adapter / adapters.CONFIG, *part.files, *([] if beside is None else beside.files)]
    self.files += own
    account.folder(self.told, adapter, folders=(), config=plain, read=own, tokenizer=(), own={})

  def _check_tokenizer(self, folder: pathlib.Path) -> None:
    """Refuses a tokenizer that lacks the tokens with which an answer of this model ends."""
    if self.config.text is None or not set(self.tokenizer) - {GENERATION_FILE}:
      return
    text_of(self.config, load_tokenizer(folder)).stop_ids()

  def tokenizer_files(self) -> dict[str, bytes]:
    """The tokenizer's files; the end tokens of config.json where no file of their own has them."""
    files = {name: path.read_bytes() for name, path in self.tokenizer.items()}
    if not set(files) - {GENERATION_FILE}:
      return {}  # the tokenizer is kept elsewhere
    values = hf.read_json(self.folder / 'config.json')
    inner = values.get('text_config') or values.get('llm_cfg') or values
    ends = inner.get('eos_token_id') if isinstance(inner, Mapping) else None
    if GENERATION_FILE not in files and ends is not None:
      read_generation({'eos_token_id': ends}, where='config.json')
      files[GENERATION_FILE] = json.dumps({'eos_token_id': ends}).encode()
    return files


def _nested(system: Any) -> dict[str, Any]:
  """Tables of the config.json of sub-folders: those of the settings that stand in the whole's."""
  tables = {name: table for name, table in system.keys.items() if isinstance(table, Mapping)}
  return {f'{folder}/config.json': tables[key] for folder, key in (
    ('llm', 'llm_cfg'), ('vision_tower', 'vision_tower_cfg'), ('mm_projector', 'mm_projector_cfg'))
    if folder in system.folders and key in tables}


def _text_folder(folder: pathlib.Path, config: ModelConfig, parts: tuple[str, ...]) -> list[str]:
  """Settings of a language model in a folder of its own that are not those of config.json."""
  path = folder / TEXT_FOLDER / 'config.json'
  if TEXT_FOLDER not in parts or not path.is_file():
    return []
  try:
    other = config_from_hf(hf.read_json(path), where=f'{TEXT_FOLDER}/config.json')
  except UserError as error:
    return [str(error)]
  # How the vocabulary lies on devices is no setting of a release.
  plain = dataclasses.replace(config.text, lora=(), pad_vocab_to=other.pad_vocab_to)
  return [f'{TEXT_FOLDER}/config.json: {line}' for line in differing(to_dict(other), to_dict(plain),
                                                                      'config.json')]


def _other_settings(adapter: pathlib.Path, config: ModelConfig) -> list[str]:
  """Settings in the config.json of an adapter folder that are not those of the base."""
  try:
    other = recognise(adapter)
  except UserError as error:
    return [f'config.json: {error}']
  return [f'config.json: {line}' for line in differing(to_dict(other), to_dict(config), 'the base')]


def differing(theirs: Mapping[str, Any], ours: Mapping[str, Any], whose: str) -> list[str]:
  """A sentence per setting of two models that differ."""
  theirs, ours = paths.flatten(theirs), paths.flatten(ours)
  return [f'{key} is {theirs.get(key)!r}, {whose} has {ours.get(key)!r}'
          for key in sorted(theirs.keys() | ours.keys()) if theirs.get(key) != ours.get(key)]


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
    say: told what became of every key and file, and about parameters that no tensor gives and
      that start fresh.

  Raises:
    UserError: unknown layout; every damaged, missing, unexpected, misshapen or non-finite tensor
      in one message; disk full; no permission.
  """
  folder, origin = hub.resolve(source, revision=revision)
  release = Release(folder, adapter=adapter)
  config = release.config
  for line in release.told.lines:
    say(line)
  # Stacked leaves are assembled on the target's disk: the model may be larger than memory.
  with store_files.scratch_arrays(pathlib.Path(target).absolute().parent) as allocate:
    params, fresh = release.params(dtype=dtype, say=say, allocate=allocate)
    facts = {'origin': origin} | source_facts(
      release, vlm.build(config).abstract, fresh)
    facts['account'] = release.told.lines
    extra: dict[str, str | bytes] = {
      f'tokenizer/{name}': data for name, data in release.tokenizer_files().items()}
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
