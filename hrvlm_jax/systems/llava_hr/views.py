"""LLaVA-HR on the host: one square image of S pixels per picture.

Source: `luogen1996/LLaVA-HR: llava_hr/mm_utils.py` (process_images, expand2square) and Hugging
Face's CLIP processor. The low-resolution image is made from the same pixels inside the tower.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw

from hrvlm_jax.core.images import check_size, to_rgb
from hrvlm_jax.core.resample import CLIP_MEAN
from hrvlm_jax.core.strips import resize_part
from hrvlm_jax.parallel.rules import DEPTHWISE, WHOLE_VECTORS, Rule
from hrvlm_jax.systems.contract import Count
from hrvlm_jax.systems.grid import WHOLE, Grid, TokenMap
from hrvlm_jax.systems.llava_hr.config import LlavaHRConfig
from hrvlm_jax.systems.packing import Entry, Packing, Views, join
from hrvlm_jax.systems.pictures import background, bytes_of, check_elongation, on_square


def square_geometry(width: int, height: int, size: int) -> tuple[tuple[int, int], tuple[int, int]]:
  """((width, height) after resizing, (left, top) of the centre crop) of aspect mode 'square'."""
  short, long = min(width, height), max(width, height)
  longer = int(size * long / short)
  resized = (size, longer) if width <= height else (longer, size)
  return resized, ((resized[0] - size) // 2, (resized[1] - size) // 2)


def to_square(image: Image.Image, size: int, *, aspect: str = 'pad',
              mean: Sequence[float] = CLIP_MEAN) -> Image.Image:
  """The picture as RGB, size x size pixels: padded ('pad') or resized and cropped ('square').

  Raises:
    UserError: the picture is so elongated that the square, or the resized picture, would be huge.
  """
  check(*image.size, size, aspect=aspect)
  if aspect == 'pad':
    return on_square(image, size, mean)
  resized, (left, top) = square_geometry(*image.size, size)
  return resize_part(to_rgb(image), resized, (left, top, left + size, top + size))


def check(width: int, height: int, size: int, *, aspect: str) -> None:
  """Refuses an image without pixels, or too elongated for its square or its resized form.

  Raises:
    UserError: see `systems.pictures`.
  """
  check_size(width, height)
  check_elongation(width, height, (max(width, height),) * 2 if aspect == 'pad' else
                   square_geometry(width, height, size)[0])


def count(width: int, height: int, config: LlavaHRConfig) -> Count:
  """Every image is one view and costs the same number of tokens.

  Raises:
    UserError: see `check`.
  """
  check(width, height, config.image_size, aspect=config.aspect)
  return Count(1, config.tokens)


def views(images: Sequence[Image.Image], config: LlavaHRConfig) -> Views:
  """Arrays of one example: pixels uint8 [m s s 3], tokens int32 [m]."""
  return join([{'pixels': bytes_of(_square(image, config)), 'tokens': config.tokens}
               for image in images], packing(config))


def tokens(config: LlavaHRConfig) -> int:
  """Visual tokens of every image."""
  return config.tokens


def packing(config: LlavaHRConfig) -> Packing:
  """Images of all rows share their slots.

  The original encodes a blank image for a row without images and discards it; here such a row uses
  no slot and its positions are invalid.
  """
  return Packing(slots={'pixels': Entry((config.image_size, config.image_size, 3))},
                 each=config.tokens, tokens=config.tokens)


def grid(config: LlavaHRConfig) -> Grid | None:
  """One map, of the padded picture or of a centre crop; none where queries read the tokens."""
  if config.reduce == 'queries':
    return None
  pad = config.aspect == 'pad'
  return Grid(maps=(TokenMap(config.grid, config.grid, box=WHOLE if pad else None),),
              view=config.image_size, background=background(config.mean) if pad else None,
              std=config.std)


def rules(config: LlavaHRConfig) -> tuple[Rule, ...]:
  """Sharding rows of the adapters and the resampler."""
  del config
  return (Rule(r'.*/fast_conv/kernel', (), why=DEPTHWISE),
          Rule(r'.*/queries', (), why=WHOLE_VECTORS))


def overlay(image: Image.Image, config: LlavaHRConfig, info: Mapping[str, object]) -> Image.Image:
  """What the encoder saw, and below it one panel per adapter: where it injected, and its gate.

  A panel is the picture, darkened where little was injected; the bar under it runs from its middle
  to the gate's value, -1 at the left edge and +1 at the right (a vector gate: its mean). Without
  adapters, the square picture alone.
  """
  picture = _square(image, config)
  if 'gates' not in info:
    return picture
  gates = [float(np.asarray(g, np.float32)[0].mean()) for g in _per_adapter(info['gates'])]
  strengths = [np.asarray(s, np.float32)[0] for s in _per_adapter(info['injected'])]
  side = max(picture.width, 192)
  panel = side // len(gates)
  bar = max(8, panel // 8)
  canvas = Image.new('RGB', (side, side + panel + bar + 14), 'white')
  canvas.paste(picture.resize((side, side)), (0, 0))
  draw = ImageDraw.Draw(canvas)
  largest = max(float(s.max()) for s in strengths) or 1.0
  for number, (gate, strength) in enumerate(zip(gates, strengths, strict=True)):
    x, y = number * panel, side
    heat = Image.fromarray(np.uint8(np.clip(strength / largest, 0, 1) * 255))
    small = np.asarray(picture.resize((panel, panel)), np.float32)
    light = 0.15 + 0.85 * np.asarray(heat.resize((panel, panel)), np.float32)[..., None] / 255
    canvas.paste(Image.fromarray(np.uint8(small * light)), (x, y))
    middle, reach = x + panel // 2, int(gate * (panel // 2 - 2))
    draw.rectangle((x + 1, y + panel, x + panel - 2, y + panel + bar), outline='black')
    draw.rectangle((min(middle, middle + reach), y + panel + 2, max(middle, middle + reach),
                    y + panel + bar - 2), fill='seagreen' if gate >= 0 else 'firebrick')
    draw.text((x + 2, y + panel + bar + 1), f'gate {number + 1}: {gate:+.3f}', fill='black')
  return canvas


def _per_adapter(values) -> list:
  """[n k ...] or a list of [n ...] -> a list of [n ...]."""
  return list(values) if isinstance(values, (list, tuple)) else list(
    np.moveaxis(np.asarray(values), 1, 0))


def _square(image: Image.Image, config: LlavaHRConfig) -> Image.Image:
  return to_square(image, config.image_size, aspect=config.aspect, mean=config.mean)
