"""A stored model laid over a mesh: no host and no device ever holds all of it.

Parameters lie as in training (`parallel.rules`). Orbax reads what the devices of this process hold;
stacked layers are then taken apart in their places, one leaf after the other, so that no more than
one leaf is there twice.
"""

from __future__ import annotations

from collections.abc import Sequence
import functools
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P

from hrvlm_jax.checkpoint import store
from hrvlm_jax.core import paths
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.parallel import fitting, rules
from hrvlm_jax.parallel.fitting import Choice, Need
from hrvlm_jax.parallel.layout import Layout
from hrvlm_jax.parallel.mesh import MeshConfig, mesh_config
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.contract import ModelConfig, sharding_rules
from hrvlm_jax.vlm import model as vlm


def load(checkpoint: str | os.PathLike, config: ModelConfig, layout: Layout) -> dict[str, Any]:
  """Parameters of `vlm.build(config, unrolled=True)` in their places.

  Args:
    checkpoint: see `store.load_params`.

  Raises:
    UserError: no checkpoint, tensors that do not fit, leaves that cannot be cut (all listed).
  """
  abstract = vlm.build(config).abstract
  places = rules.param_shardings(abstract, layout.mesh, rules=sharding_rules(config))
  flat = paths.flatten(store.load_params(checkpoint, abstract, shardings=places))
  return unroll(config, flat)


def lay(config: ModelConfig, params: Any, layout: Layout) -> dict[str, Any]:
  """The same of parameters of `vlm.build(config)` in the memory of every process."""
  places = rules.param_shardings(params, layout.mesh, rules=sharding_rules(config))
  return unroll(config, paths.flatten(layout.put(params, places)))


def unroll(config: ModelConfig, flat: dict[str, jax.Array]) -> dict[str, Any]:
  """`vlm.unroll` of parameters by path that lie over a mesh; `flat` is emptied."""
  stacks = tuple(f'{name}/blocks/' for name in config.fusion.unrolled)
  result = {}
  for path in list(flat):
    leaf = flat.pop(path)
    stack = next((stack for stack in stacks if path.startswith(stack)), None)
    if stack is None:
      result[path] = leaf
      continue
    rest = path.removeprefix(stack)
    place = NamedSharding(leaf.sharding.mesh, P(*leaf.sharding.spec[1:]))
    for number, layer in enumerate(_apart(leaf.shape[0], place)(leaf)):
      result[f'{stack}{number}/{rest}'] = layer
    leaf.delete()
  return paths.unflatten(result)


@functools.lru_cache(maxsize=256)
def _apart(depth: int, place: NamedSharding):
  return jax.jit(lambda leaf: [leaf[i] for i in range(depth)], out_shardings=[place] * depth)


def answer_need(config: ModelConfig, abstract: Any, mesh: MeshConfig, *, rows: int,
                new_tokens: int, beams: int = 1, dtype: str = 'float32') -> Need:
  """What a device of a mesh (all sizes known) needs to answer `rows` questions at a time.

  Parameters are counted exactly. The prompt is taken to be the visual tokens of one image and 512
  places of text.

  Args:
    abstract: parameters of the model.

  Raises:
    UserError: leaves that cannot be cut over the mesh.
  """
  text, sizes = config.text, mesh.shape
  places = rules.param_shardings(abstract, fitting.abstract_mesh(mesh),
                                 rules=sharding_rules(config))
  held = fitting.local_bytes(jax.tree.leaves(abstract), jax.tree.leaves(places))
  number, tensor = jnp.dtype(dtype).itemsize, sizes['tensor']
  each = math.ceil(rows / (sizes['data'] * sizes['fsdp']))
  slots = (registry.get(config.system).tokens(config.encoder) or 2048) + 512 + new_tokens
  heads = text.kv_heads / (tensor if text.kv_heads % tensor == 0 else 1)
  cache = each * beams * slots * 2 * text.depth * heads * text.head_dim * number
  prompt = each * slots * (6 * text.width + 3 * text.mlp_width / tensor) * number
  layer = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract['language']['blocks']))
  layer *= number / text.depth / tensor
  logits = each * beams * text.vocab_size * 4 * 3
  parts = {'parameters': held, 'cache': cache * (2 if beams > 1 else 1),
           'prompt and one layer': prompt + 2 * layer + logits}
  return Need({name: int(count) for name, count in parts.items()})


def told(layout: Layout, choice: Choice) -> str:
  """The line about where a model answers."""
  kind = layout.mesh.devices.flat[0].device_kind
  return (f'answers on {layout.mesh.size} x {kind}, mesh {fitting.axes_of(choice.mesh)}: '
          f'{choice.words}')


def layout_for(config: ModelConfig, *, mesh: dict[str, int] | None, rows: int, new_tokens: int,
               beams: int = 1, dtype: str = 'float32', devices: Sequence[Any] | None = None,
               least: int = 1) -> tuple[Layout, Choice]:
  """Where a model answers, and what that leaves free: the mesh that was named, else the smallest.

  Without one a device of this process is tried first, then all of this process, then those of all
  processes: of what a process holds alone it needs no messages.

  Args:
    mesh: sizes of axes, over the devices of all processes.
    rows: questions at a time.
    devices: this process's, to be chosen from; default: all.
    least: devices to begin with.

  Raises:
    UserError: a mesh that does not fit the devices or the model, or a model that fits nowhere.
  """
  if config.text is None:
    raise UserError(f'model.text is none: {config.system} alone answers no questions')
  abstract, limit = vlm.build(config).abstract, fitting.device_bytes()
  local = list(devices or jax.local_devices())
  need = functools.partial(answer_need, config, abstract, rows=rows, new_tokens=new_tokens,
                           beams=beams, dtype=dtype)
  if mesh is not None:
    resolved = mesh_config(mesh).resolve(jax.device_count())
    return Layout(resolved), Choice(resolved, need(resolved), limit)

  def tried(sizes: MeshConfig) -> Need | None:
    try:
      return need(sizes)
    except UserError:  # heads or widths that do not divide
      return None

  best = None
  for chosen in dict.fromkeys((tuple(local[:least]), tuple(local), tuple(jax.devices()))):
    # Heads first: weights that are spread over fsdp are gathered anew for every token.
    meshes = sorted(fitting.candidates(len(chosen), slices=fitting.slices_of(chosen)),
                    key=lambda m: (m.fsdp * m.tensor, m.fsdp))
    choice = fitting.smallest(meshes, tried, limit)
    if choice is not None:
      best = Layout(choice.mesh, devices=chosen), choice
      if choice.fits:
        break
  layout, choice = best
  held = choice.need.parts['parameters']
  if held > limit:
    raise UserError(f'{config.system}: parameters are {fitting.size(held)} a device on '
                    f'{layout.mesh.size} device(s), each has {fitting.size(limit)}; use more '
                    'devices')
  return layout, choice
