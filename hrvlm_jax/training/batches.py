"""The batches of a run config: source, transform, order, hosts."""

from __future__ import annotations

import inspect

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.data import pipeline
from hrvlm_jax.data.sources import open_source
from hrvlm_jax.data.transforms import TextLimit, ToBatch, ToExample, tokenizer_of
from hrvlm_jax.systems import registry
from hrvlm_jax.training.config import RunConfig
from hrvlm_jax.vlm.answer import text_of


def make_batches(config: RunConfig) -> pipeline.Batches:
  """The checkpointable iterator over training batches of a config.

  Every process makes the whole global batch and hands its part to its devices: indices into shared
  crops then mean the same everywhere, and the batches do not depend on the number of hosts.
  """
  system = registry.get(config.model.system)
  if config.data.boxes and 'boxes' not in inspect.signature(system.views).parameters:
    raise UserError(f'data.boxes: system {config.model.system!r} does not learn where to look; '
                    'remove it')
  tokenizer = tokenizer_of(config.data.tokenizer)
  example = ToExample(text=text_of(config.model, tokenizer), views=system.views,
                      encoder=config.model.encoder, exif=config.data.exif,
                      max_length=max(config.data.lengths),
                      limit=TextLimit(length=config.data.max_length, policy=config.data.too_long),
                      boxes=config.data.boxes,
                      augment=config.data.background)
  batch = ToBatch(batch=system.batch, encoder=config.model.encoder, lengths=config.data.lengths,
                  slots=config.data.slots, parts=config.training.accumulate)
  source = open_source(config.data.train, images=config.data.images)
  return pipeline.build(
    source, example, batch_size=config.training.batch_size, collate=batch, seed=config.seed,
    shuffle=config.data.shuffle, order=config.data.order, group=config.data.group,
    workers=config.data.workers, lanes=config.data.lanes, bad_rows=config.data.bad_rows)
