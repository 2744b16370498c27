"""The sharding table: covers every released model, divides, or lists every offender at once."""

import jax
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

from hrvlm_jax.core import paths
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.parallel import rules
from hrvlm_jax.parallel.mesh import single_device_mesh
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.contract import sharding_rules
from hrvlm_jax.vlm import model as vlm
from tests import levels

POD = {'data': 16, 'fsdp': 16, 'sequence': 1, 'tensor': 1}
MIXED = {'data': 2, 'fsdp': 8, 'sequence': 1, 'tensor': 4}


def leaf(*shape, dtype=np.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


def spec(path, shape, mesh=MIXED):
  return rules.placements({path: leaf(*shape)}, mesh)[path].spec


@pytest.mark.parametrize(
  'path, shape, expected',
  [
    ('language/blocks/attn/q/kernel', (32, 4096, 4096), P(None, 'fsdp', 'tensor')),
    ('language/blocks/attn/out/kernel', (32, 4096, 4096), P(None, 'tensor', 'fsdp')),
    ('vision/tower/blocks/mlp/fc1/kernel', (24, 1024, 4096), P(None, 'fsdp', 'tensor')),
    ('language/blocks/mlp/down/kernel', (32, 11008, 4096), P(None, 'tensor', 'fsdp')),
    ('language/embed/embedding', (32000, 4096), P(None, ('fsdp', 'tensor'))),
    ('language/head/kernel', (4096, 32000), P('fsdp', 'tensor')),
    ('language/head/bias', (51200,), P('tensor')),
    # A vocabulary that does not divide: the width takes both axes.
    ('language/embed/embedding', (50295, 2568), P(None, 'fsdp')),
    ('language/head/kernel', (2560, 50295), P(('fsdp', 'tensor'))),
    ('language/blocks/norm1/scale', (32, 4096), P()),
    ('vision/tower/patch_embed/kernel', (14, 14, 3, 1024), P(None, None, None, 'fsdp')),
    ('vision/tower/pos_embed', (577, 1024), P(None, 'fsdp')),
    ('vision/tower/blocks/attn/q/lora_a_first', (32, 1280, 8), P(None, 'fsdp')),
    ('vision/tower/blocks/attn/q/lora_b_first', (32, 8, 1280), P(None, None, 'fsdp')),
    ('vision/slow/stages/2/blocks/conv_dw/kernel', (27, 7, 7, 1, 768), P()),
  ],
)
def test_table(path, shape, expected):
  assert spec(path, shape) == expected


@pytest.mark.parametrize('name', levels.rows(
  'parallel', registry.names(), first=['mc_llava', 'vila_hd']))
def test_every_released_model_is_covered(name):
  for release, config in registry.get(name).released.items():
    flat = paths.flatten(vlm.build(config).abstract)
    placed = rules.placements(flat, POD, rules=sharding_rules(config))
    for path, place in placed.items():
      size = np.prod(place.shape) * 4
      whole = not any(place.spec)
      assert not whole or size < rules.SMALL_BYTES or place.rule.why, f'{release}: {path}'
      assert place.rule is not rules.GENERAL or size < rules.SMALL_BYTES, f'{release}: {path}'
    assert len(rules.describe(placed, POD).splitlines()) == len(flat)


def test_tiny_models_run_on_any_mesh():
  for name in registry.names():
    config = registry.get(name).tiny()
    flat = paths.flatten(vlm.build(config).abstract)
    for axis in ('data', 'fsdp', 'tensor'):
      placed = rules.placements(
        flat, {'data': 1, 'fsdp': 1, 'sequence': 1, 'tensor': 1} | {axis: 8},
        rules=sharding_rules(config))
      general = [path for path, place in placed.items()
                 if place.rule is rules.GENERAL and place.shape]
      assert not general, f'{name}: {general}'


def test_all_offenders_in_one_error():
  leaves = {
    'vision/blocks/attn/q/kernel': leaf(24, 1024, 1002),
    'vision/blocks/attn/out/kernel': leaf(24, 1002, 1028),
    'vision/blocks/attn/k/kernel': leaf(24, 1024, 1024),
  }
  with pytest.raises(UserError) as caught:
    rules.placements(leaves, MIXED)
  assert str(caught.value).splitlines() == [
    'cannot shard: 3 problems',
    '  vision/blocks/attn/q/kernel (24, 1024, 1002): dim 1002 not divisible by tensor=4',
    '  vision/blocks/attn/out/kernel (24, 1002, 1028): dim 1002 not divisible by tensor=4',
    '  vision/blocks/attn/out/kernel (24, 1002, 1028): dim 1028 not divisible by fsdp=8',
  ]


def test_what_no_rule_names_is_placed_by_its_shape_and_told_once(caplog):
  leaves = {
    'vision/rings': leaf(64, 4096, 1023),  # the largest dimension that fsdp=8 divides
    'vision/odd': leaf(1023, 1021),  # none divides
    'vision/small': leaf(16, 16), 'vision/long': leaf(1 << 20),
  }
  rules._say_unnamed.cache_clear()
  with caplog.at_level('INFO', logger=rules.__name__):
    placed = rules.placements(leaves, MIXED)
    rules.state_shardings({'params': paths.unflatten(leaves), 'opt': (leaves,)},
                          jax.sharding.AbstractMesh((2, 8, 1, 4), tuple(MIXED)))
  assert placed['vision/rings'].spec == P(None, 'fsdp')
  assert [placed[f'vision/{name}'].spec for name in ('odd', 'small', 'long')] == [P()] * 3
  assert all(place.rule is rules.GENERAL for place in placed.values())
  assert len(caplog.records) == 1 and 'vision/long, vision/odd, vision/rings' in caplog.text
  own = (rules.Rule('vision/odd', (), why='a test'), *rules.RULES)
  assert rules.placements(leaves, MIXED, rules=own)['vision/odd'].rule.why == 'a test'


def test_large_leaves_stay_whole_only_with_a_reason():
  table = (rules.Rule(r'.*', ()),)
  with pytest.raises(UserError, match='4.2 MB stay whole on every device'):
    rules.placements({'a/kernel': leaf(1024, 1024)}, MIXED, rules=table)
  rules.placements({'a/kernel': leaf(16, 16)}, MIXED, rules=table)
  reasoned = (rules.Rule(r'.*', (), why='a test'),)
  assert (
    rules.placements({'a/kernel': leaf(1024, 1024)}, MIXED, rules=reasoned)['a/kernel'].spec == P()
  )
  # An alternative that keeps the leaf whole needs a reason, too.
  table = (rules.Rule(r'.*', ('fsdp', None), ((),)),)
  with pytest.raises(UserError, match='stay whole'):
    rules.placements({'a/kernel': leaf(1023, 1024)}, MIXED, rules=table)


def test_small_leaves_that_do_not_divide_stay_whole_unless_told():
  leaves = {'a/q/kernel': leaf(10, 16)}
  assert rules.placements(leaves, MIXED)['a/q/kernel'].spec == P(None, 'tensor')
  with pytest.raises(UserError, match='dim 10 not divisible by fsdp=8'):
    rules.placements(leaves, MIXED, small=0)


def test_optimizer_state_lies_where_its_parameter_lies():
  params = {'language': {'head': {'kernel': leaf(64, 128)}, 'norm': {'scale': leaf(64)}}}
  flat = paths.flatten(params)
  trained = {'language/head/kernel': flat['language/head/kernel']}
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(1e-3)))
  state = {
    'params': params,
    'opt': jax.eval_shape(tx.init, trained),
    'ema': trained,
    'step': leaf(dtype=np.int32),
  }
  mesh = jax.sharding.AbstractMesh((2, 8, 1, 4), ('data', 'fsdp', 'sequence', 'tensor'))
  placed = jax.tree.map(lambda s: s.spec, rules.state_shardings(state, mesh))
  expected = P('fsdp', 'tensor')
  assert placed['params']['language']['head']['kernel'] == expected
  found = {
    jax.tree_util.keystr(path): s
    for path, s in jax.tree_util.tree_flatten_with_path(placed, is_leaf=lambda x: isinstance(x, P))[
      0
    ]
  }
  moments = {k: s for k, s in found.items() if '.mu' in k or '.nu' in k}
  assert len(moments) == 2 and set(moments.values()) == {expected}
  assert placed['ema']['language/head/kernel'] == expected
  counts = [s for k, s in found.items() if 'count' in k]
  assert counts and set(counts) == {P()} and placed['step'] == P()


def test_on_one_device_everything_is_whole():
  mesh = single_device_mesh()
  shardings = rules.param_shardings({'a': {'q': {'kernel': leaf(8, 8)}}}, mesh)
  assert shardings['a']['q']['kernel'].spec == P()


def test_on_one_device_no_rule_is_asked(caplog):
  with caplog.at_level('INFO'):
    placed = rules.placements({'a/strange': leaf(4096, 4096)}, single_device_mesh(), small=0,
                              rules=(rules.Rule('(', ()),))  # no expression: reading it would fail
  assert placed['a/strange'].spec == P() and not caplog.records
