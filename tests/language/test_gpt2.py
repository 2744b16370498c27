"""GPT-2: names and numbers beside transformers, learned positions in every way the decoder runs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hrvlm_jax.core import paths
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.language import config as language
from hrvlm_jax.systems.baselines import single_view
from hrvlm_jax.systems.fusion import CrossAttentionFusion
from hrvlm_jax.vlm import model as vlm

SMALL = language.gpt2(vocab_size=64, width=32, depth=2, heads=2, max_positions=24)


def test_settings_come_back():
  """Numbers beside transformers: tests/interop/test_starts.py."""
  values = language.config_to_hf(SMALL)
  assert values['model_type'] == 'gpt2' and language.config_from_hf(values) == SMALL
  usual = language.config_from_hf({'model_type': 'gpt2'})
  assert usual == language.RELEASED['gpt2'] and usual.max_positions == 1024
  table = language.table(SMALL)
  names = {name for row in table.rows for name in row.names}
  assert 'transformer.h.{i}.attn.c_attn.weight' in names and 'lm_head.weight' in table.tied


@pytest.mark.parametrize('inside', [True, False])
def test_one_token_at_a_time_is_the_whole_text(inside):
  """Prefill and steps, with cross-attention inside the layers and in front of them."""
  base = single_view.tiny()
  config = dataclasses.replace(
    base, text=dataclasses.replace(SMALL, vocab_size=264), projector=None, image_token=None,
    chat='this_image_shows_beside',
    fusion=CrossAttentionFusion(width=96, interval=1, inside=inside))
  fn, loop = vlm.build(config), vlm.build(config, unrolled=True)
  rng = np.random.default_rng(1)
  params = jax.tree.map(lambda leaf: jnp.asarray(0.2 * rng.normal(size=leaf.shape), leaf.dtype),
                        fn.abstract)
  ids = jnp.asarray(rng.integers(0, 264, (1, 6)))
  views = {'pixels': rng.integers(0, 256, (1, 40, 40, 3), np.uint8),
           'index': np.zeros((1, 1), np.int32), 'valid': np.ones((1, 1), bool)}
  batch = lambda n: {'tokens': ids[:, :n], 'valid': jnp.ones((1, n), bool), 'views': views}

  @jax.jit
  def whole(p):
    module = fn.bind(p)
    return module.logits(module(batch(6)))

  @jax.jit
  def stepped(p):
    module = loop.bind(vlm.unroll(config, p))
    embeds, valid, extras = module.prompt(batch(4))
    first, _, cache = module.prefill(embeds, valid, slots=6, **extras)
    valid = jnp.ones((1, 6), bool)
    out = [first]
    for slot in (4, 5):
      seen = valid & (jnp.arange(6) <= slot)
      more, cache = module.step(ids[:, slot], seen, cache, slot, **extras)
      out.append(more)
    return jnp.stack(out, axis=1)

  want, found = whole(params), stepped(params)
  np.testing.assert_allclose(found, want[:, 3:], atol=1e-4)
  assert ('norm2' in paths.unflatten(paths.flatten(params))['fusion']['blocks']) is not inside


def test_what_does_not_go_together_is_refused():
  with pytest.raises(ValueError, match='rotary_dim must be 0'):
    dataclasses.replace(SMALL, rotary_dim=8)
  with pytest.raises(ValueError, match='MLP follows its attention'):
    base = single_view.tiny()
    dataclasses.replace(base, projector=None,
                        fusion=CrossAttentionFusion(width=96, interval=1, inside=True))
  with pytest.raises(UserError, match="'qwen2' or 'gpt2'"):
    language.config_from_hf({'model_type': 'gpt3'})
