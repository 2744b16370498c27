"""Counted things of compiled programs against stored values: operations, bytes, compilations.

A change that makes a program read more memory or compute more shows here, on any machine, however
busy. Meant changes: `python -m benchmarks.ours.counts --write`, and say why in the commit.
"""

import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks.ours import counts
from hrvlm_jax.core.module import Functional
from hrvlm_jax.language import config as language
from hrvlm_jax.language.decoder import Decoder, empty_cache

STORED = json.loads(counts.STORED.read_text())
# Fusion may differ a little between builds and processors; another compiler may differ wholly.
ROOM = 1.1 if STORED['jax'] == jax.__version__ else 1.5


@pytest.mark.parametrize('name', counts.PROGRAMS)
def test_counts_are_those_stored(name):
  found, stored = counts.counts(name), STORED['programs'][name]
  assert found['flops'] == stored['flops']
  assert found['compilations'] == stored['compilations']
  for key in ('compiled_flops', 'bytes', 'temporaries', 'arguments'):
    assert found[key] <= ROOM * stored[key], (
      f'{name}: {key} grew from {stored[key]:,} to {found[key]:,}; if that is meant, run '
      'python -m benchmarks.ours.counts --write')


def step_bytes(unrolled: bool) -> tuple[int, int]:
  """(bytes the one-token step reads and writes, bytes of its weights)."""
  config = language.phi(vocab_size=264, width=256, depth=6, heads=4, mlp_width=1024)
  fn = Functional(lambda rngs: Decoder(config, unrolled=unrolled, rngs=rngs))
  cache = jax.eval_shape(lambda: empty_cache(config, 1, 32, unrolled=unrolled))
  shape = lambda *s, dtype: jax.ShapeDtypeStruct(s, dtype)
  step = lambda params, token, valid, cache, slot: fn.apply(
    params, token, valid, cache, slot, method='step')
  compiled = jax.jit(step).lower(
    fn.abstract, shape(1, dtype=jnp.int32), shape(1, 32, dtype=jnp.bool_), cache,
    shape(dtype=jnp.int32)).compile()
  weights = sum(leaf.size * 4 for leaf in jax.tree.leaves(fn.abstract))
  return int(compiled.cost_analysis()['bytes accessed']), weights


def test_a_decoding_step_reads_its_weights_once():
  moved, weights = step_bytes(unrolled=True)
  assert moved < 1.3 * weights
