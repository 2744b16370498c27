"""What a program is traced for: one frozen, hashable value that callers hand down as an argument.

Where the best form of an operation depends on the machine, on the mesh or on whether gradients
follow, a layer asks the `Execution` it was given and nothing else: no context variable, no global.
Being hashable it can be a static argument of `jax.jit`, so that the same function under two
executions is two programs. A program that is compiled ahead of time for another machine
(`planning`) gets the form of that machine.

Axis letters: b batch, t positions of a row, d width, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

# Axes of a mesh, outermost first; `parallel.mesh` says what each is for.
AXES = ('data', 'fsdp', 'sequence', 'tensor')
# The axes over which the examples of a batch are cut.
BATCH_AXES = ('data', 'fsdp')

PLACES = ('hidden', 'logits', 'small', 'cache')
# The name of an attention's result, and of the log-sums that a fused kernel's gradient needs.
ATTENTION = 'attention'
# What the backward pass of a layer keeps besides its input, as a policy of `jax.checkpoint`; what
# is not kept is computed again. From the least memory to the most.
_attention = jax.checkpoint_policies.save_only_these_names(ATTENTION)
REMAT = {
  'layers': None,
  'attention': _attention,
  'dots': jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims, _attention),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
  """The circumstances of a program. Results do not depend on them beyond rounding.

  Attributes:
    mesh: devices the program is spread over; None: one device.
    platform: 'cpu', 'gpu' or 'tpu'; None: the mesh's, or else the default backend's.
    dtype: of activations.
    remat: what the backward pass recomputes: 'none'; 'layers' (all but a layer's input);
      'attention' (all but the results of attentions); 'dots' (keeps these and the products of
      activations with weights).
    attention: form of attention, see `core.attention`; 'auto': the platform's own.
    layers: how stacked layers run: 'loop' (one compilation for any depth), or 'unrolled': one
      after the other. The program grows with the depth, and so does its compilation; in exchange no
      layer's weights are cut out of the stack, and what the backward pass needs of a layer is
      neither put into an array of all layers nor taken out of it again.
    gradients: the program is differentiated.
    deterministic: forms whose sums do not depend on timing are chosen.
  """

  mesh: Mesh | None = None
  platform: str | None = None
  dtype: str = 'float32'
  remat: Literal['none', 'attention', 'dots', 'layers'] = 'none'
  attention: str = 'auto'
  layers: Literal['loop', 'unrolled'] = 'loop'
  gradients: bool = False
  deterministic: bool = False

  def __post_init__(self):
    object.__setattr__(self, 'dtype', jnp.dtype(self.dtype).name)
    problems = []
    if self.remat not in ('none', *REMAT):
      problems.append(f'remat must be one of {sorted(("none", *REMAT))}, got {self.remat!r}')
    if self.layers not in ('loop', 'unrolled'):
      problems.append(f"layers must be 'loop' or 'unrolled', got {self.layers!r}")
    if self.platform not in (None, 'cpu', 'gpu', 'tpu'):
      problems.append(f"platform must be 'cpu', 'gpu' or 'tpu', got {self.platform!r}")
    if problems:
      raise ValueError('Execution: ' + '; '.join(problems))

  @property
  def on(self) -> str:
    """The platform: 'cpu', 'gpu' or 'tpu'."""
    if self.platform is not None:
      return self.platform
    if isinstance(self.mesh, Mesh):  # an abstract one has no devices
      return self.mesh.devices.flat[0].platform
    return jax.default_backend()

  @property
  def devices(self) -> int:
    """Number of devices the program is spread over."""
    return 1 if self.mesh is None else self.mesh.size

  @property
  def gathers(self) -> bool:
    """Whether weights are spread over devices (fsdp) and gathered where they are used."""
    return self.mesh is not None and self.mesh.shape['fsdp'] > 1

  @property
  def options(self) -> dict[str, str] | None:
    """Options of the compiler for programs that answer, for `jax.jit(compiler_options=)`.

    XLA for CPUs otherwise begins as much as it can at once, the gathers of all layers' weights too,
    and a device that holds a part of the model fills with all of it (tests/vlm/peaks.py).
    """
    if self.devices == 1 or self.on != 'cpu':
      return None
    return {'xla_cpu_scheduler_type': 'CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED'}

  @property
  def one_cpu(self) -> bool:
    """Whether that is a single CPU device, whose caches decide which form of a product is fast."""
    return self.devices == 1 and self.on == 'cpu'

  def kept_once(self, fn: Callable) -> Callable:
    """`fn`, of which a train step on one CPU keeps what goes in and makes what lies between again.

    For an activation between two products: both of its sides would be kept, each as large as the
    hidden layer. A tenth to a fifth of a step's memory, for the time of the activation
    (benchmarks/findings.md). Elsewhere, and where it is set, `remat` says what is kept.
    """
    wanted = self.gradients and self.one_cpu and self.remat == 'none'
    return jax.checkpoint(fn) if wanted else fn

  @property
  def plain(self) -> Execution:
    """The same without fused kernels and without recomputation.

    For short attentions and shallow stacks, where neither pays, and for counting operations.
    """
    return self.replace(attention='xla', remat='none')

  def replace(self, **changes) -> Execution:
    """The same circumstances but for `changes`."""
    return dataclasses.replace(self, **changes)

  def spread(self, rows: int, heads: int) -> tuple[tuple[str, ...] | None, str | None]:
    """(axes of the rows, axis of the heads) of an attention on the mesh.

    Rows lie over data and fsdp, or over one of the two, heads over tensor; None where they do not
    divide.
    """
    sizes = self.mesh.shape
    for axes in (BATCH_AXES, BATCH_AXES[1:], BATCH_AXES[:1]):
      if rows % math.prod(sizes[axis] for axis in axes) == 0:
        break
    else:
      axes = None
    return axes, 'tensor' if heads % sizes['tensor'] == 0 else None

  def constrain(self, place: str, x):
    """`x` (an array or a tree of arrays) laid over the mesh as that place wants it.

    Without this the partitioner is free to keep a weight in parts and to add up partial activations
    instead, which moves far more bytes than gathering the weight. On one device nothing happens. A
    dimension that does not divide stays whole: an evaluation batch of one example is no error.

    Args:
      place: 'hidden' ([b t d], [b h w c]: the residual stream, cut over examples and, if [b t d],
        over sequence); 'logits' ([b t v]: the same, and the vocabulary over tensor, where the
        head's columns lie); 'small' (low-rank matrices and position tables, whole: left in parts,
        a small matrix draws the partitioner into moving the activations beside it, hundreds of
        times its own size); 'cache' ([b k s p]: keys and values of generation, cut over examples
        and heads).

    Raises:
      ValueError: another place.
    """
    if place not in PLACES:
      raise ValueError(f'constrain: unknown place {place!r}; known: {list(PLACES)}')
    if self.devices == 1:
      return x
    return jax.tree.map(lambda leaf: self._pin(place, leaf), x)

  def _pin(self, place: str, x: jax.Array) -> jax.Array:
    if place != 'small' and (x.ndim < 3 or (place == 'cache' and x.ndim != 4)):
      return x
    return jax.lax.with_sharding_constraint(x, self.laid(place, x.shape))

  def laid(self, place: str, shape: tuple[int, ...]) -> NamedSharding:
    """How an array of a shape lies on the mesh at a place of `constrain`."""
    sizes = self.mesh.shape
    if place == 'small' or not shape:
      return NamedSharding(self.mesh, P())
    shards = sizes['data'] * sizes['fsdp']
    spec = [BATCH_AXES if shape[0] % shards == 0 else None, *(None,) * (len(shape) - 1)]
    if place == 'cache':
      if len(shape) == 4 and sizes['tensor'] > 1 and shape[1] % sizes['tensor'] == 0:
        spec[1] = 'tensor'
    elif len(shape) == 3 and sizes['sequence'] > 1 and shape[1] % sizes['sequence'] == 0:
      spec[1] = 'sequence'
    if place == 'logits' and sizes['tensor'] > 1 and shape[-1] % sizes['tensor'] == 0:
      spec[-1] = 'tensor'
    return NamedSharding(self.mesh, P(*spec))


HERE = Execution()
