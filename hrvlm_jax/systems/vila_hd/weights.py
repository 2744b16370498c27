"""VILA-HD's released layout: folders llm/, vision_tower/, mm_projector/ and config.json.

Tensors are named `folder/name`. Source: `NVlabs/VILA: llava/model/llava_arch.py`
(`save_pretrained`), `llava/model/builder.py`, `llava/train/args.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

from hrvlm_jax.checkpoint.formats import GENERIC, same, used
from hrvlm_jax.checkpoint.rows import Op, Row, Table, joined, linear, norm, prefixed
from hrvlm_jax.checkpoint.settings import Keys, Only, Reader
from hrvlm_jax.core.config import from_dict, to_dict
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.language import config as language
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.systems.fusion import TwoPassFusion
from hrvlm_jax.systems.ps3 import weights as ps3_weights
from hrvlm_jax.systems.vila_hd.config import VilaHDConfig, laid_out
from hrvlm_jax.vision.blocks import block_side, stages

FOLDERS = ('llm', 'vision_tower', 'mm_projector')
MODEL_TYPE = 'llava_topdown_llama'

# [1, 1, d] <-> [d], one per scale.
_scale = Op('scale', lambda x: x[0, 0], lambda x: x[None, None], lambda s: (1, 1, *s))


def projector_table(kind: str, *, positions: bool, prompt_head: str | None) -> Table:
  """Rows of `mm_projector/`, our prefix `vision/` left out."""
  rows: list[Row] = []
  # Places in the original's Sequential: block stacking first, a GELU between linear layers.
  place = int(block_side(kind) > 1)
  for number, (normed, _, _) in enumerate(stages(kind, 1, 1), 1):
    if normed:
      rows += norm(f'projector/norm{number}', f'layers.{place}')
      place += 1
    rows += linear(f'projector/fc{number}', 'layers' if kind == 'linear' else f'layers.{place}')
    place += 2
  if positions:
    rows += [Row('projector/pos_embed', 'high_res_pos_embed', ps3_weights.batched),
             Row('projector/scale_embedding', 'high_res_scale_embed.{i}', _scale)]
  head = 'top_down_prompt_head'
  if prompt_head == 'linear':
    rows += linear('prompt_head/fc1', head)
  elif prompt_head == 'mlp':
    rows += [*linear('prompt_head/fc1', f'{head}.fc1'), *norm('prompt_head/norm', f'{head}.norm'),
             *linear('prompt_head/fc2', f'{head}.fc2')]
  return Table(tuple(rows))


def table(config: ModelConfig) -> Table:
  """Rows of the whole model, folder by folder."""
  encoder: VilaHDConfig = config.encoder
  own = projector_table(encoder.projector, positions=encoder.positions,
                        prompt_head=encoder.prompt_head)
  return joined(
    prefixed(language.table(config.text), ours='language/', theirs='llm/'),
    prefixed(ps3_weights.vision_table(encoder.tower), ours='vision/ps3/',
             theirs='vision_tower/vision_model.'),
    prefixed(own, ours='vision/', theirs='mm_projector/'))


def from_release(values: Mapping[str, Any]) -> ModelConfig | None:
  """config.json of a released folder -> ModelConfig; None when the model type is another one.

  Raises:
    UserError: settings this system does not implement, all of them.
  """
  if values.get('model_type') != MODEL_TYPE:
    return None
  read = Reader(values, where='config.json of VILA-HD')
  for key in ('llm_cfg', 'vision_tower_cfg', 'mm_projector_cfg'):
    if not isinstance(values.get(key), Mapping):
      read.problems.append(f'{key}: expected an object with the settings of its folder, found '
                           f'{type(values.get(key)).__name__}')
  for key, wanted in (('ps3', True), ('mm_vision_select_feature', 'cls_patch'),
                      ('image_aspect_ratio', 'resize'), ('s2', False)):
    if values.get(key, wanted) != wanted:
      read.problems.append(f'{key}: expected {wanted!r}, found {values[key]!r}')
  mode = read.word('look_close_mode', 'after_prompt', ('after_prompt', 'after_image'), null=True)
  head = read.word('top_down_prompt_head_type', 'linear', ('linear', 'mlp'), null=True)
  layer = read.integer('mm_vision_select_layer', -2, least=-1000, most=-1)
  looks = read.integer('num_look_close', 1, most=1000, null=True)
  tokens = read.integer('num_token_look_close', None, null=True)
  weight = read.number('token_selection_loss_weight', 0.0, null=True)
  projector = read.inside('mm_projector_cfg').word('mm_projector_type', 'mlp_downsample')
  flags = {key: read.flag(key) for key in ('high_res_pos_embed', 'ps3_dynamic_aspect_ratio')}
  read.done()
  llm = values['llm_cfg']
  text = laid_out(language.config_from_hf(
    llm, kind=llm.get('model_type', 'qwen2'), where=read.where, prefix='llm_cfg.'))
  ours = values.get('hrvlm') or {}
  if 'encoder' in ours:
    encoder = from_dict(VilaHDConfig, ours['encoder'], path='hrvlm.encoder', title=read.where)
    _agree(values, encoder)
  else:
    tower = ps3_weights.vision_from_hf(values['vision_tower_cfg'])
    encoder = read.build(lambda: VilaHDConfig(
      tower=tower, width=text.width, projector=projector,
      # The head exists only in models that were built to look after the prompt.
      prompt_head=head if mode == 'after_prompt' else None,
      positions=flags['high_res_pos_embed'], select_layer=layer, mode=mode, looks=looks,
      tokens=tokens,
      dynamic_aspect='stored' if flags['ps3_dynamic_aspect_ratio'] else 'off'))
  return ModelConfig(
    system='vila_hd', encoder=encoder, text=text, chat='vila_qwen2', after_image='\n',
    fusion=TwoPassFusion(selection_weight=weight))


# Keys of config.json and, the nested ones, of the folders' own; see `checkpoint.settings`.
_TRAINER = "only how the original's training was run"
KEYS: Keys = {
  **GENERIC, 'llm_cfg': language.KEYS, 'vision_tower_cfg': ps3_weights.VISION_KEYS,
  'mm_projector_cfg': {**GENERIC, **used('mm_projector_type')},
  **used('ps3', 'mm_vision_select_feature', 'image_aspect_ratio', 's2', 'look_close_mode',
         'top_down_prompt_head_type', 'mm_vision_select_layer', 'num_look_close',
         'num_token_look_close', 'high_res_pos_embed', 'ps3_dynamic_aspect_ratio',
         'token_selection_loss_weight'),
  **same('the tensors have their own shapes', 'hidden_size', 'mm_hidden_size'),
  **same(_TRAINER, 'tune_language_model', 'tune_vision_tower', 'tune_mm_projector',
         'tune_vision_tower_parts', 'model_dtype', 'drop_path_rate', 'resume_path', 'num_frames',
         'fps', 'num_video_frames', 'vision_resolution', 'interpolate_mode', 'min_max_range_path',
         'mm_projector_lr', 'unfreeze_mm_vision_tower', 'soft_ce_std', 'time_token_ids', 'lr_scale',
         'num_time_tokens', 'time_token_format', 'gt_selection_maps', 'random_selection',
         'smooth_selection_prob', 'train_smooth_selection_prob', 'ps3_grad_checkpointing',
         'mm_scale_num', 'look_close_train', 'vision_tower_lr', 'ps3_deterministic'),
  **same('of other ways to cut pictures, which image_aspect_ratio resize does not take',
         's2_scales', 's2_max_split_size', 's2_resize_output_to_scale_idx', 'min_tiles',
         'max_tiles', 'video_max_tiles'),
  **same('only in this form of prompt', 'mm_use_im_patch_token', 'image_encoder', 'video_encoder'),
  'mm_use_im_start_end': Only((False,)),
  'chat_template': Only(('qwen2',), 'qwen2 or null'),
}


def _agree(values: Mapping[str, Any], encoder: VilaHDConfig) -> None:
  """Refuses a file whose own keys and `hrvlm` say different things about the weights."""
  said = (values['mm_projector_cfg'].get('mm_projector_type'),
          list(values['vision_tower_cfg'].get('ps3_scales', encoder.tower.scales)))
  held = (encoder.projector, list(encoder.tower.scales))
  if said != held:
    raise UserError(f'config.json of VILA-HD: projector type and scales are {said}, but {held} in '
                    "hrvlm.encoder; remove the key 'hrvlm' to follow the original's keys")


def to_release(config: ModelConfig) -> dict[str, Any]:
  """Files of the released layout: config.json and those of the three folders.

  `hrvlm` in config.json holds our whole encoder config (sizes of a trunk that has no published
  name, and knobs the original passes at run time); the original's code ignores it.
  """
  encoder: VilaHDConfig = config.encoder
  tower = encoder.tower if encoder.budgets is None else dataclasses.replace(
    encoder.tower, budgets=encoder.budgets)
  text = language.config_to_hf(config.text)
  vision = _tower_to_hf(tower)
  projector = {'architectures': ['MultimodalProjector'], 'model_type': 'v2l_projector',
               'mm_projector_type': encoder.projector}
  looks = encoder.looks if encoder.looks != 'all' else encoder.plan().looks
  return {
    'config.json': {
      'architectures': ['LlavaTopDownLlamaModel'], 'model_type': MODEL_TYPE,
      'llm_cfg': text, 'vision_tower_cfg': vision, 'mm_projector_cfg': projector,
      'hidden_size': config.text.width, 'mm_hidden_size': encoder.tower.vision.width,
      'mm_vision_select_layer': encoder.select_layer, 'mm_vision_select_feature': 'cls_patch',
      'image_aspect_ratio': 'resize', 's2': False, 'ps3': True, 'chat_template': 'qwen2',
      'look_close_mode': encoder.mode, 'num_look_close': looks,
      'num_token_look_close': encoder.tokens,
      'top_down_prompt_head_type': encoder.prompt_head or 'linear',
      'high_res_pos_embed': encoder.positions,
      'ps3_dynamic_aspect_ratio': encoder.dynamic_aspect != 'off',
      'token_selection_loss_weight': getattr(config.fusion, 'selection_weight', 0.0),
      'hrvlm': {'encoder': to_dict(encoder)},
    },
    'llm/config.json': text,
    'vision_tower/config.json': {'architectures': ['PS3VisionModel'], **vision},
    'vision_tower/preprocessor_config.json': ps3_weights.processor_to_hf(tower),
    'mm_projector/config.json': projector,
  }


def _tower_to_hf(tower) -> dict[str, Any]:
  try:
    return ps3_weights.vision_to_hf(tower)
  except UserError:  # a trunk without a published name: its sizes stand in `hrvlm`
    return {'model_type': 'ps3_vision_model', 'hidden_size': tower.vision.width,
            'ps3_scales': list(tower.scales), 'max_select_num': tower.max_select,
            'select_based_on_layer': list(tower.select_layers)}
