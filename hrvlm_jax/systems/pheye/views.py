"""Pheye on the host: the whole image squashed to S x S, and tiles of an enlarged copy.

Source: `miguelscarv/pheye: pheye_builder/phEYE.py, encoder.py`. Nothing depends on the size of the
image: every image costs the same views and tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.images import check_size, resize_exact, to_rgb
from hrvlm_jax.systems.contract import Count
from hrvlm_jax.systems.grid import WHOLE, Grid, TokenMap
from hrvlm_jax.systems.packing import Entry, Packing, Views
from hrvlm_jax.systems.pheye.config import PheyeConfig

Box = tuple[int, int, int, int]


def tile_boxes(size: int, level: int) -> list[Box]:
  """(x0, y0, x1, y1) of every tile on the (level * size)^2 image: down the first column first."""
  return [(x * size, y * size, (x + 1) * size, (y + 1) * size)
          for x in range(level) for y in range(level)]


def sub_images(image: Image.Image, config: PheyeConfig) -> np.ndarray:
  """uint8 [1 + level^2, s, s, 3]: the global view, then the tiles; aspect ratio is not kept."""
  size = config.vision.image_size
  rgb = to_rgb(image)
  large = np.asarray(resize_exact(rgb, (config.side, config.side)), np.uint8)
  tiles = [large[y0:y1, x0:x1] for x0, y0, x1, y1 in tile_boxes(size, config.level)]
  return np.stack([np.asarray(resize_exact(rgb, (size, size)), np.uint8), *tiles])


def count(width: int, height: int, config: PheyeConfig) -> Count:
  """Views and visual tokens of an image: the same for every size. None stands in the prompt.

  Raises:
    UserError: a side below 1.
  """
  check_size(width, height)
  return Count(config.sub_images, config.tokens)


def views(images: Sequence[Image.Image], config: PheyeConfig) -> Views:
  """Arrays of one example: pixels uint8 [1 + level^2, s, s, 3], tokens int32 [1].

  Raises:
    UserError: not exactly one image (a prompt has one image that all its text reads).
  """
  if len(images) != 1:
    raise UserError(f'Pheye reads exactly one image per prompt, got {len(images)}; drop examples '
                    'without or with several images')
  return {'pixels': sub_images(images[0], config), 'tokens': np.array([config.tokens], np.int32)}


def tokens(config: PheyeConfig) -> int:
  """Visual tokens of every image."""
  return config.tokens


def packing(config: PheyeConfig) -> Packing:
  """Every row has its own views; the text reads all their tokens, so there is no index."""
  size = config.vision.image_size
  return Packing(rows={'pixels': Entry((config.sub_images, size, size, config.vision.channels))},
                 each=None, views=config.sub_images)


def grid(config: PheyeConfig) -> Grid:
  """The map of the global view, then those of the tiles; a class token is in front of each."""
  side, each = config.vision.grid, config.vision.tokens
  boxes = [tuple(x / config.side for x in box)
           for box in tile_boxes(config.vision.image_size, config.level)]
  first = each - side**2
  return Grid(maps=tuple(TokenMap(side, side, first + number * each, box)
                         for number, box in enumerate([WHOLE, *boxes])),
              view=config.vision.image_size, std=config.std)


def overlay(image: Image.Image, config: PheyeConfig, info: Mapping[str, object]) -> Image.Image:
  """The image with its tiles and, where known, the share of attention each of them got.

  Args:
    info: 'attention_share' float [1 + level^2] or [1, 1 + level^2], the global view first, sums
      to 1; without it only the grid is drawn. The redder a tile, the larger its share.
  """
  picture = to_rgb(image).copy()
  share = info.get('attention_share')
  boxes = [tuple(round(v * length / config.side) for v, length in zip(box, picture.size * 2))
           for box in tile_boxes(config.vision.image_size, config.level)]
  if share is not None:
    share = np.asarray(share, np.float64).reshape(-1)
    if len(share) != config.sub_images:
      raise ValueError(f'attention_share: {len(share)} values, expected {config.sub_images}')
    top = max(share[1:].max(), 1e-12)
    for box, value in zip(boxes, share[1:], strict=True):
      tint = Image.new('L', (box[2] - box[0], box[3] - box[1]), round(128 * value / top))
      picture.paste((255, 0, 0), box, tint)
  draw = ImageDraw.Draw(picture)
  line = max(1, max(picture.size) // 400)
  font = ImageFont.load_default(size=max(10, min(picture.size) // 20))
  for number, box in enumerate(boxes):
    draw.rectangle((box[0], box[1], max(box[2] - 1, box[0]), max(box[3] - 1, box[1])),
                   outline=(255, 255, 255), width=line)
    if share is not None:
      middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
      _label(draw, middle, f'{share[1 + number]:.1%}', font, 'mm')
  if share is not None:
    _label(draw, (2 * line, 2 * line), f'whole image {share[0]:.1%}', font, 'la')
  return picture


def _label(draw, place, text, font, anchor):
  draw.text(place, text, font=font, anchor=anchor, fill=(255, 255, 255), stroke_width=2,
            stroke_fill=(0, 0, 0))
