"""Several sets of tensors as one, each under a prefix of its own."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
import os
import pathlib
from typing import Any

import numpy as np

from hrvlm_jax.checkpoint.hf import Everything, TensorFolder
from hrvlm_jax.core.errors import UserError


class Joined(Mapping[str, np.ndarray]):
  """The tensors of several mappings, named `prefix + name`, read only when asked for.

  Args:
    parts: by prefix; a tensor belongs to the longest prefix that its name begins with.

  Attributes:
    shapes, dtypes, files, problems, unreadable: as those of `hf.TensorFolder`, joined.
  """

  def __init__(self, parts: Mapping[str, Any]):
    self._parts = dict(sorted(parts.items(), key=lambda item: -len(item[0])))
    self.shapes: dict[str, tuple[int, ...]] = {}
    self.dtypes: dict[str, np.dtype] = {}
    self.files: list[pathlib.Path] = []
    self.problems: list[str] = []
    for prefix, part in parts.items():
      self.shapes |= {f'{prefix}{name}': shape for name, shape in part.shapes.items()}
      self.dtypes |= {f'{prefix}{name}': dtype for name, dtype in part.dtypes.items()}
      self.files += part.files
      self.problems += part.problems
    self.unreadable = _Unreadable(self._parts)

  def __getitem__(self, name: str) -> np.ndarray:
    prefix = next((p for p in self._parts if name.startswith(p)), None)
    if prefix is None:
      raise KeyError(name)
    return self._parts[prefix][name.removeprefix(prefix)]

  def __iter__(self) -> Iterator[str]:
    return iter(self.shapes)

  def __len__(self) -> int:
    return len(self.shapes)


class Over(Mapping[str, np.ndarray]):
  """The tensors of `base`, of which those of `others` take the place, by the same names."""

  def __init__(self, base: Any, others: Any):
    self._base, self._others = base, others
    self.shapes = {**base.shapes, **others.shapes}
    self.dtypes = {**base.dtypes, **others.dtypes}
    self.files = [*base.files, *others.files]
    self.problems = [*base.problems, *others.problems]
    self.unreadable = base.unreadable

  def __getitem__(self, name: str) -> np.ndarray:
    return self._others[name] if name in self._others.shapes else self._base[name]

  def __iter__(self) -> Iterator[str]:
    return iter(self.shapes)

  def __len__(self) -> int:
    return len(self.shapes)


class Renamed(Mapping[str, np.ndarray]):
  """The tensors of a file under other names.

  Args:
    names: new name -> name in `base`.
  """

  def __init__(self, base: Any, names: Mapping[str, str]):
    self._base, self._names = base, dict(names)
    self.files, self.problems = base.files, list(base.problems)
    self.shapes = {new: base.shapes[old] for new, old in self._names.items()}
    self.dtypes = {new: base.dtypes[old] for new, old in self._names.items()}
    self.unreadable = base.unreadable

  def __getitem__(self, name: str) -> np.ndarray:
    return self._base[self._names[name]]

  def __iter__(self) -> Iterator[str]:
    return iter(self.shapes)

  def __len__(self) -> int:
    return len(self.shapes)


class _Unreadable(Everything):
  """Names that are, under their prefix, unreadable in a part."""

  def __init__(self, parts: Mapping[str, Any]):
    self._parts = parts

  def __contains__(self, name: object) -> bool:
    prefix = next((p for p in self._parts if str(name).startswith(p)), None)
    return prefix is not None and str(name).removeprefix(prefix) in self._parts[prefix].unreadable


class _Broken(Mapping[str, np.ndarray]):
  """What stands for a folder that cannot be opened: no tensor, one problem."""

  shapes: Mapping[str, tuple[int, ...]] = {}
  dtypes: Mapping[str, np.dtype] = {}
  files: Sequence[pathlib.Path] = ()
  unreadable: Collection[str] = Everything()

  def __init__(self, problem: str):
    self.problems = [problem]

  def __getitem__(self, name: str) -> np.ndarray:
    raise KeyError(name)

  def __iter__(self) -> Iterator[str]:
    return iter(())

  def __len__(self) -> int:
    return 0


def open_folders(path: str | os.PathLike, folders: Sequence[str]) -> Joined:
  """The weights of several sub-folders, named `folder/name`; damage is listed, never raised."""
  parts: dict[str, Any] = {}
  for folder in folders:
    try:
      parts[f'{folder}/'] = TensorFolder(pathlib.Path(path) / folder, strict=False)
    except UserError as error:
      parts[f'{folder}/'] = _Broken(str(error))
  return Joined(parts)
