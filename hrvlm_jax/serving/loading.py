"""A checkpoint as a model to be served, on one device or cut over the devices of a process."""

from __future__ import annotations

from collections.abc import Mapping
import os
from typing import Any

import jax

from hrvlm_jax.checkpoint import store
from hrvlm_jax.core.execution import Execution
from hrvlm_jax.parallel.mesh import MeshConfig, make_mesh
from hrvlm_jax.parallel.rules import param_shardings
from hrvlm_jax.systems.contract import sharding_rules
from hrvlm_jax.vlm import model as vlm
from hrvlm_jax.vlm.answer import Answerer, find_tokenizer, model_config


def load_answerer(checkpoint: str | os.PathLike, *, dtype: str = 'float32', exif: str = 'apply',
                  encoder_options: Mapping[str, Any] | None = None, tensor: int = 1, fsdp: int = 1
                  ) -> Answerer:
  """The model of a checkpoint or work directory.

  Args:
    tensor, fsdp: sizes of the mesh; 1 and 1: one device. No device holds the whole model while it
      is read.

  Raises:
    UserError: no checkpoint, no tokenizer, more devices than there are, weights that cannot be cut
      that way.
  """
  if tensor * fsdp == 1:
    return Answerer.load(checkpoint, ex=Execution(dtype=dtype), exif=exif,
                         encoder_options=dict(encoder_options or {}))
  devices = jax.local_devices()
  mesh = make_mesh(MeshConfig(data=1, tensor=tensor, fsdp=fsdp),
                   devices=devices[:max(tensor * fsdp, 1)])
  config = model_config(checkpoint, dict(encoder_options or {}))
  abstract = vlm.build(config).abstract
  params = store.load_params(checkpoint, abstract, shardings=param_shardings(
    abstract, mesh, rules=sharding_rules(config)))
  return Answerer(config, params, find_tokenizer(checkpoint), exif=exif,
                  ex=Execution(dtype=dtype, mesh=mesh))
