"""A model from whatever holds one: a checkpoint, a run, an original's folder, a name on the hub."""

from __future__ import annotations

from collections.abc import Mapping
import logging
import os
import pathlib
from typing import Any

import jax

from hrvlm_jax.checkpoint import averages, layout
from hrvlm_jax.core.config import from_dict, to_dict
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.execution import Execution
from hrvlm_jax.core.images import MAX_PIXELS
from hrvlm_jax.front.images import MAX_BYTES
from hrvlm_jax.front.model import Model
from hrvlm_jax.interop import hub
from hrvlm_jax.interop.convert import Release
from hrvlm_jax.interop.export import read_source
from hrvlm_jax.language.tokenizer import tokenizer_from_files
from hrvlm_jax.parallel import distributed
from hrvlm_jax.parallel.layout import Layout
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.vlm import laid, model as vlm, where
from hrvlm_jax.vlm.answer import Answerer, find_tokenizer, model_config, with_methods
from hrvlm_jax.vlm.encode import ImageEncoder

_log = logging.getLogger(__name__)


def load(what: str | os.PathLike, *, revision: str | None = None, dtype: str = 'float32',
         encoder: Mapping[str, Any] | None = None,
         methods: Mapping[str, Mapping[str, Any]] | None = None, exif: str = 'apply',
         urls: bool | str = False, max_bytes: int = MAX_BYTES,
         mesh: Mapping[str, int] | None = None, alpha: str = 'drop', max_pixels: int = MAX_PIXELS,
         weights: str | None = None) -> Model:
  """See `hrvlm_jax.api.load`."""
  options = dict(encoder or {})
  if exif not in ('apply', 'ignore') or alpha not in ('drop', 'white') or max_pixels < 1:
    raise UserError(f'exif={exif!r}, alpha={alpha!r}, max_pixels={max_pixels!r}: expected apply or '
                    'ignore, drop or white, and a number of pixels')
  reading = dict(exif=exif, urls=urls, max_bytes=max_bytes, alpha=alpha, max_pixels=max_pixels)
  try:
    ex = Execution(dtype=dtype)
  except TypeError as error:
    raise UserError(f'dtype: found {dtype!r}, expected float32 or bfloat16') from error
  if is_checkpoint(what):
    config, origin = model_config(what, options), read_source(layout.resolve(what)).get('origin')
    lies = _layout(config, mesh, methods, dtype)
    params = (averages.load_params(what, vlm.build(config).abstract, weights=weights)
              if lies is None else laid.load(what, config, lies, dtype=dtype, weights=weights))
    tokenizer = None if config.text is None else find_tokenizer(what)
    if revision is not None:
      raise UserError(f'{what}: is a checkpoint; a revision belongs to a name on the hub')
  else:
    if weights == 'ema':
      raise UserError(f'{what}: is a release, which holds no moving average; leave weights out')
    folder, origin = hub.resolve(_folder(what), revision=revision)
    release = Release(folder)
    config = _with_options(release.config, options)
    lies = _layout(config, mesh, methods, dtype)
    files = release.tokenizer_files()
    if config.text is not None and not files:
      raise UserError(f'{folder}: no tokenizer beside the weights; copy the tokenizer files of the '
                      'language model there')
    if lies is None:
      params, _ = release.params()
      params = jax.device_put(params)
    else:
      params = laid.load_tensors(release.tensors, release.table, config, lies,
                                 dtype=dtype, what=f'folder {folder}')
    tokenizer = tokenizer_from_files(files) if files else None
  common: dict[str, Any] = dict(ex=ex, name=os.fspath(what), origin=origin, **reading)
  if config.text is None:
    if methods:
      raise UserError(f'{what}: is an encoder alone; {", ".join(methods)} belong to answers')
    return Model(config, encoder=ImageEncoder(config, params, tokenizer), **common)
  answerer = Answerer(config, params, tokenizer, ex=ex, exif=exif, alpha=alpha,
                      max_pixels=max_pixels, layout=lies)
  return Model(config, answerer=with_methods(answerer, methods or {}), **common)


def _layout(config: ModelConfig, mesh: Mapping[str, int] | None, methods: Mapping[str, Any] | None,
            dtype: str) -> Layout | None:
  """The mesh that was named, else the smallest that holds the model; None for one device."""
  if mesh is not None and (methods or config.text is None):
    what = ', '.join(sorted(methods)) if methods else f'{config.system} alone'
    raise UserError(f'{what}: runs on one device; leave out the mesh')
  if methods or config.text is None or (mesh is None and jax.device_count() == 1):
    return None
  lies, choice = where.layout_for(config, mesh=mesh, rows=1, new_tokens=256, dtype=dtype)
  if lies.mesh.size == 1:
    return None
  if distributed.is_main():
    _log.warning('%s', where.told(lies, choice))
  return lies


def is_checkpoint(what: str | os.PathLike) -> bool:
  """Whether a path holds a checkpoint of ours, or the run that will hold one."""
  path = layout.to_path(what)
  return path.is_dir() and ((layout.beside(path) / layout.MARKER).exists()
                            or (path / layout.STEPS).is_dir())


def _folder(what: str | os.PathLike) -> str | os.PathLike:
  """A folder of a release, or a name; refuses folders that hold neither."""
  if '://' in os.fspath(what):
    raise UserError(f'{what}: holds no checkpoint')
  path = pathlib.Path(what)
  if path.is_dir() and not (path / 'config.json').exists():
    inside = [child for child in sorted(path.iterdir())
              if child.is_dir() and (is_checkpoint(child) or (child / 'config.json').exists())]
    hint = f'; did you mean {inside[0]}?' if inside else ''
    raise UserError(f'{what}: holds no model; expected a checkpoint, the work directory of a run, '
                    f"or an original's folder with its config.json{hint}")
  return what


def _with_options(config: ModelConfig, options: Mapping[str, Any]) -> ModelConfig:
  if not options:
    return config
  values = to_dict(config)
  values['encoder'] = dict(values['encoder']) | dict(options)
  return from_dict(ModelConfig, values, path='model')
