"""A lower bound of a train step's memory without compiling or tracing it."""

from __future__ import annotations

from collections.abc import Mapping
import math
from typing import Any

import jax
import jax.numpy as jnp

from hrvlm_jax.core import paths
from hrvlm_jax.core.config import from_dict
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.parallel import rules
from hrvlm_jax.parallel.mesh import AXES, batch_shards, mesh_config
from hrvlm_jax.parallel.topology import Topology
from hrvlm_jax.systems.contract import sharding_rules
from hrvlm_jax.training.config import RunConfig
from hrvlm_jax.training.optimizer import groups_of
from hrvlm_jax.training.program import run_dtypes
from hrvlm_jax.training.step import init_state
from hrvlm_jax.vlm import model as vlm


class Least:
  """Bounds for one model and its optimizer on any mesh of a topology.

  Args:
    options: of `programs.train_program`.

  Raises:
    UserError: the config's parameter groups do not cover the model.
  """

  def __init__(self, options: Mapping[str, Any], topology: Topology):
    self._topology = topology
    config = _config(options)
    abstract = vlm.build(config.model).abstract
    groups = groups_of(config.training, abstract)
    self._state = jax.eval_shape(
      lambda p: init_state(config.training, groups, p),
      run_dtypes(config.training, groups, abstract))
    self._trained = {path for path, group in groups.items() if not group.frozen}
    self._table = sharding_rules(config.model)

  def bytes(self, options: Mapping[str, Any], mesh: Mapping[str, int]) -> int:
    """Of one device: the state, and the larger of all gradients and of what layers keep.

    Raises:
      UserError: leaves that cannot be cut over the mesh (all listed).
    """
    config = _config(options)
    sizes = mesh_config(mesh).resolve(self._topology.devices).shape
    cut = jax.sharding.AbstractMesh(tuple(sizes.values()), AXES)
    shardings = rules.state_shardings(self._state, cut, rules=self._table)
    local = lambda leaf, place: math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    sums = jax.tree.map(local, self._state, shardings)
    parameters = paths.flatten(sums['params'])
    gradients = sum(size for path, size in parameters.items() if path in self._trained)
    # Gradients pass through the decoder unless only what comes after it learns.
    through = any(not path.startswith(('language/head', 'language/norm')) for path in self._trained)
    kept = _kept(config, options, cut) if through else 0
    return sum(jax.tree.leaves(sums)) + max(gradients, kept)


def _config(options: Mapping[str, Any]) -> RunConfig:
  config = options['config']
  return config if isinstance(config, RunConfig) else from_dict(RunConfig, config)


def _kept(config: RunConfig, options: Mapping[str, Any], mesh) -> int:
  """The inputs of the decoder's layers, which every recomputation keeps."""
  text, t = getattr(config.model, 'text', None), config.training
  if text is None:
    return 0
  if not t.batch_size % t.accumulate == 0:
    raise UserError(f'batch {t.batch_size} cannot be cut into {t.accumulate} micro-batches')
  rows = t.batch_size // t.accumulate // batch_shards(mesh)
  length = (options.get('length') or max(config.data.lengths)) // mesh.shape['sequence']
  return text.depth * rows * length * text.width * jnp.dtype(t.dtype).itemsize
