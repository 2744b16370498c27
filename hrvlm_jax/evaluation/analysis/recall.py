"""How many patches of ground-truth regions a model selects (PS3, Table 7), on one's own records.

The records are those of PS3's pre-training (`hrvlm curate` writes them): images with captioned
boxes. A PS3 with its text tower is measured at any share of the patches and in all three ways
(`systems.ps3.recall`); a VILA-HD as it is set up, its question being the caption.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses
import json
import pathlib

import jax
import numpy as np

from hrvlm_jax.checkpoint import averages
from hrvlm_jax.core import resample
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.data.rows import BadRow, open_images
from hrvlm_jax.systems.ps3 import recall
from hrvlm_jax.systems.ps3.records import regions_of
from hrvlm_jax.systems.ps3.shards import open_regions
from hrvlm_jax.systems.ps3.text import tokenizer
from hrvlm_jax.vlm import model as vlm
from hrvlm_jax.vlm.answer import Answerer, find_tokenizer, model_config


@dataclasses.dataclass(frozen=True)
class Region:
  """One box of a record: its image (PIL), the box in its pixels, and what is said of it."""

  image: object
  box: tuple[float, ...]
  caption: str


def regions(source, limit: int | None = None) -> Iterator[Region]:
  """The boxes of records in their order; records that cannot be used are left out.

  Args:
    limit: so many boxes at most.
  """
  count = 0
  for index in range(len(source)):
    try:
      row = source[index]
      found, image = regions_of(row), open_images(row, exif='ignore')[0]
    except BadRow:
      continue
    for box, caption in zip(found.boxes, found.captions, strict=True):
      if count == limit:
        return
      count += 1
      yield Region(image, tuple(box), caption)


def run(*, checkpoint: str, records: str, shares: Sequence[float] = (0.44,), candidates: int = 8,
        limit: int | None = None, batch_size: int = 4, out: str | None = None) -> list[str]:
  """Share of the patches of ground-truth regions that a model selects, on your own records.

  Args:
    checkpoint: a PS3 with its text tower, or a VILA-HD.
    records: region records, as `hrvlm curate` and `data build` write them.
    shares: of all high-resolution patches that are selected (0..1).
    candidates: of a PS3: captions among which a region's own must score best.
    limit: so many boxes.
    batch_size: regions at a time.
    out: JSON file for the numbers.

  Raises:
    UserError: no usable record, a model that does not select, shares outside 0..1.
  """
  if not shares or min(shares) <= 0 or max(shares) > 1:
    raise UserError(f'--shares: expected numbers above 0 and at most 1, got {list(shares)}')
  found = list(regions(open_regions(records), limit))
  if not found:
    raise UserError(f'{records}: has no region record with a box that can be used; hrvlm data '
                    'check lists what is wrong with each row')
  config = model_config(checkpoint)
  if config.system == 'ps3' and config.encoder.text is not None:
    scores = _ps3(checkpoint, config, found, shares, candidates, batch_size)
  elif config.system == 'vila_hd':
    scores = [_vila_hd(checkpoint, config, found, share, batch_size) for share in shares]
  else:
    raise UserError(f'{checkpoint}: {config.system} does not select patches; expected a PS3 with '
                    'its text tower, or a VILA-HD')
  if out is not None:
    pathlib.Path(out).write_text(json.dumps(
      {'regions': len(found), 'scores': scores}, indent=1) + '\n')
  return [f'{len(found)} regions'] + [
    '{way:<9} {share:>6.1%} of the patches: recall {recall:.1%}'.format(**score)
    + (f', own caption best {score["accuracy"]:.1%}' if 'accuracy' in score else '')
    for score in scores]


def _ps3(checkpoint, config, found: Sequence[Region], shares, candidates: int, batch_size: int):
  fn = vlm.build(config)
  params = averages.load_params(checkpoint, fn.abstract)
  tokenize = tokenizer(find_tokenizer(checkpoint), config.encoder.text)
  captions = list(dict.fromkeys(region.caption for region in found))
  batches = recall.own_probes(
    [(region.image, region.box, region.caption) for region in found], captions, config.encoder,
    tokenize, candidates=candidates, batch_size=batch_size)
  scores = recall.measure(fn, params, batches, encoder=config.encoder, shares=shares)
  return [dataclasses.asdict(score) for score in scores]


def _vila_hd(checkpoint, config, found: Sequence[Region], share: float, batch_size: int):
  encoder = config.encoder
  cells = sum(rows * columns for rows, columns in encoder.plan().grids[1:])
  answerer = Answerer.load(checkpoint, exif='ignore', encoder_options={
    'tokens': round(share * cells), 'select_target': False})
  way = {'after_prompt': 'top_down', 'after_image': 'bottom_up'}.get(encoder.mode, encoder.mode)
  shares = []
  for start in range(0, len(found), batch_size):
    shares += selected(answerer, found[start:start + batch_size])
  return {'way': way, 'share': float(share), 'tokens': round(share * cells),
          'recall': round(float(np.mean(shares)), 4)}


def selected(answerer: Answerer, found: Sequence[Region]) -> list[float]:
  """Share of the high-resolution patches under each region's box that a VILA-HD selects.

  The caption is the question. The patches of all scales and looks count.

  Raises:
    UserError: another model.
  """
  if answerer.config.system != 'vila_hd':
    raise UserError(f'{answerer.config.system}: does not select patches; expected a VILA-HD')
  batch = answerer.batch([((region.image,), region.caption) for region in found])
  maps = [np.asarray(m) for m in jax.device_get(answerer.generator.info(batch)['maps'])]
  shares = []
  for row, region in enumerate(found):
    target = recall.region_map(region.image.size, region.box, answerer.config.encoder.side)
    chosen = wanted = 0
    for one in maps:
      side = one.shape[1]
      touched = np.asarray(resample.area(target[None].astype(np.float32), side, side))[0] > 0
      wanted += touched.sum()
      chosen += (touched & (one[row] > 0)).sum()
    shares.append(float(chosen / max(wanted, 1)))
  return shares
