"""The fields of the presets: what every task has on a canvas of that size.

Texts of `relate` and `page` span a 16-fold range of areas (4-fold in height).
"""

from __future__ import annotations

from typing import Any

from hrvlm_jax.core.errors import UserError, unknown
from hrvlm_jax.lab.needle import kinds

# Capitals and digits without the pairs that look alike in print (I 1, O 0 Q).
CLEAR_LETTERS = 'ABCDEFGHJKLMNPRSTUVWXYZ'
CLEAR_CHARACTERS = CLEAR_LETTERS + '23456789'

_SMALL = {
  'width': 320, 'height': 160, 'signs': (3, 4), 'alphabet': CLEAR_LETTERS, 'length': 1,
  'relative_area': (0.005, 0.010), 'ask': ('colour',),
  'colours': ('red', 'green', 'blue', 'yellow', 'purple', 'white'),
  'shapes': ('rectangle', 'oval'), 'fonts': ('DejaVuSansMono-Bold',), 'grain': 2}
_SQUARE = _SMALL | {
  'width': 160, 'height': 160, 'shapes': ('rectangle',), 'relative_area': (0.010, 0.018)}
_FOUR_K = {'width': 3840, 'height': 2160, 'length': 5, 'relative_area': (2e-4, 3e-3)}

NEEDLE: dict[str, dict[str, Any]] = {
  'tiny': _SMALL,
  'panorama': _SMALL | {'width': 640, 'height': 80, 'shapes': ('rectangle',),
                        'relative_area': (0.012, 0.018)},
  'square': _SQUARE,
  'medium': _SMALL | {'width': 240, 'height': 240, 'shapes': ('rectangle',)},
  'one_k': {},
  'four_k': _FOUR_K,
}
PRESETS = tuple(NEEDLE)

_ALL = kinds.KINDS['relate']
_LEVEL = tuple(kind for kind in _ALL if kind != 'circle')  # where nothing fits above a sign
_RELATE: dict[str, dict[str, Any]] = {
  'tiny': {'relative_area': (0.0022, 0.0358), 'ask': _LEVEL, 'shapes': ('rectangle',)},
  'panorama': {'relative_area': (0.0022, 0.0358), 'ask': _LEVEL},
  'square': {'relative_area': (0.0017, 0.0299), 'ask': _ALL},
  'medium': {'relative_area': (0.0019, 0.0318), 'ask': _ALL},
  'one_k': {'relative_area': (4.8e-4, 7.8e-3), 'ask': _ALL, 'signs': (4, 7),
            'shapes': ('rectangle', 'oval')},
  'four_k': {'relative_area': (2e-4, 3.3e-3), 'ask': _ALL, 'signs': (4, 8),
             'shapes': ('rectangle', 'oval')},
}
_PAGE: dict[str, dict[str, Any]] = {
  'tiny': {'relative_area': (0.00085, 0.0140), 'signs': (3, 4)},
  'panorama': {'relative_area': (0.00085, 0.0140), 'signs': (2, 2)},
  'square': {'relative_area': (0.0017, 0.0299), 'signs': (4, 6)},
  'medium': {'relative_area': (0.0019, 0.0318), 'signs': (4, 6)},
  'one_k': {'relative_area': (8e-4, 0.0130), 'signs': (10, 16), 'length': 5,
            'alphabet': CLEAR_LETTERS},
  'four_k': {'relative_area': (2e-4, 3.3e-3), 'signs': (12, 20), 'alphabet': CLEAR_LETTERS},
}


def fields(name: str, task: str) -> dict[str, Any]:
  """The fields of a preset for a task.

  Raises:
    UserError: an unknown task.
  """
  if task not in kinds.TASKS:
    raise UserError(unknown(task, kinds.TASKS, what='task'))
  made = dict(NEEDLE[name])
  if task == 'needle':
    return made
  made |= {'task': task, 'cues': tuple(kinds.CUES[task])}
  if task == 'relate':
    return made | {'signs': (4, 4)} | _RELATE[name]
  words = {'ask': kinds.KINDS['page'], 'shapes': ('word',), 'colours': ('black',)}
  return made | words | _PAGE[name]


def word_gap(height: int) -> int:
  """Pixels between two words of a height."""
  return height * 3 // 5 + 1


def row_height(height: int) -> int:
  """Pixels that a row takes whose words have a height."""
  return height + max(2, height * 3 // 10)
