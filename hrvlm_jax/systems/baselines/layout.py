"""LLaVA's tensor names and config.json for the baselines whose projector sits in the encoder.

Names: `model.vision_tower.vision_tower.vision_model.*`, `model.mm_projector.*`,
`model.image_newline`, the language model's own. Settings that LLaVA fixes in code stand under
`hrvlm` in config.json, which its code ignores.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hrvlm_jax.checkpoint.rows import Row, Table, identity, joined, linear, norm, prefixed
from hrvlm_jax.core.config import from_dict, to_dict
from hrvlm_jax.language import config as language
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.vision import vit
from hrvlm_jax.vision.blocks import block_side, stages
from hrvlm_jax.vision.vit import ViTConfig

TOWER = 'model.vision_tower.vision_tower.vision_model.'
PROJECTOR = 'model.mm_projector'
NEWLINE = 'model.image_newline'


def tower_table(vision: ViTConfig, *, ours: str = 'vision/tower/') -> Table:
  """Rows of the tower, CLIP's names with a class token, SigLIP's without."""
  rows = vit.clip_table(vision) if vision.class_token else vit.siglip_table(vision)
  return prefixed(rows, ours=ours, theirs=TOWER)


def projector_rows(kind: str, theirs: str, *, ours: str = 'vision/projector') -> list[Row]:
  """Rows of a projector type; module numbers count the activations and block stacking between."""
  if kind == 'linear':
    return linear(f'{ours}/fc1', theirs)
  rows, index = [], int(block_side(kind) > 1)
  prefix = f'{theirs}.layers' if block_side(kind) > 1 else theirs
  for number, (normed, _, _) in enumerate(stages(kind, 1, 1), 1):
    if number > 1:
      index += 1  # the activation
    if normed:
      rows += norm(f'{ours}/norm{number}', f'{prefix}.{index}')
      index += 1
    rows += linear(f'{ours}/fc{number}', f'{prefix}.{index}')
    index += 1
  return rows


def table(config: ModelConfig) -> Table:
  """Rows of a whole model whose encoder has a tower, maybe a projector and a newline."""
  encoder = config.encoder
  inside = getattr(encoder, 'projector', None)
  own = [] if inside is None else projector_rows(inside, PROJECTOR)
  if getattr(encoder, 'has_newline', False):
    own.append(Row('vision/newline', NEWLINE, identity))
  if config.projector is not None:
    own += [row for i in range(1 if config.projector.kind == 'linear' else config.projector.depth)
            for row in linear(f'projector/fc{i + 1}', f'{PROJECTOR}.{2 * i}')]
  return joined(tower_table(encoder.vision), Table(tuple(own)),
                prefixed(language.table(config.text), ours='language/'))


def backbones(encoder: Any) -> dict[str, ViTConfig]:
  """The tower can start from a release of its own."""
  return {'vision/tower': encoder.vision}


def release(config: ModelConfig, keys: Mapping[str, Any]) -> dict[str, Any]:
  """config.json and the processor's file; `keys` are what LLaVA calls this system's settings."""
  encoder = config.encoder
  text = language.config_to_hf(config.text)
  size = encoder.vision.image_size
  return {
    'config.json': {
      **text, 'text_type': text['model_type'], 'model_type': 'llava',
      'architectures': ['LlavaLlamaForCausalLM'], 'mm_hidden_size': encoder.vision.width,
      'mm_vision_select_layer': encoder.layer, 'mm_vision_select_feature': 'patch',
      'mm_projector_type': encoder.projector or 'mlp2x_gelu', **keys,
      'hrvlm': {'system': config.system, 'model': to_dict(config)},
    },
    'preprocessor_config.json': {
      'image_processor_type': 'CLIPImageProcessor', 'do_resize': True, 'resample': 3,
      'size': {'height': size, 'width': size}, 'do_normalize': True,
      'image_mean': list(encoder.mean), 'image_std': list(encoder.std),
    },
  }


def own_config(values: Mapping[str, Any], system: str) -> ModelConfig | None:
  """The model that `release` wrote down, if it is of that system."""
  ours = values.get('hrvlm')
  if not isinstance(ours, Mapping) or ours.get('system') != system or 'model' not in ours:
    return None
  return from_dict(ModelConfig, ours['model'], path='hrvlm.model', title='config.json')


def written_by_us(values: Mapping[str, Any]) -> bool:
  """Whether config.json names the system itself (then nothing is guessed)."""
  return isinstance(values.get('hrvlm'), Mapping)


def text_config(values: Mapping[str, Any]):
  """The language model of a LLaVA config.json."""
  return language.config_from_hf({**values, 'model_type': values.get('text_type', 'llama')})
