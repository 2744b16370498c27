"""Twenty steps of the real trainer on one device and on meshes of eight: a program, not a test.

Prints one JSON object: losses by mesh. Run by the tests for one system and by hand for all:

    JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=8 python -m tests.parallel.equivalence mc_llava float32 20
"""

import json
import sys
from typing import Any

import jax
import numpy as np
from PIL import Image

from hrvlm_jax.parallel.layout import Layout
from hrvlm_jax.systems import registry
from hrvlm_jax.training.config import OptimizerConfig, TrainingConfig
from hrvlm_jax.training.optimizer import groups_of
from hrvlm_jax.training.step import init_state, make_train_step
from hrvlm_jax.vlm import model as vlm

ROWS, LENGTH = 8, 96
MESHES = {
  'one': None,
  'data': {'data': 8},
  'fsdp': {'data': 1, 'fsdp': 8},
  'tensor': {'data': 1, 'tensor': 8},
  'mixed': {'data': 2, 'fsdp': 2, 'tensor': 2},
}


def batch_of(name: str, model: Any, seed: int) -> dict[str, Any]:
  """A batch of noise images of several sizes and random text, with visual places in front."""
  rng = np.random.default_rng(seed)
  system = registry.get(name)
  sizes = [(60 + 11 * i, 97 - 7 * i) for i in range(ROWS)]
  noise = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
  examples = [system.views([image], model.encoder) for image in noise]
  most = max(system.count(*image.size, model.encoder).views for image in noise)
  views = system.batch(examples, model.encoder, slots=ROWS * max(most, 1))
  tokens = rng.integers(1, 200, (ROWS, LENGTH)).astype(np.int32)
  index = np.full((ROWS, LENGTH), -1, np.int32)
  for row, example in enumerate(examples):
    count = min(int(np.sum(example['tokens'])), LENGTH // 2)
    index[row, 2 : 2 + count] = np.arange(count)
  tokens[index >= 0] = 0
  labels = np.where(index >= 0, -100, tokens).astype(np.int32)
  valid = np.arange(LENGTH)[None] < (LENGTH - 3 * np.arange(ROWS))[:, None]
  labels[~valid] = -100
  return {'tokens': tokens, 'visual_index': index, 'valid': valid, 'labels': labels, 'views': views}


def losses(name: str, dtype: str, steps: int, mesh: dict[str, int] | None) -> list[float]:
  """Losses of `steps` steps with warm-up from zero and clipping at 1.0."""
  model = registry.get(name).tiny()
  devices = jax.devices()[:1] if mesh is None else None
  layout = Layout(mesh, devices=devices)
  config = TrainingConfig(
    steps=steps,
    batch_size=ROWS,
    loss_chunk=32 * layout.shards,
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup=0.25, clip_norm=1.0, weight_decay=0.01),
  )
  param_dtype = np.dtype(dtype)
  fn = vlm.build(model, param_dtype=param_dtype)
  groups = groups_of(config, fn.abstract)
  if dtype == 'float64':
    object.__setattr__(config, 'dtype', 'float64')  # no released run uses it: tests only
  init = lambda key: init_state(config, groups, fn.init(key))
  abstract = jax.eval_shape(init, jax.random.key(0))
  shardings = layout.state_shardings(abstract)
  state = layout.make(init, shardings, jax.random.key(0))
  step = layout.compile(make_train_step(fn, config, groups, seed=0), shardings)
  batches = [layout.batch(batch_of(name, model, seed)) for seed in range(4)]
  found = []
  for i in range(steps):
    state, metrics = step(state, batches[i % len(batches)])
    found.append(float(metrics['loss']))
  return found


def main(name: str, dtype: str = 'float32', steps: str = '20', *meshes: str) -> None:
  jax.config.update('jax_default_matmul_precision', 'highest')
  jax.config.update('jax_enable_x64', dtype == 'float64')
  chosen = {m: MESHES[m] for m in ('one', *(meshes or [m for m in MESHES if m != 'one']))}
  print(json.dumps({m: losses(name, dtype, int(steps), mesh) for m, mesh in chosen.items()}))


if __name__ == '__main__':
  main(*sys.argv[1:])
