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


def step_bytes(unrolled: bool, *, rows: int = 1, places: int = 32, each: bool = False
               ) -> tuple[int, int, int]:
  """(bytes the one-token step reads and writes, bytes of its weights, of its cache).

  Args:
    each: every row writes at a place of its own, as slots do.
  """
  config = language.phi(vocab_size=264, width=256, depth=6, heads=4, mlp_width=1024)
  fn = Functional(lambda rngs: Decoder(config, unrolled=unrolled, rngs=rngs))
  cache = jax.eval_shape(lambda: empty_cache(config, rows, places, unrolled=unrolled))
  shape = lambda *s, dtype: jax.ShapeDtypeStruct(s, dtype)

  def step(params, token, valid, cache, slot):
    return fn.apply(params, token, valid, cache, slot, method='step')

  def by_row(params, *arguments):
    return jax.vmap(lambda *row: step(params, *jax.tree.map(lambda x: x[None], row[:-1]), row[-1]))(
      *arguments)

  compiled = jax.jit(by_row if each else step, donate_argnums=3).lower(
    fn.abstract, shape(rows, dtype=jnp.int32), shape(rows, places, dtype=jnp.bool_), cache,
    shape(*((rows,) if each else ()), dtype=jnp.int32)).compile()
  size = lambda tree: sum(leaf.size * 4 for leaf in jax.tree.leaves(tree))
  return int(compiled.cost_analysis()['bytes accessed']), size(fn.abstract), size(cache)


def test_a_decoding_step_reads_its_weights_once():
  moved, weights, _ = step_bytes(unrolled=True)
  assert moved < 1.3 * weights


@pytest.mark.parametrize('each', [False, True])
def test_a_decoding_step_reads_its_cache_once(each):
  """Keys and values are not turned round at every token (3.1 times their bytes, when they were)."""
  moved, weights, cache = step_bytes(unrolled=True, rows=2, places=2048, each=each)
  assert moved - weights < 1.3 * cache
