"""The decoder beyond its golden cases: causality, packing, vocabulary, prefix reuse, names."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hrvlm_jax.checkpoint.rows import check_names, export_tensors, import_tensors
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.execution import HERE
from hrvlm_jax.core.module import Functional
from hrvlm_jax.language import config as sizes
from hrvlm_jax.language.decoder import Decoder

KEYS = pathlib.Path(__file__).parents[1] / 'goldens' / 'release_keys'
CONFIGS = {
  'phi': sizes.phi(vocab_size=50, width=32, depth=2, heads=4, mlp_width=48),
  'llama': sizes.llama(vocab_size=50, width=32, depth=2, heads=4, mlp_width=48),
  'qwen2': sizes.qwen2(vocab_size=50, width=32, depth=2, heads=4, kv_heads=2, mlp_width=48,
                       tie_embeddings=True),
}


def build(config, **options):
  fn = Functional(lambda rngs: Decoder(config, **options, rngs=rngs))
  return fn, fn.init(jax.random.key(0))


def hidden_of(fn, params, ids, **options):
  module = fn.bind(params)
  ids = jnp.asarray(ids)
  return module(module.embed(ids), jnp.ones(ids.shape, bool), **options)


@pytest.mark.parametrize('family', CONFIGS)
def test_a_token_is_seen_from_its_place_on(family):
  fn, params = build(CONFIGS[family])
  ids = np.arange(10)[None] % 7
  changed = ids.copy()
  changed[0, 6] = 20
  a, b = (np.asarray(hidden_of(fn, params, x)) for x in (ids, changed))
  np.testing.assert_array_equal(a[:, :6], b[:, :6])
  assert (np.abs(a[:, 6:] - b[:, 6:]).max(axis=-1) > 1e-4).all()


@pytest.mark.parametrize('family', CONFIGS)
def test_packed_rows_equal_separate_rows(family):
  fn, params = build(CONFIGS[family])
  first, second = [1, 2, 3, 4], [9, 8, 7]
  packed = hidden_of(fn, params, [first + second], segments=jnp.array([[0] * 4 + [1] * 3]),
                     positions=jnp.array([[0, 1, 2, 3, 0, 1, 2]]))
  np.testing.assert_allclose(packed[:, :4], hidden_of(fn, params, [first]), atol=1e-6)
  np.testing.assert_allclose(packed[:, 4:], hidden_of(fn, params, [second]), atol=1e-6)


def test_extending_a_cache_equals_reading_at_once():
  fn, params = build(CONFIGS['qwen2'])
  module = fn.bind(params)
  ids = jnp.arange(11)[None]
  whole = hidden_of(fn, params, ids)
  valid = jnp.arange(16)[None] < 6
  _, _, cache = module.prefill(module.embed(ids[:, :6]), valid[:, :6], slots=16)
  more, _ = module.extend(module.embed(ids[:, 6:]), jnp.arange(16)[None] < 11, cache, 6)
  np.testing.assert_allclose(more, whole[:, 6:], atol=1e-5)


def test_padded_vocabulary_rows_never_win():
  config = dataclasses.replace(CONFIGS['phi'], pad_vocab_to=64)
  fn, params = build(config)
  logits = fn.bind(params).logits(jnp.ones((1, 32)))
  assert logits.shape == (1, 64)
  assert np.isneginf(logits[0, 50:]).all() and np.isfinite(logits[0, :50]).all()


@pytest.mark.parametrize('family', CONFIGS)
def test_padded_vocabulary_rows_are_not_in_files(family):
  """The names and shapes of the model without them, and the same known rows on the way back."""
  config = dataclasses.replace(CONFIGS[family], pad_vocab_to=64)
  fn, params = build(config)
  table = sizes.table(config)
  written = dict(export_tensors(params, table))
  plain, _ = build(CONFIGS[family])
  check_names(sizes.table(CONFIGS[family]), plain.abstract,
              {name: x.shape for name, x in written.items()})
  again = import_tensors(written, table, fn.abstract)
  assert again['embed']['embedding'].shape[0] == 64
  assert not np.any(again['embed']['embedding'][50:])
  np.testing.assert_array_equal(again['embed']['embedding'][:50], params['embed']['embedding'][:50])
  a, b = (fn.bind(p).logits(jnp.ones((1, 32))) for p in (params, again))
  np.testing.assert_array_equal(a, b)


def test_dropout_acts_with_a_key_only():
  config = dataclasses.replace(CONFIGS['phi'], residual_dropout=0.5)
  fn, params = build(config)
  ids = [[1, 2, 3]]
  plain = hidden_of(fn, params, ids)
  np.testing.assert_array_equal(plain, hidden_of(fn, params, ids))
  assert not np.allclose(plain, hidden_of(fn, params, ids, key=jax.random.key(1)))


@pytest.mark.parametrize('release', ['phi_1_5', 'phi_2', 'vicuna_7b', 'vicuna_13b', 'qwen2_7b'])
def test_released_names_map_one_to_one_at_full_size(release):
  recorded = json.loads((KEYS / f'{release}.json').read_text())
  # Rows of the table follow the weights: VILA-HD's Qwen2 has 151651 of them.
  config = dataclasses.replace(
    sizes.RELEASED[release], vocab_size=recorded['config']['vocab_size'])
  shapes = {name: tuple(shape) for name, shape in recorded['tensors'].items()}
  fn = Functional(lambda rngs: Decoder(config, rngs=rngs))
  table = sizes.table(config)
  present = check_names(table, fn.abstract, shapes, what=release)
  named = {name for entry in present for name in entry.names}
  assert named == {name for name in shapes if not table.is_ignored(name)}


@pytest.mark.parametrize('family', CONFIGS)
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_weights_survive_the_round_trip_bit_for_bit(family, dtype):
  fn, params = build(CONFIGS[family], param_dtype=dtype)
  table = sizes.table(CONFIGS[family])
  tensors = dict(export_tensors(params, table))
  again = import_tensors(tensors, table, fn.abstract)
  jax.tree.map(np.testing.assert_array_equal, again, jax.tree.map(np.asarray, params))
  jax.tree.map(lambda a, b: pytest.fail('dtype') if a.dtype != b.dtype else None, again, params)


def test_all_problems_of_a_checkpoint_are_in_one_message():
  fn, params = build(CONFIGS['phi'])
  table = sizes.table(CONFIGS['phi'])
  tensors = dict(export_tensors(params, table))
  tensors['model.final_layernorm.weight'] = np.zeros(3, np.float32)
  tensors['surprise'] = np.zeros(2, np.float32)
  del tensors['lm_head.bias'], tensors['model.layers.1.mlp.fc1.bias']
  with pytest.raises(UserError) as error:
    import_tensors(tensors, table, fn.abstract)
  for part in ('missing tensor lm_head.bias', 'missing tensor model.layers.1.mlp.fc1.bias',
               'unexpected tensor surprise', 'model.final_layernorm.weight: shape (3,)'):
    assert part in str(error.value)


@pytest.mark.parametrize('family', CONFIGS)
def test_hugging_face_configs_round_trip(family):
  config = CONFIGS[family]
  assert sizes.config_from_hf(json.loads(json.dumps(sizes.config_to_hf(config)))) == config


@pytest.mark.parametrize('values, message', [
  ({'model_type': 'gptj'}, "model_type 'gptj' is not supported"),
  ({'model_type': 'phi', 'qk_layernorm': True}, 'qk_layernorm'),
  ({'model_type': 'llama', 'rope_scaling': {'rope_type': 'yarn'}}, "rope_scaling type 'yarn'")])
def test_unsupported_settings_are_named(values, message):
  with pytest.raises(UserError, match=message):
    sizes.config_from_hf(values)


@pytest.mark.parametrize('family, kept', [('phi', 1), ('llama', 2)])
def test_a_cpu_keeps_what_goes_into_an_activation_and_no_more(family, kept):
  config = CONFIGS[family]
  fn, params = build(config)
  ids = [[1, 2, 3, 4, 5]]

  def arrays(ex):
    loss = lambda params: hidden_of(fn, params, ids, ex=ex).sum()
    backward = jax.vjp(loss, params)[1]
    return [leaf.shape for leaf in jax.tree.leaves(backward)].count(
      (config.depth, 1, 5, config.mlp_width))

  assert arrays(HERE.replace(platform='cpu', gradients=True)) == kept
  assert arrays(HERE.replace(platform='tpu', gradients=True, attention='xla')) > kept
