"""The head and its loss over meshes: what the plain loss gives, and what is gathered and summed."""

import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hrvlm_jax.core.execution import HERE, Execution
from hrvlm_jax.core.module import Functional
from hrvlm_jax.language import config as configs
from hrvlm_jax.language.decoder import Decoder, Output
from hrvlm_jax.training.losses import chunked_cross_entropy

REPO = pathlib.Path(__file__).parents[2]
ROWS, LENGTH, WIDTH = 4, 50, 16


def inputs(known, padded, bias, dtype=np.float32):
  rng = np.random.default_rng(0)
  make = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  labels = rng.integers(0, known, (ROWS, LENGTH))
  labels[1, 20:] = -100
  return make(ROWS, LENGTH, WIDTH), make(WIDTH, padded), make(padded) if bias else None, labels


def loss_and_gradients(known, inputs, ex, chunk=40):
  """(loss, gradients of states, kernel, bias), jitted for `ex`."""
  *arrays, labels = inputs

  def loss(hidden, kernel, bias):
    total, count = chunked_cross_entropy(hidden, labels, Output(kernel, bias, known), chunk=chunk,
                                         ex=ex)
    return total / count

  some = [i for i, x in enumerate(arrays) if x is not None]
  return jax.jit(jax.value_and_grad(loss, some))(*arrays)


def assert_same(one, other):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), one, other)


@pytest.mark.parametrize('known, padded, bias', [(264, 264, True), (263, 384, False)])
def test_on_one_accelerator(known, padded, bias):
  given = inputs(known, padded, bias)
  assert_same(loss_and_gradients(known, given, HERE.replace(platform='cpu')),
              loss_and_gradients(known, given, HERE.replace(platform='tpu')))


def test_a_frozen_head_has_no_gradient_to_be_added_up():
  hidden, kernel, bias, labels = inputs(264, 264, True)
  ex = Execution(platform='tpu')
  loss = lambda hidden, kernel: chunked_cross_entropy(
    hidden, labels, Output(kernel, bias, 264), chunk=40, ex=ex)[0]
  added = lambda arguments: str(jax.make_jaxpr(jax.grad(loss, arguments))(hidden, kernel)).count(
    'f32[16,264] = dot_general')
  assert added((0, 1)) == 1 and added(0) == 0


def test_a_tied_table_is_the_head():
  c = configs.qwen2(vocab_size=30, width=16, depth=1, heads=2, kv_heads=1, mlp_width=16,
                    tie_embeddings=True, pad_vocab_to=32)
  fn = Functional(lambda rngs: Decoder(c, rngs=rngs))
  module = fn.bind(fn.init(jax.random.key(0)))
  logits = module.logits(jnp.ones((2, 16)))
  assert logits.shape == (2, 32) and np.isneginf(logits[:, 30:]).all()
  np.testing.assert_array_equal(logits[:, :30], module.embed.attend(jnp.ones((2, 16)))[:, :30])


PROGRAM = """
import json, sys
from hrvlm_jax.core.execution import HERE, Execution
from hrvlm_jax.parallel.mesh import make_mesh
from tests.training.test_head_loss import *
from jax.sharding import NamedSharding, PartitionSpec as P
for sizes, known, padded, bias in json.loads(sys.argv[1]):
  given = inputs(known, padded, bias)
  ex = Execution(mesh=make_mesh(sizes))
  assert_same(loss_and_gradients(known, given, HERE), loss_and_gradients(known, given, ex))
mesh = make_mesh({'data': 1, 'fsdp': 4, 'tensor': 2})
put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
hidden, kernel, _, labels = inputs(264, 264, False)
given = [put(hidden, ('data', 'fsdp')), put(kernel, 'fsdp', 'tensor')]
loss = lambda h, k: chunked_cross_entropy(h, labels, Output(k, None, 264), chunk=8,
                                          ex=Execution(mesh=mesh))[0]
print(jax.jit(jax.grad(loss, (0, 1))).lower(*given).compile().as_text())
"""


def test_meshes_of_eight_devices():
  cases = [
    ({'data': 1, 'fsdp': 2, 'tensor': 4}, 264, 264, True),
    ({'data': 2, 'fsdp': 2, 'tensor': 2}, 263, 263, True),  # a column more on every second device
    ({'data': 1, 'fsdp': 4, 'sequence': 2}, 263, 384, False),
    ({'data': 1, 'fsdp': 8}, 263, 263, False),  # fewer rows than devices
  ]
  env = os.environ | {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '8', 'PYTHONPATH': str(REPO)}
  env.pop('XLA_FLAGS', None)
  done = subprocess.run([sys.executable, '-c', PROGRAM, json.dumps(cases)], env=env, cwd=REPO,
                        capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-3000:]
  # The weight is gathered once and its gradient reduced once, outside the loop over chunks.
  bodies = re.findall(r'^(?:ENTRY )?%\S+ \(.*?^}', done.stdout, re.M | re.S)
  holding = {kind: [body.startswith('ENTRY') for body in bodies
                    for line in body.splitlines() if re.search(rf'= \S+ {kind}\(', line)]
             for kind in ('all-gather', 'reduce-scatter')}
  assert holding['all-gather'] == [True] and holding['reduce-scatter'] == [True], holding
