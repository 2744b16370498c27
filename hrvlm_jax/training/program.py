"""The train step of a run, assembled once: for the loop, for plans and for tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from hrvlm_jax.core import paths
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.execution import Execution
from hrvlm_jax.core.module import Functional, Params
from hrvlm_jax.parallel import rules
from hrvlm_jax.parallel.mesh import batch_sharding, batch_shards, check_batch
from hrvlm_jax.systems.contract import sharding_rules
from hrvlm_jax.systems.objective import BatchShapes
from hrvlm_jax.training.batches import batch_shapes
from hrvlm_jax.training.config import Group, RunConfig, TrainingConfig
from hrvlm_jax.training.optimizer import frozen_summary, groups_of
from hrvlm_jax.training.step import State, execution_of, init_state, make_train_step
from hrvlm_jax.vlm import model as vlm


@dataclasses.dataclass(frozen=True)
class TrainProgram:
  """What a run computes, before any weight is made.

  Attributes:
    config: of the run.
    mesh: that the state and the batches are cut over.
    ex: what the step is traced for.
    fn: the model as pure functions.
    groups: parameter group by path.
    state: shapes and dtypes of the train state; shardings: where its leaves lie.
    step: (state, batch) -> (state, metrics).
    plain: the same in the forms whose operations are those the model needs, to be counted.
  """

  config: RunConfig
  mesh: Mesh
  ex: Execution
  fn: Functional
  groups: Mapping[str, Group]
  state: Any
  shardings: Any
  step: Callable[[State, Any], tuple[State, dict[str, jax.Array]]]
  plain: Callable[[State, Any], tuple[State, dict[str, jax.Array]]]

  @property
  def summary(self) -> str:
    """How many parameters train, in a line."""
    return frozen_summary(self.groups, self.fn.abstract)

  @property
  def placed_state(self) -> Any:
    """The state's shapes with their shardings: what a checkpoint is restored into."""
    return placed(self.state, self.shardings)

  def init(self, params: Params) -> State:
    """Parameters with fresh optimizer state."""
    return init_state(self.config.training, self.groups, params)

  def batch(self, **options) -> BatchShapes:
    """The shapes of a step's batch, micro-batches in front, with their shardings.

    Args:
      options: of `Objective.batch_shapes`.

    Raises:
      UserError: arrays that cannot be cut over the mesh (all listed).
    """
    t = self.config.training
    shapes = batch_shapes(self.config, t.batch_size // t.accumulate, **options)
    check_batch(shapes.arrays, self.mesh)
    arrays, leading = shapes.arrays, int(t.accumulate > 1)
    if leading:
      arrays = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct((t.accumulate, *s.shape), s.dtype), arrays)
    return dataclasses.replace(
      shapes, arrays=placed(arrays, batch_sharding(self.mesh, leading=leading)))


@dataclasses.dataclass(frozen=True)
class Outline:
  """What of a program does not depend on a mesh.

  Attributes:
    fn, groups, state: as in `TrainProgram`.
  """

  fn: Functional
  groups: Mapping[str, Group]
  state: Any


def outline_of(config: RunConfig, *, stored: Mapping[str, Any] | None = None) -> Outline:
  """The outline of a run.

  Args:
    stored: by path, what the file the run starts from holds (see `run_dtypes`).

  Raises:
    UserError: groups that do not cover the parameters.
  """
  t, fn = config.training, vlm.build(config.model)
  groups = groups_of(t, fn.abstract)
  return Outline(fn, groups, jax.eval_shape(
    lambda p: init_state(t, groups, p), run_dtypes(t, groups, fn.abstract, stored)))


def micro_rows(config: RunConfig) -> int:
  """Rows that are cut over the mesh at a time: of one micro-batch, packed where they are."""
  return (config.data.packing.rows or config.training.batch_size) // config.training.accumulate


def check_rows(config: RunConfig, sizes: Mapping[str, int]) -> None:
  """A micro-batch must be divisible over the shards of a mesh (sizes of its axes).

  Raises:
    UserError: it is not; names what would work.
  """
  t, shards, devices = config.training, batch_shards(sizes), math.prod(sizes.values())
  rows = micro_rows(config)
  if rows % shards == 0:
    return
  packed = config.data.packing.rows
  total, key = ((t.batch_size, 'training.batch_size') if packed is None else
                (packed, 'data.packing.rows'))
  works = []
  parts = next((n for n in range(t.accumulate, 0, -1) if total % n == 0
                and t.batch_size % n == 0 and total // n % shards == 0), None)
  if parts is not None:
    works.append(f'--config.training.accumulate={parts}')
  each = t.accumulate * shards
  works.append(f'--config.{key}={-(-total // each) * each}')
  fewer = math.gcd(rows, devices)
  cut = [(name, size) for name, size in sizes.items() if size > 1]
  shown = ','.join(f'{name}={size}' for name, size in cut)
  if devices // fewer <= 8:
    works.append(f'a mesh of {fewer} shard(s), such as --mesh '
                 f'data=1,fsdp={fewer},tensor={devices // fewer}')
  raise UserError(
    f'{key}={total} in training.accumulate={t.accumulate} part(s) is {rows} row(s) at a time, '
    f'which the {shards} shards (data x fsdp) of the mesh {shown} cannot share evenly; what works: '
    f'{", or ".join(works)}')


def assemble(config: RunConfig, mesh: Mesh, *, stored: Mapping[str, Any] | None = None,
             outline: Outline | None = None, platform: str | None = None,
             adapt: Callable[[Execution], Execution] = lambda ex: ex) -> TrainProgram:
  """The program of a run on a mesh.

  Args:
    stored: by path, what the file the run starts from holds (see `run_dtypes`).
    outline: of the run, where it was made already.
    platform: of the devices, where those of the mesh are stand-ins.
    adapt: changes what the step is traced for (`planning`).

  Raises:
    UserError: groups that do not cover the parameters, leaves that cannot be cut over the mesh (all
      listed), a batch that cannot.
  """
  t = config.training
  check_rows(config, mesh.shape)
  outline = outline or outline_of(config, stored=stored)
  fn, groups, state = outline.fn, outline.groups, outline.state
  ex = adapt(execution_of(t, mesh, platform=platform))
  # The chunk of the loss is meant per device; the step sees the batch of all.
  wide = dataclasses.replace(t, loss_chunk=t.loss_chunk * batch_shards(mesh))
  make = lambda ex: make_train_step(fn, wide, groups, config.seed, ex=ex)
  return TrainProgram(
    config=config, mesh=mesh, ex=ex, fn=fn, groups=groups, state=state,
    shardings=rules.state_shardings(state, mesh, rules=sharding_rules(config.model)),
    step=make(ex), plain=make(ex.plain))


def run_dtypes(
  config: TrainingConfig, groups: Mapping[str, Group], abstract: Any,
  stored: Mapping[str, Any] | None = None,
) -> Any:
  """Shapes and dtypes of a run's parameters: float32 masters, frozen leaves as they are kept.

  Args:
    abstract: parameters as the model makes them.
    stored: by path, what the file the run starts from holds; its dtype is kept for frozen leaves
      unless `frozen_dtype` names another.
  """
  def shape(path, leaf):
    dtype = leaf.dtype
    if groups[path].frozen and jnp.issubdtype(dtype, jnp.floating):
      if config.frozen_dtype is not None:
        dtype = jnp.dtype(config.frozen_dtype)
      elif stored is not None and path in stored:
        dtype = stored[path].dtype
    return jax.ShapeDtypeStruct(leaf.shape, dtype)

  return paths.map_with_path(shape, abstract)


def placed(tree: Any, shardings: Any) -> Any:
  """Shapes with their shardings; one sharding may serve a whole tree."""
  if isinstance(shardings, NamedSharding):
    shardings = jax.tree.map(lambda _: shardings, tree)
  return jax.tree.map(
    lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), tree, shardings)
