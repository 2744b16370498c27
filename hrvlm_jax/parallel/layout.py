"""Where a run's arrays lie: one object for the training loop, evaluation and tests.

    layout = Layout(config.mesh)
    shardings = layout.state_shardings(abstract_state)
    state = layout.make(init, shardings, params)         # or restored with these shardings
    step = layout.compile(make_train_step(..., ex=execution_of(training, layout.mesh)), shardings)
    state, metrics = step(state, layout.batch(batch))

On one device all of it is plain `jax.jit`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding

from hrvlm_jax.parallel import distributed, rules
from hrvlm_jax.parallel.compiler import compiler_options
from hrvlm_jax.parallel.mesh import MeshConfig, batch_shards, check_batch, make_mesh, replicated
from hrvlm_jax.parallel.topology import chip_of


class Layout:
  """A mesh and what follows from it.

  Attributes:
    mesh: of all devices of all processes.
    shards: over how many parts a batch is cut; sizes counted per device (chunks of the loss) are
      multiplied by it.

  Raises:
    UserError: the mesh does not fit the devices.
  """

  def __init__(self, mesh: MeshConfig | Mapping[str, int] | None = None, *,
               devices: Sequence[Any] | None = None):
    self.mesh = make_mesh(mesh, devices=devices)
    self.shards = batch_shards(self.mesh)

  @property
  def own(self) -> bool:
    """Whether all its devices are this process's: others of the run then take no part in it."""
    return all(device.process_index == jax.process_index() for device in self.mesh.devices.flat)

  def state_shardings(self, abstract: Any, table: Sequence[rules.Rule] = rules.RULES) -> Any:
    """Shardings of a train state (a tree of shapes) by the rules of a model.

    Raises:
      UserError: leaves that do not divide (all listed).
    """
    return rules.state_shardings(abstract, self.mesh, rules=table)

  def abstract(self, abstract: Any, shardings: Any) -> Any:
    """Shapes that carry their shardings: what a checkpoint is restored into."""
    return jax.tree.map(
      lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
      abstract, shardings)

  def make(self, fn: Callable, shardings: Any, *args: Any) -> Any:
    """`fn(*args)` computed straight into its places: never whole on one device."""
    return jax.jit(fn, out_shardings=shardings)(*args)

  def put(self, tree: Any, shardings: Any) -> Any:
    """Host values, equal on every process, into their places."""
    if jax.process_count() == 1:
      return jax.device_put(tree, shardings)
    return jax.tree.map(
      lambda x, place: jax.make_array_from_callback(x.shape, place, lambda i, x=x: x[i]),
      tree, shardings)

  def compile(self, step: Callable, shardings: Any, *, options: Mapping[str, Any] | None = None
              ) -> Callable:
    """`step(state, batch) -> (state, metrics)`, jitted with the state donated and in its places.

    Metrics come back whole on every device, so that every process can read them.

    Args:
      step: made for this mesh (its `Execution`).
      options: further options of the compiler.
    """
    whole: NamedSharding = replicated(self.mesh)

    # Options speak of messages between devices; a program for one device gets none.
    device = self.mesh.devices.flat[0]
    chip = chip_of(device.device_kind)
    wanted = compiler_options(chip.name if chip else device.platform)
    options = {**(wanted if self.mesh.size > 1 else {}), **(options or {})}
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, whole),
                   compiler_options=options or None)

  def parts(self, shards: int) -> tuple[int, ...]:
    """Which of a batch's `shards` equal, consecutive parts this process needs for its devices."""
    return distributed.host_parts(self.mesh, shards)

  def batch(self, batch: Any, *, leading: int = 0, own: Sequence[int] = (0,),
            shards: int = 1) -> Any:
    """NumPy arrays of a batch -> global arrays, cut over the mesh.

    Each device receives only its own rows and crops.

    Args:
      batch: the shards `own` (`parts`), one after the other; by default the whole batch, the same
        on every process. Indices into shared crops count over the whole batch in either case.
      leading: axes before the examples (micro-batches).
      shards: number of shards of the whole batch.

    Raises:
      UserError: arrays that cannot be cut (all listed).
    """
    if len(own) == shards:
      check_batch(batch, self.mesh, leading=leading)
    return distributed.global_batch(batch, self.mesh, leading=leading, own=own, parts=shards)
