"""Depthwise 7 x 7 convolution: XLA's grouped form, the sum of shifted products, PyTorch.

Command:  python benchmarks/depthwise.py [--size 1024] [--batch 1] [--dtype bfloat16] [--out FILE]
          on the machine in question. On a busy one: taskset -c 0 python ... --clock cpu, which
          counts the processor time of one core and not what others take from it.

`core.conv.depthwise` chooses its form per backend from these numbers: run this on a new kind of
machine before changing the choice. Shapes are those of ConvNeXt-L's stages for an image of `size`
pixels, and of an MR-Adapter. Rounds of all forms alternate and the best round counts, so that a
busy machine disturbs all alike; compare the ratios, not the milliseconds. Before anything is timed,
the forms are held against each other, gradients included.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np

from hrvlm_jax.core import machine as cpu
from hrvlm_jax.core.conv import depthwise

FORMS = ('grouped', 'shifted')
WIDTHS = (192, 384, 768, 1536)


def shapes(size: int, batch: int) -> dict[str, tuple[int, int, int, int]]:
  """NHWC shapes by name."""
  grid = size // 4
  stages = {f'stage{i}': (batch, grid >> i, grid >> i, width) for i, width in enumerate(WIDTHS)}
  return stages | {'adapter': (batch, grid >> 3, grid >> 3, 1024)}


def draw(shape, dtype):
  """Image, kernel, weights of the loss."""
  rng = np.random.default_rng(0)
  kernel = rng.normal(size=(7, 7, 1, shape[-1])) / 7
  return tuple(jnp.asarray(x, dtype) for x in (
    rng.normal(size=shape), kernel, rng.normal(size=shape)))


def programs(form: str, x, kernel, weight, clock):
  """Compiled forward and forward-plus-backward passes, and the seconds compilation took.

  The loss's weights are an argument: as a constant XLA would fold 49 copies of them.
  """
  forward = lambda x, k, w: depthwise(x, k, impl=form)
  loss = lambda x, k, w: (depthwise(x, k, impl=form) * w).astype(jnp.float32).mean()
  out = {}
  for name, fn in (('forward', forward), ('both', jax.value_and_grad(loss, (0, 1)))):
    start = clock()
    out[name] = jax.jit(fn).lower(x, kernel, weight).compile()
    out[f'{name}_compile_s'] = clock() - start
  return out


def torch_programs(x, kernel, weight):
  """The same with PyTorch on the CPU (channels last, its fastest layout here); None without it."""
  try:
    import torch
  except ImportError:
    return None
  dtype = torch.bfloat16 if x.dtype == jnp.bfloat16 else torch.float32
  tensor = lambda a, order: torch.from_numpy(np.array(a, np.float32)).permute(order).to(
    dtype).contiguous(memory_format=torch.channels_last)
  a, w, g = tensor(x, (0, 3, 1, 2)), tensor(kernel, (3, 2, 0, 1)), tensor(weight, (0, 3, 1, 2))
  conv = lambda a, w: torch.nn.functional.conv2d(a, w, padding=3, groups=w.shape[0])

  def forward(*_):
    with torch.no_grad():
      return conv(a, w)

  def both(*_):
    leaves = a.detach().requires_grad_(), w.detach().requires_grad_()
    (conv(*leaves) * g).float().mean().backward()
    return [leaf.grad for leaf in leaves]

  return {'forward': forward, 'both': both}


def check(forms, arguments):
  """The largest difference of all results of the forms, relative to the largest value.

  Raises:
    SystemExit: above 1e-5 (bfloat16: 2e-2).
  """
  limit = 2e-2 if arguments[0].dtype == jnp.bfloat16 else 1e-5
  worst = 0.0
  for name in ('forward', 'both'):
    results = [jax.tree.leaves(forms[form][name](*arguments)) for form in FORMS]
    for one, other in zip(*results, strict=True):
      one, other = (np.asarray(leaf, np.float64) for leaf in (one, other))
      worst = max(worst, float(np.abs(one - other).max() / max(np.abs(one).max(), 1e-12)))
  if worst > limit:
    raise SystemExit(f'the forms differ by {worst:.2g}, more than {limit:.0e}')
  return worst


def best_ms(fn, arguments, seconds: float, clock) -> float:
  """Milliseconds of the best call within about `seconds`."""
  best, end = float('inf'), clock() + seconds
  while True:
    start = clock()
    jax.block_until_ready(fn(*arguments))
    best = min(best, clock() - start)
    if clock() > end:
      return best * 1e3


def measure(shape, dtype, *, rounds: int, seconds: float, clock) -> dict:
  """All forms of one shape: best milliseconds, compile seconds, largest difference."""
  arguments = draw(shape, dtype)
  forms = {form: programs(form, *arguments, clock) for form in FORMS}
  row = {'shape': list(shape), 'difference': check(forms, arguments)}
  if jax.default_backend() == 'cpu' and (torch_forms := torch_programs(*arguments)):
    forms['torch'] = torch_forms
  for form, compiled in forms.items():
    row[form] = {key: round(value, 3) for key, value in compiled.items() if key.endswith('_s')}
  for _ in range(rounds):
    for form, compiled in forms.items():
      for name in ('forward', 'both'):
        now = best_ms(compiled[name], arguments, seconds, clock)
        row[form][f'{name}_ms'] = round(min(now, row[form].get(f'{name}_ms', now)), 3)
  return row


def machine() -> dict:
  """What the numbers belong to."""
  device = jax.devices()[0]
  return {**dataclasses.asdict(cpu.here()), 'backend': jax.default_backend(),
          'device': device.device_kind, 'system': platform.system(),
          'memory_gb': round(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30, 1)}


def main(argv=None) -> dict:
  """Measures, prints a table, writes JSON."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--size', type=int, default=1024, help='side of the image in pixels')
  parser.add_argument('--batch', type=int, default=1)
  parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32')
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--seconds', type=float, default=0.3, help='per form, pass and round')
  parser.add_argument('--clock', choices=('wall', 'cpu'), default='wall')
  parser.add_argument('--note', default='', help='kept with the result')
  parser.add_argument('--out', help='JSON file of the result')
  options = parser.parse_args(argv)
  jax.config.update('jax_default_matmul_precision', 'highest')
  result = {'case': 'depthwise', 'device': 'cpu' if jax.default_backend() == 'cpu' else 'cuda',
            'date': datetime.datetime.now(datetime.UTC).date().isoformat(),
            'versions': {'jax': jax.__version__}, 'machine': machine(), 'note': options.note,
            'size': options.size,
            'batch': options.batch, 'dtype': options.dtype, 'clock': options.clock, 'rows': {}}
  clock = {'wall': time.perf_counter, 'cpu': time.process_time}[options.clock]
  print(f'{"":10}{"shape":>22}{"form":>9}{"forward":>12}{"+ backward":>12}{"compile":>10}')
  for name, shape in shapes(options.size, options.batch).items():
    row = measure(shape, jnp.dtype(options.dtype), rounds=options.rounds, seconds=options.seconds,
                  clock=clock)
    result['rows'][name] = row
    for form in (f for f in (*FORMS, 'torch') if f in row):
      part = row[form]
      compiled = part.get('both_compile_s')
      print(f'{name:10}{"x".join(map(str, shape)):>22}{form:>9}{part["forward_ms"]:9.2f} ms'
            f'{part["both_ms"]:9.2f} ms' + (f'{compiled:8.2f} s' if compiled else ''), flush=True)
  if options.out:
    with open(options.out, 'w', encoding='utf-8') as file:
      json.dump(result, file, indent=1)
  return result


if __name__ == '__main__':
  main()
