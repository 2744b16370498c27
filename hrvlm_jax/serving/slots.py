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
from hrvlm_jax.serving.draw import Drawn, Settings, draw, settings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
  """The device's side of all requests in progress.

  Attributes:
    cache: keys and values, leaves [s l ...].
    held: what else a step reads of a request, leaves [s ...].
    valid: bool [s l], places with a real token.
    place: int32 [s], where the next token goes.
    token: int32 [s], the last token, which the next step reads.
    count: int32 [s], tokens drawn so far.
    chosen: how each slot draws.
  """

  cache: Cache
  held: Any
  valid: jax.Array
  place: jax.Array
  token: jax.Array
  count: jax.Array
  chosen: Settings


def empty(config: DecoderConfig, slots: int, length: int, held: Any, *, ex: Execution) -> Slots:
  """Slots without a request.

  Args:
    length: places of each.
    held: shapes of one row's `held`, leaves [1 ...] (see `vlm.model.VLM.held`).
  """
  zeros = lambda leaf: jnp.zeros((slots, *leaf.shape[1:]), leaf.dtype)
  number = lambda: jnp.zeros(slots, jnp.int32)
  return Slots(
    empty_cache(config, slots, length, dtype=jnp.dtype(ex.dtype), unrolled=True),
    jax.tree.map(zeros, held), jnp.zeros((slots, length), bool), number(), number(), number(),
    jax.tree.map(jnp.asarray, settings(slots)))


def read(fn: Functional, params, batch: Mapping[str, Any], *, ex: Execution):
  """(logits [1 v], cache, what is held, valid [1 t]) of one prompt."""
  embeds, valid, extras = fn.apply(params, batch, method='prompt', ex=ex)
  logits, _, cache = fn.apply(params, embeds.astype(ex.dtype), valid, slots=valid.shape[1],
                              method='prefill', ex=ex, **extras)
  return logits, cache, fn.apply(params, extras, method='held'), valid


def admit(fn: Functional, params, slots: Slots, batch: Mapping[str, Any], chosen: Settings, row,
          *, ex: Execution) -> tuple[Slots, Drawn]:
  """Reads a prompt into slot `row` and draws its first token.

  Args:
    batch: of one row, its length no more than that of a slot.
    chosen: of one slot.

  Returns:
    (slots, the token [1]).
  """
  logits, cache, held, valid = read(fn, params, batch, ex=ex)
  count = jnp.zeros(1, jnp.int32)
  drawn = draw(logits, chosen, count)

  def write(store, new):
    new = new.astype(store.dtype)
    return jax.lax.dynamic_update_slice(store, new, (row, *(0,) * (store.ndim - 1)))

  def whole(store, new):  # nothing of the slot's last request may stay
    return write(store, jnp.pad(new, [(0, 0), *(
      (0, room - size) for room, size in zip(store.shape[1:], new.shape[1:], strict=True))]))

  place = jnp.full(1, valid.shape[1], jnp.int32)
  return Slots(
    jax.tree.map(write, slots.cache, cache), jax.tree.map(whole, slots.held, held),
    whole(slots.valid, valid), write(slots.place, place), write(slots.token, drawn.token),
    write(slots.count, count + 1), jax.tree.map(write, slots.chosen, chosen)), drawn


def step(fn: Functional, params, slots: Slots, *, ex: Execution) -> tuple[Slots, Drawn]:
  """The next token of every slot, [s]."""
  length = slots.valid.shape[1]
  valid = slots.valid | (jnp.arange(length) == slots.place[:, None])
  row = lambda tree: jax.tree.map(lambda leaf: leaf[None], tree)

  def one(token, valid, cache, held, place):
    logits, cache = fn.apply(params, token[None], valid[None], row(cache), place, method='step',
                             ex=ex, **row(held))
    return logits[0], jax.tree.map(lambda leaf: leaf[0], cache)

  logits, cache = jax.vmap(one)(slots.token, valid, slots.cache, slots.held, slots.place)
  drawn = draw(logits, slots.chosen, slots.count)
  place = jnp.minimum(slots.place + 1, length - 1)  # of slots without a request
  return Slots(cache, slots.held, valid, place, drawn.token, slots.count + 1, slots.chosen), drawn


def shardings(slots: Slots, ex: Execution) -> Any:
  """Where the slots lie on the mesh of `ex`: rows over its batch axes, heads over `tensor`, what
  does not divide whole; None on one device."""
  if ex.devices == 1:
    return None
  sizes = ex.mesh.shape
  shards, tensor = sizes['data'] * sizes['fsdp'], sizes['tensor']

  def place(leaf) -> NamedSharding:
    spec: list[Any] = [BATCH_AXES if leaf.shape[0] % shards == 0 else None]
    if leaf.ndim == 4:  # [s l k p] of the cache, [s m h p] of visual keys
      spec += [None, 'tensor' if leaf.shape[2] % tensor == 0 else None]
    return NamedSharding(ex.mesh, P(*spec))

  return jax.tree.map(place, slots)
