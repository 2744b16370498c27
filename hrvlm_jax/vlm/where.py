"""Where a model answers: what that takes of a device, by arithmetic, and the mesh that follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.parallel import fitting, rules
from hrvlm_jax.parallel.fitting import Choice, Need
from hrvlm_jax.parallel.layout import Layout
from hrvlm_jax.parallel.mesh import MeshConfig, mesh_config
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.contract import ModelConfig, sharding_rules
from hrvlm_jax.vlm import laid


def prompt_places(config: ModelConfig) -> int:
  """Places that a prompt is taken to have: the visual tokens of one image and 512 of text."""
  return (registry.get(config.system).tokens(config.encoder) or 2048) + 512


def answer_need(config: ModelConfig, abstract: Any, mesh: MeshConfig, *, rows: int,
                new_tokens: int, beams: int = 1, dtype: str = 'float32') -> Need:
  """What a device of a mesh (all sizes known) needs to answer `rows` questions at a time.

  Parameters are counted exactly. The prompt has `prompt_places`.

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
  slots = prompt_places(config) + new_tokens
  heads = text.kv_heads / (tensor if text.kv_heads % tensor == 0 else 1)
  cache = each * beams * slots * 2 * text.depth * heads * text.head_dim * number
  prompt = each * slots * (6 * text.width + 3 * text.mlp_width / tensor) * number
  layer = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract['language']['blocks']))
  layer *= number / text.depth / tensor
  logits = each * beams * text.vocab_size * 4 * 3
  parts = {'parameters': held, 'cache': cache * (2 if beams > 1 else 1),
           'prompt and one layer': prompt + 2 * layer + logits}
  return Need({name: int(count) for name, count in parts.items()})


def chosen(config: ModelConfig, abstract: Any, devices: int, limit: int, *, slices: int = 1,
           mesh: MeshConfig | None = None, **asked: Any) -> Choice | None:
  """The mesh that was named, else the smallest of so many devices; None where none can be cut.

  Args:
    limit: bytes that a device offers.
    asked: of `answer_need`.

  Raises:
    UserError: a named mesh that fits neither the devices nor the model.
  """
  need = functools.partial(answer_need, config, abstract, **asked)
  if mesh is not None:
    mesh = mesh.resolve(devices)
    return Choice(mesh, need(mesh), limit)

  def tried(sizes: MeshConfig) -> Need | None:
    try:
      return need(sizes)
    except UserError:  # heads or widths that do not divide
      return None

  # Heads first: weights that are spread over fsdp are gathered anew for every token.
  meshes = sorted(fitting.candidates(devices, slices=slices),
                  key=lambda m: (m.fsdp * m.tensor, m.fsdp))
  return fitting.smallest(meshes, tried, limit)


def told(layout: Layout, choice: Choice) -> str:
  """The line about where a model answers."""
  kind = layout.mesh.devices.flat[0].device_kind
  return (f'answers on {layout.mesh.size} x {kind}, mesh {fitting.axes_of(choice.mesh)}: '
          f'{choice.words}')


def layout_for(config: ModelConfig, *, mesh: Mapping[str, int] | None, rows: int, new_tokens: int,
               beams: int = 1, dtype: str = 'float32', devices: Sequence[Any] | None = None,
               least: int = 1) -> tuple[Layout, Choice]:
  """Where a model answers, and what that leaves free: the mesh that was named, else the smallest.

  Without one a device of this process is tried first, then two, four and so on to all of this
  process, then those of all processes: of what a process holds alone it needs no messages.

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
  abstract, limit = laid.held(config, dtype), fitting.device_bytes()
  local = list(devices or jax.local_devices())
  asked = dict(rows=rows, new_tokens=new_tokens, beams=beams, dtype=dtype)
  if mesh is not None:
    choice = chosen(config, abstract, jax.device_count(), limit, mesh=mesh_config(mesh), **asked)
    return Layout(choice.mesh), choice
  best, parts = None, [least]
  while parts[-1] < len(local):
    parts.append(min(2 * parts[-1], len(local)))
  for some in dict.fromkeys((*(tuple(local[:n]) for n in parts), tuple(jax.devices()))):
    choice = chosen(config, abstract, len(some), limit, slices=fitting.slices_of(some), **asked)
    if choice is not None:
      best = Layout(choice.mesh, devices=some), choice
      if choice.fits:
        break
  layout, choice = best
  held = choice.need.parts['parameters']
  if held > limit:
    raise UserError(f'{config.system}: parameters are {fitting.size(held)} a device on '
                    f'{layout.mesh.size} device(s), each has {fitting.size(limit)}; use more '
                    'devices')
  return layout, choice
