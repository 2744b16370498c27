"""The batches of a run config: source, transform, order, hosts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import math

import jax
import numpy as np
from PIL import Image

from hrvlm_jax.core.errors import UserError, raise_all
from hrvlm_jax.core.images import MAX_PIXELS
from hrvlm_jax.data import pipeline
from hrvlm_jax.data.packed import RowMaker
from hrvlm_jax.data.packing import RowPacker
from hrvlm_jax.data.sources import open_source
from hrvlm_jax.data.transforms import TextLimit, ToBatch, ToExample
from hrvlm_jax.language.prompt import tokenizer_of
from hrvlm_jax.parallel.layout import Layout
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.contract import System
from hrvlm_jax.systems.objective import BatchShapes
from hrvlm_jax.training.config import RunConfig
from hrvlm_jax.training.objectives import objective_of
from hrvlm_jax.vlm.answer import text_of

ROW_KEYS = {'tokens': np.int32, 'visual_index': np.int32, 'valid': np.bool_, 'labels': np.int32}


def make_batches(config: RunConfig, layout: Layout | None = None, *,
                 own: Callable[[int], Sequence[int]] | None = None) -> pipeline.Batches:
  """The checkpointable iterator over training batches of a config, those of its objective.

  Args:
    layout: of a run; the shards that are made are those that the devices of this process need.
    own: without a layout, the shards to make (see `pipeline.Options`); default: all.

  Raises:
    UserError: data that cannot be opened, or settings the system cannot follow.
  """
  check_draw(config, registry.get(config.model.system))
  own = own if layout is None else layout.parts
  return objective_of(config.training).batches(config, layout=layout, own=own)


def batch_shapes(config: RunConfig, rows: int, **options) -> BatchShapes:
  """The shapes of the batches of a config's objective, see `Objective.batch_shapes`."""
  return objective_of(config.training).batch_shapes(config, rows, **options)


def picture_words(config: RunConfig) -> list[str]:
  """What the largest picture may take, where `data.max_pixels` is above the default."""
  data = config.data
  if data.max_pixels <= MAX_PIXELS:
    return []
  # Decoded in its own mode (up to 4 bytes a pixel), then as RGB.
  gib = 7 * data.max_pixels / 2**30
  where = f'each of {data.workers} data workers' if data.workers else 'this process'
  return [f'data.max_pixels={data.max_pixels:,}: a picture of that size takes up to {gib:.1f} GiB '
          f'while it is read, in {where}']


def conversations(config: RunConfig, *, layout: Layout | None = None,
                  own: Callable[[int], Sequence[int]] | None = None) -> pipeline.Batches:
  """Batches of conversations about images, see `Objective.batches`.

  With `data.packing`, where all hosts find the same shapes, a host makes only its shards of a batch
  (`Batches.own`); otherwise the whole.

  Raises:
    UserError: data that cannot be opened, or settings the system cannot follow.
  """
  system, data, training = registry.get(config.model.system), config.data, config.training
  if data.boxes and not system.boxes:
    raise UserError(f'data.boxes: system {config.model.system!r} does not learn where to look; '
                    'remove it')
  tokenizer, rows = tokenizer_of(data.tokenizer), config.model.text.vocab_size
  if tokenizer.vocab_size > rows:  # a lookup beyond the table would give NaN
    raise UserError(f'data.tokenizer: {data.tokenizer} has ids up to {tokenizer.vocab_size - 1}, '
                    f'model.text.vocab_size is {rows}; use the tokenizer that belongs to the model')
  text = text_of(config.model, tokenizer)
  example = ToExample(text=text, views=system.views, count=system.count,
                      encoder=config.model.encoder, **data.reading, inexact=data.inexact_decode,
                      max_length=max(data.lengths),
                      limit=TextLimit(length=data.max_length, policy=data.too_long),
                      boxes=data.boxes, augment=data.background, draw=data.draw)
  batch = ToBatch(batch=system.batch, encoder=config.model.encoder, lengths=data.lengths,
                  slots=data.slots, parts=training.accumulate)
  packed = _packed(config, system, example, 1 if layout is None else layout.shards)
  if packed is None and layout is not None:
    own = None
  if packed is None and own is not None:
    raise ValueError('hosts agree on shapes only with data.packing; without it each makes the '
                     'whole batch')
  return pipeline.build(
    open_source(data.train, images=data.images, split=data.split, fields=data.fields), example,
    pipeline.Options(batch_size=training.batch_size, seed=config.seed, shuffle=data.shuffle,
                     order=data.order, group=data.group, shards=data.shards, own=own,
                     workers=data.workers, bad_rows=data.bad_rows),
    collate=batch, packed=packed)


def conversation_shapes(config: RunConfig, rows: int, *, length: int | None = None,
                        image: tuple[int, int] = (1024, 768), images: int = 1) -> BatchShapes:
  """The shapes of a batch of conversations, see `Objective.batch_shapes`.

  They come from the system's own `views` and `batch` functions, run on two and on four blank images
  and continued to any number of rows.

  Raises:
    UserError: the visual tokens alone do not fit into the bucket.
  """
  system, encoder = registry.get(config.model.system), config.model.encoder
  check_draw(config, system)
  # Room for the largest that is drawn.
  highest = {key: high for key, (_, high) in config.data.draw.items()}
  encoder = dataclasses.replace(encoder, **highest)
  length = length or max(config.data.lengths)
  example = system.views([Image.new('RGB', image)] * images, encoder)
  count = system.count(*image, encoder)
  if config.model.fusion.positions(count.tokens * images) > length:
    raise UserError(f'bucket of {length} places: {images} image(s) of {image[0]} x {image[1]} '
                    f'alone take {count.tokens * images} tokens')
  two, four = (system.batch([example] * n, encoder, slots=n * images * max(count.slots, 1))
               for n in (2, 4))

  def shape(a, b):
    a, b = np.asarray(a), np.asarray(b)
    sizes = tuple(x + (y - x) // 2 * (rows - 2) for x, y in zip(a.shape, b.shape))
    return jax.ShapeDtypeStruct(sizes, a.dtype)

  text = {key: jax.ShapeDtypeStruct((rows, length), dtype) for key, dtype in ROW_KEYS.items()}
  return BatchShapes(text | {'views': jax.tree.map(shape, two, four)}, length,
                     f'{images} image(s) of {image[0]} x {image[1]}')


def check_draw(config: RunConfig, system: System) -> None:
  """Raises:
    UserError: `data.draw` names settings that the system does not draw, or no range of them.
  """
  problems = []
  for key, (low, high) in config.data.draw.items():
    if key not in system.per_image:
      allowed = ', '.join(system.per_image) or 'none'
      problems.append(f'{key}: system {system.name!r} draws {allowed}; remove it')
    elif low > high:
      problems.append(f'{key}: found ({low}, {high}), expected the lowest value first')
    else:
      try:
        for value in (low, high):
          dataclasses.replace(config.model.encoder, **{key: value})
      except ValueError as error:
        problems.append(f'{key}: ({low}, {high}): {error}')
  raise_all('data.draw', problems)


def _packed(config: RunConfig, system: System, example: ToExample, devices: int
            ) -> RowMaker | None:
  data, training = config.data, config.training
  if not data.packing.active:
    return None
  problems = []
  if data.packing.rows is not None:
    if why := config.model.fusion.unpackable:
      problems.append(f'data.packing.rows: {why}; remove it')
  if data.order == 'grouped' and data.packing.window > 1:
    problems.append('data.packing.window: would undo the groups of data.order=grouped; expected 1')
  raise_all('packing', problems)
  each = (data.packing.rows or training.batch_size) // training.accumulate
  shards = 1 if system.shift is None else math.gcd(
    data.shards, each, training.batch_size // training.accumulate)
  packer = RowPacker(batch_size=training.batch_size, packing=data.packing, lengths=data.lengths,
                     parts=training.accumulate, shards=shards,
                     share=devices // math.gcd(devices, shards))
  return RowMaker(packer=packer, example=example, views=system.views, batch=system.batch,
                  encoder=config.model.encoder, shift=system.shift)
