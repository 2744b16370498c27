"""Parameters of a checkpoint, one leaf or one layer of it at a time.

Export reads a model larger than memory this way. Orbax restores whole leaves only; the arrays of
its checkpoints are plain zarr arrays, which TensorStore reads in any part.
"""

from __future__ import annotations

from collections.abc import Mapping
import os
from typing import Any

import numpy as np
import tensorstore as ts

from hrvlm_jax.checkpoint import chunks, layout, store
from hrvlm_jax.core import paths
from hrvlm_jax.core.errors import UserError

_HELD = 3  # leaves kept whole: the largest row of a weight table joins three
_SMALL = 16 << 20  # bytes; below, one read is cheaper than one per layer


class StoredParams:
  """Reads the parameters of a checkpoint in parts, as they are stored.

  Args:
    directory: see `store.load_params`.

  Attributes:
    directory: the checkpoint's own folder.
    flat: path -> `jax.ShapeDtypeStruct`.

  Raises:
    UserError: no whole checkpoint.
  """

  def __init__(self, directory: layout.PathLike):
    self.directory = layout.resolve(directory)
    self.flat = store.describe(directory)
    self._open: dict[str, ts.TensorStore] = {}
    self._whole: dict[str, np.ndarray] = {}
    self._places: dict[str, tuple[str, str]] = {}
    self._shardings: Mapping[str, Any] = {}

  def lies(self, shardings: Mapping[str, Any]) -> None:
    """Says where parameters will lie (path -> sharding): only the files of what this process'
    devices need are checked, which reads them whole."""
    self._shardings = shardings

  def move(self, places: dict[str, tuple[str, str]]) -> None:
    """Reads some parameters elsewhere in the checkpoint: path -> (part, path there)."""
    self._places |= places

  @property
  def abstract(self) -> dict[str, Any]:
    """Shapes and dtypes as a nested dict."""
    return paths.unflatten(self.flat)

  def __call__(self, path: str, layer: int | None = None) -> np.ndarray:
    """A leaf, or its part at place `layer` of the leading axis.

    A leaf that is stored in pieces along its leading axis is read piece by piece; another one
    whole, and kept until a few others were asked for.
    """
    if layer is None:
      return self._leaf(path)
    if path in self._whole or not self._in_layers(path):
      return self._leaf(path)[layer]
    return self._read(path, layer)

  def part(self, path: str, box: tuple[slice, ...]) -> np.ndarray:
    """A box of a leaf; only the chunks it touches are read."""
    return self._read(path, box)

  def _leaf(self, path: str) -> np.ndarray:
    if path not in self._whole:
      value = self._read(path, ...)
      while len(self._whole) >= _HELD:
        del self._whole[next(iter(self._whole))]
      self._whole[path] = value
    return self._whole[path]

  def _read(self, path: str, box: Any) -> np.ndarray:
    array = self._array(path)
    try:
      return np.asarray(array[box].read().result())
    except ValueError as error:  # bytes that the checksums have not been asked about
      raise UserError(f'{path}: cannot be read, a file of the checkpoint is damaged '
                      f'({str(error)[:200]}); hrvlm doctor CHECKPOINT names it') from error

  def _in_layers(self, path: str) -> bool:
    leaf = self.flat[path]
    if np.prod(leaf.shape) * leaf.dtype.itemsize <= _SMALL:
      return False
    return (self._array(path).chunk_layout.read_chunk.shape or leaf.shape)[0] < leaf.shape[0]

  def _array(self, path: str) -> ts.TensorStore:
    if path not in self._open:
      leaf = self.flat[path]
      part, name = self._places.get(path, (store.PARAMS, path))
      chunks.check(self.directory, part, {name: (leaf.shape, self._shardings.get(path))})
      folder = os.fspath(layout.arrays(self.directory) / part)
      # Not as an address: '#', '%' and '?' may stand in the name of a folder.
      base = folder if '://' in folder else {'driver': 'file', 'path': f'{folder}/'}
      spec = {'driver': 'zarr3', 'kvstore': {
          'driver': 'ocdbt', 'base': base, 'path': name.replace('/', '.') + '/'}}
      try:
        self._open[path] = ts.open(spec, open=True, read=True).result()
      except ValueError as error:
        raise UserError(f'{self.directory}: parameter {path} cannot be read ({error}); the '
                        'checkpoint is damaged') from error
    return self._open[path]
