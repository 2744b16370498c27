"""LLaVA-1.5's layout: names of the tensors and config.json, both directions.

Source: `haotian-liu/LLaVA` checkpoints (`model.mm_projector`, `model.vision_tower`).
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

from hrvlm_jax.checkpoint.rows import Table, joined, linear, prefixed
from hrvlm_jax.language import config as language, weights as language_weights
from hrvlm_jax.systems.baselines.single_view.config import RELEASED, SingleViewConfig
from hrvlm_jax.systems.contract import ModelConfig, ProjectorConfig
from hrvlm_jax.vision import weights as vision_weights
from hrvlm_jax.vision.vit import ViTConfig

_TOWER = 'model.vision_tower.vision_tower.vision_model.'


def table(config: ModelConfig) -> Table:
  """Rows of the whole model; SigLIP towers take the same prefix."""
  vision = config.encoder.vision
  tower = vision_weights.clip(vision) if vision.class_token else vision_weights.siglip(vision)
  return joined(
    prefixed(tower, ours='vision/tower/', theirs=_TOWER),
    Table((*linear('projector/fc1', 'model.mm_projector.0'),
           *linear('projector/fc2', 'model.mm_projector.2'))),
    prefixed(language_weights.table(config.text), ours='language/'))


def from_release(values: Mapping[str, Any]) -> ModelConfig | None:
  """config.json of a LLaVA-1.5 folder -> ModelConfig; None for other layouts."""
  if values.get('architectures') != ['LlavaLlamaForCausalLM'] or 'input_image_size' in values:
    return None
  if values.get('image_aspect_ratio') == 'anyres' or values.get('s2'):
    return None
  if 'system' in values.get('hrvlm', {}):  # another baseline's own mark
    return None
  if 'hrvlm' in values:
    own = dict(values['hrvlm'])
    encoder = SingleViewConfig(
      vision=ViTConfig(**own.pop('vision')),
      **{k: tuple(v) if isinstance(v, list) else v for k, v in own.items()})
  else:
    encoder = dataclasses.replace(
      RELEASED['llava_1_5_7b'].encoder, layer=values.get('mm_vision_select_layer', -2),
      fit='pad' if values.get('image_aspect_ratio', 'pad') == 'pad' else 'squash')
  text = language.config_from_hf({**values, 'model_type': values.get('text_type', 'llama')})
  return ModelConfig(
    system='single_view', encoder=encoder, text=text, chat=values.get('chat', 'vicuna_v1'),
    projector=ProjectorConfig(n_in=encoder.vision.width, n_out=text.width))


def to_release(config: ModelConfig) -> dict[str, Any]:
  """config.json and processor of the released layout; `hrvlm` keeps what LLaVA fixes in code."""
  encoder: SingleViewConfig = config.encoder
  size = encoder.vision.image_size
  own = dataclasses.asdict(encoder)
  own['vision'].pop('lora')
  text = language.config_to_hf(config.text)
  return {
    'config.json': {
      **text, 'text_type': text['model_type'], 'model_type': 'llava',
      'architectures': ['LlavaLlamaForCausalLM'], 'mm_projector_type': 'mlp2x_gelu',
      'mm_hidden_size': encoder.vision.width, 'mm_vision_select_layer': encoder.layer,
      'mm_vision_select_feature': 'patch',
      'image_aspect_ratio': 'pad' if encoder.fit == 'pad' else 'square',
      'chat': config.chat, 'hrvlm': own,
    },
    'preprocessor_config.json': {
      'image_processor_type': 'CLIPImageProcessor', 'do_resize': True, 'resample': 3,
      'size': {'height': size, 'width': size}, 'do_normalize': True,
      'image_mean': list(encoder.mean), 'image_std': list(encoder.std),
    },
  }
