"""How many files a reader opens to follow one thing through the package, counted from call traces.

    python tests/walks.py [SYSTEM ...]      what is left to follow, file by file (default: all)

Two ways of a tiny model are walked under `sys.setprofile`: an image from a question to its answer,
and a parameter from its shape to an exported file. A file counts when one of its functions is
called on the way; files of forms that only a CPU takes do not. `tests/test_walks.py` holds both
counts of MC-LLaVA to their limits.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import pathlib
import sys
import tempfile

import jax
import numpy as np
from PIL import Image

import hrvlm_jax
from hrvlm_jax.checkpoint import store
from hrvlm_jax.core.config import from_dict, to_dict
from hrvlm_jax.interop.export import export
from hrvlm_jax.language.prompt import tokenizer_of
from hrvlm_jax.parallel.layout import Layout
from hrvlm_jax.systems import registry
from hrvlm_jax.training.batches import batch_shapes
from hrvlm_jax.training.config import RunConfig
from hrvlm_jax.training.optimizer import groups_of
from hrvlm_jax.training.step import execution_of, init_state, make_train_step
from hrvlm_jax.vlm import model as vlm
from hrvlm_jax.vlm.answer import Answerer

PACKAGE = pathlib.Path(hrvlm_jax.__file__).parent
# Forms of operations that only a program for one CPU takes, and what listens to compilations.
CPU_FORMS = ('core/cpu.py', 'core/heap.py')
SYSTEMS = ('mc_llava', 'pheye', 'llava_hr', 'vila_hd')


@contextlib.contextmanager
def traced(files: dict[str, None]) -> Iterator[None]:
  """Adds the files of the package whose functions are called inside, in the order of first calls.

  Args:
    files: grows; the keys are paths relative to the package.
  """
  root = f'{PACKAGE}/'

  def seen(frame, event, argument):
    del argument
    name = frame.f_code.co_filename
    if event == 'call' and name.startswith(root) and frame.f_code.co_name != '<module>':
      files.setdefault(name.removeprefix(root))

  before = sys.getprofile()
  sys.setprofile(seen)
  try:
    yield
  finally:
    sys.setprofile(before)
    for name in CPU_FORMS:
      files.pop(name, None)


def ask(system: str) -> list[str]:
  """Files on the way of an image: views, prompt, encoder, prefill and decoding, text."""
  config = registry.get(system).tiny()
  params = jax.jit(vlm.build(config).init)(jax.random.key(0))
  answerer = Answerer(config, params, tokenizer_of('byte'))
  image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8))
  files: dict[str, None] = {}
  with traced(files):
    answerer.answer([([image], 'What?')], max_new_tokens=2)
  return list(files)


def parameter(system: str) -> list[str]:
  """Files on the way of a parameter: shape, place, init, one step, saved, restored, exported."""
  model = registry.get(system).tiny()
  run = from_dict(RunConfig, {
    'model': to_dict(model), 'data': {'train': 'none', 'lengths': (320,)},
    'training': {'steps': 1, 'batch_size': 2, 'optimizer': {'learning_rate': 1e-3}}})
  batch = batch_shapes(run, 2, length=320, image=(90, 60)).arrays
  files: dict[str, None] = {}
  with tempfile.TemporaryDirectory() as folder:
    tokens = pathlib.Path(folder, 'saved/tokenizer')
    tokens.mkdir(parents=True)
    tokenizer_of('byte').save(tokens)
    with traced(files):
      fn, t, layout = vlm.build(run.model), run.training, Layout()
      groups = groups_of(t, fn.abstract)
      fresh = lambda key: init_state(t, groups, fn.init(key))
      abstract = jax.eval_shape(fresh, jax.random.key(0))
      state = layout.make(fresh, layout.state_shardings(abstract), jax.random.key(0))
      step = make_train_step(fn, t, groups, run.seed, ex=execution_of(t, layout.mesh))
      jax.eval_shape(step, state, batch)
      with store.TrainStore(f'{folder}/saved', config=to_dict(run)) as saver:
        saver.save(1, state)
        saver.restore(abstract)
      export(f'{folder}/saved', f'{folder}/out')
  return list(files)


def main(systems: list[str]) -> None:
  """Prints both ways of each system."""
  for system in systems or SYSTEMS:
    for walk in (ask, parameter):
      files = walk(system)
      print(f'{system}, {walk.__name__}: {len(files)} files')
      print(''.join(f'  {name}\n' for name in files), end='')


if __name__ == '__main__':
  main(sys.argv[1:])
