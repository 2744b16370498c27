"""How many images and boxes region records have, and how large the boxes are (PS3, Table 9)."""

from __future__ import annotations

from collections import defaultdict
import json
import pathlib

import numpy as np

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.data.rows import BadRow, image_sizes
from hrvlm_jax.systems.ps3.records import regions_of
from hrvlm_jax.systems.ps3.shards import open_regions

# The columns of the paper: longest side in pixels, from and below (the last one and at).
SIZES = {'below 1K': (0, 1000), '1K - 2K': (1000, 2000), '2K - 4K': (2000, 4097),
         'above 4K': (4097, 1 << 30)}


def run(*, records: str, out: str | None = None) -> list[str]:
  """Images, boxes and mean box of region records, by their type and the images' longest side.

  Args:
    records: region records, as `hrvlm curate` and `data build` write them.
    out: JSON file for the numbers.

  Raises:
    UserError: no record that can be used.
  """
  source = open_regions(records)
  images: dict[tuple[str, str], int] = defaultdict(int)
  boxes: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
  bad = 0
  for index in range(len(source)):
    try:
      row = source[index]
      found = regions_of(row)
      longest = max(image_sizes(row, exif='ignore')[0])  # boxes count the pixels as stored
    except BadRow:
      bad += 1
      continue
    size = next(name for name, (low, high) in SIZES.items() if low <= longest < high)
    key = (found.kind or 'no type', size)
    images[key] += 1
    boxes[key] += [(box[2] - box[0], box[3] - box[1]) for box in found.boxes]
  if not images:
    raise UserError(f'{records}: has no region record that can be used; hrvlm data check lists '
                    'what is wrong with each row')
  rows = []
  for kind, size in sorted(images, key=lambda k: (k[0], list(SIZES).index(k[1]))):
    sides = np.asarray(boxes[kind, size], np.float64).reshape(-1, 2)
    mean = sides.mean(axis=0).tolist() if len(sides) else None
    rows.append({'type': kind, 'size': size, 'images': images[kind, size], 'boxes': len(sides),
                 'mean_box': mean})
  if out is not None:
    pathlib.Path(out).write_text(json.dumps({'rows': rows, 'bad': bad}, indent=1) + '\n')
  lines = ['type, longest side: images, boxes, mean box']
  for row in rows:
    box = '-' if row['mean_box'] is None else '{:.0f} x {:.0f}'.format(*row['mean_box'])
    lines.append(f'{row["type"]}, {row["size"]}: {row["images"]}, {row["boxes"]}, {box}')
  return [*lines, f'{bad} records cannot be used'] if bad else lines
