"""The facade over Flax: modules describe parameters, everything else is a pure function.

This package is the only one that imports flax, and it uses NNX's functional core alone (a lint test
holds it there). A `Functional` turns a module constructor into `init` and `apply` over plain nested
dicts of arrays; transforms come from jax.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from hrvlm_jax.core.execution import HERE, REMAT, Execution

Module = nnx.Module
Param = nnx.Param
Rngs = nnx.Rngs
List = nnx.List
initializers = nnx.initializers

Params = dict[str, Any]  # nested dict of arrays (or of ShapeDtypeStruct, when abstract)


class Functional:
  """A module constructor as a pair of pure functions.

  Args:
    make: builds the module from an `Rngs`; it may create `Param` leaves only.

  Attributes:
    abstract: nested dict of `jax.ShapeDtypeStruct`, known without any input.

  Raises:
    TypeError: the module holds state that is no parameter (named in the message).
  """

  def __init__(self, make: Callable[[Rngs], Module]):
    self._make = make
    self._graphdef, state = nnx.split(nnx.eval_shape(lambda: make(Rngs(params=0))))
    hidden = [
      '/'.join(map(str, path))
      for path, leaf in jax.tree_util.tree_flatten_with_path(
        state, is_leaf=lambda x: isinstance(x, nnx.Variable)
      )[0]
      if isinstance(leaf, nnx.Variable) and not isinstance(leaf, Param)
    ]
    if hidden:
      raise TypeError(f'modules may hold parameters only; found other state at {hidden}')
    self.abstract: Params = _string_keys(nnx.to_pure_dict(state))

  def init(self, key: jax.Array) -> Params:
    """Draws all parameters from one key."""
    return _string_keys(nnx.to_pure_dict(nnx.split(self._make(Rngs(params=key)))[1]))

  def bind(self, params: Params) -> Module:
    """The module holding `params`; use inside one traced function, never across calls."""
    return nnx.merge(self._graphdef, _list_keys(params))

  def apply(self, params: Params, *args, method: str = '__call__', **kwargs):
    """Calls `method` of the module that holds `params`."""
    return getattr(self.bind(params), method)(*args, **kwargs)


def stacked(make: Callable[[Rngs], Module], depth: int, *, unrolled: bool = False, rngs: Rngs
            ) -> Module | List:
  """One layer whose leaves carry a leading axis of length `depth` (each slice drawn by itself).

  Args:
    unrolled: a list of layers instead: no weight is copied per step (see `scan_layers`).
  """
  if unrolled:
    return List([make(Rngs(params=rngs.params())) for _ in range(depth)])
  keys = jax.random.split(rngs.params(), depth)
  state = jax.vmap(lambda key: nnx.split(make(Rngs(params=key)))[1])(keys)
  graphdef = nnx.split(nnx.eval_shape(lambda: make(Rngs(params=0))))[0]
  return nnx.merge(graphdef, state)


def scan_layers(
  layers: Module | List,
  x,
  body: Callable[[Module, Any, Any], tuple[Any, Any]],
  *,
  xs=None,
  start: int = 0,
  stop: int | None = None,
  ex: Execution = HERE,
):
  """Runs `body(layer, x, xs_i) -> (x, ys_i)` over the layers `start..stop`.

  A stacked layer is scanned (one compilation for any depth, leaves sliced per step). A `List` of
  layers is a Python loop: longer programs, but XLA never copies a layer's weights, which is what
  one-token decoding is bound by (a scan was four times slower there on CPU).

  Args:
    xs: per-layer inputs: leaves with the leading axis of `layers` (stacked), or a list of one
      tree per layer (`List`); indexed with the same `start..stop`.
    ex: `remat` says what of a layer is recomputed in the backward pass, `layers` whether a stack is
      a loop.

  Returns:
    (x, ys): ys stacked on a leading axis, or a list, like `xs`.
  """

  def wrap(fn):
    if ex.remat == 'none':
      return fn
    return jax.checkpoint(fn, prevent_cse=False, policy=REMAT[ex.remat])

  if isinstance(layers, List):
    chosen = list(layers)[start:stop]
    inputs = [None] * len(chosen) if xs is None else list(xs)[start:stop]
    ys = []
    for layer, inp in zip(chosen, inputs, strict=True):
      step = lambda x, inp, layer=layer: body(layer, ex.constrain('hidden', x), inp)
      x, y = wrap(step)(x, inp)
      ys.append(y)
    return x, ys
  graphdef, state = nnx.split(layers)
  depth = jax.tree.leaves(state)[0].shape[0]
  step = wrap(lambda x, leaves: body(
    nnx.merge(graphdef, leaves[0]), ex.constrain('hidden', x), leaves[1]))
  unroll = True if ex.layers == 'unrolled' else 1
  if start or (stop is not None and stop != depth):
    chosen = range(depth)[start:stop]
    if not ex.gradients:
      # A part of the stack would be a copy of its weights: read them where they are. The gradient
      # of this form is a sum over whole stacks, hence the other one where gradients are taken.
      at = lambda number: jax.tree.map(
        lambda leaf: jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False), (state, xs))
      numbers = jnp.arange(chosen.start, chosen.stop)
      return jax.lax.scan(lambda x, number: step(x, at(number)), x, numbers, unroll=unroll)
    state, xs = jax.tree.map(lambda leaf: leaf[chosen.start:chosen.stop], (state, xs))
  return jax.lax.scan(step, x, (state, xs), unroll=unroll)


def layer_at(layers: Module | List, index: int) -> Module:
  """The layer at `index` of a stack, as a module of its own."""
  if isinstance(layers, List):
    return layers[index]
  graphdef, state = nnx.split(layers)
  return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[index], state))


def grouped(layers: Module, size: int, *, start: int = 0, stop: int | None = None) -> Module:
  """The stacked layers start..stop as groups of `size`: leaves [groups, size, ...].

  A group is itself a stack, so `scan_layers` nests. stop - start must be a multiple of `size`.
  """
  graphdef, state = nnx.split(layers)
  cut = lambda leaf: leaf[start:stop].reshape(-1, size, *leaf.shape[1:])
  return nnx.merge(graphdef, jax.tree.map(cut, state))


def depth_of(layers: Module | List) -> int:
  """Number of layers of a stack."""
  if isinstance(layers, List):
    return len(layers)
  return jax.tree.leaves(nnx.split(layers)[1])[0].shape[0]


def stop_gradient(module: Module) -> Module:
  """The same module; no gradient reaches its parameters through it."""
  graphdef, state = nnx.split(module)
  return nnx.merge(graphdef, jax.tree.map(jax.lax.stop_gradient, state))


def unstack(params: Params) -> Params:
  """Parameters of stacked layers as parameters of unrolled ones."""
  depth = jax.tree.leaves(params)[0].shape[0]
  return {str(i): jax.tree.map(lambda leaf: leaf[i], params) for i in range(depth)}  # noqa: B023


def restack(params: Params) -> Params:
  """The inverse of `unstack`."""
  layers = [params[str(i)] for i in range(len(params))]
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


def _string_keys(tree):
  if isinstance(tree, dict):
    return {str(key): _string_keys(value) for key, value in tree.items()}
  return tree


def _list_keys(tree):
  if isinstance(tree, dict):
    return {int(k) if k.isdigit() else k: _list_keys(value) for k, value in tree.items()}
  return tree
