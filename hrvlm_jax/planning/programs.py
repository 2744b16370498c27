"""The real steps as `parallel.plan` compiles them: training, prefill, decoding; shapes only.

Nothing is computed and no weight is made. The shapes of a batch come from the objective.
"""

from __future__ import annotations

from collections.abc import Mapping
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from hrvlm_jax.core.config import from_dict
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.execution import Execution
from hrvlm_jax.language.generate import Generator
from hrvlm_jax.parallel import rules
from hrvlm_jax.parallel.flops import count_flops
from hrvlm_jax.parallel.mesh import batch_sharding, batch_shards, check_batch
from hrvlm_jax.planning.program import Program
from hrvlm_jax.systems.contract import sharding_rules
from hrvlm_jax.training.batches import batch_shapes
from hrvlm_jax.training.config import RunConfig
from hrvlm_jax.training.program import assemble, placed
from hrvlm_jax.vlm import model as vlm


def resolve(config: Mapping[str, Any] | RunConfig) -> RunConfig:
  """A run config from its plain values."""
  return config if isinstance(config, RunConfig) else from_dict(RunConfig, config)


def train_program(mesh: Mesh, *, config: Mapping[str, Any] | RunConfig, length: int | None = None,
                  image: tuple[int, int] = (1024, 768), images: int = 1,
                  platform: str | None = None) -> Program:
  """The train step of a run config on a mesh: state and batch in their places, state donated.

  Args:
    length: bucket; default: the longest of `data.lengths`.
    image: width and height of the images that the batch's shapes are taken for.
    platform: of the planned devices, where those of the mesh are stand-ins (GPUs).

  Raises:
    UserError: leaves or batch arrays that cannot be cut over the mesh (all listed).
  """
  config = resolve(config)
  t = config.training
  program = assemble(config, mesh, platform=platform, adapt=planned)
  batch = program.batch(length=length, image=tuple(image), images=images)
  size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(program.fn.abstract))
  return Program(
    fn=program.step, args=(program.placed_state, batch.arrays), donate=(0,),
    out_shardings=(program.shardings, NamedSharding(mesh, P())),
    model_flops=count_flops(program.plain, program.state, batch.arrays), examples=t.batch_size,
    tokens=t.batch_size * batch.length,
    notes=(f'train step of {config.model.system}, {size / 1e9:.2f} billion parameters, '
           f'{program.summary}',
           f'batch {t.batch_size} in {t.accumulate} part(s), bucket {batch.length}, '
           f'{batch.seen}, {t.dtype}, '
           f'remat {t.remat}, attention {t.attention}'))


def planned(ex: Execution) -> Execution:
  """An execution without what cannot be compiled here: kernels of GPUs cannot be lowered for the
  fake devices that stand for them. TPUs keep the attention that a run takes."""
  return ex.replace(attention='xla') if ex.on == 'gpu' else ex


def serve_program(mesh: Mesh, *, config: Mapping[str, Any] | RunConfig, what: str,
                  rows: int | None = None, length: int | None = None, new_tokens: int = 128,
                  image: tuple[int, int] = (1024, 768), images: int = 1,
                  platform: str | None = None) -> Program:
  """The prefill (views encoded, prompt read) or the one-token decode step of a model.

  Layers are unrolled and parameters stored in the compute dtype, as in generation.

  Args:
    what: 'prefill' or 'decode'.
    rows: prompts at a time; default: one per shard of the batch axes.
    length: positions of a prompt; default: the longest of `data.lengths`.
    platform: as in `train_program`.

  Raises:
    UserError: leaves or batch arrays that cannot be cut over the mesh (all listed).
  """
  if what not in ('prefill', 'decode'):
    raise UserError(f"serving step: found '{what}', expected prefill or decode")
  config = resolve(config)
  rows, length = rows or batch_shards(mesh), length or max(config.data.lengths)
  ex = Execution(mesh=mesh, platform=platform, dtype=config.training.dtype)
  dtype = jnp.dtype(ex.dtype)
  slots = length + new_tokens
  fn = vlm.build(config.model, unrolled=True)
  cast = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, dtype), fn.abstract)
  table = sharding_rules(config.model)
  params = placed(cast, rules.param_shardings(fn.abstract, mesh, rules=table))
  batch = batch_shapes(config, rows, length=length, image=tuple(image), images=images).arrays
  del batch['labels']
  check_batch(batch, mesh)
  batch = placed(batch, batch_sharding(mesh))

  # The programs of an answer, and where they leave the cache.
  generator = Generator(fn, params, ex=ex)

  def prefill(params, batch):
    embeds, valid, extras = fn.apply(params, batch, method='prompt', ex=ex)
    return *generator.prefill_fn(params, embeds, valid, extras, slots=slots, ex=ex), extras

  def decode(params, tokens, valid, cache, slot, extras):
    return generator.step_fn(params, tokens, valid, cache, slot, extras, ex=ex)

  _, cache, extras = jax.eval_shape(prefill, params, batch)
  place = lambda tree: jax.tree.map(lambda s: jax.ShapeDtypeStruct(
    s.shape, s.dtype, sharding=ex.laid('cache', s.shape)), tree)
  cache = place(cache)
  laid = jax.tree.map(lambda s: s.sharding, cache)
  if what == 'prefill':
    step, args, donate, out = prefill, (params, batch), (), (None, laid, None)
  else:
    row = lambda *shape, dtype: place(jax.ShapeDtypeStruct((rows, *shape), dtype))
    slot = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))
    step, donate, out = decode, (3,), (None, None, laid)
    args = (params, row(dtype=jnp.int32), row(slots, dtype=jnp.bool_), cache, slot, place(extras))
  size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(fn.abstract))
  return Program(
    fn=step, args=args, donate=donate, out_shardings=out,
    model_flops=count_flops(step, *args), examples=rows,
    tokens=rows * (length if what == 'prefill' else 1),
    notes=(f'{what} of {config.model.system}, {size / 1e9:.2f} billion parameters in {dtype.name}',
           f'{rows} prompts of {length} places, cache of {slots}, {images} image(s) of '
           f'{image[0]} x {image[1]}'))

