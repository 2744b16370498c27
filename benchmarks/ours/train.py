"""Train steps: AdamW over all parameters, one batch, as `hrvlm train` runs them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from benchmarks.harness.ours import Side
from benchmarks.harness.program import Program
from benchmarks.ours.vision import images
from hrvlm_jax.language import config as language
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.contract import ModelConfig, ProjectorConfig
from hrvlm_jax.systems.llava_hr import config as llava_hr
from hrvlm_jax.systems.mc_llava import encoder as mc_llava
from hrvlm_jax.systems.pheye import config as pheye
from hrvlm_jax.systems.ps3 import config as ps3
from hrvlm_jax.training.config import OptimizerConfig, TrainingConfig
from hrvlm_jax.training.optimizer import groups_of
from hrvlm_jax.training.step import execution_of, init_state, make_train_step
from hrvlm_jax.vision.convnext import ConvNeXtConfig
from hrvlm_jax.vision.vit import CLIP_L_336, SIGLIP_SO400M_384
from hrvlm_jax.vlm import model as vlm

LEARNING_RATE = 1e-4
_SMALL = dict(width=512, depth=8, heads=8, mlp_width=2048)


def _without_dropout(encoder: pheye.PheyeConfig) -> pheye.PheyeConfig:
  """Random masks differ between the sides."""
  plain = {name: dataclasses.replace(getattr(encoder, name), dropout=0.0)
           for name in ('first', 'second')}
  return dataclasses.replace(encoder, **plain)


def _ps3(tiny: bool) -> ModelConfig:
  """Budgets of whole cells; the published code squashes to 1512 pixels whatever the model."""
  config = ps3.tiny()
  if tiny:
    encoder = dataclasses.replace(
      config.encoder, budgets=(12, 16), saliency=ps3.SaliencyConfig(width=32, out=32, depth=2))
  else:
    vision = dataclasses.replace(ps3.SO400M, image_size=224, **_SMALL)
    encoder = ps3.PS3Config(
      vision=vision, scales=(224, 448, 896), select_layers=(0, 3, 7), budgets=(128, 256),
      max_select=384, saliency=ps3.SaliencyConfig(width=256, out=256, depth=3),
      pool=ps3.PoolConfig(width=512, heads=8, mlp_width=2048),
      text=ps3.TextConfig(vocab_size=16000, out=512, prompt_width=512, **_SMALL))
  return dataclasses.replace(config, encoder=encoder)


def model_config(system: str, size: str) -> ModelConfig:
  """The tiny model of a system, or one of about 100 million parameters."""
  tiny = size == 'tiny'
  if system == 'ps3':
    return _ps3(tiny)
  if system == 'mc_llava':
    if tiny:
      return mc_llava.tiny()
    vision = dataclasses.replace(SIGLIP_SO400M_384, image_size=224, **_SMALL)
    text = language.phi(vocab_size=16000, width=640, depth=8, heads=10, mlp_width=2560)
    return ModelConfig(
      system='mc_llava', text=text,
      encoder=mc_llava.MCLlavaConfig(vision=vision, max_crops=4, num_tokens=255, window=224),
      projector=ProjectorConfig(n_in=vision.width, n_out=text.width))
  if system == 'pheye':
    config = pheye.tiny()
    if not tiny:
      vision = dataclasses.replace(config.encoder.vision, image_size=224, patch_size=14, **_SMALL)
      text = language.phi(vocab_size=16000, width=512, depth=8, heads=8, mlp_width=2048)
      config = pheye.model(pheye.PheyeConfig(vision=vision, level=2), text, interval=2)
    return dataclasses.replace(config, encoder=_without_dropout(config.encoder))
  if system == 'llava_hr':
    if tiny:
      config = llava_hr.tiny()
    else:
      fast = dataclasses.replace(CLIP_L_336, image_size=224, **_SMALL)
      slow = ConvNeXtConfig(depths=(3, 3, 9, 3), widths=(96, 192, 384, 768))
      text = language.llama(vocab_size=16000, width=512, depth=8, heads=8, mlp_width=1408)
      config = llava_hr.model(llava_hr.LlavaHRConfig(
        image_size=512, fast=fast, slow=slow, fast_size=224), text)
    slow = dataclasses.replace(config.encoder.slow, classes=0, head_width=None)
    return dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, slow=slow))
  raise ValueError(f'no train step of {system} at {size}')


class TrainStep(Side):
  """settings: system, size ('tiny' or '100m'), rows, text (ids of a row beside the image's)."""

  def config(self) -> ModelConfig:
    """See `model_config`."""
    return model_config(self.settings['system'], self.settings['size'])

  def model(self):
    config = self.config()
    return vlm.build(config), registry.get(config.system).table(config)

  def inputs(self, rng):
    config, rows = self.config(), self.settings['rows']
    system = registry.get(config.system)
    if config.text is None:
      return self._pairs(rng, config.encoder, rows)
    pictures = (images(rng, rows, self.settings['picture']) + 1) * 127.5
    examples = [system.views([Image.fromarray(p.astype(np.uint8))], config.encoder)
                for p in pictures]
    views = system.batch(examples, config.encoder)
    count = views['index'].shape[1] if config.fusion.in_prompt else 0
    ids = rng.integers(5, min(config.text.vocab_size, 260), (rows, self.settings['text']))
    blank = lambda fill: np.full((rows, count), fill, np.int32)
    batch = {
      'tokens': np.concatenate([blank(0), ids], 1).astype(np.int32),
      'visual_index': np.concatenate(
        [np.tile(np.arange(count), (rows, 1)), np.full(ids.shape, -1)], 1).astype(np.int32),
      'valid': np.ones((rows, count + ids.shape[1]), bool),
      'labels': np.concatenate([blank(-100), ids], 1).astype(np.int32)}
    return batch | {f'views/{name}': value for name, value in views.items()}

  def _pairs(self, rng, encoder: ps3.PS3Config, rows: int):
    """PS3's pre-training: images, captions, the box a caption is about."""
    side, text = self.settings['picture'], encoder.text
    target = np.zeros((rows, side, side), np.float32)
    cell = side // encoder.grid  # whole cells, so that no tie decides what is selected
    for row in range(rows):
      target[row, cell:2 * cell, cell * row:cell * (row + 1)] = 1
    ids = rng.integers(5, min(text.vocab_size, 260), (rows, text.context))
    return {'images': images(rng, rows, side), 'tokens': ids.astype(np.int32), 'target': target}

  def _step(self, fn):
    """(settings of the run, parameter groups, train step)."""
    training = TrainingConfig(
      steps=10**6, batch_size=self.settings['rows'], loss_chunk=8192,
      layers=self.settings.get('layers', 'loop'),
      objective='ps3_pretrain' if self.config().text is None else 'next_token',
      attention=self.options.impl, dtype=self.options.dtype,
      optimizer=OptimizerConfig(learning_rate=LEARNING_RATE, schedule='constant', clip_norm=1.0))
    groups = groups_of(training, fn.abstract)
    return training, groups, make_train_step(fn, training, groups, seed=0,
                                              ex=execution_of(training))

  def _batch(self, inputs):
    batch = {k: jnp.asarray(v) for k, v in inputs.items() if not k.startswith('views/')}
    if self.config().text is not None:
      batch['views'] = {k.removeprefix('views/'): jnp.asarray(v) for k, v in inputs.items()
                        if k.startswith('views/')}
    return batch

  def abstract_program(self):
    fn, _ = self.model()
    training, groups, step = self._step(fn)
    state = jax.eval_shape(lambda p: init_state(training, groups, p), fn.abstract)
    return step, (state, self._batch(self.inputs(np.random.default_rng(0))))

  def program(self, fn, params, inputs):
    training, groups, step = self._step(fn)
    batch = self._batch(inputs)
    compiled = jax.jit(step, donate_argnums=0)
    abstract = jax.eval_shape(lambda p: init_state(training, groups, p), fn.abstract)
    held = {'state': jax.jit(lambda p: init_state(training, groups, p))(params)}

    def run():
      held['state'], metrics = compiled(held['state'], batch)
      return jax.block_until_ready(metrics)

    return Program(
      run=run, trace=(step, (abstract, batch)),
      outputs=lambda metrics: {name: np.asarray(metrics[name]) for name in ('loss', 'grad_norm')},
      after=lambda: {'compilations': compiled._cache_size()})
