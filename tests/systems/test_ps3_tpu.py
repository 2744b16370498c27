"""How exactly PS3 ranks cells and makes pixels where products are rounded otherwise: on a TPU."""

import jax
import jax.numpy as jnp

from hrvlm_jax.core.execution import Execution
from hrvlm_jax.core.module import Functional
from hrvlm_jax.core.resample import bicubic
from hrvlm_jax.systems.ps3.config import tiny_encoder
from hrvlm_jax.systems.ps3.encoder import Encoder
from hrvlm_jax.systems.ps3.plan import make_plan

TPU = Execution(platform='tpu')


def equations(jaxpr):
  for equation in jaxpr.eqns:
    yield equation
    for value in equation.params.values():
      for inner in value if isinstance(value, (tuple, list)) else (value,):
        inner = getattr(inner, 'jaxpr', inner)
        if hasattr(inner, 'eqns'):
          yield from equations(inner)


def test_what_ranks_cells_and_makes_pixels_is_exact():
  """On a TPU a float32 product is one of half-precision factors unless it is told otherwise."""
  config = tiny_encoder()
  fn = Functional(lambda rngs: Encoder(config, rngs=rngs))
  side = config.scales[-1]
  plan = make_plan(side, side, config, num_looks=1)

  def rank(params, images, low, prompt):
    selection = fn.bind(params).selection
    found = selection.features([low] * len(config.select_layers), bicubic(images, 96, 80, ex=TPU),
                               ex=TPU)
    return selection(found, prompt, plan)

  grid, width = config.grid, config.vision.width
  jaxpr = jax.make_jaxpr(rank)(
    fn.abstract, jnp.zeros((1, side, side, 3)), jnp.zeros((1, grid**2, width), jnp.bfloat16),
    jnp.zeros((1, width))).jaxpr
  products = [found for found in equations(jaxpr)
              if found.primitive.name in ('dot_general', 'conv_general_dilated')]
  assert len(products) > 8
  for found in products:
    assert found.params['precision'] == (jax.lax.Precision.HIGHEST,) * 2, found
