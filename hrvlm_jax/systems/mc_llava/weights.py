"""MC-LLaVA's released layout: names of all 909 tensors and config.json, both directions."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

from hrvlm_jax.checkpoint.formats import GENERIC, VISION, same
from hrvlm_jax.checkpoint.rows import Table, joined, linear, prefixed
from hrvlm_jax.checkpoint.settings import Keys, Only, Reader, shown
from hrvlm_jax.core.config import from_dict
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.language import config as language
from hrvlm_jax.systems.contract import ModelConfig, ProjectorConfig
from hrvlm_jax.systems.mc_llava.encoder import MCLlavaConfig
from hrvlm_jax.vision import vit
from hrvlm_jax.vision.vit import ViTConfig


def table(config: ModelConfig) -> Table:
  """Rows of the whole model."""
  tower = prefixed(vit.siglip_table(config.encoder.vision), ours='vision/tower/',
                   theirs='vision_model.vision_tower.vision_model.')
  own = Table((
    *linear('vision/coord_embed/fc1', 'vision_model.coord_embed.0'),
    *linear('vision/coord_embed/fc2', 'vision_model.coord_embed.2'),
    *linear('projector/fc1', 'multi_modal_projector.linear_1'),
    *linear('projector/fc2', 'multi_modal_projector.linear_2'),
  ))
  text = prefixed(language.table(config.text), ours='language/', theirs='language_model.')
  return joined(tower, own, text)


def vision_from_hf(values: Any, *, prefix: str = 'vision_config.') -> ViTConfig:
  """`vision_config` of a SigLIP model; what is left out has the default of its class.

  Raises:
    UserError: values that are none, all of them.
  """
  return vit.config_from_hf(Reader(values, prefix=prefix), clip=False)


def vision_to_hf(config: ViTConfig) -> dict[str, Any]:
  """The inverse of `vision_from_hf`."""
  return dict(
    model_type='siglip_vision_model', image_size=config.image_size, patch_size=config.patch_size,
    hidden_size=config.width, num_hidden_layers=config.depth, num_attention_heads=config.heads,
    intermediate_size=config.mlp_width,
    hidden_act={'gelu_tanh': 'gelu_pytorch_tanh'}.get(config.activation, config.activation),
    layer_norm_eps=config.norm_eps, num_channels=config.channels)


def from_release(values: Mapping[str, Any]) -> ModelConfig | None:
  """config.json of a released folder -> ModelConfig; None when the model type is another one."""
  if values.get('model_type') != 'mc-llava':
    return None
  text = language.config_from_hf(values.get('text_config', {}), kind='phi', where='config.json',
                                 prefix='text_config.')
  vision = vision_from_hf(values.get('vision_config', {}))
  ours = values.get('hrvlm') or {}
  if not isinstance(ours, Mapping):
    raise UserError(f'config.json: hrvlm: found {shown(ours)}, expected a mapping of settings')
  knobs = {'num_tokens': min(728, vision.grid**2 - 1), **ours}
  return ModelConfig(
    system='mc_llava', text=text, chat='mc_llava',
    encoder=from_dict(MCLlavaConfig, {'vision': vision} | knobs, path='hrvlm',
                      title='config.json'),
    projector=ProjectorConfig(n_in=vision.width, n_out=text.width))


# Keys of config.json; see `checkpoint.settings`.
KEYS: Keys = {
  **GENERIC, 'vision_config': VISION, 'text_config': language.KEYS,
  **same('only of the loss of the original', 'ignore_index'),
  **same('the tokenizer has the token', 'image_token_index'),
  **same('the text model says it', 'vocab_size'),
  **same('the tower is SigLIP with these sizes', 'vision_tower_name', 'vision_embed_dim'),
  **same("the original's code does not read it", 'projector_hidden_act', 'projector_tokens_num',
         'vision_feature_select_strategy', 'vision_feature_layer'),
  'tie_word_embeddings': Only((False,)),
}


def to_release(config: ModelConfig) -> dict[str, Any]:
  """Files of the released layout: config.json, generation_config.json, preprocessor_config.json.

  `hrvlm` in config.json holds the knobs the original passes at run time; its code ignores it.
  """
  encoder: MCLlavaConfig = config.encoder
  knobs = {f.name: getattr(encoder, f.name) for f in dataclasses.fields(encoder)
           if f.name not in ('vision', 'mean', 'std')}
  size = encoder.vision.image_size
  return {
    'config.json': {
      'architectures': ['LlavaForConditionalGeneration'], 'model_type': 'mc-llava',
      'vision_config': vision_to_hf(encoder.vision),
      'text_config': language.config_to_hf(config.text),
      'ignore_index': -100, 'projector_hidden_act': 'gelu',
      'vocab_size': config.text.vocab_size, 'hrvlm': knobs,
    },
    'generation_config.json': {'do_sample': False},
    'preprocessor_config.json': {
      'image_processor_type': 'SiglipImageProcessor', 'do_resize': True, 'resample': 3,
      'size': {'height': size, 'width': size}, 'do_rescale': True,
      'rescale_factor': 0.00392156862745098, 'do_normalize': True,
      'image_mean': list(encoder.mean), 'image_std': list(encoder.std),
    },
  }
