"""Where an instruction of a compiled program comes from: file, function and line of the package."""

from __future__ import annotations

import dataclasses
import re

from hrvlm_jax.planning import hlo

PACKAGE = 'hrvlm_jax/'


@dataclasses.dataclass(frozen=True)
class Place:
  """A line of the source; all empty where the program does not say."""

  file: str = ''
  function: str = ''
  line: int = 0

  def __str__(self) -> str:
    return f'{self.file}:{self.line} {self.function}' if self.file else '(no source)'


class Sources:
  """Call stacks of a program: the tables before its computations, or what instructions say."""

  def __init__(self, text: str):
    files, functions = _table(text, 'FileNames'), _table(text, 'FunctionNames')
    places = {}
    for key, value in _table(text, 'FileLocations').items():
      ids = _numbers(value)
      places[key] = Place(_short(files.get(ids.get('file_name_id', 0), '')),
                          functions.get(ids.get('function_name_id', 0), ''), ids.get('line', 0))
    self._frames = {}
    for key, value in _table(text, 'StackFrames').items():
      ids = _numbers(value)
      self._frames[key] = (places.get(ids.get('file_location_id', 0), Place()),
                           ids.get('parent_frame_id', 0))

  def stack(self, inst: hlo.Instruction) -> tuple[Place, ...]:
    """The calls that led to an instruction, innermost first."""
    frame = re.search(r'\bstack_frame_id=(\d+)', inst.attributes)
    if frame:
      found, number, seen = [], int(frame.group(1)), set()
      while number in self._frames and number not in seen:
        seen.add(number)
        place, number = self._frames[number]
        found.append(place)
      return tuple(found)
    file = re.search(r'\bsource_file="([^"]*)"', inst.attributes)
    line = re.search(r'\bsource_line=(\d+)', inst.attributes)
    return (Place(_short(file.group(1)), '', int(line.group(1)) if line else 0),) if file else ()

  def place(self, instructions: list[hlo.Instruction]) -> Place:
    """The innermost place in the package that the first of the instructions with one names.

    A fusion holds several; those with products come first in the caller's list. A kernel of a
    library may name the library's file alone.
    """
    for inst in instructions:
      for place in self.stack(inst):
        if place.file.startswith(PACKAGE):
          return place
    others = [place for inst in instructions for place in self.stack(inst) if place.file]
    own = (place for place in others if 'site-packages/' not in place.file)
    return next(own, others[0] if others else Place())


def operation(inst: hlo.Instruction) -> str:
  """The name JAX gave an operation, such as `jit(step)/while/body/dot_general`."""
  match = re.search(r'\bop_name="([^"]*)"', inst.attributes)
  return match.group(1) if match else ''


def _table(text: str, name: str) -> dict[int, str]:
  match = re.search(rf'^{name}\n((?:\d+ .*\n)*)', text, re.M)
  rows = (line.partition(' ') for line in (match.group(1).splitlines() if match else ()))
  return {int(key): value.strip('"') for key, _, value in rows}


def _numbers(text: str) -> dict[str, int]:
  return {key: int(value) for key, value in re.findall(r'(\w+)=(\d+)', text)}


def _short(path: str) -> str:
  """A path from the package's or the libraries' folder on; others stay whole."""
  for folder in (PACKAGE, 'site-packages/'):
    if (found := path.rfind('/' + folder)) >= 0:
      return path[found + 1:]
  return path
