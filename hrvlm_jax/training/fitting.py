"""What a train step needs of a device, by arithmetic, and the mesh that follows from it.

Parameters, gradients and optimizer state are counted exactly, by the sharding rules. What a step
keeps and works on is estimated from the parameter table (depth, width and hidden width of every
stack of layers) and the shapes of a batch; tests/training/test_fitting.py holds it beside what the
compiler for TPUs said (docs/plans). `hrvlm plan` compiles the step itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hrvlm_jax.core import paths
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.parallel import fitting, rules
from hrvlm_jax.parallel.fitting import Choice, Need, axes_of
from hrvlm_jax.parallel.mesh import MeshConfig
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.contract import sharding_rules
from hrvlm_jax.systems.objective import BatchShapes
from hrvlm_jax.training.batches import batch_shapes
from hrvlm_jax.training.config import RunConfig
from hrvlm_jax.training.program import Outline, check_rows, micro_rows

# Activations of one layer that live together, forward and backward, in widths and hidden widths.
_LAYER = (8, 4)
# The same, of what a layer keeps for the backward pass.
_KEPT = {'layers': (1, 0), 'attention': (2, 0), 'dots': (6, 2), 'none': (10, 4)}
_SCORES = 1 << 28  # scores that a device makes at a time (`core.attention`)
_HEAD = 64  # width of a head, where only the width of the stream is known


class Stack(NamedTuple):
  """Layers of one shape: what the table says of them."""

  path: str
  depth: int
  width: int
  hidden: int
  layer_bytes: int  # weights of one layer, in elements
  attends: bool
  trained: bool


def stacks(outline: Outline) -> Iterator[Stack]:
  """The stacks of layers of a model, found by their paths (`.../blocks/...`)."""
  table = paths.flatten(outline.state['params'])
  names = sorted({match.group(1) for path in table if (match := re.match(r'(.*/blocks)/', path))})
  for name in names:
    leaves = {path: leaf for path, leaf in table.items() if path.startswith(f'{name}/')}
    kernels = [leaf for path, leaf in leaves.items() if path.endswith('kernel')]
    sides = [leaf.shape[-1] for leaf in kernels] + [leaf.shape[-2] for leaf in kernels]
    vectors = [leaf.shape[-1] for path, leaf in leaves.items() if '/norm' in path]
    yield Stack(
      name, next(iter(leaves.values())).shape[0], max(vectors or sides), max(sides),
      sum(math.prod(leaf.shape[1:]) for leaf in leaves.values()),
      any('/attn/' in path for path in leaves),
      any(not outline.groups[path].frozen for path in leaves))


def _places(config: RunConfig, stack: Stack, outline: Outline, shapes: BatchShapes
            ) -> tuple[float, float]:
  """(places of a whole batch that run through a stack, places of one row)."""
  arrays = paths.flatten(shapes.arrays)
  first = stack.path.partition('/')[0]
  pixels = next((leaf for path, leaf in arrays.items() if path.endswith('pixels')), None)
  if first != 'vision' or pixels is None:
    rows, length = arrays['tokens'].shape[:2]
    return rows * length, length
  table = paths.flatten(outline.state['params'])
  seen = math.prod(pixels.shape[:-1])
  if match := re.search(r'/stages/(\d+)/', stack.path):
    stride = 4 * 2**int(match.group(1))
  else:
    kernel = table.get(f'{stack.path.removesuffix("/blocks")}/patch_embed/kernel')
    stride = 16 if kernel is None or len(kernel.shape) != 4 else kernel.shape[0]
  views = math.prod(pixels.shape[:-3])
  each = seen / views / stride**2
  selected = registry.get(config.model.system).places(config.model.encoder)
  if selected is not None:
    each = min(each, selected)
  return each * views, each


def step_need(config: RunConfig, outline: Outline, mesh: MeshConfig, shapes: BatchShapes) -> Need:
  """What a step needs of one device of a mesh (all its sizes known).

  Args:
    shapes: of a micro-batch.

  Raises:
    UserError: leaves that cannot be cut over the mesh.
  """
  t, sizes = config.training, mesh.shape
  abstract = fitting.abstract_mesh(mesh)
  places = rules.state_shardings(outline.state, abstract, rules=sharding_rules(config.model))
  held = {name: fitting.local_bytes(jax.tree.leaves(outline.state[name]),
                                    jax.tree.leaves(places[name])) for name in outline.state}
  flat, where = (paths.flatten(tree['params']) for tree in (outline.state, places))
  trained = [path for path, group in outline.groups.items() if not group.frozen]
  gradients = fitting.local_bytes([flat[p] for p in trained], [where[p] for p in trained])
  shards, tensor = sizes['data'] * sizes['fsdp'], sizes['tensor']
  cut = shards * sizes['sequence']
  number = jnp.dtype(t.dtype).itemsize
  kept = working = weights = 0.0
  for stack in stacks(outline):
    whole, row = _places(config, stack, outline, shapes)
    count = whole / cut
    wide, hidden = _KEPT[t.remat]
    if stack.trained:
      kept += stack.depth * count * (wide * stack.width + hidden * stack.hidden / tensor) * number
    wide, hidden = _LAYER
    layer = count * (wide * stack.width + hidden * stack.hidden / tensor) * number
    if stack.attends:
      heads = stack.width / _HEAD / tensor
      layer += 2 * 4 * min(count * heads * row, _SCORES)
    working = max(working, layer)
    weights = max(weights, 2 * stack.layer_bytes * number / tensor)
  head = flat.get('language/head/kernel', flat.get('language/embed/embedding'))
  if head is not None:
    rows, length = paths.flatten(shapes.arrays)['tokens'].shape[:2]
    logits = min(rows * length / cut, t.loss_chunk) * max(head.shape) * 4 * 3 / tensor
    working = max(working, logits + 2 * math.prod(head.shape) * number / tensor)
  arrays = sum(math.prod(leaf.shape) * leaf.dtype.itemsize
               for leaf in jax.tree.leaves(shapes.arrays)) * t.accumulate / shards
  pixels = sum(4 * math.prod(leaf.shape) // shards  # resized in float32
               for path, leaf in paths.flatten(shapes.arrays).items() if path.endswith('pixels'))
  parts = {'parameters': held['params'], 'optimizer': held['opt'] + held.get('ema', 0),
           'gradients': gradients, 'batch': 2 * arrays + pixels, 'kept for the backward pass': kept,
           'one layer at work': working + weights}
  return Need({name: int(count) for name, count in parts.items()})


def chosen_mesh(config: RunConfig, outline: Outline, devices: int, limit: int, *, slices: int = 1,
                shapes: BatchShapes | None = None) -> Choice:
  """The smallest mesh that holds a run, or what the mesh it names needs.

  A run that names none has `MeshConfig()`: all devices on `data`, which is the first to be tried.

  Args:
    limit: bytes that a device offers (`parallel.fitting.device_bytes`).
    shapes: of a micro-batch; default: those of `batch_shapes`.

  Raises:
    UserError: a batch that no mesh of the devices can cut; weights and optimizer state that no mesh
      holds.
  """
  shapes = batch_shapes(config, micro_rows(config)) if shapes is None else shapes
  if config.mesh != MeshConfig():
    mesh = config.mesh.resolve(devices)
    check_rows(config, mesh.shape)
    return Choice(mesh, step_need(config, outline, mesh, shapes), limit)

  def need(mesh: MeshConfig) -> Need | None:
    if micro_rows(config) % (mesh.shape['data'] * mesh.shape['fsdp']):
      return None
    try:
      return step_need(config, outline, mesh, shapes)
    except UserError:  # heads or widths that do not divide
      return None

  choice = fitting.smallest(fitting.candidates(devices, slices=slices), need, limit)
  if choice is None:
    check_rows(config, MeshConfig().resolve(devices).shape)
    raise UserError(f'no mesh of {devices} devices can cut this model; name one with --mesh')
  return choice


def check_state(choice: Choice) -> None:
  """Refuses what is certain not to fit.

  Raises:
    UserError: parameters, gradients and optimizer state alone are larger than a device.
  """
  certain = sum(choice.need.parts[name] for name in ('parameters', 'optimizer', 'gradients'))
  if certain > choice.limit:
    raise UserError(
      f'mesh {axes_of(choice.mesh)}: parameters, gradients and optimizer state are '
      f'{fitting.size(certain)} a device, which has {fitting.size(choice.limit)}; spread them over '
      'more devices (--mesh fsdp=N), freeze groups, or train with LoRA')


def told(config: RunConfig, choice: Choice) -> list[str]:
  """The lines about the mesh for the start of a run."""
  own = config.mesh != MeshConfig()
  why = ('of the config' if own else 'the smallest that fits' if choice.fits else
         'the one that needs least')
  lines = [f'mesh {axes_of(choice.mesh)} ({why}): {choice.words}']
  if not choice.fits:
    lines.append(f'{choice.verdict}; more devices, more parts (training.accumulate), shorter rows, '
                 'training.remat or fewer trained parameters need less'
                 + (', or leave the mesh to be chosen (--mesh data=-1)' if own else ''))
  return lines


def batch_words(config: RunConfig, sizes: Mapping[str, Any]) -> str:
  """Rows of a step, of a shard, and the lengths they may have."""
  t, shards = config.training, sizes['data'] * sizes['fsdp']
  lengths = ', '.join(map(str, config.data.lengths))
  return (f'batch {t.batch_size} in {t.accumulate} part(s), {micro_rows(config) // shards} row(s) '
          f'of each on one of {shards} shard(s); bucket lengths {lengths}')
