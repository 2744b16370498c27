"""Plain LLaVA: one resized view, all of its patch tokens.

Source: `haotian-liu/LLaVA: llava/model/multimodal_encoder/clip_encoder.py, llava/mm_utils.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from PIL import Image

from hrvlm_jax.checkpoint.settings import Reader
from hrvlm_jax.core import bounds
from hrvlm_jax.core.config import from_dict
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.execution import HERE, Execution
from hrvlm_jax.core.images import check_size
from hrvlm_jax.core.module import Module, Rngs
from hrvlm_jax.core.resample import CLIP_MEAN, CLIP_STD, normalise
from hrvlm_jax.language import config as language
from hrvlm_jax.systems.baselines import layout
from hrvlm_jax.systems.contract import Count, ModelConfig, ProjectorConfig, System, VisualTokens
from hrvlm_jax.systems.grid import WHOLE, Grid, TokenMap
from hrvlm_jax.systems.packing import Entry, Packing, Views, join
from hrvlm_jax.systems.pictures import (
  background,
  bytes_of,
  check_elongation,
  crop,
  crop_geometry,
  on_square,
  squash,
)
from hrvlm_jax.vision.vit import CLIP_L_336, ViT, ViTConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class SingleViewConfig:
  """One view of the whole image.

  Attributes:
    layer: hidden state that is read: -1 the last block's output, -2 the one before (LLaVA).
    fit: 'squash' ignores the aspect ratio, 'pad' first pastes the image on a square of the mean
      colour (LLaVA-1.5), 'crop' resizes the short side and crops the centre (LLaVA with
      `image_aspect_ratio` square or absent).
    class_only: keep the class token alone (FROMAGe; Pheye, appendix B.1).
    last_tokens: keep only the last K patch tokens of the view; None keeps all. Comparing with a
      multi-crop model of the same encoder needs it (MC-LLaVA keeps the last K of each view).
  """

  vision: ViTConfig = dataclasses.replace(CLIP_L_336, post_norm=True)
  layer: int = -2
  fit: Literal['squash', 'pad', 'crop'] = 'pad'
  class_only: bool = False
  last_tokens: int | None = None
  mean: tuple[float, float, float] = CLIP_MEAN
  std: tuple[float, float, float] = CLIP_STD

  BOUNDS: ClassVar = {
    'layer': bounds.FROM_END, 'last_tokens': bounds.SIZE, 'mean': bounds.FINITE,
    'std': bounds.ABOVE_ZERO}

  def __post_init__(self):
    bounds.check(self)
    problems = []
    if not -self.vision.depth <= self.layer <= -1:
      problems.append(f'layer must lie in {-self.vision.depth}..-1, got {self.layer}')
    if self.last_tokens is not None and not 1 <= self.last_tokens <= self.vision.grid**2:
      problems.append(f'last_tokens must lie in 1..{self.vision.grid**2}, got {self.last_tokens}')
    if self.class_only and (self.last_tokens is not None or not self.vision.class_token):
      problems.append('class_only needs vision.class_token, and no last_tokens')
    if problems:
      raise ValueError('SingleViewConfig: ' + '; '.join(problems))

  @property
  def tokens(self) -> int:
    """Visual tokens of an image."""
    return 1 if self.class_only else self.last_tokens or self.vision.grid**2


RELEASED = {
  'llava_1_5_7b': ModelConfig(
    system='single_view', encoder=SingleViewConfig(), text=language.llama(),
    projector=ProjectorConfig(n_in=1024, n_out=4096), chat='vicuna_v1'),
}


def tiny(*, vocab_size: int = 264) -> ModelConfig:
  """A model that trains on a laptop: one 40-pixel view, width 96."""
  vision = ViTConfig(image_size=40, patch_size=5, width=96, depth=3, heads=4, mlp_width=192,
                     pool='map')
  return ModelConfig(
    system='single_view',
    encoder=SingleViewConfig(vision=vision, layer=-1, fit='squash', mean=(0.5,) * 3,
                             std=(0.5,) * 3),
    text=language.phi(vocab_size=vocab_size, width=128, depth=2, heads=4, mlp_width=256,
                      max_positions=512),
    projector=ProjectorConfig(n_in=96, n_out=128))


# Plain LLaVA on the host: one view per image.

def count(width: int, height: int, config: SingleViewConfig) -> Count:
  """One view, always.

  Raises:
    UserError: a side below 1, or too elongated for fit='pad' or 'crop' (see `pictures`).
  """
  check_size(width, height)
  if config.fit == 'pad':
    check_elongation(width, height, (max(width, height),) * 2)
  elif config.fit == 'crop':
    check_elongation(width, height, crop_geometry(width, height, config.vision.image_size))
  return Count(1, config.tokens)


def tokens(config: SingleViewConfig) -> int:
  """Visual tokens of every image."""
  return config.tokens


def view(image: Image.Image, config: SingleViewConfig) -> Image.Image:
  """The square picture that the tower sees."""
  count(*image.size, config)
  size = config.vision.image_size
  if config.fit == 'pad':
    return on_square(image, size, config.mean)
  return crop(image, size) if config.fit == 'crop' else squash(image, (size, size))


def views(images: Sequence[Image.Image], config: SingleViewConfig) -> Views:
  """Arrays of one example: pixels uint8 [m h w 3], tokens int32 [m]."""
  return join([{'pixels': bytes_of(view(image, config)), 'tokens': config.tokens}
               for image in images], packing(config))


def packing(config: SingleViewConfig) -> Packing:
  """Images of all rows share their slots; the index counts images."""
  return Packing(slots={'pixels': Entry((config.vision.image_size,) * 2 + (3,))})


def grid(config: SingleViewConfig) -> Grid | None:
  """One map of the image, or of its padded square; none where only some tokens are kept."""
  if config.last_tokens is not None or config.class_only:
    return None
  side = config.vision.grid
  return Grid(maps=(TokenMap(side, side, box=None if config.fit == 'crop' else WHOLE),),
              std=config.std,
              view=config.vision.image_size,
              background=background(config.mean) if config.fit == 'pad' else None)


def overlay(image: Image.Image, config: SingleViewConfig,
            info: Mapping[str, object]) -> Image.Image:
  """What the model sees: the view, blown up to the image's size without smoothing."""
  del info
  return view(image, config).resize(image.size, Image.Resampling.NEAREST)


# Plain LLaVA on the device: patch tokens of one hidden state. Axis letters as in `vision.vit`.

class Encoder(Module):
  """Tower; the class token is dropped or kept alone, `last_tokens` applied."""

  def __init__(self, config: SingleViewConfig, *, param_dtype=jnp.float32, rngs: Rngs):
    self.config = config
    self.tower = ViT(config.vision, param_dtype=param_dtype, rngs=rngs)

  def __call__(self, views: dict[str, jax.Array], *, key=None, ex: Execution = HERE
               ) -> VisualTokens:
    """Views of a batch -> [b m*tokens d]."""
    c = self.config
    pixels = normalise(views['pixels'], c.mean, c.std).astype(ex.dtype)
    stop = c.vision.depth + 1 + c.layer
    x = self.tower(pixels, stop=stop, key=key, ex=ex)
    x = x[:, :1] if c.class_only else x[:, int(c.vision.class_token):][:, -c.tokens:]
    rows, images = views['index'].shape
    values = jnp.take(x, views['index'], axis=0).reshape(rows, images * c.tokens, -1)
    return VisualTokens(values, jnp.repeat(views['valid'], c.tokens, axis=1))


# LLaVA-1.5's layout: names of the tensors and config.json, both directions.

table = layout.table


def from_release(values: Mapping[str, Any]) -> ModelConfig | None:
  """config.json of a LLaVA-1.5 folder -> ModelConfig; None for other layouts.

  Raises:
    UserError: settings this system does not have.
  """
  if values.get('architectures') != ['LlavaLlamaForCausalLM'] or 'input_image_size' in values:
    return None
  ours = values.get('hrvlm')
  if ours is None and (values.get('image_aspect_ratio') == 'anyres' or values.get('s2')):
    return None
  if isinstance(ours, Mapping) and 'system' in ours:  # another baseline's own mark
    return None
  read = Reader(values)
  said, text = layout.llava(read, towers=ours is None), layout.text_config(values)
  if ours is None:
    # What LLaVA does not pad goes through CLIP's processor as it is, which crops the centre.
    fit = read.word('image_aspect_ratio', 'square', ('pad', 'square'), null=True)
    encoder = read.build(lambda: dataclasses.replace(
      RELEASED['llava_1_5_7b'].encoder, layer=said.layer,
      fit='pad' if fit == 'pad' else 'crop'))
  else:
    read.done()
    encoder = from_dict(SingleViewConfig, ours, path='hrvlm', title='config.json')
  return ModelConfig(system='single_view', encoder=encoder, text=text, chat=said.chat,
                     projector=said.projector(encoder.vision.width, text.width))


def to_release(config: ModelConfig) -> dict[str, Any]:
  """config.json and processor of the released layout; `hrvlm` keeps what LLaVA fixes in code."""
  encoder: SingleViewConfig = config.encoder
  if encoder.class_only:
    raise UserError('class_only: LLaVA reads the patches of the tower, not its class token')
  size = encoder.vision.image_size
  own = dataclasses.asdict(encoder)
  own['vision'].pop('lora')
  text = language.config_to_hf(config.text)
  return {
    'config.json': {
      **text, 'text_type': text['model_type'], 'model_type': 'llava',
      'architectures': ['LlavaLlamaForCausalLM'], **layout.projector_keys(config),
      **layout.tower_keys(encoder.vision), 'mm_hidden_size': encoder.vision.width,
      'mm_vision_select_layer': encoder.layer, 'mm_vision_select_feature': 'patch',
      'image_aspect_ratio': 'pad' if encoder.fit == 'pad' else 'square',
      'chat': config.chat, 'hrvlm': own,
    },
    'preprocessor_config.json': {
      'image_processor_type': 'CLIPImageProcessor', 'do_resize': True, 'resample': 3,
      'size': {'height': size, 'width': size}, 'do_normalize': True,
      'image_mean': list(encoder.mean), 'image_std': list(encoder.std),
    },
  }


SYSTEM = System(
  name='single_view', keys=layout.KEYS, config=SingleViewConfig, encoder=Encoder, released=RELEASED,
  tiny=tiny, backbones=layout.backbones, count=count, views=views, packing=packing, grid=grid,
  tokens=tokens, overlay=overlay, table=table, from_release=from_release, to_release=to_release)
