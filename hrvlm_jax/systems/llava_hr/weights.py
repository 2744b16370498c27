"""LLaVA-HR's released layout: names of all tensors and config.json, both directions.

Source: `luogen1996/LLaVA-HR: llava_hr/model/`; section 12 of its checkpoints' key list.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

from hrvlm_jax.checkpoint.formats import LLAVA, used
from hrvlm_jax.checkpoint.rows import (
  Row,
  Table,
  conv1x1,
  conv_kernel,
  identity,
  joined,
  linear,
  norm,
  prefixed,
)
from hrvlm_jax.checkpoint.settings import Keys, Only, Reader
from hrvlm_jax.core.config import from_dict, to_dict
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.language import config as language
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.systems.llava_hr.config import RELEASED_ADAPTERS, AdapterConfig, LlavaHRConfig, model
from hrvlm_jax.systems.llava_hr.encoder import adapter_widths
from hrvlm_jax.vision import convnext, vit
from hrvlm_jax.vision.convnext import CONVNEXT_L, CONVNEXT_XXL
from hrvlm_jax.vision.vit import CLIP_L_336

TOWER = 'model.vision_tower.'

# Backbones by the names in config.json.
FAST = {'openai/clip-vit-large-patch14-336': CLIP_L_336}
SLOW = {'convnext_large_mlp.clip_laion2b_ft_320': CONVNEXT_L,
        'convnext_xxlarge.clip_laion2b_soup': CONVNEXT_XXL}
_CUSTOM = 'hrvlm'


def table(config: ModelConfig) -> Table:
  """Rows of the whole model."""
  text = prefixed(language.table(config.text), ours='language/')
  return joined(prefixed(vision_table(config.encoder), ours='vision/', theirs=TOWER),
                projector_table(), text)


def projector_table() -> Table:
  """Rows of the projector."""
  return Table((*linear('projector/fc1', 'model.mm_projector.0'),
                *linear('projector/fc2', 'model.mm_projector.2')))


def stage1_table() -> Table:
  """Rows of stage 1's `mm_projector.bin`: the projector and the final align module."""
  align = Table(tuple(align_rows()))
  return joined(prefixed(align, ours='vision/', theirs=TOWER), projector_table())


def vision_table(config: LlavaHRConfig) -> Table:
  """Rows of the encoder; names without `model.vision_tower.`."""
  parts, rows = [], []
  if config.fast is not None:
    tower = f'{"fast_vision_tower." if config.dual else ""}vision_tower.vision_model.'
    parts.append(prefixed(vit.clip_table(config.fast), ours='fast/', theirs=tower))
  if config.slow is not None:
    tower = f'{"slow_vision_tower." if config.dual else ""}vision_tower.'
    parts.append(prefixed(convnext.table(config.slow), ours='slow/', theirs=tower))
  if config.adapters is not None:
    for number in range(len(adapter_widths(config))):
      rows += adapter_rows(config.adapters, f'adapters/{number}/', f'align_stages_latent.{number}.')
  if config.dual and config.fusion == 'sum':
    rows += align_rows()
  if config.reduce == 'queries':
    rows += _resampler_rows()
  return joined(*parts, Table(tuple(rows)))


def adapter_rows(config: AdapterConfig, ours: str = '', theirs: str = '') -> list[Row]:
  """Rows of one MR-Adapter; all its maps are convolutions in the original."""
  rows = []
  for path, kind in (('slow', config.slow_map), ('fast', config.fast_map)):
    op = conv_kernel if kind == 'conv' else conv1x1
    rows += [Row(f'{ours}{path}_conv/kernel', f'{theirs}{path}_conv.weight', op),
             Row(f'{ours}{path}_conv/bias', f'{theirs}{path}_conv.bias', identity),
             Row(f'{ours}{path}_proj/kernel', f'{theirs}{path}_proj.weight', conv1x1),
             Row(f'{ours}{path}_proj/bias', f'{theirs}{path}_proj.bias', identity)]
  return rows + [*linear(f'{ours}gate/fc1', f'{theirs}gate.0'),
                 *linear(f'{ours}gate/fc2', f'{theirs}gate.2')]


def align_rows(ours: str = 'align/', theirs: str = 'align_stages.0.') -> list[Row]:
  """Rows of the final align module."""
  return [*linear(f'{ours}fast_proj', f'{theirs}fast_proj'),
          *linear(f'{ours}slow_proj', f'{theirs}slow_proj')]


def _resampler_rows() -> list[Row]:
  """Names of our own: the paper's resampler was never released."""
  layers = ('attn/q', 'attn/k', 'attn/v', 'attn/out', 'mlp/fc1', 'mlp/fc2')
  return [Row('resampler/queries', 'resampler.queries', identity),
          *norm('resampler/norm_tokens', 'resampler.norm_tokens'),
          *norm('resampler/norm', 'resampler.norm'),
          *(row for name in layers
            for row in linear(f'resampler/{name}', f'resampler.{name.replace("/", ".")}'))]


def from_release(values: Mapping[str, Any]) -> ModelConfig | None:
  """config.json of a released folder -> ModelConfig; None when it is not LLaVA-HR's.

  Other LLaVA models share `model_type: llava`; LLaVA-HR's name a slow tower. Settings the original
  cannot express stand under `hrvlm`, written by `to_release`.

  Raises:
    UserError: a tower whose sizes are not known.
  """
  ours = values.get(_CUSTOM)
  own = isinstance(ours, Mapping) and ours.get('system') == 'llava_hr'
  dual = bool(values.get('is_multipath_encoder')) or bool(values.get('vision_tower_slow'))
  if values.get('model_type') != 'llava' or not (own or dual):
    return None
  text = language.config_from_hf(values, kind='llama', where='config.json')
  if own:
    encoder = from_dict(LlavaHRConfig, ours.get('encoder'), path='hrvlm.encoder',
                        title='config.json')
    return model(encoder, text, chat=ours.get('chat', 'vicuna_v1'))
  read = Reader(values)
  kind = values.get('mm_projector_type', 'mlp2x_gelu')
  if kind != 'mlp2x_gelu':
    read.problems.append(f"mm_projector_type is {kind!r}, expected 'mlp2x_gelu'")
  found = {}
  for key, known in (('mm_vision_tower', FAST), ('vision_tower_slow', SLOW)):
    name = values.get(key)
    found[key] = known.get(name) if isinstance(name, str) else None
    if found[key] is None:
      read.problems.append(f'{key} is {name!r}, whose sizes are not known; expected one of '
                           f'{sorted(known)}')
  aspect = read.word('image_aspect_ratio', 'square', ('pad', 'square'), null=True)
  size = read.integer('input_image_size', 1024, most=1 << 14, null=True)
  stage1 = read.flag('freeze_vision')
  encoder = read.build(lambda: LlavaHRConfig(
    image_size=size, fast=found['mm_vision_tower'], slow=found['vision_tower_slow'],
    adapters=None if stage1 else RELEASED_ADAPTERS, aspect=aspect))
  return model(encoder, text, chat='plain' if stage1 else 'vicuna_v1')


# Keys of config.json; see `checkpoint.settings`.
KEYS: Keys = {
  **language.KEYS, **LLAVA,
  **used('is_multipath_encoder', 'vision_tower_slow', 'freeze_vision', 'input_image_size'),
  'mm_vision_select_layer': Only((-2,)),
}


def to_release(config: ModelConfig) -> dict[str, Any]:
  """Files of the released layout: config.json and generation_config.json.

  A model of the released form gets exactly the original's keys; any other also a `hrvlm` entry,
  which the original's code ignores.
  """
  encoder: LlavaHRConfig = config.encoder
  text = language.config_to_hf(config.text)
  fast = _name(FAST, encoder.fast)
  slow = _name(SLOW, encoder.slow)
  values = text | {
    'architectures': ['LlavaLlamaForCausalLM'], 'model_type': 'llava',
    'freeze_vision': encoder.adapters is None, 'input_image_size': encoder.image_size,
    'is_multipath_encoder': encoder.dual, 'vision_tower': fast, 'mm_vision_tower': fast,
    'vision_tower_slow': slow, 'use_mm_proj': True, 'mm_projector_type': 'mlp2x_gelu',
    'mm_hidden_size': encoder.width, 'mm_vision_select_layer': encoder.select_layer,
    'mm_vision_select_feature': 'patch', 'image_aspect_ratio': encoder.aspect,
    'mm_use_im_start_end': False, 'mm_use_im_patch_token': False, 'delay_load': False,
    'bos_token_id': 1, 'eos_token_id': 2, 'pad_token_id': 0, 'use_cache': True,
  }
  if from_release_or_none(values) != config:
    values[_CUSTOM] = {'system': 'llava_hr', 'encoder': to_dict(encoder), 'chat': config.chat}
  return {
    'config.json': values,
    'generation_config.json': {'bos_token_id': 1, 'eos_token_id': 2, 'pad_token_id': 0},
  }


def from_release_or_none(values: Mapping[str, Any]) -> ModelConfig | None:
  """`from_release`, None also where the towers are not known."""
  try:
    return from_release(values)
  except UserError:
    return None


def _name(known: Mapping[str, Any], config) -> str | None:
  """The tower's name in config.json; sizes alone decide, not how it is computed."""
  if config is None:
    return None
  plain = dataclasses.replace(config, **(
    {'lora': ()} if hasattr(config, 'lora') else {'depthwise': 'auto'}))
  return next((name for name, sizes in known.items() if sizes == plain), _CUSTOM)
