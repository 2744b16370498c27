"""Images that go through the tower in parts, as on a CPU, give what all at once give."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hrvlm_jax.core import cpu
from hrvlm_jax.core.execution import AXES, Execution
from hrvlm_jax.core.module import Functional
from hrvlm_jax.vision import vit

CONFIG = dataclasses.replace(vit.SIGLIP_SO400M_384, image_size=56, width=32, depth=3, heads=2,
                             mlp_width=48)


@pytest.mark.parametrize('images_at_once', [1, 2, 3, 4])
def test_parts_of_images_give_the_same_tokens_and_taps(images_at_once, monkeypatch):
  fn = Functional(lambda rngs: vit.ViT(CONFIG, rngs=rngs))
  params = fn.init(jax.random.key(0))
  images = jnp.asarray(np.random.default_rng(0).normal(size=(4, 56, 56, 3)), jnp.float32)

  def run(params, images, ex):
    tower = fn.bind(params)
    out = tower.run(tower.embed(images, ex=ex), taps=(0, 1), ex=ex)
    return out.x, out.taps

  compute = lambda ex: jax.jit(run, static_argnums=2)(params, images, ex)
  with jax.default_matmul_precision('highest'):
    whole = compute(Execution(platform='tpu'))
    monkeypatch.setattr(cpu, 'ROWS_AT_ONCE', images_at_once * 16)
    parts = compute(Execution(platform='cpu'))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole, parts)


def test_only_a_single_cpu_without_gradients_takes_parts():
  x = jnp.zeros((13, 729, 8))
  one = Execution(platform='cpu')
  assert cpu._images_at_once(x, one) == 3
  assert cpu._images_at_once(jnp.zeros((2, 4000, 8)), one) == 1
  assert cpu._images_at_once(x, one.replace(gradients=True)) == 13
  for platform, devices in (('cpu', 8), ('gpu', 1), ('tpu', 256)):
    mesh = jax.sharding.AbstractMesh((devices, 1, 1, 1), AXES)
    assert cpu._images_at_once(x, Execution(platform=platform, mesh=mesh)) == 13
