"""Twenty steps of the real trainer on one device, on meshes of eight, and on two processes of four.

A program, not a test: the tests run it for one system and one mesh, by hand it runs for all.

    python -m tests.parallel.equivalence SYSTEM float32|float64 [STEPS] [MESH ...] [--save]
    python -m tests.parallel.equivalence SYSTEM float32 3 splash_mixed
    python -m tests.parallel.equivalence --table       docs/equivalence.md from what was saved

SYSTEM is a name of `RUNS`; MESH one of `MESHES`, `processes_X` for the same mesh over two processes
of four devices each, `splash_X` for the same mesh with the attention kernel of a TPU, interpreted
(minutes; float32 alone, which is what it computes in). Prints one JSON object, losses by mesh;
`--save` keeps it under docs/equivalence. Ends with status 1 where a mesh is further than the
tolerance from one device.
"""

import argparse
from collections.abc import Mapping
import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys
from typing import Any

import numpy as np

REPO = pathlib.Path(__file__).resolve().parents[2]
SAVED = REPO / 'docs' / 'equivalence'
TOLERANCE = {'float32': 1e-5, 'float64': 1e-7}
ROWS = 8
MESHES: dict[str, Mapping[str, int]] = {
  'data': {'data': 8},
  'fsdp': {'data': 1, 'fsdp': 8},
  'tensor': {'data': 1, 'tensor': 8},
  'sequence': {'data': 4, 'sequence': 2},
  'mixed': {'data': 2, 'fsdp': 2, 'tensor': 2},
}
PROCESSES, SPLASH = 'processes_', 'splash_'
ALL = (*MESHES, f'{PROCESSES}mixed')
# System -> objective of its training.
RUNS = {'mc_llava': 'next_token', 'pheye': 'next_token', 'llava_hr': 'next_token',
        'vila_hd': 'two_pass', 'ps3': 'ps3_pretrain'}  # fmt: skip


def batch_of(name: str, model: Any, seed: int) -> dict[str, Any]:
  """A batch of noise images of several sizes and random text, with visual places in front."""
  from PIL import Image

  from hrvlm_jax.systems import registry

  rng = np.random.default_rng(seed)
  if name == 'ps3':
    return _pairs(model.encoder, rng)
  system = registry.get(name)
  # MC-LLaVA makes 1 to 4 crops of these: a row's crops do not lie where the row lies.
  sizes = [(24 + 9 * i, 57 - 4 * i) for i in range(ROWS)]
  noise = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
  boxes = {'boxes': [(4, 4, 20, 20)]} if name == 'vila_hd' else {}
  examples = [system.views([image], model.encoder, **boxes) for image in noise]
  slots = sum(system.count(*image.size, model.encoder).slots for image in noise)
  views = system.batch(examples, model.encoder, slots=-(-slots // ROWS) * ROWS)
  counts = [int(np.sum(example.get('tokens', 0))) for example in examples]
  length = max(counts) + 25
  tokens = rng.integers(1, 200, (ROWS, length)).astype(np.int32)
  index = np.full((ROWS, length), -1, np.int32)
  for row, count in enumerate(counts):
    index[row, 2:2 + count] = np.arange(count)
  tokens[index >= 0] = 0
  labels = np.where(index >= 0, -100, tokens).astype(np.int32)
  valid = np.arange(length)[None] < (length - 3 * np.arange(ROWS))[:, None]
  labels[~valid] = -100
  return {'tokens': tokens, 'visual_index': index, 'valid': valid, 'labels': labels, 'views': views}


def _pairs(encoder: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
  """Images with captions and maps of what the captions are about; two rows are about all of it."""
  side = encoder.scales[-1]
  target = np.zeros((ROWS, side, side), np.uint8)
  for row in range(ROWS):
    y, x = rng.integers(0, side // 2, 2)
    target[row, y:y + side // 3, x:x + side // 3] = 1
  is_global = np.arange(ROWS)[:, None] % 4 == 3
  target[is_global[:, 0]] = 1
  tokens = rng.integers(2, encoder.text.vocab_size, (ROWS, encoder.text.context)).astype(np.int32)
  pixels = rng.integers(0, 256, (ROWS, side, side, 3), dtype=np.uint8)
  return {'pixels': pixels, 'tokens': tokens, 'target': target, 'is_global': is_global}


@dataclasses.dataclass(frozen=True)
class Start:
  """What all meshes of a run share: the model, its state before the first step, the batches."""

  model: Any
  fn: Any
  state: Any
  batches: list[dict[str, Any]]


def start_of(name: str, dtype: str) -> Start:
  """The same on every process; the state's leaves are NumPy arrays."""
  import jax

  from hrvlm_jax.systems import registry
  from hrvlm_jax.vlm import model as vlm

  # LLaVA-HR's tiny images are as large as its slow tower likes; a quarter of the pixels will do.
  model = registry.get(name).tiny(**({'image_size': 128} if name == 'llava_hr' else {}))
  fn = vlm.build(model, param_dtype=np.dtype(dtype))
  state = jax.device_get(jax.jit(fn.init)(jax.random.key(0)))
  return Start(model, fn, state, [batch_of(name, model, seed) for seed in range(4)])


def losses(name: str, dtype: str, steps: int, mesh: Mapping[str, int] | None,
           start: Start, attention: str = 'auto') -> list[float]:
  """Losses of `steps` steps with warm-up from zero and clipping at 1.0."""
  import jax

  from hrvlm_jax.parallel.layout import Layout
  from hrvlm_jax.training.config import OptimizerConfig, TrainingConfig
  from hrvlm_jax.training.optimizer import groups_of
  from hrvlm_jax.training.step import execution_of, init_state, make_train_step

  layout = Layout(mesh, devices=jax.local_devices()[:1] if mesh is None else None)
  config = TrainingConfig(
    steps=steps,
    batch_size=ROWS,
    loss_chunk=32 * layout.shards,
    objective=RUNS[name],
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup=0.25, clip_norm=1.0, weight_decay=0.01),
  )
  groups = groups_of(config, start.fn.abstract)
  if dtype == 'float64':
    object.__setattr__(config, 'dtype', 'float64')  # no released run uses it: tests only
  state = jax.device_get(init_state(config, groups, start.state))
  shardings = layout.state_shardings(jax.eval_shape(lambda: state))
  state = layout.put(state, shardings)
  ex = execution_of(config, layout.mesh).replace(attention=attention)
  step = layout.compile(make_train_step(start.fn, config, groups, seed=0,
                                        ex=ex), shardings)
  batches = [layout.batch(batch) for batch in start.batches]
  found = []
  for i in range(steps):
    state, metrics = step(state, batches[i % len(batches)])
    found.append(float(metrics['loss']))
  return found


def run(names: list[str], system: str, dtype: str, steps: int) -> dict[str, list[float]]:
  """Losses by mesh, in this process (and all others of its run)."""
  import jax

  jax.config.update('jax_default_matmul_precision', 'highest')
  jax.config.update('jax_enable_x64', dtype == 'float64')
  first = start_of(system, dtype)
  form = lambda name: 'interpret' if name.startswith(SPLASH) else 'auto'
  return {m: losses(system, dtype, steps, MESHES.get(m.removeprefix(SPLASH)), first, form(m))
          for m in names}


def start(names: list[str], arguments: argparse.Namespace, processes: int) -> dict[str, Any]:
  """The same in fresh processes that share eight fake devices."""
  environment = dict(os.environ, JAX_PLATFORMS='cpu', JAX_NUM_CPU_DEVICES=str(8 // processes),
                     PYTHONPATH=str(REPO))  # fmt: skip
  # Most of the time goes into compiling programs that run twenty times.
  environment |= {'XLA_FLAGS': '--xla_backend_optimization_level=0 '
                               '--xla_cpu_use_fusion_emitters=false', 'TF_CPP_MIN_LOG_LEVEL': '2'}
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  command = [sys.executable, '-m', 'tests.parallel.equivalence', arguments.system,
             arguments.dtype, str(arguments.steps), *names]  # fmt: skip
  rank = lambda i: ['--processes', f'localhost:{port},{processes},{i}']
  children = [
    subprocess.Popen([*command, *rank(i)], env=environment, cwd=REPO, text=True,
                     stdout=subprocess.PIPE if i == 0 else subprocess.DEVNULL)
    for i in range(processes)]  # fmt: skip
  out = children[0].communicate()[0]
  if any(child.wait() for child in children):
    sys.exit(f'the run over {processes} process(es) failed')
  return json.loads(out.splitlines()[-1])


def distance(found: list[float], reference: list[float]) -> float:
  """Largest relative difference of the losses."""
  return max(abs(a - b) / abs(b) for a, b in zip(found, reference, strict=True))


def table() -> str:
  """docs/equivalence.md."""
  rows = []
  for system in RUNS:
    for dtype in TOLERANCE:
      path = SAVED / f'{system}_{dtype}.json'
      if path.exists():
        found = json.loads(path.read_text())
        steps = len(found['one'])
        cells = [f'{distance(found[m], found["one"]):.1e}' if m in found else '' for m in ALL]
        rows.append([system, dtype, str(steps), *cells])
  head = ['system', 'dtype', 'steps', *(m.replace(PROCESSES, '2 x 4: ') for m in ALL)]
  lines = [head, ['---'] * len(head), *rows]
  shapes = '\n'.join(f'- {name}: {", ".join(f"{k} {v}" for k, v in mesh.items() if v > 1)}'
                     for name, mesh in MESHES.items())  # fmt: skip
  text = '\n'.join('| ' + ' | '.join(row) + ' |' for row in lines)
  return f"""# One device, eight devices, two processes

Written by `python -m tests.parallel.equivalence --table`; do not edit. The tiny model of each
system (LLaVA-HR at 128 pixels) is trained on eight random images and texts a step: warm-up from
zero, gradients clipped at 1.0, AdamW, highest precision of matrix products, fake CPU devices. Each
cell is the largest relative difference
of a loss from the same step on one device; an empty one was not run. Allowed:
{TOLERANCE['float32']:g} in float32, {TOLERANCE['float64']:g} in float64. Meshes of eight devices
("2 x 4": two processes of four devices each):

{shapes}

{text}

Each row: `python -m tests.parallel.equivalence SYSTEM DTYPE 20 --save`. The losses themselves are
kept in docs/equivalence.
"""


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('system', nargs='?', choices=RUNS)
  parser.add_argument('dtype', nargs='?', choices=TOLERANCE, default='float32')
  parser.add_argument('steps', nargs='?', type=int, default=20)
  parser.add_argument('meshes', nargs='*', metavar='MESH')
  parser.add_argument('--save', action='store_true')
  parser.add_argument('--table', action='store_true')
  parser.add_argument('--processes', help=argparse.SUPPRESS)  # COORDINATOR,NUMBER,OWN
  arguments = parser.parse_args()
  if arguments.table:
    (REPO / 'docs' / 'equivalence.md').write_text(table())
    return 0
  if arguments.system is None:
    parser.error('SYSTEM is missing')
  if arguments.processes:
    from hrvlm_jax.parallel import distributed

    address, number, own = arguments.processes.split(',')
    distributed.initialize(coordinator=address, num_processes=int(number), process_id=int(own))
    found = run(arguments.meshes, arguments.system, arguments.dtype, arguments.steps)
    if distributed.is_main():
      print(json.dumps(found), flush=True)
    distributed.shutdown()
    return 0
  chosen = arguments.meshes or list(ALL)
  if wrong := sorted(set(chosen) - {*ALL, *(SPLASH + mesh for mesh in MESHES)}):
    parser.error(f'unknown mesh {wrong}; known: {", ".join(ALL)}')
  single = [m for m in chosen if not m.startswith(PROCESSES)]
  several = [m.removeprefix(PROCESSES) for m in chosen if m.startswith(PROCESSES)]
  found = start(['one', *single], arguments, 1)
  if several:
    found |= {PROCESSES + m: v for m, v in start(several, arguments, 2).items()}
  path = SAVED / f'{arguments.system}_{arguments.dtype}.json'
  if arguments.save:
    path.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | found) + '\n')
  worst = 0.0
  for mesh in chosen:
    away = distance(found[mesh], found['one'])
    worst = max(worst, away)
    print(f'{arguments.system} {arguments.dtype} {mesh}: {away:.2e}', file=sys.stderr, flush=True)
  print(json.dumps(found))
  return int(not worst <= TOLERANCE[arguments.dtype])


if __name__ == '__main__':
  sys.exit(main())
