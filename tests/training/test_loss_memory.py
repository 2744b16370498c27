"""Memory of the loss at a vocabulary of 152k and 8k tokens, counted by the compiler."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hrvlm_jax.training.config import TrainingConfig
from hrvlm_jax.training.losses import chunked_cross_entropy, token_cross_entropy

TOKENS, VOCABULARY, WIDTH = 8192, 152_064, 8


def naive(hidden, head, labels):
  """All logits at once."""
  return token_cross_entropy(hidden @ head, labels)[0]


DEFAULT = {field.name: field.default for field in dataclasses.fields(TrainingConfig)}['loss_chunk']


def chunked(hidden, head, labels, chunk=DEFAULT):
  return chunked_cross_entropy(hidden, labels, lambda x: x @ head, chunk=chunk)[0]


def temporaries(function, *arguments):
  """Bytes that the compiled loss and its gradients need beside arguments and results."""
  compiled = jax.jit(jax.value_and_grad(function, argnums=(0, 1))).lower(*arguments).compile()
  return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize('rows', [1, 4, 16])
def test_an_eighth_of_the_naive_loss(rows):
  shapes = (jax.ShapeDtypeStruct((rows, TOKENS // rows, WIDTH), jnp.float32),
            jax.ShapeDtypeStruct((WIDTH, VOCABULARY), jnp.float32),
            jax.ShapeDtypeStruct((rows, TOKENS // rows), jnp.int32))
  whole, small = temporaries(naive, *shapes), temporaries(chunked, *shapes)
  assert whole >= TOKENS * VOCABULARY * 4  # at least the logits
  assert small <= whole / 8, f'{small / 2**20:.0f} MiB of {whole / 2**20:.0f} MiB'


def test_the_same_loss_and_gradients():
  """At the same vocabulary, with fewer tokens: the naive one does fit into this test."""
  rng = np.random.default_rng(0)
  hidden = jnp.asarray(rng.normal(size=(1, 96, WIDTH)), jnp.float32)
  head = jnp.asarray(rng.normal(size=(WIDTH, VOCABULARY)) * 0.3, jnp.float32)
  labels = jnp.asarray(rng.integers(0, VOCABULARY, (1, 96)), jnp.int32)
  compare = lambda f: jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(hidden, head, labels)
  (a, grads_a), (b, grads_b) = compare(naive), compare(
    lambda *arguments: chunked(*arguments, chunk=20))
  np.testing.assert_allclose(a, b, rtol=1e-5)
  for x, y in zip(grads_a, grads_b, strict=True):
    np.testing.assert_allclose(x, y, atol=1e-5 * float(jnp.abs(x).max()))
