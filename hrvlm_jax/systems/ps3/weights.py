"""PS3's released layout: tensor names and config.json, both directions.

A released folder holds one `model.safetensors` (`vision_model.*`, `text_model.*`, `logit_scale`,
`logit_bias`); the training code calls the same tensors `visual.*`, `text.*` and keeps
`prompt_proj.*` at the top. Source: `NVlabs/PS3: train/src/open_clip/save_ps3_hf_ckpt.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

from hrvlm_jax.checkpoint.formats import GENERIC, same, used
from hrvlm_jax.checkpoint.rows import (
  Op,
  Row,
  Table,
  conv1x1,
  conv_kernel,
  joined,
  linear,
  norm,
  prefixed,
  split_rows,
  transpose,
)
from hrvlm_jax.checkpoint.settings import USED, Keys, Reader, shown
from hrvlm_jax.core.config import from_dict, to_dict
from hrvlm_jax.core.errors import UserError, raise_all, unknown
from hrvlm_jax.language import config as language
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.systems.ps3.config import (
  CLIP_MEAN,
  CLIP_STD,
  MLP_RATIO,
  TRUNKS,
  AdapterConfig,
  PoolConfig,
  PS3Config,
  SaliencyConfig,
  TextConfig,
)
from hrvlm_jax.vision.vit import ViTConfig

# A leading axis of one in PyTorch: [1, n, d] <-> [n, d].
batched = Op('batched', lambda x: x[0], lambda x: x[None], lambda s: (1, *s))

def vision_table(config: PS3Config) -> Table:
  """Rows of `PS3VisionModel` (release prefix `vision_model.`), our prefix `vision/` left out."""
  block, pool = 'trunk.blocks.{i}', 'trunk.attn_pool'
  rows = [
    Row('tower/patch_embed/kernel', 'trunk.patch_embed.proj.weight', conv_kernel),
    Row('tower/patch_embed/bias', 'trunk.patch_embed.proj.bias'),
    Row('tower/pos_embed', 'trunk.pos_embed', batched),
    *norm('tower/blocks/norm1', f'{block}.norm1'), *norm('tower/blocks/norm2', f'{block}.norm2'),
    *_fused('tower/blocks/attn', 'qkv', f'{block}.attn.qkv'),
    *linear('tower/blocks/attn/out', f'{block}.attn.proj'),
    *linear('tower/blocks/mlp/fc1', f'{block}.mlp.fc1'),
    *linear('tower/blocks/mlp/fc2', f'{block}.mlp.fc2'),
    Row('pool_head/probe', f'{pool}.latent'),
    *linear('pool_head/attn/q', f'{pool}.q'),
    *_fused('pool_head/attn', 'kv', f'{pool}.kv'),
    *linear('pool_head/attn/out', f'{pool}.proj'),
    *norm('pool_head/norm', f'{pool}.norm'),
    *linear('pool_head/mlp/fc1', f'{pool}.mlp.fc1'),
    *linear('pool_head/mlp/fc2', f'{pool}.mlp.fc2'),
    Row('selection/prior_prompt', 'prior_prompt'),
    *_head('selection/proj', 'selection_feature_proj'),
  ]
  if config.vision.post_norm:
    rows += norm('tower/post_norm', 'trunk.norm')
  if config.residual:
    rows += [Row(f'residual/{i}', f'pos_emb_residual.{i}', batched)
             for i in range(config.high_scales)]
  if config.adapter is not None:
    adapter = 'trunk.siglip_proj'
    rows += [
      *linear('adapter/fc1', f'{adapter}.fc1'),
      *norm('adapter/blocks/norm', f'{adapter}.blocks.{{i}}.0'),
      *linear('adapter/blocks/linear', f'{adapter}.blocks.{{i}}.2'),
      *norm('adapter/out/norm', f'{adapter}.final.0'),
      *linear('adapter/out/linear', f'{adapter}.final.2'),
    ]
  if config.saliency is not None:
    net = 'highres_selection_feature_module'
    inner, ours = f'{net}.blocks.{{i}}', 'selection/saliency'
    rows += [
      Row(f'{ours}/stem/kernel', f'{net}.stem.0.weight', conv_kernel),
      Row(f'{ours}/stem/bias', f'{net}.stem.0.bias'),
      *norm(f'{ours}/norm', f'{net}.stem.1'),
      # Not "gamma": the Hugging Face loader would rename it.
      Row(f'{ours}/blocks/weight', f'{inner}.weight'),
      Row(f'{ours}/blocks/depthwise/kernel', f'{inner}.conv_dw.weight', conv_kernel),
      Row(f'{ours}/blocks/depthwise/bias', f'{inner}.conv_dw.bias'),
      *norm(f'{ours}/blocks/norm', f'{inner}.norm'),
      *linear(f'{ours}/blocks/mlp/fc1', f'{inner}.mlp.fc1'),
      *linear(f'{ours}/blocks/mlp/fc2', f'{inner}.mlp.fc2'),
      Row(f'{ours}/out/kernel', f'{net}.out_proj.weight', conv1x1),
      Row(f'{ours}/out/bias', f'{net}.out_proj.bias'),
      *linear('selection/prompt_proj', 'prompt_proj_for_highres'),
    ]
  return Table(tuple(rows))


def text_table(*, theirs: str = 'text_model.', prompt: str = 'text_model.prompt_proj') -> Table:
  """Rows of the text tower; the prompt head has a place of its own in the training layout."""
  block = 'transformer.resblocks.{i}'
  tower = Table((
    Row('embed/embedding', 'token_embedding.weight'),
    Row('pos_embed', 'positional_embedding'),
    *norm('blocks/norm1', f'{block}.ln_1'), *norm('blocks/norm2', f'{block}.ln_2'),
    Row(tuple(f'blocks/attn/{n}/kernel' for n in 'qkv'), f'{block}.attn.in_proj_weight',
        split_rows(3, transpose)),
    Row(tuple(f'blocks/attn/{n}/bias' for n in 'qkv'), f'{block}.attn.in_proj_bias',
        split_rows(3)),
    *linear('blocks/attn/out', f'{block}.attn.out_proj'),
    *linear('blocks/mlp/fc1', f'{block}.mlp.c_fc'),
    *linear('blocks/mlp/fc2', f'{block}.mlp.c_proj'),
    *norm('norm', 'ln_final'), *linear('projection', 'text_projection'),
  ))
  return joined(prefixed(tower, theirs=theirs), Table(tuple(_head('prompt_head', prompt))))


def model_table(config: PS3Config, *, layout: str = 'release') -> Table:
  """Rows of the image-text model.

  Args:
    layout: 'release' (Hugging Face folder) or 'training' (checkpoints of the training code).
  """
  if layout not in ('release', 'training'):
    raise ValueError(f"layout must be 'release' or 'training', got {layout!r}")
  release = layout == 'release'
  vision, text, prompt = (
    ('vision_model.', 'text_model.', 'text_model.prompt_proj') if release else
    ('visual.', 'text.', 'prompt_proj'))
  # The converter writes the two scalars, but the released module has no such parameters.
  scalars = tuple(Row(name, name, optional=release) for name in ('logit_scale', 'logit_bias'))
  return joined(
    prefixed(vision_table(config), ours='vision/', theirs=vision),
    prefixed(text_table(theirs=text, prompt=prompt), ours='text/'), Table(scalars))


def table(config: ModelConfig) -> Table:
  """Rows of a whole model: the image-text model, or a vision tower with a language model."""
  encoder: PS3Config = config.encoder
  if config.text is None:
    return model_table(encoder) if encoder.text is not None else prefixed(
      vision_table(encoder), ours='vision/', theirs='vision_model.')
  parts = [prefixed(vision_table(encoder), ours='vision/', theirs='vision_model.')]
  if config.projector is not None:
    depth = 1 if config.projector.kind == 'linear' else config.projector.depth
    parts.append(Table(tuple(
      row for i in range(depth)
      for row in linear(f'projector/fc{i + 1}', f'mm_projector.{2 * i}'))))
  parts.append(prefixed(language.table(config.text), ours='language/',
                        theirs='language_model.'))
  return joined(*parts)


def _head(ours: str, theirs: str) -> list[Row]:
  return [*linear(f'{ours}/fc1', f'{theirs}.fc1'), *norm(f'{ours}/norm', f'{theirs}.norm'),
          *linear(f'{ours}/fc2', f'{theirs}.fc2')]


def _fused(ours: str, names: str, theirs: str) -> list[Row]:
  """A fused projection whose rows are [q; k; v] (or [k; v]), each head-major."""
  return [
    Row(tuple(f'{ours}/{n}/kernel' for n in names), f'{theirs}.weight',
        split_rows(len(names), transpose)),
    Row(tuple(f'{ours}/{n}/bias' for n in names), f'{theirs}.bias', split_rows(len(names))),
  ]


# Keys of `vision_config` with the original's defaults (its class, not the published files).
_VISION_DEFAULTS: dict[str, Any] = dict(
  ps3_scales=[378, 756, 1512], select_based_on_layer=[0, 9, 18, 26], max_select_num=1280,
  max_select_num_each_scale=None, separate_pos_emb=True, highres_selection_feature=True,
  highres_selection_module_hidden_dim=512, highres_selection_module_out_dim=512,
  highres_selection_module_depth=3, highres_selection_module_kernel_size=28,
  radio=False, radio_adapter_mlp_version=None, radio_adapter_mlp_input_dim=None,
  radio_adapter_mlp_hidden_dim=None, radio_adapter_mlp_output_dim=None,
  radio_adapter_mlp_num_inner=None, img_size=None, class_token=None, final_norm=False)
# Keys without meaning for this encoder, or with one meaning only.
_VISION_IGNORED = {
  'model_name', 'hidden_size', 'pool', 'drop_path', 'patch_drop', 'pretrained', 'dynamic_img_size',
  'drop', 'patch_size', 'image_size', 'min_select_num', 'ps3', 'proj', 'model_type',
  'timm_model_name', 'timm_model_pretrained', 'timm_pool', 'timm_proj', 'transformers_version',
  'torch_dtype', 'dtype', 'architectures',
}


_VISION_TYPES: dict[str, type] = {key: type(value) for key, value in _VISION_DEFAULTS.items()
                                  if value is not None} | dict(
  max_select_num_each_scale=list, radio_adapter_mlp_hidden_dim=int,
  radio_adapter_mlp_output_dim=int, radio_adapter_mlp_num_inner=int, img_size=int)
VISION_KEYS: Keys = {**GENERIC, **dict.fromkeys(_VISION_DEFAULTS, USED), **used('model_name'),
                     **same('without meaning for this encoder, or with one only',
                            *sorted(_VISION_IGNORED - {'model_name'}))}


def vision_from_hf(
  values: Mapping[str, Any], *, trunk: ViTConfig | None = None, pool: PoolConfig | None = None,
  text: TextConfig | None = None,
) -> PS3Config:
  """`vision_config` of a released folder -> our config.

  Args:
    trunk: sizes of a trunk that has no published name.
    pool: sizes of its attention pool; default: the trunk's, or SigLIP's for C-RADIO.

  Raises:
    UserError: unknown keys, an unknown trunk, an unknown adapter.
  """
  if not isinstance(values, Mapping):
    raise UserError(f'vision_config: found {shown(values)}, expected a mapping of settings')
  known = set(_VISION_DEFAULTS) | _VISION_IGNORED
  problems = [unknown(k, known) for k in values if k not in known and not k.startswith('_')]
  problems += _mistyped(values, _VISION_TYPES, _VISION_DEFAULTS)
  if trunk is None:
    name = values.get('model_name')
    if not isinstance(name, str) or name not in TRUNKS:
      problems.append(unknown(str(name), TRUNKS, what='trunk (model_name)'))
    trunk = TRUNKS.get(str(name))
  get = lambda key: values[key] if key in values else _VISION_DEFAULTS[key]
  radio = bool(get('radio'))
  if radio and get('radio_adapter_mlp_version') != 'v2':
    problems.append(f"radio_adapter_mlp_version: expected 'v2', got "
                    f'{get("radio_adapter_mlp_version")!r}')
  if get('class_token'):
    problems.append('class_token: a trunk with a class token is not supported')
  if radio and get('final_norm'):
    problems.append('final_norm: expected false with radio, got true')
  raise_all('vision_config', problems)
  adapter = None
  if radio:
    adapter = AdapterConfig(hidden=get('radio_adapter_mlp_hidden_dim'),
                            out=get('radio_adapter_mlp_output_dim'),
                            depth=get('radio_adapter_mlp_num_inner'))
  if pool is None:
    pool = PoolConfig() if radio else PoolConfig(width=trunk.width, heads=trunk.heads,
                                                 mlp_width=trunk.mlp_width)
  scales = tuple(get('ps3_scales'))
  grid = trunk.position_grid
  if radio:
    grid = (get('img_size') or trunk.table_grid * trunk.patch_size) // trunk.patch_size
  trunk = dataclasses.replace(
    trunk, image_size=scales[0] if radio else get('img_size') or trunk.image_size,
    position='crop' if radio else 'resample', position_grid=grid, post_norm=not radio)
  budgets = get('max_select_num_each_scale')
  saliency = None
  if get('highres_selection_feature'):
    saliency = SaliencyConfig(
      width=get('highres_selection_module_hidden_dim'),
      out=get('highres_selection_module_out_dim'), depth=get('highres_selection_module_depth'),
      kernel=get('highres_selection_module_kernel_size'))
  mean, std = (CLIP_MEAN, CLIP_STD) if radio else ((0.5,) * 3, (0.5,) * 3)
  return Reader(values, where='vision_config').build(lambda: PS3Config(
    vision=trunk, scales=scales, select_layers=tuple(get('select_based_on_layer')),
    max_select=get('max_select_num'), budgets=None if budgets is None else tuple(budgets),
    residual=bool(get('separate_pos_emb')), saliency=saliency, adapter=adapter, pool=pool,
    mean=mean, std=std, text=text))


def _mistyped(values: Mapping[str, Any], types: Mapping[str, type], defaults: Mapping[str, Any]
              ) -> list[str]:
  """Values of another kind than the key has; null where the default is null."""
  problems = []
  for key, kind in types.items():
    value = values.get(key, defaults.get(key))
    if value is None and defaults.get(key) is None:
      continue
    fits = isinstance(value, kind) and not (kind is int and (isinstance(value, bool) or not (
      0 < value < 1 << 24)))
    if kind is list:
      fits = isinstance(value, (list, tuple)) and bool(value) and all(
        isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 1 << 24 for v in value)
    if not fits:
      expected = {list: 'whole numbers', int: 'a whole number above 0', bool: 'true or false'}
      problems.append(f'{key}: found {shown(value)}, expected {expected[kind]}')
  return problems


def vision_to_hf(config: PS3Config) -> dict[str, Any]:
  """The inverse of `vision_from_hf` for published trunks; others have no `model_name` that the
  original could build."""
  vision = config.vision
  size = lambda v: (v.patch_size, v.width, v.depth, v.heads, v.mlp_width, v.activation)
  names = [name for name, trunk in TRUNKS.items() if size(trunk) == size(vision)]
  # SigLIP and SigLIP2 share a trunk and differ in its name.
  second = config.text is not None and config.text.activation == 'gelu_tanh'
  named = next((n for n in names if n.endswith('378') == second), names[0] if names else None)
  out = dict(
    model_type='ps3_vision_model', model_name=named, hidden_size=vision.width, pool='map',
    ps3_scales=list(config.scales), select_based_on_layer=list(config.select_layers),
    max_select_num=config.max_select,
    max_select_num_each_scale=None if config.budgets is None else list(config.budgets),
    separate_pos_emb=config.residual, highres_selection_feature=config.saliency is not None)
  if config.saliency is not None:
    out |= dict(highres_selection_module_hidden_dim=config.saliency.width,
                highres_selection_module_out_dim=config.saliency.out,
                highres_selection_module_depth=config.saliency.depth,
                highres_selection_module_kernel_size=config.saliency.kernel)
  if config.adapter is None:
    return out | dict(img_size=vision.grid * vision.patch_size)
  return out | dict(
    img_size=vision.table_grid * vision.patch_size, class_token=False, final_norm=False,
    radio=True, radio_adapter_mlp_version='v2', radio_adapter_mlp_input_dim=vision.width,
    radio_adapter_mlp_hidden_dim=config.adapter.hidden,
    radio_adapter_mlp_output_dim=config.adapter.out,
    radio_adapter_mlp_num_inner=config.adapter.depth)


_TEXT_KEYS = {'context_length', 'vocab_size', 'width', 'heads', 'layers', 'mlp_ratio', 'output_dim',
              'prompt_proj_dim', 'norm_kwargs', 'act_kwargs', 'no_causal_mask', 'proj_bias',
              'pool_type'}
_TEXT_IGNORED = {'model_type', 'hf_tokenizer_name', 'tokenizer_kwargs', 'transformers_version',
                 'torch_dtype', 'dtype', 'architectures'}
_TEXT_SIZES = ('context_length', 'vocab_size', 'width', 'heads', 'layers', 'output_dim',
               'prompt_proj_dim')
KEYS: Keys = {
  **GENERIC, 'vision_config': VISION_KEYS,
  'text_config': {**GENERIC, **dict.fromkeys(sorted(_TEXT_KEYS), USED),
                  **same("the text tower's tokenizer is asked for by --prompt alone",
                         'hf_tokenizer_name', 'tokenizer_kwargs')},
  **same('the tensor itself is read', 'logit_scale_init', 'logit_bias_init', 'init_logit_scale',
         'init_logit_bias', 'init_logit_scale_value'),
}


def text_from_hf(values: Mapping[str, Any]) -> TextConfig:
  """`text_config` of a released folder (open_clip's names) -> our config.

  Raises:
    UserError: unknown keys, a causal mask, another pooling, a projection without bias.
  """
  if not isinstance(values, Mapping):
    raise UserError(f'text_config: found {shown(values)}, expected a mapping of settings')
  known = _TEXT_KEYS | _TEXT_IGNORED
  problems = [unknown(k, known) for k in values if k not in known and not k.startswith('_')]
  for key, wanted in (('no_causal_mask', True), ('proj_bias', True), ('pool_type', 'last')):
    if values.get(key, wanted) != wanted:
      problems.append(f'{key}: expected {wanted!r}, got {values[key]!r}')
  read = Reader(values, where='text_config', problems=problems)
  for key in _TEXT_SIZES:
    read.integer(key, None)
  read.number('mlp_ratio', 1.0, above=True)
  for key in ('act_kwargs', 'norm_kwargs'):
    if not isinstance(values.get(key) or {}, Mapping):
      read.bad(key, 'a mapping')
  read.done()
  acts = values.get('act_kwargs') or {}
  if acts.get('approximate', 'none') not in ('none', 'tanh') or set(acts) - {'approximate'}:
    problems.append(f"act_kwargs: expected {{'approximate': 'tanh'}} or nothing, got {dict(acts)}")
  norms = values.get('norm_kwargs') or {}
  if set(norms) - {'eps'}:
    problems.append(f'norm_kwargs: expected eps only, got {dict(norms)}')
  raise_all('text_config', problems)
  base = TextConfig()
  width = values.get('width', base.width)
  out = values.get('output_dim', base.out)
  tanh = acts.get('approximate') == 'tanh'
  return read.build(lambda: TextConfig(
    vocab_size=values.get('vocab_size', base.vocab_size),
    context=values.get('context_length', base.context), width=width,
    depth=values.get('layers', base.depth), heads=values.get('heads', base.heads),
    mlp_width=int(width * values.get('mlp_ratio', MLP_RATIO)), out=out,
    prompt_width=values.get('prompt_proj_dim', out),
    activation='gelu_tanh' if tanh else 'gelu', norm_eps=norms.get('eps', 1e-5),
    pad=0 if values.get('vocab_size') == 256000 else base.pad))


def text_to_hf(config: TextConfig) -> dict[str, Any]:
  """The inverse of `text_from_hf`; the MLP width travels as a ratio."""
  ratio = MLP_RATIO
  if int(config.width * ratio) != config.mlp_width:
    ratio = (config.mlp_width + 0.5) / config.width
  out = dict(
    model_type='ps3_text_model', output_dim=config.out, prompt_proj_dim=config.prompt_width,
    context_length=config.context, vocab_size=config.vocab_size, width=config.width,
    heads=config.heads, layers=config.depth, mlp_ratio=ratio, no_causal_mask=True, proj_bias=True,
    pool_type='last', norm_kwargs={'eps': config.norm_eps})
  if config.activation == 'gelu_tanh':
    out['act_kwargs'] = {'approximate': 'tanh'}
  return out


def from_release(values: Mapping[str, Any]) -> ModelConfig | None:
  """config.json of a released folder -> ModelConfig; None when the model type is another one."""
  if values.get('model_type') != 'ps3':
    return None
  if 'hrvlm' in values:  # written by `to_release`: every setting, also those the original lacks
    encoder = from_dict(PS3Config, values['hrvlm'], title='config.json: hrvlm')
  else:
    text = values.get('text_config')
    encoder = vision_from_hf(values.get('vision_config') or {},
                             text=None if text is None else text_from_hf(text))
  return ModelConfig(system='ps3', encoder=encoder, text=None, image_token=None)


def processor_to_hf(config: PS3Config) -> dict[str, Any]:
  """preprocessor_config.json. The original's class reads `mean` and `std` (without them it takes
  CLIP's), other readers `image_mean` and `image_std`."""
  side, mean, std = config.scales[-1], list(config.mean), list(config.std)
  return {
    'image_processor_type': 'PS3ImageProcessor', 'image_size': [side, side], 'mean': mean,
    'std': std, 'image_mean': mean, 'image_std': std, 'interpolation': 'bicubic',
    'resize_mode': 'squash'}


def to_release(config: ModelConfig) -> dict[str, Any]:
  """Files of the released layout: config.json and preprocessor_config.json.

  Raises:
    UserError: a model with a language model, which the original layout cannot hold.
  """
  if config.text is not None:
    raise UserError('PS3 as released is an encoder alone; this model has a language model '
                    '(export VILA-HD models with their own system)')
  encoder: PS3Config = config.encoder
  files = {
    'config.json': {
      'model_type': 'ps3', 'architectures': ['PS3Model'], 'vision_config': vision_to_hf(encoder)},
    'preprocessor_config.json': processor_to_hf(encoder),
  }
  if encoder.text is not None:
    files['config.json']['text_config'] = text_to_hf(encoder.text)
  files['config.json']['hrvlm'] = to_dict(encoder)
  return files
