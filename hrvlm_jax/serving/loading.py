"""A checkpoint as a model cut over the devices of one process."""

from __future__ import annotations

from collections.abc import Mapping
import os
from typing import Any

import jax

from hrvlm_jax.checkpoint import averages
from hrvlm_jax.core.execution import Execution
from hrvlm_jax.parallel.mesh import MeshConfig, make_mesh
from hrvlm_jax.parallel.rules import param_shardings
from hrvlm_jax.systems.contract import sharding_rules
from hrvlm_jax.vlm import model as vlm
from hrvlm_jax.vlm.answer import Answerer, find_tokenizer, model_config


def load_over_mesh(checkpoint: str | os.PathLike, *, dtype: str = 'float32', exif: str = 'apply',
                   alpha: str = 'drop', encoder_options: Mapping[str, Any] | None = None,
                   tensor: int = 1, fsdp: int = 1) -> Answerer:
  """The model of a checkpoint or work directory; no device holds the whole of it.

  Args:
    tensor, fsdp: sizes of the mesh.

  Raises:
    UserError: no checkpoint, no tokenizer, fewer devices, weights that cannot be cut that way.
  """
  mesh = make_mesh(MeshConfig(data=1, tensor=tensor, fsdp=fsdp),
                   devices=jax.local_devices()[:tensor * fsdp])
  config = model_config(checkpoint, dict(encoder_options or {}))
  abstract = vlm.build(config).abstract
  params = averages.load_params(checkpoint, abstract, shardings=param_shardings(
    abstract, mesh, rules=sharding_rules(config)))
  return Answerer(config, params, find_tokenizer(checkpoint), exif=exif, alpha=alpha,
                  ex=Execution(dtype=dtype, mesh=mesh))
