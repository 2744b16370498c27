"""The output projection and its cross entropy as one function over a mesh.

The weight is gathered once a call (and so once a micro-batch), each device holds the columns of its
place on the tensor axis, chunks of places are worked on one after the other, and the weight's
gradient is added up on the device and over devices once. Logits exist for one chunk and one part of
the vocabulary at a time. The gradients are made beside the loss, while a chunk's logits are there,
so that these are computed once; they are scaled when the gradient of the loss is known.

Axis letters: b rows, t places, d width, v vocabulary, c places of a chunk.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
from jax.custom_derivatives import SymbolicZero
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec as P
from jaxtyping import Array, Float, Int

from hrvlm_jax.core.execution import Execution
from hrvlm_jax.core.layers import wide_dtype
from hrvlm_jax.language.decoder import Output

IGNORED = -100


@dataclasses.dataclass(frozen=True)
class _Cut:
  """How a call lies over the mesh; axes are empty where nothing is cut.

  Attributes:
    rows, places, gathered, columns: axes of the rows and places of a batch, of the weight's input
      side and of its vocabulary.
    chunk: places at a time on one device. known: columns that are no padding.
  """

  mesh: Mesh | None
  rows: tuple[str, ...]
  places: tuple[str, ...]
  gathered: tuple[str, ...]
  columns: tuple[str, ...]
  chunk: int
  known: int

  @property
  def specs(self) -> dict[str, P]:
    """Where states, targets, weight and bias lie."""
    place = lambda *axes: P(*(axis or None for axis in axes))
    return {'hidden': place(self.rows, self.places, ()), 'targets': place(self.rows, self.places),
            'kernel': place(self.gathered, self.columns), 'bias': place(self.columns)}


def head_loss(
  hidden: Float[Array, 'b t d'], targets: Int[Array, 'b t'], output: Output, *, chunk: int,
  ex: Execution,
) -> Float[Array, '']:
  """The sum of negative log-likelihoods of the targets that are not ignored.

  A vocabulary that does not divide over tensor is filled up with columns of zeros that no place can
  choose.

  Args:
    chunk: places at a time, over all devices; at least one of every row.
  """
  kernel, bias = output.kernel, output.bias
  rows = places = gathered = columns = ()
  if ex.devices > 1:
    sizes = ex.mesh.shape
    rows = ex.spread(hidden.shape[0], 1)[0] or ()
    if sizes['sequence'] > 1 and hidden.shape[1] % sizes['sequence'] == 0:
      places = ('sequence',)
    if 'fsdp' in rows and kernel.shape[0] % sizes['fsdp'] == 0:
      gathered = ('fsdp',)
    columns = ('tensor',)
    extra = -kernel.shape[1] % sizes['tensor']
    kernel = jnp.pad(kernel, ((0, 0), (0, extra)))
    bias = None if bias is None else jnp.pad(bias, (0, extra))
  shards = math.prod(ex.mesh.shape[axis] for axis in rows + places)
  cut = _Cut(ex.mesh if ex.devices > 1 else None, rows, places, gathered, columns,
             max(chunk // shards, 1), output.known)
  return _total(cut, hidden, kernel, bias, targets)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(cut: _Cut, hidden, kernel, bias, targets):
  return _run(cut, hidden, kernel, bias, targets, None)[0]


def _total_saved(cut: _Cut, hidden, kernel, bias, targets):
  value = lambda x: None if x is None else x.value
  trained = kernel.perturbed or (bias is not None and bias.perturbed)
  total, *gradients = _run(cut, value(hidden), value(kernel), value(bias), value(targets), trained)
  return total, tuple(gradients)


def _total_vjp(cut: _Cut, saved, grad):
  del cut
  if isinstance(grad, SymbolicZero):
    return None, None, None, None
  return (*jax.tree.map(lambda x: x * grad.astype(x.dtype), saved), None)


_total.defvjp(_total_saved, _total_vjp, symbolic_zeros=True)


def _run(cut: _Cut, hidden, kernel, bias, targets, trained: bool | None):
  """(loss, gradients of states, weight and bias): None those that are not asked for.

  Args:
    trained: also the weight's; None: no gradient at all.
  """
  local = functools.partial(_on_a_device, cut, trained=trained)
  if cut.mesh is None:
    return local(hidden, kernel, bias, targets)
  s = cut.specs
  spec_of = lambda name, wanted: s[name] if wanted else P()
  return jax.shard_map(
    local, mesh=cut.mesh, check_vma=False,
    in_specs=(s['hidden'], s['kernel'], spec_of('bias', bias is not None), s['targets']),
    out_specs=(P(), spec_of('hidden', trained is not None), spec_of('kernel', trained),
               spec_of('bias', trained and bias is not None)))(hidden, kernel, bias, targets)


def _on_a_device(cut: _Cut, hidden, kernel, bias, targets, *, trained: bool | None):
  weight = kernel.astype(hidden.dtype)
  if cut.gathered:
    weight = jax.lax.all_gather(weight, cut.gathered, axis=0, tiled=True)
  wide = wide_dtype(hidden.dtype)
  rows, length, width = hidden.shape
  first = jax.lax.axis_index(cut.columns) * weight.shape[1] if cut.columns else 0
  over = (lambda reduce, x: reduce(x, cut.columns)) if cut.columns else lambda reduce, x: x
  places, parts = equal_parts(length, cut.chunk // rows)
  extra = places * parts - length

  def pieces(x, value=0):  # [b t ...] -> [parts b c ...]
    x = jnp.pad(x, ((0, 0), (0, extra), *((0, 0),) * (x.ndim - 2)), constant_values=value)
    return jnp.moveaxis(x.reshape(rows, parts, places, *x.shape[2:]), 1, 0)

  def body(carry, piece):
    total, dkernel, dbias = carry
    states, wanted = piece
    y = jnp.matmul(states, weight, preferred_element_type=wide)
    if bias is not None:
      y = y + bias.astype(wide)
    column = first + jax.lax.broadcasted_iota(jnp.int32, y.shape, y.ndim - 1)
    y = jnp.where(column < cut.known, y, -jnp.inf)
    top = over(jax.lax.pmax, y.max(axis=-1))
    each = jnp.exp(y - top[..., None])
    right = column == wanted[..., None]
    all_of, chosen = over(jax.lax.psum, (each.sum(axis=-1), jnp.where(right, y, 0).sum(axis=-1)))
    counts = wanted != IGNORED
    total += jnp.where(counts, jnp.log(all_of) + top - chosen, 0).sum()
    if trained is None:
      return (total, None, None), None
    slope = jnp.where(counts[..., None], each / all_of[..., None] - right, 0)
    narrow = slope.astype(states.dtype)
    if trained:
      dkernel += jnp.einsum('bcd,bcv->dv', states, narrow, preferred_element_type=wide)
      dbias = None if bias is None else dbias + slope.sum(axis=(0, 1))
    return (total, dkernel, dbias), jnp.matmul(narrow, weight.T)

  start = (jnp.zeros((), wide), jnp.zeros(weight.shape, wide) if trained else None,
           jnp.zeros(bias.shape, wide) if trained and bias is not None else None)
  (total, dkernel, dbias), dhidden = jax.lax.scan(
    body, start, (pieces(hidden), pieces(targets, IGNORED)))
  batch = cut.rows + cut.places
  total = jax.lax.psum(total, batch) if batch else total
  if trained is None:
    return total, None, None, None
  dhidden = jnp.moveaxis(dhidden, 0, 1).reshape(rows, places * parts, width)[:, :length]
  dhidden = over(jax.lax.psum, dhidden)
  if trained:
    rest = tuple(axis for axis in batch if axis not in cut.gathered)
    if cut.gathered:
      dkernel = jax.lax.psum_scatter(dkernel, cut.gathered, scatter_dimension=0, tiled=True)
    dkernel = (jax.lax.psum(dkernel, rest) if rest else dkernel).astype(kernel.dtype)
    if bias is not None:
      dbias = (jax.lax.psum(dbias, batch) if batch else dbias).astype(bias.dtype)
  return total, dhidden, dkernel, dbias


def equal_parts(length: int, most: int) -> tuple[int, int]:
  """(places, parts) that hold `length`: parts of equal size, at most `most` but at least 1.

  From 8 on a multiple of 8, that devices and tiles of memory can divide.
  """
  if most >= length:
    return length, 1
  unit = 8 if most >= 8 else 1
  parts = -(-length // max(most // unit * unit, 1))
  return -(-length // (parts * unit)) * unit, parts
