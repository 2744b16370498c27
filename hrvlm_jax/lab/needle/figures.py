"""The things of `relate` as painted polygons and discs, with the same bytes on every machine."""

from __future__ import annotations

import functools

from jaxtyping import UInt8
import numpy as np

from hrvlm_jax.lab.needle.tasks import Thing

_OVERSAMPLE = 4
Points = tuple[tuple[float, float], ...]

# Polygons in units of the box, y down, one over the other.
_HOUSE: tuple[tuple[Points, tuple[int, int, int]], ...] = (
  (((0.08, 0.40), (0.92, 0.40), (0.92, 1.0), (0.08, 1.0)), (60, 45, 35)),
  (((0.13, 0.40), (0.87, 0.40), (0.87, 0.95), (0.13, 0.95)), (235, 222, 190)),
  (((0.5, 0.0), (1.0, 0.5), (0.0, 0.5)), (60, 45, 35)),
  (((0.5, 0.08), (0.88, 0.46), (0.12, 0.46)), (170, 85, 60)),
  (((0.42, 0.62), (0.60, 0.62), (0.60, 0.95), (0.42, 0.95)), (60, 45, 35)),
)
_ARROW: tuple[tuple[Points, tuple[int, int, int]], ...] = (
  (((0.0, 0.34), (0.5, 0.34), (0.5, 0.08), (1.0, 0.5), (0.5, 0.92), (0.5, 0.66), (0.0, 0.66)),
   (15, 15, 15)),
  (((0.06, 0.40), (0.56, 0.40), (0.56, 0.21), (0.91, 0.5), (0.56, 0.79), (0.56, 0.60),
    (0.06, 0.60)), (250, 250, 250)),
)
_DISC = (((0.5, (15, 15, 15)), (0.43, (205, 205, 205))))


def draw_thing(canvas: UInt8[np.ndarray, 'h w 3'], thing: Thing) -> None:
  """Paints a house, arrow or circle on the canvas, in place; its box lies on the canvas."""
  x0, y0, x1, y1 = thing.box
  target = canvas[y0:y1, x0:x1]
  for mask, colour in _layers(thing.name, thing.note, x1 - x0, y1 - y0):
    weight = mask[:, :, None].astype(np.uint16)
    mixed = target * (255 - weight) + weight * np.array(colour, np.uint16) + np.uint16(127)
    target[:] = mixed // 255


@functools.lru_cache(maxsize=512)
def _layers(name: str, note: str, width: int, height: int):
  """[(coverage 0 to 255 [h w], colour)] from below."""
  n = _OVERSAMPLE
  x = ((np.arange(width * n) + 0.5) / (width * n))[None]
  y = ((np.arange(height * n) + 0.5) / (height * n))[:, None]
  if name == 'circle':
    inside = [((x - 0.5) ** 2 + (y - 0.5) ** 2 <= radius**2, colour) for radius, colour in _DISC]
  else:
    if note == 'left':
      x = 1 - x
    inside = [(_polygon(points, x, y), colour)
              for points, colour in (_HOUSE if name == 'house' else _ARROW)]
  found = []
  for samples, colour in inside:
    count = samples.reshape(height, n, width, n).sum(axis=(1, 3))
    found.append((((count * 255 + n * n // 2) // (n * n)).astype(np.uint8), colour))
  return found


def _polygon(points: Points, x, y):
  """Even-odd rule: samples with an odd number of edges to their right."""
  inside = np.zeros(np.broadcast_shapes(x.shape, y.shape), bool)
  for (ax, ay), (bx, by) in zip(points, points[1:] + points[:1]):
    if ay == by:
      continue
    between = (y >= min(ay, by)) & (y < max(ay, by))
    inside ^= between & (x < ax + (bx - ax) * ((y - ay) / (by - ay)))
  return inside
