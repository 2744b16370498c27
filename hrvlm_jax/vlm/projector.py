"""The projector between visual and language width (LLaVA's `mlp2x_gelu` and its relatives)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from hrvlm_jax.core.layers import Linear, activation, torch_uniform
from hrvlm_jax.core.module import Module, Rngs
from hrvlm_jax.systems.contract import ProjectorConfig


class Projector(Module):
  """fc1, activation, fc2, ... : `depth` linear layers, the hidden ones in language width."""

  def __init__(self, config: ProjectorConfig, *, param_dtype=jnp.float32, rngs: Rngs):
    self.config = config
    depth = 1 if config.kind == 'linear' else config.depth
    for index in range(depth):
      n_in = config.n_in if index == 0 else config.n_out
      setattr(self, f'fc{index + 1}', Linear(
        n_in, config.n_out, kernel_init=torch_uniform(n_in), bias_init=torch_uniform(n_in),
        param_dtype=param_dtype, rngs=rngs))
    self.depth = depth

  def __call__(self, x: Float[Array, '... i']) -> Float[Array, '... o']:
    for index in range(self.depth):
      if index:
        x = activation(self.config.activation)(x)
      x = getattr(self, f'fc{index + 1}')(x)
    return x
