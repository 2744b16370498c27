"""Random folders in the original layout of any system, for tests."""

import functools
import json

import ml_dtypes
import numpy as np

from hrvlm_jax.checkpoint import hf
from hrvlm_jax.checkpoint.rows import entries
from hrvlm_jax.core import paths
from hrvlm_jax.language.prompt import tokenizer_of
from hrvlm_jax.systems import registry
from hrvlm_jax.vlm import model as vlm

KINDS = {'float32': np.dtype(np.float32), 'bfloat16': np.dtype(ml_dtypes.bfloat16),
         'float16': np.dtype(np.float16)}


@functools.cache
def layout(name):
  """(names, shape) of every tensor of a system's tiny model; aliases share an entry."""
  config = registry.get(name).tiny()
  return tuple((entry.names, entry.shape) for entry in entries(
    registry.get(name).table(config), vlm.build(config).abstract))


def random_tensors(name, dtype, seed=0):
  """{name: finite random bits} of a tiny model's release, aliases equal; `dtype` may be a function
  of the name."""
  rng = np.random.default_rng(seed)
  found = {}
  for names, shape in layout(name):
    kind = dtype if isinstance(dtype, np.dtype) else dtype(names[0])
    value = (rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 3)).astype(kind)
    found |= dict.fromkeys(names, value)
  return found


def write_release(folder, config, tensors):
  """The folder of a release: weights, its JSON files, a tokenizer."""
  system = registry.get(config.system)
  extra = dict(system.to_release(config))
  place = 'llm/' if 'llm' in system.folders else ''
  extra |= {f'{place}{name}': data for name, data in tokenizer_of('byte').files.items()}
  folder.mkdir(parents=True)
  for part in system.folders or ('',):
    prefix = f'{part}/' if part else ''
    (folder / part).mkdir(exist_ok=True)
    hf.write_weights(folder / part, ((name.removeprefix(prefix), value)
                                     for name, value in tensors.items() if name.startswith(prefix)))
  hf.write_extra(folder, {name: json.loads(json.dumps(value)) if isinstance(value, dict) else value
                          for name, value in extra.items()})
  return folder


def read_release(folder, config):
  """{name: array} of a release's folder."""
  from hrvlm_jax.checkpoint.folders import open_folders

  system = registry.get(config.system)
  return open_folders(folder, system.folders) if system.folders else hf.TensorFolder(folder)


def random_params(config, seed=0):
  """Small random parameters of a model, without compiling anything; norms scale by about one."""
  rng = np.random.default_rng(seed)
  flat = {path: (0.05 * rng.standard_normal(leaf.shape) + path.endswith('scale')).astype(np.float32)
          for path, leaf in paths.flatten(vlm.build(config).abstract).items()}
  return paths.unflatten(flat)
