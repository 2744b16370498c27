"""A checkpoint -> a folder in the original's own layout, or one that transformers opens; one layer
at a time, all or nothing."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
import itertools
import os
import pathlib
from typing import Any
import warnings

import numpy as np

from hrvlm_jax import __version__
from hrvlm_jax.checkpoint import averages, files as store_files, hf, layout, store
from hrvlm_jax.checkpoint.leaves import StoredParams
from hrvlm_jax.checkpoint.rows import Table, entries, stream_tensors
from hrvlm_jax.checkpoint.safetensors import dtype_name
from hrvlm_jax.core import paths
from hrvlm_jax.core.errors import UserError, raise_all
from hrvlm_jax.interop import adapters, folder, layouts, native
from hrvlm_jax.interop.card import model_card, processor_files
from hrvlm_jax.interop.hub import SOURCE
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.vlm import model as vlm
from hrvlm_jax.vlm.answer import find_tokenizer, model_config

TEXT_FOLDER = 'llm'  # holds the tokenizer in layouts of several folders
LAYOUTS = ('original', folder.LAYOUT)

Tensors = Iterable[tuple[str, np.ndarray]]


def export(checkpoint: str | os.PathLike, target: str | os.PathLike, *, dtype=None,
           merge_lora: bool = False, layout: str = 'original',
           say: Callable[[str], None] = lambda text: None,
           weights: str | None = None) -> dict[str, Any]:
  """Writes weights, configs, tokenizer, processors, model card and manifest of a checkpoint.

  LoRA sets of the language model are written as an adapter folder of peft beside the weights, or
  merged into them. Layers are read and written one at a time.

  Args:
    target: the folder to be made; absent or empty.
    dtype: of the written floating-point tensors; default: as stored, and for a converted
      checkpoint tensor by tensor that of its source.
    merge_lora: add the sets to the kernels they act on, in float32.
    layout: 'original', or 'transformers': with the class there is (`interop.native`), else with
      model code of ours (`interop.folder`). A model that the original's cannot hold is written in
      the house's own (`interop.layouts`).
    say: told about that, and about `weights`.
    weights: 'raw' or 'ema', see `checkpoint.averages.which`.

  Returns:
    The facts of the manifest, checksums left out.

  Raises:
    UserError: no checkpoint, tensors that do not fit its config or do not fit in `dtype`, no
      tokenizer, target not empty, LoRA sets that cannot be merged; a model without code for
      transformers.
  """
  if '://' in os.fspath(target):
    name = os.fspath(target).partition('://')[2].strip('/') or 'owner/name'
    raise UserError(f'{target}: is an address, and an export is a folder; export to a folder, then '
                    f'hrvlm push FOLDER {name}')
  if layout not in LAYOUTS:
    raise UserError(f'layout: found {layout!r}, expected one of {", ".join(LAYOUTS)}')
  if taken := averages.which(checkpoint, weights)[1]:
    say(taken)
  stored = averages.stored(checkpoint, weights)
  config = model_config(checkpoint)
  read, merged = stored, {}
  sets = adapters.lora_sets(config)
  if merge_lora:
    merged = adapters.mergeable(config, what=str(checkpoint))
    read = adapters.merged_reader(stored, stored.flat, merged)
  loose = {prefix: group for prefix, group in sets.items()
           if not merge_lora and not any(spec.name for spec in group)}
  if set(loose) - {'language/'}:
    raise UserError(f'{checkpoint}: LoRA sets of the vision tower have no place in the layout of '
                    f'{config.system}; merge them with --merge-lora')
  plain = adapters.without_sets(config) if merge_lora or loose else config
  system, ours = registry.get(config.system), layout == folder.LAYOUT
  if ours:
    folder.check(plain, what=str(checkpoint))
  abstract = _check(stored, config, checkpoint)
  if plain is not config:
    abstract = vlm.build(plain).abstract
  fields = [] if ours else layouts.lost(plain, abstract)
  if fields:
    say(layouts.said(plain, fields))
  tokenizer = None
  with contextlib.suppress(UserError) if config.text is None else contextlib.nullcontext():
    tokenizer = find_tokenizer(checkpoint)
  theirs = ours and native.fits(plain, tokenizer)  # transformers has the class
  table = (native.table(plain) if theirs else folder.table(plain) if ours else
           layouts.table(plain, own=bool(fields)))
  folders = () if ours or fields else system.folders
  source = read_source(stored.directory)
  skipped = frozenset(source.get('missing', ()))

  counts: collections.Counter = collections.Counter()
  casts = {name: np.dtype(_named(kind)) for name, kind in source.get('widened', {}).items()}
  tensors = _counted(_cast(
    ((name, x) for name, x in stream_tensors(abstract, table, read) if name not in skipped),
    dtype, casts), counts)
  extra = folder.files(plain, tokenizer) if ours else _beside(plain, tokenizer, folders, fields)
  extra['README.md'] = model_card(plain, table, origin=source.get('origin'),
                                  fresh=source.get('fresh'),
                                  usage=folder.usage(plain, tokenizer) if ours else None)
  facts = _facts(config, table, stored, source, merged)
  with store_files.staged_folder(target) as stage:
    _write(stage, tensors, folders)
    if system.pickled and not ours and not fields:
      _write_pickled(stage, system.pickled, table, abstract)
    for group in loose.values():
      _write_adapter(stage, group[0], native.modules(table) if theirs else table, stored,
                     dtype, folders)
    hf.write_extra(stage, extra)
    facts['dtype'] = dict(counts)
    hf.write_manifest(stage, facts)
  return facts


def _beside(config: ModelConfig, tokenizer: Any, folders: tuple[str, ...], lost: list[str]
            ) -> dict[str, Any]:
  """The layout's own files, tokenizer and processors."""
  place = f'{TEXT_FOLDER}/' if TEXT_FOLDER in folders else ''
  extra = layouts.files(config, own=bool(lost))
  extra = {name: value for name, value in processor_files(config, tokenizer).items()
           if not any(pathlib.PurePosixPath(other).name == name for other in extra)} | extra
  if tokenizer is not None:
    extra |= {f'{place}{name}': data for name, data in tokenizer.files.items()}
  return extra


def read_source(directory: Any) -> dict[str, Any]:
  """What a converted checkpoint was made from; empty for any other one."""
  path = layout.to_path(directory) / SOURCE
  return layout.read_json(path) if path.exists() else {}


def _named(kind: str) -> Any:
  import ml_dtypes

  return getattr(ml_dtypes, kind, None) or kind


def _check(stored: StoredParams, config: ModelConfig, checkpoint: Any) -> dict[str, Any]:
  """The model's parameters, which must be those of the checkpoint."""
  abstract = vlm.build(config).abstract
  raise_all(f'checkpoint {checkpoint} and its config do not match',
            store.mismatches(stored.flat, paths.flatten(abstract)))
  return abstract


def _cast(tensors: Tensors, dtype: Any, casts: Mapping[str, np.dtype]) -> Iterator:
  for name, array in tensors:
    kind = casts.get(name, array.dtype) if dtype is None else np.dtype(dtype)
    if kind == array.dtype or array.dtype.kind in 'biu':
      yield name, array
      continue
    with np.errstate(over='ignore'):
      narrow = array.astype(kind)
    if hf.is_finite(array) and not hf.is_finite(narrow):
      raise UserError(f'{name}: holds values up to {float(np.abs(array).max()):.3g}, beyond the '
                      f'range of {kind.name}; choose another --dtype')
    yield name, narrow


def _counted(tensors: Tensors, counts: collections.Counter) -> Iterator:
  for name, array in tensors:
    counts[dtype_name(array.dtype)] += 1
    yield name, array


def _write(stage: pathlib.Path, tensors: Tensors, folders: tuple[str, ...]) -> None:
  """Weights, index and shards; those of several folders come folder by folder."""
  if not folders:
    hf.write_weights(stage, tensors)
    return
  for name, group in itertools.groupby(tensors, lambda item: item[0].partition('/')[0]):
    if name not in folders:
      raise ValueError(f'tensor folder {name!r} is none of {folders}')
    (stage / name).mkdir()
    hf.write_weights(stage / name, ((key.partition('/')[2], x) for key, x in group))


def _write_pickled(stage: pathlib.Path, name: str, table: Table, abstract: Any) -> None:
  """The state dict as the original's loader wants it, from the files just written.

  Aliases share their storage. Without PyTorch the file is left out: the weights are there, and
  loading them needs PyTorch anyway.
  """
  try:
    import torch
  except ImportError:
    return
  written = hf.TensorFolder(stage)
  state = {}
  for entry in entries(table, abstract):
    if entry.names[0] in written:
      state |= dict.fromkeys(entry.names, _torch_tensor(torch, written[entry.names[0]]))
  torch.save(state, stage / name)


def _torch_tensor(torch: Any, array: np.ndarray) -> Any:
  with warnings.catch_warnings():  # the arrays are read-only views of a file; nothing writes there
    warnings.simplefilter('ignore', UserWarning)
    if array.dtype.name == 'bfloat16':
      return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _write_adapter(stage: pathlib.Path, spec: Any, table: Table, stored: StoredParams, dtype: Any,
                   folders: tuple[str, ...]) -> None:
  """The LoRA set of the language model as an adapter folder."""
  found = {path: leaf for path, leaf in stored.flat.items() if adapters.is_adapter(path)}
  rows = adapters.adapter_table(table, paths.unflatten(found), dotted=bool(folders))
  names: list[str] = []

  def tensors() -> Iterator[tuple[str, np.ndarray]]:
    for name, array in _cast(stream_tensors(paths.unflatten(found), rows, stored), dtype, {}):
      names.append(name)
      yield name, array

  place = stage / adapters.FOLDER
  place.mkdir()
  hf.write_weights(place, tensors(), stem=adapters.WEIGHTS)
  hf.write_extra(place, {adapters.CONFIG: adapters.adapter_config(spec, names, '..')})


def _facts(config: ModelConfig, table: Table, stored: StoredParams, source: Mapping[str, Any],
           merged: Mapping[str, Any]) -> dict[str, Any]:
  """Where the tensors came from, and which are tied, unused, missing or left out."""
  marker = store.load_marker(stored.directory)
  described = store_files.describe(store_files.all_files(stored.directory), stored.directory)
  return {
    'system': config.system, 'hrvlm_jax': __version__, 'table': table.fingerprint(),
    'source': {
      'checkpoint': stored.directory.name, 'kind': marker.get('kind'), 'step': marker.get('step'),
      'sha256': store_files.digest(described),
      'origin': {k: source[k] for k in ('origin', 'sha256', 'files') if k in source} or None},
    'merged_lora': {prefix: {'rank': spec.rank, 'alpha': spec.alpha}
                    for prefix, spec in merged.items()} or None,
    'tied': [list(row.names) for row in table.rows if len(row.names) > 1]
            + [[other, name] for name, other in table.tied.items()],
    'unused': dict(table.unused), 'missing': list(source.get('missing', ())),
    'ignored': dict(table.ignored)}
