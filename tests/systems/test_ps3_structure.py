"""What PS3's programs hold and do not hold: resizes, hidden states, patch grids; every variant."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hrvlm_jax.core import resample
from hrvlm_jax.core.module import Functional
from hrvlm_jax.language.tokenizer import ByteTokenizer
from hrvlm_jax.systems.ps3.config import CLIP_MEAN, RELEASED, tiny_encoder
from hrvlm_jax.systems.ps3.encoder import Encoder, feature_maps
from hrvlm_jax.systems.ps3.plan import make_plan
from hrvlm_jax.systems.ps3.text import tokenizer

CONFIG = tiny_encoder(max_select=40)


def program(config, shape, *, keep=1, **plan):
  """The jaxpr of a whole encoding, as text."""
  fn = Functional(lambda rngs: Encoder(config, rngs=rngs))
  made = make_plan(*shape[1:3], config, **plan)
  return str(jax.make_jaxpr(lambda p, x: fn.bind(p).encode(x, made, keep=keep).hidden)(
    fn.abstract, jax.ShapeDtypeStruct(shape, jnp.float32)))


def test_a_scale_of_the_inputs_size_is_not_resized():
  x = jax.ShapeDtypeStruct((2, 160, 160, 3), jnp.float32)
  same = jax.make_jaxpr(lambda x: resample.bicubic(x, 160, 160))(x)
  assert not same.eqns
  # 160 x 160 is the largest scale: only the thumbnail and the middle scale are made. Each resize
  # reads four taps along columns and four along rows.
  taps = lambda side: program(CONFIG, (2, side, side, 3), num_looks=1).count('f32[2,160,160,3] = ')
  assert taps(160) < taps(168)


def test_nothing_stores_all_hidden_states_unless_asked():
  depth, tokens, cells = 3, 40, 25
  for text, kept in ((program(CONFIG, (2, 160, 160, 3), num_looks=1), 1),
                     (program(CONFIG, (2, 160, 160, 3), num_looks=1, keep=depth), depth)):
    stored = [n for n in range(1, depth + 1)
              if f'f32[2,{n},{tokens},64]' in text or f'f32[{n},2,{tokens},64]' in text]
    # The buffer of tapped blocks has a slot for every tap but the last, and one for all others; its
    # first axis is that of the rows.
    assert max(stored, default=1) == max(kept, 1), (kept, stored)
  # The thumbnail stores what the selection reads (blocks 0 and 2), not every block.
  text = program(CONFIG, (2, 160, 160, 3), num_looks=1)
  assert not any(f'f32[{a},{b},{cells},64]' in text for a, b in ((depth, 2), (2, depth)))


def test_the_patch_grid_of_a_high_scale_is_never_embedded():
  # Patches of 8 pixels are the encoder's alone when the ConvNet has others.
  net = dataclasses.replace(CONFIG.saliency, kernel=16)
  text = program(dataclasses.replace(CONFIG, saliency=net), (2, 160, 160, 3), num_looks=2)
  assert 'f32[2,40,64]' in text and 'f32[2,25,192]' in text  # looks, the thumbnail's patches
  for cells in (100, 400):
    assert f'f32[2,{cells},64]' not in text
    assert f'f32[2,{cells},192]' not in text  # nor are its patches cut out


@pytest.mark.parametrize('tokens', [1, 7, 40, 41, 95, 499])
@pytest.mark.parametrize('size', [(160, 160), (90, 200), (400, 60)])
def test_any_number_of_tokens_on_any_shape_fills_its_maps(tokens, size):
  """Counts only: maps hold as many cells as tokens come out, and no cell twice."""
  plan = make_plan(*size, CONFIG, num_tokens=tokens)
  available = sum(plan.cells)
  assert plan.looks == -(-min(tokens, available) // 40)
  taken = np.array([list(look) for look in plan.counts[0]])
  assert (taken.sum(0) <= np.array(plan.cells)).all()
  # What the last scale cannot use is lost, as in the original: narrow images may get fewer.
  assert taken.sum() <= min(tokens, available)
  if size == (160, 160) or tokens <= 40:
    assert taken.sum() == min(tokens, available)


@pytest.mark.full('systems')
def test_feature_maps_of_a_wide_image_have_its_shape():
  fn = Functional(lambda rngs: Encoder(CONFIG, rngs=rngs))
  plan = make_plan(64, 160, CONFIG, num_tokens=30)

  def maps(params, x):
    out = fn.bind(params).encode(x, plan)
    return feature_maps(out.last, out.maps, CONFIG.grid), out.last

  x = jax.random.normal(jax.random.key(0), (1, 64, 160, 3))
  found, last = jax.jit(maps)(fn.init(jax.random.key(0)), x)
  assert [m.shape for m in found] == [(1, 5, 5, 64), (1, 4, 10, 64), (1, 8, 20, 64)]
  used = np.concatenate([np.asarray(m).reshape(-1, 64) for m in found])
  used = used[np.abs(used).sum(-1) > 0]
  np.testing.assert_array_equal(used, last[0])


@pytest.mark.parametrize('name', sorted(RELEASED))
def test_every_released_variant_encodes_at_its_full_size(name):
  """Shapes alone: nothing is computed."""
  config = RELEASED[name].encoder
  side, radio = config.scales[-1], 'cradio' in name
  fn = Functional(lambda rngs: Encoder(config, rngs=rngs))
  plan = make_plan(side, side, config, num_looks=1)
  out = jax.eval_shape(lambda p, x: fn.bind(p).encode(x, plan).last, fn.abstract,
                       jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32))
  assert out.shape == ((1, 576 + 2560, 1024) if radio else (1, 729 + 2560, 1152))
  assert (config.mean == CLIP_MEAN) == radio and (config.adapter is not None) == radio
  assert (config.vision.position == 'crop') == radio
  assert config.vision.activation == 'gelu'
  second = 'siglip2' in name
  assert (config.text.activation, config.text.pad, config.text.vocab_size) == (
    ('gelu_tanh', 0, 256_000) if second else ('gelu', 1, 32_000))
  pooled = jax.eval_shape(lambda p, x: fn.bind(p).pool(x), fn.abstract, out)
  assert pooled.shape == (1, 1152)


def test_the_pad_of_a_text_tower_follows_its_config():
  for pad in (0, 1):
    config = dataclasses.replace(CONFIG.text, pad=pad)
    ids = tokenizer(ByteTokenizer({}), config)(['Hi!'])[0]
    assert ids[:4].tolist() == [104, 105, 1, pad] and set(ids[3:].tolist()) == {pad}
