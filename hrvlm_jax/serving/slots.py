"""Slots of a fixed length that requests join and leave between tokens: the programs of serving.

Every slot holds one request: its part of the cache, what else its steps read (keys and values of a
cross-attention), which places are real, and how it draws. `admit` reads one prompt and writes it
into a slot; `step` gives every slot its next token, wherever each of them stands. Both are pure:
slots are an argument (given away) and a result. A slot that nobody uses is computed like the
others; what it yields is not read.

Axis letters: s slots, l places of a slot, v vocabulary; a row is a prompt on its own, [1 ...].
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P

from hrvlm_jax.core.execution import BATCH_AXES, Execution
from hrvlm_jax.core.module import Functional
from hrvlm_jax.language.config import DecoderConfig
from hrvlm_jax.language.decoder import Cache, empty_cache
from hrvlm_jax.language.sampling import Sampling
from hrvlm_jax.serving.draw import PLAIN, Drawn, Settings, draw, penalised, settings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
  """The device's side of all requests in progress.

  Attributes:
    cache: keys and values, leaves [s k l p].
    held: what else a step reads of a request, leaves [s ...].
    valid: bool [s l], places with a real token.
    place: int32 [s], where the next token goes.
    token: int32 [s], the last token, which the next step reads.
    count: int32 [s], tokens drawn so far.
    written: int32 [s n], those tokens, where repetitions count; else n is 0.
    chosen: how each slot draws.
  """

  cache: Cache
  held: Any
  valid: jax.Array
  place: jax.Array
  token: jax.Array
  count: jax.Array
  written: jax.Array
  chosen: Settings


def empty(config: DecoderConfig, slots: int, length: int, held: Any, *, written: int = 0,
          ex: Execution) -> Slots:
  """Slots without a request.

  Args:
    length: places of each.
    held: shapes of one row's `held`, leaves [1 ...] (see `vlm.model.VLM.held`).
    written: most new tokens that are kept to count repetitions among.
  """
  zeros = lambda leaf: jnp.zeros((slots, *leaf.shape[1:]), leaf.dtype)
  number = lambda: jnp.zeros(slots, jnp.int32)
  return Slots(
    empty_cache(config, slots, length, dtype=jnp.dtype(ex.dtype), unrolled=True),
    jax.tree.map(zeros, held), jnp.zeros((slots, length), bool), number(), number(), number(),
    jnp.zeros((slots, written), jnp.int32), jax.tree.map(jnp.asarray, settings(slots)))


def read(fn: Functional, params, batch: Mapping[str, Any], *, ex: Execution):
  """(logits [1 v], cache, what is held, valid [1 t]) of one prompt."""
  embeds, valid, extras = fn.apply(params, batch, method='prompt', ex=ex)
  logits, _, cache = fn.apply(params, embeds.astype(ex.dtype), valid, slots=valid.shape[1],
                              method='prefill', ex=ex, **extras)
  return logits, cache, fn.apply(params, extras, method='held'), valid


def admit(fn: Functional, params, slots: Slots, batch: Mapping[str, Any], chosen: Settings, row,
          *, ex: Execution, usual: Sampling = PLAIN) -> tuple[Slots, Drawn]:
  """Reads a prompt into slot `row` and draws its first token.

  Args:
    batch: of one row, its length no more than that of a slot.
    chosen: of one slot.
    usual: its penalties are those of every slot.

  Returns:
    (slots, the token [1]).
  """
  new, drawn = _first(fn, params, slots, batch, chosen, ex=ex, usual=usual)

  def write(store, new):
    return jax.lax.dynamic_update_slice(
      store, new.astype(store.dtype), (row, *(0,) * (store.ndim - 1)))

  filled = dataclasses.replace(_filled(new, slots), cache=new.cache)
  return jax.tree.map(write, slots, filled), drawn


def admit_group(fn: Functional, params, slots: Slots, batch: Mapping[str, Any], chosen: Settings,
                places, *, ex: Execution, usual: Sampling = PLAIN) -> tuple[Slots, Drawn]:
  """Reads as many prompts as the batch axes of the mesh have parts, each into a slot of its part.

  The slots of a part follow one another, so nothing of a prompt leaves its devices.

  Args:
    batch: a row for every part.
    places: int32 [r], the slot of each part counted within it; -1: that row is not kept.

  Returns:
    (slots, the tokens [r]).
  """
  new, drawn = _first(fn, params, slots, batch, chosen, ex=ex, usual=usual)
  parts = len(places)
  each = slots.valid.shape[0] // parts
  taken = jnp.arange(each) == jnp.asarray(places)[:, None]

  def write(store, new):
    kept = store.reshape(parts, each, *store.shape[1:])
    here = taken.reshape(parts, each, *(1,) * (store.ndim - 1))
    return jnp.where(here, new[:, None], kept).reshape(store.shape)

  return laid(jax.tree.map(write, slots, _filled(new, slots)), ex), drawn


def _first(fn: Functional, params, slots: Slots, batch, chosen: Settings, *, ex: Execution,
           usual: Sampling) -> tuple[Slots, Drawn]:
  """Prompts as slots of their own length, and the first token of each."""
  logits, cache, held, valid = read(fn, params, batch, ex=ex)
  count = jnp.zeros(len(logits), jnp.int32)
  written = jnp.zeros((len(logits), slots.written.shape[1]), jnp.int32)
  drawn = draw(penalised(logits, written, count, usual), chosen, count, logits)
  if written.shape[1]:
    written = written.at[:, 0].set(drawn.token)
  place = jnp.full(len(logits), valid.shape[1], jnp.int32)
  chosen = jax.tree.map(jnp.asarray, chosen)
  return Slots(cache, held, valid, place, drawn.token, count + 1, written, chosen), drawn


def _filled(new: Slots, slots: Slots) -> Slots:
  """New rows padded to the sizes of the slots: nothing of a slot's last request may stay."""
  whole = lambda leaf, store: jnp.pad(leaf.astype(store.dtype), [(0, 0), *(
    (0, room - size) for room, size in zip(store.shape[1:], leaf.shape[1:], strict=True))])
  return jax.tree.map(whole, new, slots)


def step(fn: Functional, params, slots: Slots, *, ex: Execution, usual: Sampling = PLAIN
         ) -> tuple[Slots, Drawn]:
  """The next token of every slot, [s]."""
  length = slots.valid.shape[1]
  valid = slots.valid | (jnp.arange(length) == slots.place[:, None])
  row = lambda tree: jax.tree.map(lambda leaf: leaf[None], tree)

  def one(token, valid, cache, held, place):
    logits, cache = fn.apply(params, token[None], valid[None], row(cache), place, method='step',
                             ex=ex, **row(held))
    return logits[0], jax.tree.map(lambda leaf: leaf[0], cache)

  logits, cache = jax.vmap(one)(slots.token, valid, slots.cache, slots.held, slots.place)
  drawn = draw(penalised(logits, slots.written, slots.count, usual), slots.chosen, slots.count,
               logits)
  written = slots.written
  if written.shape[1]:  # beyond the end nothing is written: slots without a request
    written = written.at[jnp.arange(len(written)), slots.count].set(drawn.token)
  place = jnp.minimum(slots.place + 1, length - 1)  # of slots without a request
  return Slots(cache, slots.held, valid, place, drawn.token, slots.count + 1, written,
               slots.chosen), drawn


def grown(slots: Slots, shapes: Slots) -> Slots:
  """The same requests in larger slots, of these shapes."""
  return jax.tree.map(lambda leaf, shape: jnp.pad(leaf, [
    (0, room - size) for room, size in zip(shape.shape, leaf.shape, strict=True)]), slots, shapes)


def laid(slots: Slots, ex: Execution) -> Slots:
  """The slots in their places on the mesh (`shardings`), inside a program."""
  places = shardings(slots, ex)
  return slots if places is None else jax.lax.with_sharding_constraint(slots, places)


def shardings(slots: Slots, ex: Execution) -> Any:
  """Where the slots lie on the mesh of `ex`: rows over its batch axes, heads over `tensor`, what
  does not divide whole; None on one device."""
  if ex.devices == 1:
    return None
  sizes = ex.mesh.shape
  shards, tensor = sizes['data'] * sizes['fsdp'], sizes['tensor']

  def place(leaf) -> NamedSharding:
    spec: list[Any] = [BATCH_AXES if leaf.shape[0] % shards == 0 else None]
    if leaf.ndim == 4:  # [s k l p] of the cache, [s h m p] of visual keys
      spec += ['tensor' if leaf.shape[1] % tensor == 0 else None]
    return NamedSharding(ex.mesh, P(*spec))

  return jax.tree.map(place, slots)
