"""Images with captioned boxes: what PS3's pre-training reads.

A region record is an ordinary `Row` with one image and, in `extra`,

    boxes           [[x1, y1, x2, y2], ...], pixels of the stored image
    captions        one text per box
    global_caption  a text about the whole image, or absent
    type            where the record is from, or absent

so it is written by `build.build_records` and read by `tables.ArrayRecords` like any other row. The
JSON of the original's shards has the same values under other names (`from_published`). Source:
`NVlabs/PS3: train/README.md`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.data.rows import BadRow, ImageRef, Row, open_images

Box = tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Regions:
  """The annotations of one image; see the head of this module.

  Raises:
    UserError: numbers of boxes and captions that differ, malformed boxes or captions, nothing at
      all to learn from.
  """

  boxes: tuple[Box, ...] = ()
  captions: tuple[str, ...] = ()
  global_caption: str | None = None
  kind: str | None = None

  def __post_init__(self):
    if len(self.boxes) != len(self.captions):
      raise UserError(f'{len(self.boxes)} boxes and {len(self.captions)} captions; each box needs '
                      'one')
    for index, box in enumerate(self.boxes):
      if len(box) != 4 or not all(_finite(value) for value in box):
        raise UserError(f'box {index} is {list(box)}, expected four numbers x1, y1, x2, y2')
      if box[2] <= box[0] or box[3] <= box[1]:
        raise UserError(f'box {index} is {list(box)}: it has no area; expected x1 < x2, y1 < y2')
    wrong = [text for text in (*self.captions, self.global_caption)
             if text is not None and not isinstance(text, str)]
    if wrong:
      raise UserError(f'caption {wrong[0]!r} is {type(wrong[0]).__name__}, expected a text')
    if not self.boxes and self.global_caption is None:
      raise UserError('neither boxes nor a global caption')

  def extra(self) -> dict[str, Any]:
    """The fields of a row."""
    values = {'boxes': [list(box) for box in self.boxes], 'captions': list(self.captions),
              'global_caption': self.global_caption, 'type': self.kind}
    return {key: value for key, value in values.items() if value is not None}


def _finite(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def region_row(id: str, image: ImageRef, regions: Regions, where: str = '') -> Row:
  """A record of one image."""
  return Row(id, (image,), (), where, regions.extra())


def regions_of(row: Row) -> Regions:
  """The annotations of a row.

  Raises:
    BadRow: of kind 'regions': not such a record, or malformed.
  """
  if len(row.images) != 1:
    raise BadRow('regions', row.where, f'has {len(row.images)} images, expected one')
  values = row.extra
  try:
    return Regions(boxes=_boxes(values.get('boxes')), captions=_texts(values.get('captions')),
                   global_caption=values.get('global_caption'), kind=values.get('type'))
  except UserError as error:
    raise BadRow('regions', row.where, str(error)) from error


def from_published(values: Mapping[str, Any]) -> Regions:
  """The annotations of the original's JSON: `text` [k], `box` [k 4], `global_text`, `type`.

  Raises:
    UserError: malformed values.
  """
  return Regions(boxes=_boxes(values.get('box')), captions=_texts(values.get('text')),
                 global_caption=values.get('global_text'), kind=values.get('type'))


def _boxes(value: Any) -> tuple:
  if value is None:
    return ()
  if not _listed(value) or not all(_listed(box) for box in value):
    raise UserError(f'the boxes are {value!r:.80}, expected a list of [x1, y1, x2, y2]')
  return tuple(tuple(box) for box in value)


def _texts(value: Any) -> tuple:
  if value is None:
    return ()
  if not _listed(value):
    raise UserError(f'the captions are {value!r:.80}, expected a list of texts')
  return tuple(value)


def _listed(value: Any) -> bool:
  return isinstance(value, Sequence) and not isinstance(value, str | bytes)


@dataclasses.dataclass(frozen=True)
class RegionCheck:
  """What makes a region record bad (for `build.build_records` and `checks.check_source`): an image
  that cannot be decoded, or annotations that cannot be used."""

  def __call__(self, row: Row) -> None:
    """Raises:
      BadRow: what is wrong.
    """
    regions = regions_of(row)
    image = open_images(row)[0]
    outside = [list(box) for box in regions.boxes if box[0] >= image.width or box[2] <= 0
               or box[1] >= image.height or box[3] <= 0]
    if outside:
      raise BadRow('regions', row.where, f'box {outside[0]} lies outside the image of '
                   f'{image.width}x{image.height} pixels')
