"""Encoders: PS3, SigLIP, CLIP with two adapter sets, LLaVA-HR's two towers."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from benchmarks.harness.ours import Side
from hrvlm_jax.core.module import Functional
from hrvlm_jax.systems.llava_hr import config as llava_hr, encoder as llava_hr_encoder
from hrvlm_jax.systems.llava_hr.weights import vision_table as llava_hr_table
from hrvlm_jax.systems.mc_llava import encoder as mc_llava
from hrvlm_jax.systems.pheye import config as pheye
from hrvlm_jax.systems.pheye.weights import tower_table
from hrvlm_jax.systems.ps3 import config as ps3, encoder as ps3_encoder
from hrvlm_jax.systems.ps3.plan import make_plan
from hrvlm_jax.systems.ps3.weights import vision_table as ps3_table
from hrvlm_jax.vision.vit import SIGLIP_SO400M_384, ViT, ViTConfig, siglip_table


def images(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
  """Normalised images NHWC in [-1, 1]: blocks of 1/27 of the side, so that some cells stand out."""
  cells = rng.uniform(-1, 1, (count, 27, 27, 3)).astype(np.float32)
  index = np.arange(size) * 27 // size
  picture = cells[:, index][:, :, index]
  picture += rng.standard_normal(picture.shape, np.float32) * np.float32(0.1)
  return np.clip(picture, -1, 1)


class PS3(Side):
  """PS3-4K-SigLIP. settings: size (pixels), budgets (tokens per scale), looks (0: low-res only)."""

  def config(self) -> ps3.PS3Config:
    """The released encoder; budgets of whole cells, so that ties decide nothing."""
    encoder = ps3.RELEASED['ps3_4k_siglip'].encoder
    if self.settings.get('tiny'):
      # The published code squashes to 1512 pixels whatever the model.
      encoder = dataclasses.replace(ps3.tiny_encoder(), saliency=ps3.SaliencyConfig(
        width=32, out=32, depth=2))
    return dataclasses.replace(encoder, budgets=tuple(self.settings['budgets']), text=None)

  def model(self):
    config = self.config()
    return Functional(lambda rngs: ps3_encoder.Encoder(config, rngs=rngs)), ps3_table(config)

  def inputs(self, rng):
    return {'images': images(rng, 1, self.settings['size'])}

  def program(self, fn, params, inputs):
    size = self.settings['size']
    plan = make_plan(size, size, self.config(), num_looks=self.settings['looks'])

    def encode(params, pixels):
      out = fn.apply(params, pixels.astype(jnp.float32), plan, keep=1, ex=self.ex, method='encode')
      return {'tokens': out.last, **{f'map{i}': m for i, m in enumerate(out.maps)}}

    return self.jit(encode, params, inputs['images'], tokens=plan.tokens)


class Siglip(Side):
  """SigLIP-SO400M/14-384, all blocks. settings: views."""

  def config(self) -> ViTConfig:
    """Without the pooling head, which MC-LLaVA never runs."""
    whole = mc_llava.tiny().encoder.vision if self.settings.get('tiny') else SIGLIP_SO400M_384
    return dataclasses.replace(whole, pool=None)

  def model(self):
    config = self.config()
    return Functional(lambda rngs: ViT(config, rngs=rngs)), siglip_table(config)

  def inputs(self, rng):
    return {'images': images(rng, self.settings['views'], self.config().image_size)}

  def program(self, fn, params, inputs):
    encode = lambda params, x: {
      'tokens': fn.apply(params, x.astype(self.dtype), ex=self.ex)}
    return self.jit(encode, params, inputs['images'])


class Pheye(Side):
  """CLIP-H/14-224 over a global view and tiles, an adapter set for each. settings: level."""

  def config(self) -> pheye.PheyeConfig:
    """Both sets as released."""
    encoder = pheye.tiny().encoder if self.settings.get('tiny') else pheye.PheyeConfig()
    return dataclasses.replace(encoder, level=self.settings['level'])

  def model(self):
    config = self.config()
    return Functional(lambda rngs: ViT(config.tower, rngs=rngs)), tower_table(config)

  def inputs(self, rng):
    return {'images': images(rng, self.config().sub_images, self.config().vision.image_size)}

  def program(self, fn, params, inputs):
    adapter = self.config().adapters

    def encode(params, x):
      tower = fn.bind(params)
      tokens = tower.embed(x.astype(self.dtype)[None], adapter=adapter)
      return {'tokens': tower.run(tokens, adapter=adapter, ex=self.ex).x[0]}

    return self.jit(encode, params, inputs['images'])


class LlavaHR(Side):
  """LLaVA-HR's dual tower. settings: size."""

  def config(self) -> llava_hr.LlavaHRConfig:
    """As released, without the ConvNeXt's classifier."""
    encoder = llava_hr.tiny().encoder if self.settings.get('tiny') else llava_hr.LlavaHRConfig()
    slow = dataclasses.replace(encoder.slow, classes=0, head_width=None)
    return dataclasses.replace(encoder, image_size=self.settings['size'], slow=slow)

  def model(self):
    config = self.config()
    return (Functional(lambda rngs: llava_hr_encoder.Encoder(config, rngs=rngs)),
            llava_hr_table(config))

  def inputs(self, rng):
    return {'images': images(rng, 1, self.settings['size'])}

  def program(self, fn, params, inputs):
    def encode(params, x):
      tokens, _ = fn.apply(params, x.astype(self.dtype), ex=self.ex, method='tower')
      return {'tokens': tokens}

    return self.jit(encode, params, inputs['images'])
