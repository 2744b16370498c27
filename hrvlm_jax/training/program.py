"""The train step of a run, assembled once: for the loop, for plans and for tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from hrvlm_jax.core import paths
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


def assemble(config: RunConfig, mesh: Mesh, *, stored: Mapping[str, Any] | None = None,
             platform: str | None = None,
             adapt: Callable[[Execution], Execution] = lambda ex: ex) -> TrainProgram:
  """The program of a run on a mesh.

  Args:
    stored: by path, what the file the run starts from holds (see `run_dtypes`).
    platform: of the devices, where those of the mesh are stand-ins.
    adapt: changes what the step is traced for (`planning`).

  Raises:
    UserError: groups that do not cover the parameters, leaves that cannot be cut over the mesh (all
      listed).
  """
  t = config.training
  fn = vlm.build(config.model)
  groups = groups_of(t, fn.abstract)
  state = jax.eval_shape(
    lambda p: init_state(t, groups, p), run_dtypes(t, groups, fn.abstract, stored))
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
