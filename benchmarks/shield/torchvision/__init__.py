"""A stand-in for torchvision, for the peers' environment only (installed by scripts/peers.sh).

timm and ps3-torch import torchvision at their top, but the models measured here use nothing of it.
The published torchvision wheel needs compiled operators that a CPU-only PyTorch lacks and fails at
import, which would take both packages down with it. This package answers every import instead:
names that are asked for exist, and using one of them raises an error that says so.
"""

from __future__ import annotations

import enum
import importlib.abc
import importlib.machinery
import sys
import types

__version__ = '0'


class InterpolationMode(enum.Enum):
  """The resampling names that timm and ps3-torch mention in tables at import."""

  NEAREST = 'nearest'
  NEAREST_EXACT = 'nearest-exact'
  BILINEAR = 'bilinear'
  BICUBIC = 'bicubic'
  BOX = 'box'
  HAMMING = 'hamming'
  LANCZOS = 'lanczos'


def _placeholder(module: str, name: str):
  """A class that can be imported and subclassed, but not used."""
  def refuse(self, *args, **kwargs):
    raise RuntimeError(
      f'{module}.{name} was called, but this environment has a stand-in for torchvision '
      '(see benchmarks/shield): prepare images without it')
  return type(name, (), {'__init__': refuse, '__module__': module})


class _Module(types.ModuleType):
  """A module in which every public name exists."""

  __path__: list[str] = []

  def __getattr__(self, name: str):
    if name.startswith('_'):
      raise AttributeError(f'module {self.__name__!r} has no attribute {name!r}')
    value = InterpolationMode if name == 'InterpolationMode' else _placeholder(self.__name__, name)
    setattr(self, name, value)
    return value


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
  """Finds every module below torchvision."""

  def find_spec(self, fullname, path=None, target=None):
    if fullname.startswith('torchvision.'):
      return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
    return None

  def create_module(self, spec):
    return _Module(spec.name)

  def exec_module(self, module):
    """Nothing to run: names appear when they are asked for."""


sys.meta_path.append(_Finder())
