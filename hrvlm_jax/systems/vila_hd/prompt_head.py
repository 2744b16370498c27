"""The head that turns a state of the language model into PS3's selection prompt.

Source: `NVlabs/VILA: llava/model/multimodal_projector/builder.py`, `llava_arch.py`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hrvlm_jax.core.layers import LayerNorm, Linear, activation, wide
from hrvlm_jax.core.module import Module, Rngs


def _uniform(key, shape, dtype):
  return jax.random.uniform(key, shape, dtype, -0.02, 0.02)


class PromptHead(Module):
  """'linear': fc1; 'mlp': fc2(norm(gelu(fc1(x)))), the inner width twice the visual one."""

  def __init__(self, kind: str, n_in: int, n_out: int, *, param_dtype=jnp.float32, rngs: Rngs):
    make = dict(kernel_init=_uniform, bias_init=_uniform, param_dtype=param_dtype, rngs=rngs)
    self.mlp = kind == 'mlp'
    self.fc1 = Linear(n_in, 2 * n_out if self.mlp else n_out, **make)
    self.norm = LayerNorm(2 * n_out, eps=1e-5, param_dtype=param_dtype,
                          rngs=rngs) if self.mlp else None
    self.fc2 = Linear(2 * n_out, n_out, **make) if self.mlp else None

  def __call__(self, state: Float[Array, 'b d']) -> Float[Array, 'b c']:
    """In float32 whatever the language model computes in: the selection is decided by it."""
    x = self.fc1(wide(state))
    return self.fc2(self.norm(activation('gelu')(x))) if self.mlp else x
