"""Models for which transformers has the class: plain LLaVA and AnyRes as `LlavaForConditional-
Generation` and `LlavaNextForConditionalGeneration`.

Their classes look the placeholder of an image up in the embedding table before a visual token takes
its place, and a released vocabulary has no row for it; a row more would change the loss. So in such
a folder the placeholder is an id whose row exists and that no text can have (`placeholder`). Which
settings the classes have: transformers `models/llava`, `models/llava_next`, `models/clip`,
`models/siglip`. Tensor names are those of the releases on the hub (`llava-hf`), which every version
of transformers reads and writes back.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

from hrvlm_jax.checkpoint.folders import Renamed
from hrvlm_jax.checkpoint.formats import same, used
from hrvlm_jax.checkpoint.rows import Row, Table, joined, linear, prefixed
from hrvlm_jax.checkpoint.settings import Keys, Reader
from hrvlm_jax.core.layers import activation_name
from hrvlm_jax.language import config as language
from hrvlm_jax.language.tokenizer import Tokenizer
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.vision import vit
from hrvlm_jax.vision.vit import ViTConfig
from hrvlm_jax.vlm.answer import text_of

CLASSES = {'llava': 'LlavaForConditionalGeneration',
           'llava_next': 'LlavaNextForConditionalGeneration'}  # by model_type
NUL = '<0x00>'  # the token of the NUL character in vocabularies with a token for every byte

_TYPES = {'single_view': 'llava', 'anyres': 'llava_next'}
_TEXTS = ('llama', 'qwen2')  # the classes' output layer has no bias
_ACTIVATIONS = ('gelu', 'gelu_tanh', 'quick_gelu', 'relu', 'silu')
_PARTS = ('language_model.', 'vision_tower.', 'multi_modal_projector.', 'image_newline')
# What the classes have where config.json leaves a key out.
_DEFAULTS = {'vision_feature_layer': -2, 'vision_feature_select_strategy': 'default',
             'projector_hidden_act': 'gelu', 'multimodal_projector_bias': True,
             'image_grid_pinpoints': [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]}
_DECIDED = (*_DEFAULTS, 'vision_config')
KEYS: Keys = {
  **used(*_DEFAULTS),
  **same('the model says it', 'image_token_index', 'image_seq_length')}
VISION_KEYS: Keys = used('vision_use_head')


def model_type(config: ModelConfig) -> str | None:
  """The `model_type` whose class has all settings of a model; None where none has."""
  kind, text, encoder = _TYPES.get(config.system), config.text, config.encoder
  if kind is None or text is None or config.fusion.kind != 'prefix' or not _is_tower(
      encoder.vision) or text.family not in _TEXTS or text.head_bias:
    return None
  if kind == 'llava':
    own = config.projector
    fits = (own is not None and (own.kind, own.depth, own.n_out) == ('mlp', 2, text.width)
            and own.activation in _ACTIVATIONS and not encoder.class_only
            and encoder.tokens == encoder.vision.grid**2)
  else:
    fits = (config.projector is None and encoder.projector == 'mlp2x_gelu'
            and encoder.merge == 'spatial_unpad' and encoder.width == text.width)
  return kind if fits else None


def _is_tower(c: ViTConfig) -> bool:
  """Whether it is `CLIPVisionModel` or `SiglipVisionModel`."""
  if c.lora or not c.post_norm or c.position != 'resample' or c.table_grid != c.grid or (
      activation_name(c.activation) not in _ACTIVATIONS):
    return False
  if c.class_token:
    return c.pre_norm and not c.patch_bias and c.pool is None
  pool = c.pool is None or (c.pool_width in (None, c.width)
                            and c.pool_mlp_width in (None, c.mlp_width))
  return pool and c.patch_bias and not c.pre_norm


def placeholder(config: ModelConfig, tokenizer: Tokenizer) -> int | None:
  """An id with a row in the embedding table that no text has: that of the vocabulary's own
  `<image>`, a row behind the tokenizer's, or the byte token of NUL; None where there is none."""
  rows, text = config.text.vocab_size, text_of(config, tokenizer)
  if config.image_token is not None and text.image_sentinel is None:
    return text.image_id if text.image_id < rows else None
  if tokenizer.vocab_size < rows:
    return rows - 1
  found = tokenizer.vocabulary.get(NUL)
  if found is None or found >= rows or found in tokenizer.special_tokens.values():
    return None
  written = tokenizer.encode(f'{NUL} a{NUL}', bos=False)  # its name is a text like others
  return found if found not in written else None


def fits(config: ModelConfig, tokenizer: Tokenizer | None) -> bool:
  """Whether a folder with the class of transformers can be written."""
  return model_type(config) is not None and tokenizer is not None and (
    placeholder(config, tokenizer) is not None)


def is_native(values: Mapping[str, Any]) -> bool:
  """Whether a config.json of layout 'transformers' names a class of transformers."""
  return values.get('model_type') in CLASSES


def values(config: ModelConfig) -> dict[str, Any]:
  """What the class reads in config.json, language model and placeholder apart."""
  kind, encoder = model_type(config), config.encoder
  tower = encoder.vision
  vision = vit.config_to_hf(tower)
  if not tower.class_token:
    vision |= {'vision_use_head': tower.pool is not None}
  act = 'gelu' if kind == 'llava_next' else vit.hf_activation(config.projector.activation)
  found = {
    'model_type': kind, 'architectures': [CLASSES[kind]], 'vision_config': vision,
    'vision_feature_layer': encoder.layer, 'image_seq_length': tower.grid**2,
    'vision_feature_select_strategy': 'default' if tower.class_token else 'full',
    'projector_hidden_act': act, 'multimodal_projector_bias': True,
    'tie_word_embeddings': config.text.tie_embeddings}
  if kind == 'llava_next':
    found['image_grid_pinpoints'] = [[high, wide] for wide, high in encoder.pinpoints]
  return found


def contradictions(given: Mapping[str, Any], config: ModelConfig) -> list[str]:
  """Settings that the class reads and that are not those under `model`.

  Raises:
    UserError: a `vision_config` with values that are none.
  """
  kind = model_type(config)
  if kind != given['model_type']:
    return [f'model_type is {given["model_type"]!r}, but the settings under model are those of '
            f'{kind or "no class of transformers"}; export the checkpoint again']
  ours = values(config)
  found = {key: given.get(key, default) for key, default in _DEFAULTS.items() if key in ours}
  problems = [f'{key} is {found[key]!r}, model says {ours[key]!r}; change them together'
              for key in found if _plain(found[key]) != _plain(ours[key])]
  vision = given.get('vision_config') or {}
  tower, clip = config.encoder.vision, config.encoder.vision.class_token
  if vision.get('model_type') != ours['vision_config']['model_type']:
    return [*problems, f'vision_config.model_type is {vision.get("model_type")!r}, model.encoder.'
                       f'vision is a {ours["vision_config"]["model_type"]}; change them together']
  theirs = vit.config_from_hf(Reader(vision, where='config.json', prefix='vision_config.'),
                              clip=clip)
  names = ('image_size', 'patch_size', 'width', 'depth', 'heads', 'mlp_width', 'activation',
           'norm_eps', 'channels')
  problems += [f'vision_config says {name} {getattr(theirs, name)!r}, model.encoder.vision says '
               f'{getattr(tower, name)!r}; change them together' for name in names
               if getattr(theirs, name) != activation_name(getattr(tower, name))]
  if not clip and vision.get('vision_use_head', True) != (tower.pool is not None):
    problems.append(f'vision_config.vision_use_head is {vision.get("vision_use_head", True)}, '
                    f'model.encoder.vision.pool is {tower.pool!r}; change them together')
  return problems


def _plain(value: Any) -> Any:
  return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def table(config: ModelConfig) -> Table:
  """Tensor names of the whole model."""
  tower = config.encoder.vision
  build = vit.clip_table if tower.class_token else vit.siglip_table
  inside = 'vision/' if config.system == 'anyres' else ''
  rows = [row for n in (1, 2)
          for row in linear(f'{inside}projector/fc{n}', f'multi_modal_projector.linear_{n}')]
  if config.system == 'anyres':
    rows.append(Row('vision/newline', 'image_newline'))
  return joined(
    prefixed(language.table(config.text), ours='language/', theirs='language_model.'),
    prefixed(build(tower), ours='vision/tower/', theirs='vision_tower.vision_model.'),
    Table(tuple(rows)))


def canonical(name: str) -> str:
  """A tensor's name in the releases, from whichever name transformers gave it."""
  if name.startswith('model.') and name[6:].startswith(_PARTS):
    name = name[6:]
  if name.startswith('lm_head.'):
    return f'language_model.{name}'
  for part, inner in (('language_model.', 'model.'), ('vision_tower.', 'vision_model.')):
    rest = name.removeprefix(part)
    if name.startswith(part) and not rest.startswith((inner, 'lm_head.')):
      return f'{part}{inner}{rest}'
  return name


def modules(table: Table) -> Table:
  """The same rows by the names of the modules in transformers 5, which adapters of peft use."""
  def module(name: str) -> str:
    if name.startswith('language_model.lm_head.'):
      return name.removeprefix('language_model.')
    return f'model.{name}'.replace('model.language_model.model.', 'model.language_model.', 1)

  return dataclasses.replace(table, rows=tuple(
    dataclasses.replace(row, theirs=tuple(map(module, row.names))) for row in table.rows))


def renamed(tensors: Any) -> Any:
  """The tensors of a folder by the names of `table`; two that are one are a problem of the
  folder."""
  names: dict[str, str] = {}
  problems = []
  for name in tensors.shapes:
    new = canonical(name)
    if new in names:
      problems.append(f'{names[new]} and {name} are two names of one tensor')
    names[new] = name
  if all(new == old for new, old in names.items()):
    return tensors
  found = Renamed(tensors, names)
  found.problems += problems
  return found
