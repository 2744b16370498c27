"""High-resolution alignment data: an ordinary question about a small picture on a large page.

Image, question and answer of an existing data set stay as they are; the image is pasted somewhere
on a much larger background, so that only a model that finds it can answer. Source: paper
2503.19903 (PS3), Figure 8 and section 4; sizes and backgrounds are not stated there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any, ClassVar

import grain
import numpy as np
from PIL import Image

from hrvlm_jax.core import bounds
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.images import resize_exact, to_rgb

BACKGROUNDS = ('colour', 'gradient', 'noise')


@dataclasses.dataclass(frozen=True, kw_only=True)
class PasteOnBackground(grain.transforms.RandomMap):
  """Pastes every image of an element on a background of its own.

  An element is a mapping with `images`, a list of PIL images, and optionally `boxes`, per image
  (x0, y0, x1, y1) in its pixels or None. Boxes move along; an image without one gets the place it
  was pasted at, which is where its question has to look.

  Attributes:
    side: (smallest, largest) side of the square page in pixels.
    share: probability that an element is changed at all.
    largest_share: an image that is wider or higher than this share of the page is made smaller.
    kinds: backgrounds to draw from: one colour, a gradient between two, noise of large patches.
  """

  side: tuple[int, int] = (1512, 3780)
  share: float = 1.0
  largest_share: float = 0.5
  kinds: tuple[str, ...] = BACKGROUNDS

  BOUNDS: ClassVar = {'side': bounds.SIZE, 'share': bounds.SHARE, 'largest_share': '(0, 1]'}

  def __post_init__(self):
    bounds.check(self)
    problems = []
    if not 1 <= self.side[0] <= self.side[1]:
      problems.append(f'side must be a rising pair from 1, got {self.side}')
    if not self.kinds or set(self.kinds) - set(BACKGROUNDS):
      problems.append(f'kinds must be some of {BACKGROUNDS}, got {self.kinds}')
    if problems:
      raise ValueError('PasteOnBackground: ' + '; '.join(problems))

  def random_map(self, element: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """The changed element; a function of the element and `rng` alone.

    Raises:
      UserError: not one box (or None) per image.
    """
    images = list(element['images'])
    boxes = list(element.get('boxes') or [None] * len(images))
    if len(boxes) != len(images):
      raise UserError(f'{len(boxes)} boxes for {len(images)} images; give one (or None) per image')
    if rng.random() >= self.share:
      return {**element, 'images': images, 'boxes': boxes}
    pairs = [self._paste(image, box, rng) for image, box in zip(images, boxes, strict=True)]
    return {**element, 'images': [image for image, _ in pairs], 'boxes': [box for _, box in pairs]}

  def _paste(self, image: Image.Image, box: Sequence[float] | None, rng: np.random.Generator):
    image = to_rgb(image)
    side = int(rng.integers(self.side[0], self.side[1] + 1))
    factor = min(1.0, self.largest_share * side / max(image.size))
    size = tuple(max(1, round(n * factor)) for n in image.size)
    scale = (size[0] / image.width, size[1] / image.height) * 2
    page = background(str(rng.choice(self.kinds)), side, rng)
    x, y = (int(rng.integers(0, side - n + 1)) for n in size)
    page.paste(resize_exact(image, size), (x, y))
    place = (x, y, x + size[0], y + size[1])
    if box is not None:
      place = tuple(float(v * f + o) for v, f, o in zip(box, scale, (x, y) * 2, strict=True))
    return page, place


def background(kind: str, side: int, rng: np.random.Generator) -> Image.Image:
  """A square page of mode RGB.

  Args:
    kind: 'colour', 'gradient' (top to bottom) or 'noise' (16 x 16 random patches, blurred).
  """
  colour = lambda *shape: rng.integers(0, 256, (*shape, 3), np.uint8)
  if kind == 'colour':
    return Image.new('RGB', (side, side), tuple(colour().tolist()))
  cells = colour(2, 1) if kind == 'gradient' else colour(16, 16)
  return Image.fromarray(cells).resize((side, side), Image.Resampling.BILINEAR)
