"""Measurements that say something on a GPU only: utilisation, the papers' latency ratios."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness.case import Options
from benchmarks.harness.docs import seconds
from benchmarks.ours.alone import _timed
from benchmarks.ours.train import TrainStep
from benchmarks.ours.vision import images
from hrvlm_jax.core.execution import Execution
from hrvlm_jax.core.module import Functional
from hrvlm_jax.parallel.flops import count_flops
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.llava_hr import config as llava_hr, encoder as llava_hr_encoder
from hrvlm_jax.systems.ps3 import config as ps3, encoder as ps3_encoder
from hrvlm_jax.systems.ps3.plan import make_plan
from hrvlm_jax.training.config import OptimizerConfig, TrainingConfig
from hrvlm_jax.training.optimizer import groups_of
from hrvlm_jax.training.step import execution_of, init_state, make_train_step
from hrvlm_jax.vlm import model as vlm

# Dense bfloat16 operations per second of a card, by a part of its name (vendors' data sheets).
PEAKS = {'H200': 989e12, 'H100': 989e12, 'A100': 312e12, 'L4': 121e12, 'B200': 2250e12}


def peak() -> float | None:
  """Of the card at hand; None when it is not listed."""
  name = jax.devices()[0].device_kind
  return next((value for part, value in PEAKS.items() if part in name), None)


def _on_device(fn: Functional, dtype):
  """Parameters drawn where they are needed."""
  return jax.jit(lambda key: jax.tree.map(lambda x: x.astype(dtype), fn.init(key)))(
    jax.random.key(0))


class _Whole(TrainStep):
  """A released model instead of a small one."""

  def config(self):
    if self.settings.get('tiny'):
      return registry.get(self.settings['system']).tiny()
    return next(iter(registry.get(self.settings['system']).released.values()))


def train(settings: Mapping[str, Any], options: Options) -> dict[str, Any]:
  """Step time and utilisation: the operations of a step without recomputation over time x peak."""
  rows = []
  for system in settings['systems']:
    side = _Whole({**settings, 'system': system}, '.', options)
    config = side.config()
    fn = vlm.build(config)
    batch = side._batch(side.inputs(np.random.default_rng(0)))
    training = TrainingConfig(
      steps=10**6, batch_size=settings['rows'], dtype=options.dtype, remat='layers',
      attention=options.impl, optimizer=OptimizerConfig(learning_rate=1e-4, schedule='constant'))
    groups = groups_of(training, fn.abstract)
    ex = execution_of(training)
    abstract = jax.eval_shape(lambda p, t=training, g=groups: init_state(t, g, p), fn.abstract)
    flops = count_flops(make_train_step(fn, training, groups, 0, ex=ex.plain), abstract, batch)
    step = jax.jit(make_train_step(fn, training, groups, 0, ex=ex), donate_argnums=0)
    held = {'state': jax.jit(lambda p, t=training, g=groups: init_state(t, g, p))(
      _on_device(fn, jnp.float32))}

    def call(step=step, held=held, batch=batch):
      held['state'], metrics = step(held['state'], batch)
      return metrics

    took = _timed(call, settings['rounds'])
    most = peak()
    rows.append({
      'system': system, 'parameters': f'{sum(map(_size, jax.tree.leaves(fn.abstract))) / 1e9:.2f} '
      'billion', 'places': int(batch['tokens'].size), 'step': seconds(took),
      'tflop': round(flops / 1e12, 2),
      'mfu': f'{flops / took / most:.1%}' if most else 'peak of this device is not listed'})
  return {'rows': rows, 'accelerator': jax.devices()[0].device_kind}


def _size(leaf) -> int:
  return math.prod(leaf.shape)


def latency(settings: Mapping[str, Any], options: Options) -> dict[str, Any]:
  """PS3: 20 % of a 4K image against all of it. LLaVA-HR: 384 to 1024 pixels, dual against one ViT.
  """
  ex, rows = Execution(dtype=options.dtype, attention=options.impl), []
  dtype = jnp.dtype(ex.dtype)
  tiny = settings.get('tiny')
  config = ps3.tiny_encoder() if tiny else ps3.RELEASED['ps3_4k_siglip'].encoder
  config = dataclasses.replace(config, text=None)
  fn = Functional(lambda rngs: ps3_encoder.Encoder(config, rngs=rngs))
  params, side = _on_device(fn, dtype), config.scales[-1]
  x = jnp.asarray(images(np.random.default_rng(0), 1, side))
  cells = sum((s // config.vision.patch_size)**2 for s in config.scales[1:])
  took = []
  for tokens in (cells // 5, cells):
    plan = make_plan(side, side, config, num_tokens=tokens)
    call = jax.jit(lambda params, x, plan=plan: fn.apply(
      params, x, plan, ex=ex, method='encode').last)
    took.append(_timed(lambda call=call: call(params, x), settings['rounds']))
  del params
  rows.append(_ratio('PS3-4K, 20 % of the patches : all', *took, paper='0.417 s : 1.812 s = 0.23'))
  released = llava_hr.tiny() if tiny else llava_hr.RELEASED['llava_hr_7b']
  dual = released.encoder
  single = dataclasses.replace(dual, slow=None, adapters=None)
  sizes = (256, 512) if tiny else (384, 1024)
  for name, base in (('LLaVA-HR', dual), ('single ViT', single)):
    took = []
    for size in sizes:
      # 1024 is no multiple of the patch: the ViT alone leaves the remainder out, as timm does.
      encoder = dataclasses.replace(base, image_size=size)
      fn = Functional(lambda rngs, e=encoder: llava_hr_encoder.Encoder(e, rngs=rngs))
      params = _on_device(fn, dtype)
      x = jnp.asarray(images(np.random.default_rng(0), 1, size), dtype)
      call = jax.jit(lambda params, x, fn=fn: fn.apply(
        params, x, ex=ex, method='tower')[0])
      took.append(_timed(lambda call=call, p=params, x=x: call(p, x), settings['rounds']))
    rows.append(_ratio(f'{name}, {sizes[0]} : {sizes[1]} pixels', *took))
  return {'rows': rows, 'accelerator': jax.devices()[0].device_kind}


def _ratio(what: str, short: float, long: float, *, paper: str = '-') -> dict[str, Any]:
  return {'what': what, 'short': seconds(short), 'long': seconds(long),
          'ratio': round(short / long, 3), 'paper': paper}
