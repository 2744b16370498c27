"""PS3's pre-training samples: captions, crops with their boxes, ground-truth maps. NumPy, Pillow.

One record is an image with boxes (XYXY in its pixels), one caption per box, and optionally a
caption of the whole image. Source: `NVlabs/PS3: train/src/open_clip_train/data.py,
train/src/open_clip/transform.py`; paper 2503.19903, section 3.1. Axis letters: h w pixels, k boxes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
import re
from typing import Any, ClassVar, Literal

from jaxtyping import Float
import numpy as np
from PIL import Image

from hrvlm_jax.core import bounds
from hrvlm_jax.core.images import crop as cut, resize_exact, to_rgb
from hrvlm_jax.systems.ps3.records import Regions

Box = Sequence[float]
# Left-overs of the captioning model, which saw the whole image first and the crop second.
_PHRASES = ('The second image is a close-up of', 'The image is a close-up of')


def clean_caption(text: str) -> str:
  """Drops two stock phrases and a final sentence about visible text, unless it is the only one."""
  for phrase in _PHRASES:
    text = text.replace(phrase, '')
  sentences = split_sentences(text)
  if len(sentences) > 1 and 'text' in sentences[-1] and 'visible' in sentences[-1]:
    sentences = sentences[:-1]
  return ' '.join(sentences)


def split_sentences(text: str) -> list[str]:
  """Cuts after . ! ? where white space follows."""
  return re.split(r'(?<=[.!?])\s+', text)


def mask_sentences(text: str, randint: Callable[[int, int], int]) -> str:
  """A random run of sentences: it starts at one of the first three.

  Args:
    randint: (low, high) -> integer, both ends included; called for the start, then the number.
  """
  sentences = split_sentences(text)
  n = len(sentences)
  start = randint(0, min(n - 1, 2))
  number = randint(min(n, 1), max(n - start, 1))
  return ' '.join(sentences[start:start + number])


def join_captions(captions: Sequence[str], rng: np.random.Generator) -> str:
  """One caption for k boxes: of all their sentences, a k-th, in order. One caption is untouched."""
  if len(captions) == 1:
    return captions[0]
  sentences = [s for caption in captions for s in split_sentences(caption)]
  keep = np.sort(rng.choice(len(sentences), len(sentences) // len(captions), replace=False))
  return ' '.join(sentences[i] for i in keep)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Crop:
  """A window of an image, in its pixels."""

  top: int
  left: int
  height: int
  width: int


def sample_crop(
  width: int, height: int, rng: np.random.Generator, *,
  area: tuple[float, float] = (0.9, 1.0), ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Crop:
  """torchvision's random resized crop; panoramas get a centre crop of the nearest ratio."""
  for _ in range(10):
    target = width * height * rng.uniform(*area)
    aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
    if 0 < w <= width and 0 < h <= height:
      return Crop(top=int(rng.integers(0, height - h + 1)),
                  left=int(rng.integers(0, width - w + 1)), height=h, width=w)
  w, h = width, height
  if width / height < ratio[0]:
    h = round(w / ratio[0])
  elif width / height > ratio[1]:
    w = round(h * ratio[1])
  return Crop(top=(height - h) // 2, left=(width - w) // 2, height=h, width=w)


def crop_image(image: Image.Image, window: Crop, side: int) -> np.ndarray:
  """uint8 [side side 3]: the window, resized (bicubic, as Pillow <= 10.3), then RGB."""
  box = (window.left, window.top, window.left + window.width, window.top + window.height)
  return np.asarray(to_rgb(resize_exact(cut(image, box), (side, side))), np.uint8)


def crop_boxes(boxes: Sequence[Box], window: Crop, side: int) -> np.ndarray:
  """[k 4] boxes in pixels of the resized crop.

  Whole-number boxes stay whole numbers, truncated toward zero after the scaling, as the original's
  integer tensors; others are float32.
  """
  array = np.asarray(boxes)
  whole = np.issubdtype(array.dtype, np.integer)
  array = array.astype(np.int64 if whole else np.float32).reshape(-1, 4)
  origin = np.array([window.left, window.top] * 2, array.dtype)
  limit = np.array([window.width, window.height] * 2, array.dtype)
  array = np.clip(array - origin, 0, limit)
  factor = np.array([side / window.width, side / window.height] * 2)
  if whole:
    return np.trunc(array * factor).astype(np.int64)
  return (array * factor.astype(np.float32)).astype(np.float32)


def box_range(box: Box, height: int, width: int) -> np.ndarray:
  """int32 [4] (first row, last row + 1, first column, last column + 1) of the map of a box.

  Rows floor(y1) up to and including ceil(y2), columns likewise, inside the image.
  """
  x1, y1, x2, y2 = (float(v) for v in box)
  ends = (math.floor(y1), math.ceil(y2) + 1, math.floor(x1), math.ceil(x2) + 1)
  return np.clip(ends, 0, (height, height, width, width)).astype(np.int32)


def target_map(boxes: Sequence[Box], height: int, width: int) -> Float[np.ndarray, 'h w']:
  """Ones inside the `box_range` of every box.

  A box that clipping moved to the far edge leaves nothing, one at the near edge a strip of a pixel.
  """
  out = np.zeros((height, width), np.float32)
  for box in boxes:
    top, bottom, left, right = box_range(box, height, width)
    out[top:bottom, left:right] = 1
  return out


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
  """How a record becomes a training sample.

  Attributes:
    global_share: probability of the global caption where both kinds exist (the published script's;
      the option's own default is 0.5).
    boxes_per_sample: boxes drawn for a row of a local sample.
    rows_per_image: rows that a record gives, of one crop; more than one makes pairs within an image
      (see `losses.ContrastiveConfig`). The original draws one.
    prior_target: what the bottom-up selection learns: the drawn boxes, as the original, or all
      boxes of the image, as the paper says.
    clean: `clean_caption` and `mask_sentences`; off for captions that are no sentences.
  """

  global_share: float = 0.25
  boxes_per_sample: int = 1
  rows_per_image: int = 1
  prior_target: Literal['drawn', 'all'] = 'drawn'
  crop_area: tuple[float, float] = (0.9, 1.0)
  crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
  clean: bool = True

  BOUNDS: ClassVar = {
    'global_share': bounds.SHARE, 'boxes_per_sample': bounds.SIZE, 'rows_per_image': bounds.SIZE,
    'crop_area': '(0, 1]', 'crop_ratio': bounds.ABOVE_ZERO}

  def __post_init__(self):
    bounds.check(self)


def sample(image: Image.Image, regions: Regions, config: SampleConfig, rng: np.random.Generator, *,
           side: int) -> dict[str, Any]:
  """The training rows of one image and its annotations, all of one crop.

  Args:
    side: the largest scale, in pixels.

  Returns:
    pixels uint8 [side side 3], and per row r: captions (list of str), target uint8 [r side side],
    is_global bool [r]; with `prior_target` 'all' also prior_target uint8 [r side side].
  """
  rows = [_draw(regions, image.size, config, rng) for _ in range(config.rows_per_image)]
  window = sample_crop(*image.size, rng, area=config.crop_area, ratio=config.crop_ratio)
  covered = lambda boxes: target_map(crop_boxes(boxes, window, side), side, side).astype(np.uint8)
  out = {
    'pixels': crop_image(image, window, side),
    'captions': [join_captions(captions, rng) for _, captions, _ in rows],
    'target': np.stack([covered(boxes) for boxes, _, _ in rows]),
    'is_global': np.array([not local for _, _, local in rows]),
  }
  if config.prior_target == 'all':
    whole = covered(regions.boxes) if regions.boxes else out['target'][0]
    out['prior_target'] = np.stack([whole] * len(rows))
  return out


def _draw(regions: Regions, size: tuple[int, int], config: SampleConfig,
          rng: np.random.Generator):
  """(boxes, captions, whether they are local) of one row."""
  local = bool(regions.boxes)
  if regions.global_caption is not None and local:
    local = rng.random() >= config.global_share
  if local:
    number = min(config.boxes_per_sample, len(regions.boxes))
    picked = sorted(rng.choice(len(regions.boxes), number, replace=False).tolist())
    boxes = [regions.boxes[i] for i in picked]
    captions = [regions.captions[i] for i in picked]
  else:
    boxes = [(0, 0, *size)]
    captions = [regions.global_caption]
  if config.clean:
    draw = lambda low, high: int(rng.integers(low, high + 1))
    captions = [mask_sentences(clean_caption(text), draw) for text in captions]
  return boxes, captions, local


def collate(samples: Sequence[Mapping[str, Any]], tokenize) -> dict[str, np.ndarray]:
  """Samples -> a batch for `model.PS3`: pixels, tokens int32 [b t], target, is_global bool [b 1].

  Samples of several rows repeat their pixels and get `image` int32 [b 1], the number of the image
  that a row shows.

  Args:
    tokenize: captions -> int32 [b t] (`text.tokenizer`).
  """
  each = [len(s['captions']) for s in samples]
  repeat = lambda values: np.repeat(np.stack(values), each, axis=0)
  batch = {'pixels': repeat([s['pixels'] for s in samples]),
           'tokens': tokenize([text for s in samples for text in s['captions']]),
           'target': np.concatenate([s['target'] for s in samples]),
           'is_global': np.concatenate([s['is_global'] for s in samples])[:, None]}
  if 'prior_target' in samples[0]:
    batch['prior_target'] = np.concatenate([s['prior_target'] for s in samples])
  if max(each) > 1:
    batch['image'] = repeat(list(np.arange(len(samples), dtype=np.int32)))[:, None]
  return batch
