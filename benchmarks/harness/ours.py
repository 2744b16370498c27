"""Our side of a case: draws the weights, writes them in the original's layout, reads them back.

The peers read the same files, so that both sides hold equal numbers; ours come in through the same
name table as `hrvlm convert`.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
import json
import math
import pathlib
from typing import Any
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness.case import Options
from benchmarks.harness.program import INPUTS, Program, read_inputs
from hrvlm_jax.checkpoint import hf
from hrvlm_jax.checkpoint.rows import Table, export_tensors, import_tensors
from hrvlm_jax.core import heap, paths
from hrvlm_jax.core.config import to_dict
from hrvlm_jax.core.execution import Execution
from hrvlm_jax.core.module import Functional, Params


class Side(abc.ABC):
  """A case's own part: subclasses say what the model, its inputs and its program are."""

  def __init__(self, settings: Mapping[str, Any], folder: pathlib.Path, options: Options):
    self.settings, self.folder, self.options = settings, pathlib.Path(folder), options
    self.dtype = jnp.dtype(options.dtype)
    self.ex = Execution(dtype=options.dtype, attention=options.impl)

  @abc.abstractmethod
  def config(self) -> Any:
    """The sizes, a dataclass; the peer reads them as config.json."""

  @abc.abstractmethod
  def model(self) -> tuple[Functional, Table]:
    """The module and the names of its tensors in the original's layout."""

  @abc.abstractmethod
  def inputs(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random inputs, the same for both sides."""

  @abc.abstractmethod
  def program(self, fn: Functional, params: Params, inputs: Mapping[str, np.ndarray]) -> Program:
    """What is measured."""

  def prepare(self) -> dict[str, int]:
    """Writes weights and inputs into the folder; returns how many parameters there are."""
    self.folder.mkdir(parents=True, exist_ok=True)
    fn, table = self.model()
    hf.write_weights(self.folder, export_tensors(draw(fn.abstract), table))
    (self.folder / 'config.json').write_text(json.dumps(to_dict(self.config())))
    np.savez(self.folder / INPUTS, **self.inputs(np.random.default_rng(1)))
    return {'parameters': sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(fn.abstract))}

  def load(self) -> Program:
    """Reads them back, on the device, and builds the program."""
    heap.trim_after_compiling()  # as training and a loaded model do
    fn, table = self.model()
    # Cast on the device: the folder holds float32.
    # No name for the tree itself: it would keep every leaf in memory beside its device copy.
    flat = paths.flatten(import_tensors(
      hf.TensorFolder(self.folder), table, fn.abstract, what='benchmark'))
    params = {}
    for path in list(flat):
      params |= self.place(path, flat.pop(path))
    return self.program(fn, paths.unflatten(params), read_inputs(self.folder))

  def place(self, path: str, leaf: np.ndarray) -> dict[str, jax.Array]:
    """A stored leaf as device arrays by path; more than one where layers are unrolled."""
    return {path: jax.device_put(leaf).astype(self.dtype)}

  def abstract_program(self) -> tuple[Callable, tuple]:
    """The traced function and the shapes of its arguments: no weight is made, nothing computed."""
    fn, _ = self.model()
    # One stored number stands for each array.
    params = jax.tree.map(lambda s: np.broadcast_to(np.zeros((), self.dtype), s.shape),
                          fn.abstract)
    found: dict[str, Any] = {}

    def keep(function, *arguments, **facts):
      shape = lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype)
      found.update(function=function, shapes=jax.tree.map(shape, arguments))

    self.jit = keep
    self.program(fn, params, self.inputs(np.random.default_rng(0)))
    return found['function'], found['shapes']

  def jit(self, function, params, *arguments, **facts) -> Program:
    """The usual program: one jitted function of parameters and device arrays."""
    arguments = jax.tree.map(jnp.asarray, arguments)
    compiled = jax.jit(function)
    return Program(
      run=lambda: jax.block_until_ready(compiled(params, *arguments)),
      outputs=lambda result: {name: np.asarray(x, np.float32) if x.dtype == jnp.bfloat16
                              else np.asarray(x) for name, x in result.items()},
      trace=(function, (params, *arguments)),
      after=lambda: {'compilations': compiled._cache_size(), **facts})


def draw(abstract: Params) -> Params:
  """Weights of a size a trained model could have, so that activations neither vanish nor explode.

  Matrices have the standard deviation 1/sqrt(rows), tables 0.02, biases 0.02, norm scales 1 +- 0.1;
  layer scales and gates of a new model (zero or 1e-6) get values, so that every part counts.
  """
  flat = paths.flatten(abstract)
  out = {}
  for path, leaf in flat.items():
    rng = np.random.default_rng(zlib.crc32(path.encode()))
    noise = rng.standard_normal(leaf.shape, np.float32)
    name = path.rsplit('/', 1)[-1]
    if name == 'scale':
      noise *= np.float32(0.1)
      noise += 1
    elif name == 'kernel' or name.startswith('lora'):
      convolution = any(part in path for part in ('patch_embed', 'conv', 'stem', 'depthwise'))
      rows = math.prod(leaf.shape[-4:-1] if convolution else leaf.shape[-2:-1])
      noise *= np.float32(1 / math.sqrt(max(rows, 1)))
    else:
      noise *= np.float32(0.02)
    out[path] = noise
  return paths.unflatten(out)
