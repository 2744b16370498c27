"""Captioned regions of unlabelled images, as PS3's pre-training needs them.

Photographs: masks -> a saliency map -> windows where it is densest -> a caption of each window and
of the whole image. Documents: lines of text with their boxes -> the lines are the captions. Masks,
captions and lines come from callables (`module:function`), because the paper's are models of other
projects; the built-in ones need no model. Source: paper 2503.19903, data curation. The paper does
not say how windows are scored: what is done here is said at `mask_density` and `windows`.

Axis letters: h w pixels, k regions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import pathlib
from typing import Any, Literal

from jaxtyping import Float
import numpy as np
from PIL import Image

from hrvlm_jax.core import json_text
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.images import to_rgb
from hrvlm_jax.data.rows import BadRow, Row, Source, open_images
from hrvlm_jax.systems.ps3.records import Regions, region_row

# What a caption without a model can say of a window: the colour nearest to its pixels, its ninth.
COLOURS = {
  'red': (200, 30, 35), 'green': (25, 140, 60), 'blue': (30, 75, 200), 'yellow': (245, 210, 45),
  'purple': (130, 50, 165), 'white': (242, 242, 242), 'black': (22, 22, 22),
  'orange': (240, 130, 25), 'pink': (246, 150, 190), 'turquoise': (40, 190, 190),
  'brown': (115, 70, 35),
}
NINTHS = ('at the top left', 'at the top', 'at the top right', 'on the left', 'in the centre',
          'on the right', 'at the bottom left', 'at the bottom', 'at the bottom right')
Window = tuple[int, int, int, int]  # x1, y1, x2, y2 in pixels
Segmenter = Callable[[Image.Image, 'MaskConfig'], Sequence[Any]]
Captioner = Callable[[Image.Image, Window | None], str]
LineReader = Callable[[Image.Image, Row], Sequence[tuple[Sequence[float], str]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskConfig:
  """Settings of SAM's automatic masks, handed to the segmenter; defaults of the paper's table
  (EfficientViT-SAM)."""

  points_per_side: int = 24
  points_per_batch: int = 128
  crop_n_layers: int = 1
  crop_n_points_downscale_factor: int = 1
  pred_iou_thresh: float = 0.6
  stability_score_thresh: float = 0.85
  min_mask_region_area: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurateConfig:
  """How regions are chosen.

  Attributes:
    boxes: most regions of an image; the paper's average is about four.
    box_area: pixels of a window; None: the mean box of the paper's table (424 x 438 for images up
      to 2000 pixels, 562 x 578 above), at most a quarter of the image.
    aspects: width / height of the windows.
    stride: windows begin at multiples of it.
    overlap: most intersection over union of two regions of an image.
    min_side, max_side: images with a longest side outside are left out (1K to 4K).
    min_letters: documents: shorter lines are no caption.
    masks: for the segmenter.
  """

  boxes: int = 4
  box_area: int | None = None
  aspects: tuple[float, ...] = (0.4, 0.64, 1.0, 1.56, 2.5)
  stride: int = 15
  overlap: float = 0.2
  min_side: int = 1000
  max_side: int = 4096
  min_letters: int = 4
  masks: MaskConfig = MaskConfig()

  def __post_init__(self):
    problems = [f'{name} must be at least 1, got {getattr(self, name)}'
                for name in ('boxes', 'stride', 'min_side') if getattr(self, name) < 1]
    if self.box_area is not None and self.box_area < 1:
      problems.append(f'box_area must be at least 1 pixel, got {self.box_area}')
    if not self.aspects or min(self.aspects) <= 0:
      problems.append(f'aspects must be positive, got {self.aspects}')
    if not 0 <= self.overlap < 1:
      problems.append(f'overlap must lie in [0, 1), got {self.overlap}')
    if self.max_side < self.min_side:
      problems.append(f'max_side {self.max_side} is below min_side {self.min_side}')
    if problems:
      raise UserError('curate: ' + '; '.join(problems))


def edge_density(image: Image.Image) -> Float[np.ndarray, 'h w']:
  """Saliency without a segmenter: strength of brightness edges, the strongest tenth cut off.

  Text, faces and small things have many edges; sky, walls and water few.
  """
  grey = np.asarray(to_rgb(image).convert('L'), np.float32)
  if min(grey.shape) < 2:
    return np.zeros_like(grey)
  rows, columns = np.gradient(grey)
  strength = np.hypot(rows, columns)
  limit = float(np.quantile(strength, 0.9))
  return np.minimum(strength, limit) if limit else strength


def mask_density(masks: Sequence[Any], size: tuple[int, int]) -> Float[np.ndarray, 'h w']:
  """Saliency of masks: every mask spreads a weight of one over its pixels.

  A window's sum is then the number of masks in it, parts counted: high where masks are small or
  dense, which is how the paper describes its salient regions.

  Args:
    masks: bool [h w], or SAM's records with one under 'segmentation'.
    size: (width, height) of the image.

  Raises:
    UserError: a mask of another shape.
  """
  total = np.zeros((size[1], size[0]), np.float32)
  for number, entry in enumerate(masks):
    mask = np.asarray(entry['segmentation'] if isinstance(entry, Mapping) else entry)
    if mask.shape != total.shape:
      raise UserError(f'mask {number} has shape {mask.shape}, the image is {total.shape} (rows, '
                      'columns); a segmenter returns masks in the pixels of its image')
    area = int(np.count_nonzero(mask))
    if area:
      total[mask.astype(bool)] += 1 / area
  return total


def windows(saliency: Float[np.ndarray, 'h w'], config: CurateConfig) -> list[Window]:
  """The windows with the largest mean saliency, best first; none where nothing is salient.

  All windows have about the same area and one of a few shapes (published examples are 360 x 240,
  180 x 450 and 450 x 180). They are taken greedily, each overlapping those before it only a little.
  """
  height, width = saliency.shape
  table = np.zeros((height + 1, width + 1), np.float64)
  table[1:, 1:] = saliency.cumsum(axis=0, dtype=np.float64).cumsum(axis=1)
  boxes, scores = [], []
  for w, h in dict.fromkeys(_shapes(width, height, config)):
    xs = _starts(width, w, config.stride)
    ys = _starts(height, h, config.stride)
    inside = (table[ys[:, None] + h, xs + w] - table[ys[:, None], xs + w]
              - table[ys[:, None] + h, xs] + table[ys[:, None], xs])
    y, x = (a.ravel() for a in np.meshgrid(ys, xs, indexing='ij'))
    boxes.append(np.stack([x, y, x + w, y + h], axis=1))
    scores.append((inside / (w * h)).ravel())
  boxes, scores = np.concatenate(boxes), np.concatenate(scores)
  order = np.argsort(-scores, kind='stable')
  boxes, scores = boxes[order], scores[order]
  chosen: list[Window] = []
  free = scores > 0
  while len(chosen) < config.boxes and free.any():
    best = boxes[int(np.argmax(free))]
    chosen.append(tuple(int(v) for v in best))
    free &= _overlap(boxes, best) <= config.overlap
  return chosen


def _shapes(width: int, height: int, config: CurateConfig):
  area = config.box_area
  if area is None:
    area = 424 * 438 if max(width, height) <= 2000 else 562 * 578
  area = min(area, width * height / 4)
  for aspect in config.aspects:
    w = min(width, max(1, round((area * aspect) ** 0.5)))
    yield w, min(height, max(1, round(area / w)))


def _starts(length: int, window: int, stride: int) -> np.ndarray:
  starts = np.arange(0, length - window + 1, stride)
  last = length - window
  return starts if starts[-1] == last else np.append(starts, last)


def _overlap(boxes: np.ndarray, box: np.ndarray) -> np.ndarray:
  """Intersection over union of [k 4] boxes with one."""
  low, high = np.maximum(boxes[:, :2], box[:2]), np.minimum(boxes[:, 2:], box[2:])
  shared = np.clip(high - low, 0, None).prod(axis=1)
  area = lambda b: (b[..., 2] - b[..., 0]) * (b[..., 3] - b[..., 1])
  return shared / (area(boxes) + area(box) - shared)


def plain_caption(image: Image.Image, window: Window | None) -> str:
  """A caption without a model: place, colours and how busy it is. For trials; a vision-language
  model belongs here."""
  rgb = to_rgb(image)
  part = rgb if window is None else rgb.crop(window)
  small = np.asarray(part.resize((16, 16)), np.float32).reshape(-1, 3)
  names, values = list(COLOURS), np.array(list(COLOURS.values()), np.float32)
  nearest = ((small[:, None] - values) ** 2).sum(-1).argmin(1)
  common = np.bincount(nearest, minlength=len(names)).argsort()[::-1][:2]
  colours = ' and '.join(names[i] for i in common if (nearest == i).any())
  busy = 'fine detail' if float(edge_density(part).mean()) > 8 else 'even areas'
  if window is None:
    return f'An image with {colours}. It has {busy}.'
  x, y = (window[0] + window[2]) / 2, (window[1] + window[3]) / 2
  column, row = (min(2, int(3 * c // n)) for c, n in ((x, rgb.width), (y, rgb.height)))
  return f'A {colours} part {NINTHS[3 * row + column]}. It has {busy}.'


def page_lines(image: Image.Image, row: Row) -> list[tuple[Sequence[float], str]]:
  """Lines that came with the row (`data.pdf`), in pixels of its image.

  Raises:
    BadRow: a page without a text layer.
  """
  del image
  lines = row.extra.get('lines') or []
  if not lines:
    raise BadRow('regions', row.where, 'has no text layer (a scan?); give --ocr module:function')
  return [(line['box'], line['text']) for line in lines]


def sidecar_lines(image: Image.Image, row: Row) -> list[tuple[Sequence[float], str]]:
  """Lines of a document from the JSON file beside its image: {"lines": [{"box", "text"}]}.

  Boxes are x1, y1, x2, y2 in pixels, or in 0..1 of the image's sides when the file says
  "relative": true.

  Raises:
    BadRow: no such file, or malformed.
  """
  ref = row.images[0]
  if ref.folder is None or ref.path is None:
    raise BadRow('form', row.where, 'its image is no file, so no JSON lies beside it; give --ocr '
                 'module:function')
  path = (pathlib.Path(ref.folder) / ref.path).with_suffix('.json')
  try:
    values = json_text.loads(path.read_text('utf-8'))
    scale = [image.width, image.height] * 2 if values.get('relative') else [1] * 4
    return [([v * s for v, s in zip(line['box'], scale, strict=True)], line['text'])
            for line in values['lines']]
  except OSError as error:
    raise BadRow('path', row.where, f'{path.name} is missing beside it, expected the lines of text '
                 'of the document') from error
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise BadRow('form', row.where, f'{path.name}: expected {{"lines": [{{"box": [x1, y1, x2, y2], '
                 f'"text": "..."}}]}} ({error!r})') from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curated:
  """A source of region records made from a source of images.

  Every record is a function of its image alone (and of what the callables answer), so a build that
  was stopped goes on where it was.

  Attributes:
    kind: 'photographs' or 'documents'.
    segmenter: (image, `MaskConfig`) -> masks; None: edge density.
    captioner: (image, window, or None for the whole image) -> caption.
    reader: (image, row) -> lines of a document, (box, text) each.
  """

  source: Source
  config: CurateConfig = CurateConfig()
  kind: Literal['photographs', 'documents'] = 'photographs'
  segmenter: Segmenter | None = None
  captioner: Captioner = plain_caption
  reader: LineReader = sidecar_lines

  def __len__(self):
    return len(self.source)

  def __getitem__(self, index: int) -> Row:
    """Raises:
      BadRow: an image that cannot be used: too small or large, nothing salient, no lines.
    """
    row = self.source[index]
    if len(row.images) != 1:
      raise BadRow('form', row.where, f'has {len(row.images)} images, expected one')
    # Boxes will count the pixels as they are stored, so EXIF turns nothing here.
    image = to_rgb(open_images(row, exif='ignore')[0])
    longest = max(image.size)
    if not self.config.min_side <= longest <= self.config.max_side:
      raise BadRow('size', row.where, f'has {image.width}x{image.height} pixels; expected a '
                   f'longest side of {self.config.min_side} to {self.config.max_side}')
    find = self._document if self.kind == 'documents' else self._photograph
    found = find(image, row)
    return region_row(row.id, row.images[0], found, row.where)

  def _photograph(self, image: Image.Image, row: Row) -> Regions:
    if self.segmenter is None:
      density = edge_density(image)
    else:
      density = mask_density(self.segmenter(image, self.config.masks), image.size)
    boxes = windows(density, self.config)
    if not boxes:
      raise BadRow('regions', row.where, 'shows nothing salient')
    return Regions(boxes=tuple(boxes), captions=tuple(self.captioner(image, b) for b in boxes),
                   global_caption=self.captioner(image, None), kind='photograph')

  def _document(self, image: Image.Image, row: Row) -> Regions:
    lines = [(_inside(box, image), ' '.join(str(text).split()))
             for box, text in self.reader(image, row)]
    lines = [(box, text) for box, text in lines
             if box is not None and sum(c.isalnum() for c in text) >= self.config.min_letters]
    if not lines:
      raise BadRow('regions', row.where, 'has no line of text long enough for a caption')
    # Evenly over the page: neighbouring lines say much the same about where to look.
    count = min(self.config.boxes, len(lines))
    picked = [lines[i] for i in np.linspace(0, len(lines) - 1, count).round().astype(int)]
    return Regions(boxes=tuple(box for box, _ in picked),
                   captions=tuple(text for _, text in picked), kind='document')


def _inside(box: Sequence[float], image: Image.Image) -> tuple[float, ...] | None:
  """The box cut to the image; None when nothing is left."""
  x1, y1, x2, y2 = (float(v) for v in box)
  x1, x2 = (min(max(v, 0.0), image.width) for v in (x1, x2))
  y1, y2 = (min(max(v, 0.0), image.height) for v in (y1, y2))
  return (x1, y1, x2, y2) if x2 > x1 and y2 > y1 else None
