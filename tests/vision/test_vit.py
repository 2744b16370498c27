"""Images that go through the tower in parts, as on a CPU, give what all at once give."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hrvlm_jax.core.module import Functional, layers_for_gradients
from hrvlm_jax.core.target import compiling_for
from hrvlm_jax.vision import vit

CONFIG = dataclasses.replace(vit.SIGLIP_SO400M_384, image_size=56, width=32, depth=3, heads=2,
                             mlp_width=48)


@pytest.mark.parametrize('images_at_once', [1, 2, 3, 4])
def test_parts_of_images_give_the_same_tokens_and_taps(images_at_once, monkeypatch):
  fn = Functional(lambda rngs: vit.ViT(CONFIG, rngs=rngs))
  params = fn.init(jax.random.key(0))
  images = jnp.asarray(np.random.default_rng(0).normal(size=(4, 56, 56, 3)), jnp.float32)

  def run(params, images):
    tower = fn.bind(params)
    out = tower.run(tower.embed(images), taps=(0, 1))
    return out.x, out.taps

  compute = lambda: jax.jit(lambda p, x: run(p, x))(params, images)
  with jax.default_matmul_precision('highest'):
    whole = compute()
    monkeypatch.setattr(vit, 'ROWS_AT_ONCE', images_at_once * 16)
    with compiling_for('cpu', 1):
      parts = compute()
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole, parts)


def test_only_a_single_cpu_without_gradients_takes_parts():
  x = jnp.zeros((13, 729, 8))
  with compiling_for('cpu', 1):
    assert vit._images_at_once(x) == 3
    assert vit._images_at_once(jnp.zeros((2, 4000, 8))) == 1
    with layers_for_gradients('loop'):
      assert vit._images_at_once(x) == 13
  for platform, devices in (('cpu', 8), ('gpu', 1), ('tpu', 256)):
    with compiling_for(platform, devices):
      assert vit._images_at_once(x) == 13
