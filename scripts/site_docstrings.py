"""Docstrings as Markdown, for the documentation site: examples become code, brackets no links.

An extension of griffe, named in mkdocs.yml. A docstring here is plain text: `[b t d]` is a shape,
and an example is what follows `>>>`.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_CODE = re.compile(r'(`[^`\n]*`)')


class PlainDocstrings(griffe.Extension):
  """Rewrites every docstring before it is read."""

  def on_object(self, *, obj: Any, **_: Any) -> None:
    """Called for every object that was found."""
    if obj.docstring is not None:
      obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
  """Examples in fences, square brackets escaped outside of code.

  An example ends with an empty line or where the text is indented less.
  """
  out: list[str] = []
  inside, indent = False, ''
  for line in text.splitlines():
    if not inside and line.lstrip().startswith('>>>'):
      indent = line[:len(line) - len(line.lstrip())]
      out += ['', f'{indent}```pycon']
      inside = True
    elif inside and (not line.strip() or not line.startswith(indent)):
      out.append(f'{indent}```')
      inside = False
    out.append(line if inside else plain(line))
  return '\n'.join([*out, f'{indent}```'] if inside else out)


def plain(line: str) -> str:
  """A line whose brackets make no link."""
  parts = _CODE.split(line)
  return ''.join(part if n % 2 else part.replace('[', r'\[').replace(']', r'\]')
                 for n, part in enumerate(parts))
