"""How far half precision moves the logits of tiny models: PyTorch against itself and JAX against
PyTorch. Prints the rows of the table in docs/weights.md:

    python -m tests.interop.half_precision [NAME ...]
"""

import dataclasses
import pathlib
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import AutoModelForImageTextToText

from hrvlm_jax.checkpoint import store
from hrvlm_jax.core.execution import Execution
from hrvlm_jax.vlm import laid, model as vlm
from tests.interop.pytorch import Pair
from tests.interop.tiny_models import MODELS

KINDS = {'bfloat16': torch.bfloat16, 'float16': torch.float16}


@dataclasses.dataclass(frozen=True)
class Moved:
  """Mean differences over the mean magnitude of the logits, in units of the format's eps.

  Attributes:
    half: PyTorch, half precision against float32.
    order: PyTorch, 'sdpa' against 'eager': the same sums in another order.
    ours: JAX against PyTorch ('sdpa'), both in half precision.
  """

  half: float
  order: float
  ours: float


def moved(pair, kind):
  """`Moved` of a pair at real places of two unequal pictures.

  Args:
    kind: a name of `KINDS`.
  """
  items = pair.items(2)
  inputs, batch = pair.inputs(items), pair.batch(items)
  real = batch['valid']

  def logits(dtype, attention):
    model = AutoModelForImageTextToText.from_pretrained(
      pair.folder, trust_remote_code=True, dtype=dtype, attn_implementation=attention).eval()
    with torch.no_grad():
      return model(**inputs).logits.float().numpy()[real]

  single = logits(torch.float32, 'sdpa')
  eager, sdpa = (logits(KINDS[kind], attention) for attention in ('eager', 'sdpa'))
  params = store.load_params(pair.checkpoint, laid.held(pair.config, kind))
  ex = Execution(dtype=kind)
  fn = vlm.build(pair.config)

  def run(params, batch):
    module = fn.bind(params)
    return module.logits(module(batch, ex=ex))

  ours = np.asarray(jax.jit(run)(params, jax.tree.map(jnp.asarray, batch)), np.float32)[real]
  unit = np.mean(np.abs(single)) * torch.finfo(KINDS[kind]).eps
  apart = lambda a, b: float(np.mean(np.abs(a - b)) / unit)
  return Moved(apart(sdpa, single), apart(sdpa, eager), apart(ours, sdpa))


def main(names):
  """A row per model."""
  for name in names or MODELS:
    with tempfile.TemporaryDirectory() as place:
      pair = Pair.make(MODELS[name], pathlib.Path(place))
      found = [moved(pair, kind) for kind in KINDS]
    row = [' / '.join(f'{getattr(one, field.name):.1f}' for one in found)
           for field in dataclasses.fields(Moved)]
    print(f'| {name} | {" | ".join(row)} |', flush=True)


if __name__ == '__main__':
  main(sys.argv[1:])
