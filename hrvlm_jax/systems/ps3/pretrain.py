"""Batches of PS3's pre-training: region records -> augmented samples -> arrays.

The pieces (captions, joint crops, ground-truth maps) are `systems.ps3.data`; order, workers, faults
and exact resume are `data.pipeline`'s, as in every other stage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.data import pipeline
from hrvlm_jax.data.rows import Row, open_images
from hrvlm_jax.language.prompt import tokenizer_of
from hrvlm_jax.systems.ps3 import data
from hrvlm_jax.systems.ps3.config import PS3Config
from hrvlm_jax.systems.ps3.records import regions_of
from hrvlm_jax.systems.ps3.shards import open_regions
from hrvlm_jax.systems.ps3.text import tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToSample:
  """A region record -> a training sample (see `systems.ps3.data.sample`)."""

  config: data.SampleConfig
  side: int

  def __call__(self, row: Row, rng: np.random.Generator) -> dict[str, Any]:
    regions = regions_of(row)
    # Boxes count the pixels as they are stored, so EXIF turns nothing here.
    image = open_images(row, exif='ignore')[0]
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


def make_batches(config: Any, *, own: Callable[[int], Sequence[int]] | None = None
                 ) -> pipeline.Batches:
  """The checkpointable iterator over pre-training batches.

  Args:
    own: the shards of a batch to make (see `pipeline.Options`); default: all.

  Raises:
    UserError: a model without a text tower, a vocabulary that does not fit it, or data that cannot
      be opened.
  """
  encoder, options = config.model.encoder, config.data
  if not isinstance(encoder, PS3Config) or encoder.text is None or config.model.text is not None:
    raise UserError(f'training.objective=ps3_pretrain: model.system {config.model.system!r} has no '
                    'text tower of its own; use system ps3 with encoder.text and no language model')
  vocabulary = tokenizer_of(options.tokenizer)
  if vocabulary.vocab_size > encoder.text.vocab_size:
    raise UserError(f'data.tokenizer={options.tokenizer} gives ids up to '
                    f'{vocabulary.vocab_size - 1}, model.encoder.text.vocab_size is '
                    f'{encoder.text.vocab_size}; use the tokenizer that belongs to the model')
  collate = ToBatch(tokenize=tokenizer(vocabulary, encoder.text), parts=config.training.accumulate)
  return pipeline.build(
    open_regions(options.train, annotations=options.annotations),
    ToSample(config=options.regions, side=encoder.scales[-1]),
    pipeline.Options(batch_size=config.training.batch_size, seed=config.seed,
                     shuffle=options.shuffle, workers=options.workers, shards=options.shards,
                     own=own, bad_rows=options.bad_rows),
    collate=collate, blank=blank)
