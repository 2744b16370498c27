"""From a record to arrays: views, token ids, labels; one example at a time, NumPy only.

Systems are known through their `views` and `batch` functions alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from hrvlm_jax.core.images import MAX_PIXELS
from hrvlm_jax.data.packing import Size
from hrvlm_jax.data.rows import BadRow, Row, box_of, image_sizes, open_images
from hrvlm_jax.language.chat import IGNORE, Encoded
from hrvlm_jax.language.prompt import Text, choose_bucket, join_texts, pad_batch

TooLong = Literal['cut_text', 'cut_row', 'refuse']

@dataclasses.dataclass(frozen=True, kw_only=True)
class TextLimit:
  """What happens to a row that is longer than a model was trained on.

  Attributes:
    length: ids of a row; None: no limit but the largest bucket.
    policy: 'cut_text' cuts the text before the images take their slots, an image counting one
      (LLaVA, LLaVA-HR, MC-LLaVA; images whose place is cut away are left out); 'cut_row' cuts the
      finished row, visual tokens included (VILA, in training); 'refuse' makes it a bad row.
  """

  length: int | None = None
  policy: TooLong = 'cut_text'

  def __post_init__(self):
    if self.policy not in get_args(TooLong):
      raise ValueError(f'policy: expected one of {get_args(TooLong)}, got {self.policy!r}')
    if self.length is not None and self.length < 1:
      raise ValueError(f'length: expected at least 1 or None, got {self.length}')


@dataclasses.dataclass(frozen=True)
class Opened:
  """A row that was read: its text as ids, its decoded images, a box or None for each, and the
  encoder config of each where it was drawn."""

  row: Row
  encoded: Encoded
  images: Sequence[Image.Image]
  boxes: Sequence[Any]
  configs: Sequence[Any] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToExample:
  """A row of a source -> {'views', 'tokens', 'visual_index', 'labels'} of one example.

  Attributes:
    views: (images, encoder config) -> dict of arrays with 'tokens' per image.
    exif: 'apply' turns photographs upright, 'ignore' follows the originals.
    alpha, max_pixels: see `core.images.open_image`.
    inexact: decode JPEG files at a fraction of their size (`core.images.open_image`).
    max_length: the largest bucket; a row that is longer after `limit` is a bad row.
    limit: length of the text, as the original of the system treats it.
    boxes: hand the row's `box` (x0, y0, x1, y1 in pixels of its image) to `views`, for systems that
      learn where to look (VILA-HD).
    augment: a transform with `random_map({'images', 'boxes'}, rng)` (`data.background`).
    draw: setting of the encoder -> (lowest, highest) whole number; drawn uniformly for every image
      (`System.per_image`).
    count: (width, height, encoder config) -> `slots` and `tokens` of an image; for `measure`.
  """

  text: Text
  views: Callable[[Sequence[Image.Image], Any], dict[str, np.ndarray]]
  encoder: Any
  exif: str = 'apply'
  alpha: str = 'drop'
  max_pixels: int = MAX_PIXELS
  inexact: int | None = None
  max_length: int | None = None
  limit: TextLimit = TextLimit()
  boxes: bool = False
  augment: Any = None
  draw: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
  count: Callable[[int, int, Any], Any] | None = None

  def __call__(self, row: Row, rng: np.random.Generator | None = None) -> dict[str, Any]:
    """The example of a row.

    Raises:
      UserError: an image or a conversation that cannot be used (`BadRow`: with its kind).
    """
    text, views = self.join([self.open(row, rng)], packed=False)
    return {'views': views, **text}

  def open(self, row: Row, rng: np.random.Generator | None = None) -> Opened:
    """The row with its text tokenised and its images decoded.

    Raises:
      UserError: an image or a conversation that cannot be used (`BadRow`: with its kind).
    """
    encoded, rng = self.encode(row), np.random.default_rng() if rng is None else rng
    configs = self.drawn(row, rng)
    images = open_images(row, exif=self.exif, alpha=self.alpha, max_pixels=self.max_pixels,
                         inexact=self.inexact)[:self.images_of(row, encoded)]
    boxes = [None] * len(images)
    if self.boxes and (box := box_of(row)) is not None:
      if len(images) != 1:
        raise BadRow('form', row.where, f'has a box and {len(images)} images, expected one image')
      boxes = [box]
    if self.augment is not None:
      changed = self.augment.random_map({'images': images, 'boxes': boxes}, rng)
      images, boxes = changed['images'], changed['boxes']
    return Opened(row, encoded, images, boxes, configs and configs[:len(images)])

  def drawn(self, row: Row, rng: np.random.Generator) -> list[Any] | None:
    """The encoder config of each image of the row; None where nothing is drawn."""
    if not self.draw:
      return None
    numbers = {key: rng.integers(low, high + 1, len(row.images)).tolist()
               for key, (low, high) in self.draw.items()}
    return [dataclasses.replace(self.encoder, **{key: found[i] for key, found in numbers.items()})
            for i in range(len(row.images))]

  def join(self, opened: Sequence[Opened], *, packed: bool
           ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(text arrays, views) of one row of a batch.

    Args:
      packed: the row may hold several examples, with `segments` and `positions` (see
        `prompt.join_texts`); otherwise there is one.

    Raises:
      UserError: an image the system refuses, or that does not fit its text.
    """
    images = [image for item in opened for image in item.images]
    boxes = [box for item in opened for box in item.boxes]
    options = {'boxes': boxes} if self.boxes else {}
    if self.draw:
      options['configs'] = [config for item in opened for config in item.configs]
    views = self.views(images, self.encoder, **options)
    # Systems that read the image by cross-attention have no positions in the text.
    counts = views['tokens'].tolist() if 'tokens' in views else [0] * len(images)
    texts, totals = [], []
    for item in opened:
      own, counts = counts[:len(item.images)], counts[len(item.images):]
      texts.append(self.finish(item.row, item.encoded, own))
      totals.append(sum(own))
    return (join_texts(texts, totals) if packed else texts[0]), views

  def measure(self, row: Row, rng: np.random.Generator | None = None) -> Size:
    """What the row costs, from the headers of its images (decoded only where `augment` needs it).

    Raises:
      UserError: what the headers and the text show to be unusable.
    """
    if self.count is None:
      raise ValueError('measure needs the count function of the system (ToExample.count)')
    if self.augment is not None:
      opened = self.open(row, rng)
      encoded, sizes = opened.encoded, [image.size for image in opened.images]
      configs = opened.configs
    else:
      encoded, configs = self.encode(row), self.drawn(row, rng) if self.draw else None
      sizes = image_sizes(row, exif=self.exif, max_pixels=self.max_pixels,
                          inexact=self.inexact)[:self.images_of(row, encoded)]
    configs = [self.encoder] * len(sizes) if configs is None else configs[:len(sizes)]
    counts = [self.count(*size, config) for size, config in zip(sizes, configs, strict=True)]
    tokens = [count.tokens for count in counts]
    return Size(len(self.finish(row, encoded, tokens)['tokens']),
                sum(count.slots for count in counts), len(counts))

  def encode(self, row: Row) -> Encoded:
    """The row's text as ids and labels, within the limit.

    Raises:
      UserError: a conversation that cannot be used; too long, under 'refuse'.
    """
    length = self.limit.length
    encoded = self.text.encode(
      row.messages, len(row.images), system=row.system,
      max_length=length if self.limit.policy == 'cut_text' else None)
    if self.limit.policy == 'refuse' and length is not None and len(encoded.ids) > length:
      raise BadRow('too long', row.where, f'has {len(encoded.ids)} ids of text, at most {length} '
                   'are allowed (data.max_length)')
    self._check_targets(row, encoded.labels)
    return encoded

  def _check_targets(self, row: Row, labels: Sequence[int]) -> None:
    """The first place is no target: nothing comes before it. A box is learned without text, too."""
    if self.boxes and row.extra.get('box') is not None:
      return
    if all(label == IGNORE for label in labels[1:]):
      cut = '' if self.limit.length is None else f' within data.max_length={self.limit.length}'
      raise BadRow('no target', row.where, f'has no answer to learn{cut}')

  def images_of(self, row: Row, encoded: Encoded) -> int:
    """How many of the row's images its text still has a place for: a cut may drop the last ones."""
    count, limit = len(row.images), self.limit
    cut = limit.policy == 'cut_text' and limit.length is not None and (
      len(encoded.ids) >= limit.length)
    if not cut or self.text.image_id is None:
      return count
    return min(count, encoded.ids.count(self.text.image_id))

  def finish(self, row: Row, encoded: Encoded, counts: Sequence[int]) -> dict[str, np.ndarray]:
    """Arrays of the text with the visual positions of its images.

    Raises:
      UserError: placeholders do not fit the images; longer than the largest bucket.
    """
    arrays = self.text.expand(encoded, counts)
    if self.limit.policy == 'cut_row' and self.limit.length is not None:
      end = arrays.pop('prompt_end', None)
      arrays = {key: value[:self.limit.length] for key, value in arrays.items()}
      if end is not None:
        arrays['prompt_end'] = np.minimum(end, np.int32(len(arrays['tokens']) - 1))
    self._check_targets(row, arrays['labels'].tolist())
    length = len(arrays['tokens'])
    if self.max_length is not None and length > self.max_length:
      raise BadRow('too long', row.where, f'has {length} tokens with its images, the longest '
                   f'bucket is {self.max_length}')
    return arrays


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToBatch:
  """Examples -> one batch of static shapes.

  Attributes:
    batch: the system's function that packs views.
    lengths: bucket lengths of a row.
    slots: crop slots of the whole batch; None: the system's default.
    side: padding side of the text.
    parts: micro-batches; more than 1 adds a leading axis to every array, crop slots being shared
      within a micro-batch only.
  """

  batch: Callable[..., dict[str, np.ndarray]]
  encoder: Any
  lengths: tuple[int, ...]
  slots: int | None = None
  side: str = 'right'
  parts: int = 1

  def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    longest = max(len(example['tokens']) for example in examples)
    rows = pad_batch(examples, choose_bucket(longest, self.lengths), self.side)
    views = [example['views'] for example in examples]
    if self.parts == 1:
      return {**rows, 'views': self.batch(views, self.encoder, slots=self.slots)}
    size = len(examples) // self.parts
    groups = [views[i * size:(i + 1) * size] for i in range(self.parts)]
    packed = [self.batch(group, self.encoder, slots=self.slots) for group in groups]
    slots = max(len(part['pixels']) for part in packed)
    packed = [part if len(part['pixels']) == slots else
              self.batch(group, self.encoder, slots=slots)
              for part, group in zip(packed, groups, strict=True)]
    split = {key: value.reshape(self.parts, size, *value.shape[1:]) for key, value in rows.items()}
    stacked = {key: np.stack([part[key] for part in packed]) for key in packed[0]}
    return {**split, 'views': stacked}
