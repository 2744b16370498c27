"""Folders of Hugging Face `datasets` on disk: what `save_to_disk` writes, and clones of data sets.

Arrow files are mapped into memory and read row by row; `datasets` itself is not needed.
"""

from __future__ import annotations

import os
import pathlib

import numpy as np

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.data.rows import Fields, Row
from hrvlm_jax.data.tables import find_files, guess_fields, table_row
from hrvlm_jax.data.unchanged import Unchanged

STATE, SPLITS = 'state.json', 'dataset_dict.json'


def is_saved(folder: str | os.PathLike) -> bool:
  """Whether a folder is what `Dataset.save_to_disk` or `DatasetDict.save_to_disk` writes."""
  names = set(os.listdir(folder))
  return SPLITS in names or (STATE in names and any(name.endswith('.arrow') for name in names))


def cloned(folder: str | os.PathLike, split: str | None = None) -> str | None:
  """The pattern of a clone's parquet files: of a split, default `train` where it has several.

  Raises:
    UserError: no such split.
  """
  data = pathlib.Path(folder) / 'data'
  names = sorted(path.name for path in data.glob('*.parquet')) if data.is_dir() else []
  if not names:
    return None
  if split is not None:
    if not any(name.startswith(split) for name in names):
      raise UserError(f'{data}: no files of the split {split!r}; found {", ".join(names[:5])}')
    return str(data / f'{split}*.parquet')
  train = any(name.startswith('train') for name in names)
  return str(data / ('train*.parquet' if train else '*.parquet'))


class Arrow:
  """Rows of a folder that `datasets` saved (images as {'bytes', 'path'}).

  Args:
    folder: of one data set, or of several splits.
    split: which one of several; default: `train`.
    fields: which column is what; None: by the usual names (`tables.guess_fields`).
    images: folder for images stored as paths.

  Raises:
    UserError: no such split, no Arrow file, not Arrow, or a named column is missing.
  """

  def __init__(self, folder: str | os.PathLike, fields: Fields | None = None, *,
               images: str | os.PathLike | None = None, split: str | None = None):
    root = pathlib.Path(folder)
    if (root / SPLITS).exists():
      found = sorted(path.name for path in root.iterdir() if (path / STATE).exists())
      if (split or 'train') not in found:
        raise UserError(f'{folder}: has no split {split or "train"!r}, but '
                        f'{", ".join(found) or "none"}; name one of them')
      root /= split or 'train'
    elif split is not None:
      raise UserError(f'{folder}: holds one data set without splits; leave the split out')
    self.images = None if images is None else os.fspath(images)
    self.paths = find_files(root, '.arrow')
    self._unchanged = Unchanged(self.paths)
    self._tables: list | None = None
    tables = self._open()
    self._ends = np.cumsum([table.num_rows for table in tables])
    names = tables[0].schema.names
    self.fields = guess_fields(names) if fields is None else fields
    self.fields.check(names, str(root), what='columns')
    self._tables = None

  def _open(self) -> list:
    import pyarrow as pa

    if self._tables is None:
      self._unchanged.check()
      tables = []
      for path in self.paths:
        try:
          with pa.memory_map(path) as file:
            tables.append(pa.ipc.open_stream(file).read_all())
        except (pa.ArrowInvalid, OSError) as error:
          raise UserError(f'{path}: is not an Arrow file of datasets ({error})') from error
      self._tables = tables  # whole, for threads that come meanwhile
    return self._tables

  def __len__(self):
    return int(self._ends[-1])

  def __getitem__(self, index) -> Row:
    if not 0 <= index < len(self):
      raise IndexError(index)
    number = int(np.searchsorted(self._ends, index, side='right'))
    within = index - (int(self._ends[number - 1]) if number else 0)
    # Before the map is touched: one of a file that was cut ends the process with a bus error.
    self._unchanged.check([self.paths[number]])
    values = self._open()[number].slice(within, 1).to_pylist()[0]
    return table_row(values, self.fields, self.images, f'{self.paths[number]}, row {within}')

  def __getstate__(self):
    return self.__dict__ | {'_tables': None}
