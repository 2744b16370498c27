"""Painting the global cue of a picture: tint, weather, time of day; on pages tint and ruling.

A cue covers the whole picture and is painted before signs, things and words, which show nothing of
it (words of a PDF file are part of the picture and lie under it). Integers only, so that every
machine makes the same bytes.
"""

from __future__ import annotations

from jaxtyping import UInt8
import numpy as np

from hrvlm_jax.lab.needle.tasks import Cue

_TINTS = ((255, 205, 140), (150, 200, 255))  # parts of 255 that a channel keeps: warm, cold
_PAPERS = ((255, 238, 165), (178, 216, 255))
_NIGHT, _DAY = (70, 80, 120), (165, 165, 160)  # parts of 255


def draw_cue(canvas: UInt8[np.ndarray, 'h w 3'], cue: Cue, task: str, rng: np.random.Generator
             ) -> None:
  """Paints a cue over an empty canvas, in place."""
  page = task == 'page'
  if cue.kind == 'tint':
    _scale(canvas, (_PAPERS if page else _TINTS)[cue.state])
  elif cue.kind == 'weather':
    (_snow if cue.state else _rain)(canvas, rng)
  elif page:
    _rule(canvas, squared=bool(cue.state))
  elif cue.state:
    _scale(canvas, _NIGHT)
  else:
    _scale(canvas, _DAY)
    canvas += np.uint8(90)


def _scale(canvas, parts):
  canvas[:] = (canvas * np.array(parts, np.uint16) + np.uint16(127)) // 255


def _rain(canvas, rng):
  """Long pale blue slanted streaks over a darkened picture."""
  _scale(canvas, (150, 155, 165))
  height, width = canvas.shape[:2]
  short = min(width, height)
  length, thick = max(6, short // 6), max(2, short // 60)
  count = 40 * width * height // short**2
  for x, y in zip(rng.integers(-length, width, count).tolist(),
                  rng.integers(-length, height, count).tolist()):
    for step in range(length):
      row, left = y + step, x + step // 3
      if 0 <= row < height and left + thick > 0:
        canvas[row, max(0, left):left + thick] = (150, 195, 250)


def _snow(canvas, rng):
  """White discs."""
  height, width = canvas.shape[:2]
  short = min(width, height)
  size = max(4, short // 28)
  axis = np.arange(size) * 2 + 1 - size
  disc = axis[:, None] ** 2 + axis[None] ** 2 <= size**2
  count = 55 * width * height // short**2
  for x, y in zip(rng.integers(0, width - size + 1, count).tolist(),
                  rng.integers(0, height - size + 1, count).tolist()):
    canvas[y:y + size, x:x + size][disc] = (252, 252, 252)


def _rule(canvas, *, squared):
  """Faint lines, level or also upright."""
  short = min(canvas.shape[:2])
  step, thick = max(8, short // 8), max(1, short // 80)
  lines = (np.arange(canvas.shape[0]) % step) >= step - thick
  canvas[lines] = canvas[lines] // 4 * 3
  if squared:
    columns = (np.arange(canvas.shape[1]) % step) >= step - thick
    part = canvas[:, columns]
    part[~lines] = part[~lines] // 4 * 3
    canvas[:, columns] = part
