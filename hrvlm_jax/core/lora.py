"""Folding LoRA sets into kernels and taking them out again, over parameter trees."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from hrvlm_jax.core.layers import LoRA


def merge(params: Mapping[str, Any], spec: LoRA) -> dict[str, Any]:
  """Adds scale * a @ b of one set to every kernel that has it; nothing else changes.

  The product is taken in float32 and the sum cast to the kernel's dtype: merging into bfloat16
  rounds the update. Linear layers, stacked ones and patch convolutions alike. The merged tree is
  used with `adapter=None`, or without its LoRA leaves (`strip`).
  """
  return _shift(params, spec, 1.0)


def unmerge(params: Mapping[str, Any], spec: LoRA) -> dict[str, Any]:
  """Takes a merged set out again; equal to what was merged up to rounding."""
  return _shift(params, spec, -1.0)


def strip(params: Mapping[str, Any]) -> dict[str, Any]:
  """The tree without LoRA leaves: parameters of the same model built without sets."""
  return {
    key: strip(value) if isinstance(value, Mapping) else value
    for key, value in params.items() if not key.startswith(('lora_a', 'lora_b'))}


def _shift(params, spec: LoRA, sign: float):
  out = {key: _shift(value, spec, sign) if isinstance(value, Mapping) else value
         for key, value in params.items()}
  a, b = spec.leaves
  if a in out:
    # a: [... in r], b: [... r out] with the same leading layer axis, or none.
    low = (jnp.asarray(out[leaf], jnp.float32) for leaf in (a, b))
    delta = jnp.matmul(*low, precision='highest') * (sign * spec.scale)
    kernel = out['kernel']
    out['kernel'] = (jnp.asarray(kernel, jnp.float32) + delta).astype(kernel.dtype)
  return out
