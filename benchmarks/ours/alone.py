"""Measurements without a peer: growth with resolution, compilation and warm start."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

from benchmarks.harness import measure
from benchmarks.harness.case import Options
from benchmarks.harness.docs import seconds

ROOT = pathlib.Path(__file__).parents[2]


def _timed(call, rounds: int, clock=time.perf_counter) -> float:
  """Median seconds of a call after a first one; the clock may be the process's own."""
  import jax

  jax.block_until_ready(call())
  found = []
  for _ in range(rounds):
    start = clock()
    jax.block_until_ready(call())
    found.append(clock() - start)
  return statistics.median(found)


def _device_params(fn, dtype):
  """Random parameters of a module on the device."""
  import jax

  from benchmarks.harness.ours import draw

  return jax.tree.map(lambda x: jax.device_put(x).astype(dtype), draw(fn.abstract))


def ps3_growth(settings: Mapping[str, Any], options: Options) -> dict[str, Any]:
  """PS3-4K at a fixed token budget over image sizes, resizing and selection apart.

  Times are of separate programs: `encode` (thumbnail pass, gathering, looks) gets the images of
  every scale and the selection maps as inputs.
  """
  import jax
  import jax.numpy as jnp

  from benchmarks.ours.vision import images
  from hrvlm_jax.core import resample
  from hrvlm_jax.core.execution import Execution
  from hrvlm_jax.core.module import Functional
  from hrvlm_jax.systems.ps3 import config as ps3, encoder as ps3_encoder
  from hrvlm_jax.systems.ps3.patches import scaled
  from hrvlm_jax.systems.ps3.plan import make_plan

  config = dataclasses.replace(ps3.tiny_encoder() if settings.get('tiny') else
                               ps3.RELEASED['ps3_4k_siglip'].encoder, text=None)
  ex = Execution(dtype=options.dtype, attention=options.impl)
  dtype = jnp.dtype(ex.dtype)
  fn = Functional(lambda rngs: ps3_encoder.Encoder(config, rngs=rngs))
  params = _device_params(fn, dtype)
  rng, rows = np.random.default_rng(0), []
  for size in settings['sizes']:
    # The same number of tokens at every size: a look of a model whose scales end there.
    scales = tuple(s for s in config.scales if s <= size)
    budgets = dataclasses.replace(config, scales=scales, budgets=None).resolved_budgets
    budgets = (*budgets, *(0,) * (len(config.scales) - len(scales)))
    model = Functional(lambda rngs, b=budgets: ps3_encoder.Encoder(
      dataclasses.replace(config, budgets=b), rngs=rngs))
    plan = make_plan(size, size, dataclasses.replace(config, budgets=budgets), num_looks=1)
    x = jnp.asarray(images(rng, 1, size))

    def whole(params, x, model=model, plan=plan):
      return model.apply(params, x, plan, ex=ex, method='encode').last

    def resize(x, plan=plan):
      return resample.bicubic(x, *plan.sizes[0], ex=ex), scaled(x, plan, ex=ex)

    def select(params, hidden, x, model=model, plan=plan):
      encoder = model.bind(params)
      features = encoder.selection.features(hidden, x, ex=ex)
      return encoder.selection(features, None, plan)

    def trunk(params, small, sized, probs, model=model, plan=plan):
      """Both passes of the transformer over images and maps that are there."""
      encoder = model.bind(params)
      chosen = ps3_encoder.selection.choose(probs, plan)
      low = encoder.tower.run(encoder.tower.embed(small.astype(dtype)), return_kv=True, ex=ex)
      tokens = encoder.embed_high(sized, chosen[0], plan.look(0), plan, ex=ex)
      high = encoder.tower.run(tokens, prefix=(low.keys, low.values), ex=ex)
      return low.x, high.x

    layers = [jnp.zeros((1, config.grid**2, config.vision.width), dtype)] * len(
      config.select_layers)
    small, sized = jax.jit(resize)(x)
    probs = jax.jit(select)(params, layers, x)
    measure.reset_peak()
    calls = {'whole': (whole, params, x), 'resize': (resize, x),
             'select': (select, params, layers, x), 'trunk': (trunk, params, small, sized, probs)}
    parts = {name: _timed(functools.partial(jax.jit(call), *arguments), settings['rounds'])
             for name, (call, *arguments) in calls.items()}
    memory = jax.jit(whole).lower(params, x).compile().memory_analysis()
    rows.append({'pixels': size, 'tokens': plan.tokens, **{k: seconds(v) for k, v in parts.items()},
                 'trunk_s': round(parts['trunk'], 4), 'whole_s': round(parts['whole'], 4),
                 'temporaries_mb': round(memory.temp_size_in_bytes / 1e6),
                 'peak_gb': round(measure.peak_bytes() / 1e9, 2)})
    print(rows[-1], file=sys.stderr, flush=True)
  chosen = [row for row in rows if row['pixels'] >= settings['from']]
  growth = chosen[-1]['trunk_s'] / chosen[0]['trunk_s'] - 1
  return {'rows': rows, 'growth': round(growth, 4), 'remark': (
    f'From {chosen[0]["pixels"]} to {chosen[-1]["pixels"]} pixels at {chosen[-1]["tokens"]} tokens '
    f'the encoder proper (image on the device, resizing and selection apart) takes '
    f'{growth:+.1%}; asked for: below +15 %.')}


def growth(settings: Mapping[str, Any], options: Options) -> dict[str, Any]:
  """FLOPs, memory and time of every system's encoder against resolution.

  Up to `settings['time_below']` FLOPs a program is run; beyond, it is only compiled (temporaries
  are the compiler's own count). Times are of the processor, all cores together, so that a shared
  machine may measure them.
  """
  import jax
  import jax.numpy as jnp

  from hrvlm_jax.core.execution import Execution
  from hrvlm_jax.core.module import Functional
  from hrvlm_jax.parallel.flops import count_flops

  ex = Execution(dtype=options.dtype, attention=options.impl)
  dtype, rows = jnp.dtype(ex.dtype), []
  for system, encoders in _encoders(settings).items():
    for pixels, count, (config, module, shapes) in encoders:
      fn = Functional(lambda rngs, c=config, m=module: m(c, rngs=rngs))
      run = lambda params, views, fn=fn: fn.apply(params, views, ex=ex).values
      abstract = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, dtype), fn.abstract)
      flops = count_flops(run, abstract, shapes)
      compiled = jax.jit(run).lower(abstract, shapes).compile()
      row = {'system': system, 'pixels': pixels, 'tokens': count.tokens, 'views': count.views,
             'tflop': round(flops / 1e12, 3),
             'temporaries_mb': round(compiled.memory_analysis().temp_size_in_bytes / 1e6)}
      if flops <= settings['time_below']:
        params = _device_params(fn, dtype)
        views = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        took = _timed(lambda f=compiled, p=params, v=views: f(p, v), settings['rounds'],
                      time.process_time)
        row |= {'time': seconds(took), 'cpu_s': round(took, 4)}
        del params
      rows.append(row)
      print(row, file=sys.stderr, flush=True)
  return {'rows': rows, 'remark': (
    "Temporaries are the compiled program's, images and weights not counted. Programs above "
    f'{settings["time_below"] / 1e12:g} TFLOP are compiled and counted, not run. Time is that of '
    'all cores together.')}


def _encoders(settings):
  """Per system: (pixels, Count, (config, module, shapes of the views)) of one square image."""
  import jax
  from PIL import Image

  from hrvlm_jax.systems import registry

  found: dict[str, list] = {}
  for name in settings['systems']:
    system = registry.get(name)
    for pixels in settings['sizes']:
      config = _sized(name, pixels, settings)
      if config is None:
        continue
      example = system.views([Image.new('RGB', (pixels, pixels))], config)
      views = system.batch([example], config)
      shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), views)
      count = system.count(pixels, pixels, config)
      side = getattr(config, 'image_size', pixels)
      found.setdefault(name, []).append((side, count, (config, system.encoder, shapes)))
  return found


def _sized(name: str, pixels: int, settings):
  """A system's encoder for images of that side; None where it has none."""
  from hrvlm_jax.systems import registry

  system = registry.get(name)
  tiny = settings.get('tiny')
  released = {'mc_llava': 'mc_llava_3b', 'pheye': 'pheye_x2_672', 'llava_hr': 'llava_hr_7b',
              'ps3': 'ps3_4k_siglip'}
  encoder = system.tiny().encoder if tiny else next(
    (config for key, config in system.released.items() if key == released.get(name)),
    next(iter(system.released.values()))).encoder
  try:
    if name == 'pheye':
      level = max(2, round(pixels / encoder.vision.image_size))
      return dataclasses.replace(encoder, level=level, sub_image_rows=1 + level**2)
    if name == 'llava_hr':
      # Sides at which both grids fit: 384, and from 768 on in steps of 32.
      side = pixels if tiny else 384 if pixels < 600 else max(pixels // 32 * 32, 768)
      return dataclasses.replace(encoder, image_size=side)
    if name == 'mc_llava':
      # As many crops as windows of the tower's size cover the image, which keeps its detail.
      crops = min(round((pixels / encoder.vision.image_size)**2), encoder.num_tokens - 1)
      return dataclasses.replace(encoder, max_crops=crops if crops > 1 else 0,
                                 view_buckets=tuple(range(1, 400, 2)))
  except ValueError:  # a size the system refuses
    return None
  return encoder


def warm_start(settings: Mapping[str, Any], options: Options) -> dict[str, Any]:
  """First call of each system's encoder and of a train step, in new processes: without and with
  the persistent cache that the command line keeps by default."""
  rows = []
  for name in settings['programs']:
    with tempfile.TemporaryDirectory() as cache:
      took = [_start(name, cache, options) for _ in range(2)]
    rows.append({'program': name, 'trace': seconds(took[0]['trace_s']),
                 'first': seconds(took[0]['compile_s']), 'warm': seconds(took[1]['compile_s']),
                 'first_s': took[0]['compile_s'], 'warm_s': took[1]['compile_s'],
                 'cache_mb': round(took[0]['cache_mb'], 1)})
    print(rows[-1], file=sys.stderr, flush=True)
  return {'rows': rows, 'remark': 'Processor seconds at real sizes; nothing is computed. Each time '
          'a new process and, the first time, an empty cache in the form that `hrvlm` keeps by '
          'itself.'}


def _start(name: str, cache: str, options: Options) -> dict[str, float]:
  environment = {**os.environ, 'JAX_COMPILATION_CACHE_DIR': cache,
                 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '1'}
  if options.device == 'cpu':
    environment['JAX_PLATFORMS'] = 'cpu'
  done = subprocess.run(
    [sys.executable, '-m', 'benchmarks.ours.compile_once', name, options.dtype], cwd=ROOT,
    env=environment, stdout=subprocess.PIPE, text=True, check=True)
  found = json.loads(done.stdout.splitlines()[-1])
  size = sum(path.stat().st_size for path in pathlib.Path(cache).rglob('*') if path.is_file())
  return found | {'cache_mb': size / 1e6}
