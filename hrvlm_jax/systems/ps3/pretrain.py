"""The objective `ps3_pretrain`: region records -> augmented samples -> arrays -> three losses.

The pieces (captions, joint crops, ground-truth maps) are `systems.ps3.data`, the losses
`systems.ps3.losses`; order, workers, faults and exact resume are `data.pipeline`'s, as in every
other stage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
from typing import Any

import jax
import numpy as np

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.execution import HERE, Execution
from hrvlm_jax.core.images import MAX_PIXELS
from hrvlm_jax.data import pipeline
from hrvlm_jax.data.rows import Row, open_images
from hrvlm_jax.language.prompt import tokenizer_of
from hrvlm_jax.systems.objective import BatchShapes, Objective, ObjectiveOptions
from hrvlm_jax.systems.ps3 import data, losses
from hrvlm_jax.systems.ps3.config import PS3Config
from hrvlm_jax.systems.ps3.records import regions_of
from hrvlm_jax.systems.ps3.shards import open_regions
from hrvlm_jax.systems.ps3.text import tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToSample:
  """A region record -> a training sample (see `systems.ps3.data.sample`)."""

  config: data.SampleConfig
  side: int
  alpha: str = 'drop'
  max_pixels: int = MAX_PIXELS

  def __call__(self, row: Row, rng: np.random.Generator) -> dict[str, Any]:
    regions = regions_of(row)
    # Boxes count the pixels as they are stored, so EXIF turns nothing here.
    image = open_images(row, exif='ignore', alpha=self.alpha, max_pixels=self.max_pixels)[0]
    made = data.sample(image, regions, self.config, rng, side=self.side)
    return made | {'counted': np.array([True])}


def blank(sample: Mapping[str, Any]) -> dict[str, Any]:
  """The stand-in of a record that cannot be used: it takes a row, and no part in any loss."""
  return dict(sample) | {'counted': np.array([False])}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToBatch:
  """Samples -> arrays of a batch, with a leading axis of micro-batches for `parts` > 1."""

  tokenize: Callable[[Sequence[str]], np.ndarray]
  parts: int = 1

  def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    batch = data.collate(samples, self.tokenize)
    each = [len(sample['captions']) for sample in samples]
    batch['counted'] = np.repeat(np.stack([sample['counted'] for sample in samples]), each, axis=0)
    if self.parts == 1:
      return batch
    return {key: x.reshape(self.parts, -1, *x.shape[1:]) for key, x in batch.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainOptions(ObjectiveOptions):
  """What the pre-training is told beyond the sections of every run.

  Attributes:
    annotations: tar shards that hold the JSON, where it is not beside the images of `data.train`.
    regions: captions, crops and maps of the samples.
    contrast: weights and switches of the losses.
  """

  name: str = 'ps3_pretrain'
  annotations: str | None = None
  regions: data.SampleConfig = data.SampleConfig()
  contrast: losses.ContrastiveConfig = losses.ContrastiveConfig()


class Pretrain(Objective):
  """Images and captions find each other, and captions find their boxes.

  Contrast joins all rows of a step: its micro-batches cannot be summed one by one, see
  `losses.accumulated`.
  """

  Options = PretrainOptions

  def batches(self, run: Any, *, layout: Any = None,
              own: Callable[[int], Sequence[int]] | None = None) -> pipeline.Batches:
    """See `Objective.batches`.

    Raises:
      UserError: a model without a text tower, a vocabulary that does not fit it, or data that
        cannot be opened.
    """
    del layout
    encoder, options = run.model.encoder, run.data
    if not isinstance(encoder, PS3Config) or encoder.text is None or run.model.text is not None:
      raise UserError(f'training.objective=ps3_pretrain: model.system {run.model.system!r} has no '
                      'text tower of its own; use system ps3 with encoder.text and no language '
                      'model')
    vocabulary = tokenizer_of(options.tokenizer)
    if vocabulary.vocab_size > encoder.text.vocab_size:
      raise UserError(f'data.tokenizer={options.tokenizer} gives ids up to '
                      f'{vocabulary.vocab_size - 1}, model.encoder.text.vocab_size is '
                      f'{encoder.text.vocab_size}; use the tokenizer that belongs to the model')
    collate = ToBatch(tokenize=tokenizer(vocabulary, encoder.text), parts=run.training.accumulate)
    return pipeline.build(
      open_regions(options.train, annotations=self.options.annotations),
      ToSample(config=self.options.regions, side=encoder.scales[-1], alpha=run.data.alpha,
               max_pixels=run.data.max_pixels),
      pipeline.Options(batch_size=run.training.batch_size, seed=run.seed, shuffle=options.shuffle,
                       workers=options.workers, own=own, shards=math.gcd(
                         options.shards, run.training.batch_size // run.training.accumulate),
                       bad_rows=options.bad_rows),
      collate=collate, blank=blank)

  def batch_shapes(self, run: Any, rows: int, **options) -> BatchShapes:
    """Images of the largest scale, captions, maps of the boxes."""
    encoder, length = run.model.encoder, run.model.encoder.text.context
    side = encoder.scales[-1]
    shapes = {'pixels': ((side, side, 3), np.uint8), 'tokens': ((length,), np.int32),
              'target': ((side, side), np.uint8), 'is_global': ((1,), np.bool_),
              'counted': ((1,), np.bool_)}
    arrays = {key: jax.ShapeDtypeStruct((rows, *shape), dtype)
              for key, (shape, dtype) in shapes.items()}
    return BatchShapes(arrays, length, f'images of {side} x {side}')

  def loss(self, fn, params, batch, *, key=None, ex: Execution = HERE,
           chunk: int = 1024):
    """(total loss times rows, rows). Contrast is over the rows at hand."""
    del key
    return losses.summed(
      losses.pretrain_losses(fn, params, batch, self._config(chunk), ex=ex), batch)

  def value_and_grad(self, fn, merge, trained, batch, key, *, parts=1, mean=False, ex=HERE,
                     chunk=1024):
    """See `Objective.value_and_grad`; the sum over micro-batches is that of the large batch."""
    if parts > 1 and not mean:
      return losses.accumulated(fn, merge, trained, batch, self._config(chunk), ex=ex)
    return super().value_and_grad(fn, merge, trained, batch, key, parts=parts, mean=mean,
                                  ex=ex, chunk=chunk)

  def after_update(self, leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """exp(logit_scale) stays within [1, 100]."""
    return losses.clamp_logit_scale(leaves)

  def _config(self, chunk: int) -> losses.ContrastiveConfig:
    return dataclasses.replace(self.options.contrast, chunk=chunk)
