"""LLaVA's tensor names and config.json for the baselines whose projector sits in the encoder.

Names: `model.vision_tower.vision_tower.vision_model.*`, `model.mm_projector.*`,
`model.image_newline`, the language model's own. Settings that LLaVA fixes in code stand under
`hrvlm` in config.json, which its code ignores.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

from hrvlm_jax.checkpoint.formats import LLAVA, used
from hrvlm_jax.checkpoint.rows import Row, Table, identity, joined, linear, norm, prefixed
from hrvlm_jax.checkpoint.settings import Keys, Reader, shown
from hrvlm_jax.core.config import from_dict, to_dict
from hrvlm_jax.language import config as language
from hrvlm_jax.language.chat import TEMPLATES
from hrvlm_jax.systems.contract import ModelConfig, ProjectorConfig
from hrvlm_jax.vision import vit
from hrvlm_jax.vision.blocks import block_side, is_projector, stages
from hrvlm_jax.vision.vit import CLIP_L_336, ViTConfig

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
    own += projector_rows(projector_kind(config.projector), PROJECTOR, ours='projector')
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
      'mm_projector_type': encoder.projector or 'mlp2x_gelu', **tower_keys(encoder.vision), **keys,
      'hrvlm': {'system': config.system, 'model': to_dict(config)},
    },
    'preprocessor_config.json': {
      'image_processor_type': 'CLIPImageProcessor', 'do_resize': True, 'resample': 3,
      'size': {'height': size, 'width': size}, 'do_normalize': True,
      'image_mean': list(encoder.mean), 'image_std': list(encoder.std),
    },
  }


def tower_keys(vision: ViTConfig) -> dict[str, Any]:
  """What LLaVA's code needs to build a tower whose sizes it can look up, and to take its weights
  from the folder; no keys for other towers, which that code cannot build."""
  bare = dataclasses.replace(vision, lora=())
  return next(({'mm_vision_tower': f'openai/{name}', 'unfreeze_mm_vision_tower': True}
               for name, known in TOWERS.items() if known == bare), {})


def own_config(values: Mapping[str, Any], system: str) -> ModelConfig | None:
  """The model that `release` wrote down, if it is of that system."""
  ours = values.get('hrvlm')
  if not isinstance(ours, Mapping) or ours.get('system') != system or 'model' not in ours:
    return None
  return from_dict(ModelConfig, ours['model'], path='hrvlm.model', title='config.json')


def written_by_us(values: Mapping[str, Any]) -> bool:
  """Whether config.json names the system itself (then nothing is guessed)."""
  return isinstance(values.get('hrvlm'), Mapping)


def text_config(values: Mapping[str, Any]) -> language.DecoderConfig:
  """The language model of a LLaVA config.json."""
  return language.config_from_hf(values, kind=values.get('text_type', 'llama'), where='config.json')


# Keys of config.json; see `checkpoint.settings`.
KEYS: Keys = {**language.KEYS, **LLAVA, **used('_name_or_path', 'eos_token_id')}
# Towers by the last part of their name: LLaVA's code takes a local path as well.
TOWERS = {'clip-vit-large-patch14-336': CLIP_L_336}
# Words in the name of a LLaVA for which its code takes another template than vicuna_v1.
_OTHER_TEMPLATES = ('llama-2', 'llama2', 'llama-3', 'llama3', 'mistral', 'mpt', '34b', '-v0')
_VICUNA_ROWS = 32064  # 32,000 and some tokens that trainers add


@dataclasses.dataclass(frozen=True)
class Llava:
  """What every config.json of LLaVA says beside its language model.

  Attributes:
    layer: hidden state of the tower that is read.
    kind: type string of the projector.
    aspect: `image_aspect_ratio`, None where it is left out.
  """

  layer: int
  kind: str
  aspect: str | None
  chat: str

  def projector(self, n_in: int, n_out: int) -> ProjectorConfig:
    """The projector as a part of its own."""
    if self.kind == 'linear':
      return ProjectorConfig(n_in=n_in, n_out=n_out, kind='linear')
    depth = int(self.kind.removeprefix('mlp').partition('x')[0])
    return ProjectorConfig(n_in=n_in, n_out=n_out, depth=depth)


def projector_kind(projector: ProjectorConfig) -> str:
  """LLaVA's type string of a projector."""
  return 'linear' if projector.kind == 'linear' else f'mlp{projector.depth}x_gelu'


def projector_keys(config: ModelConfig) -> dict[str, Any]:
  """`mm_projector_type` of a projector that is a part of its own."""
  return {} if config.projector is None else {
    'mm_projector_type': projector_kind(config.projector)}


def llava(read: Reader, *, towers: bool = True) -> Llava:
  """Reads LLaVA's own keys; what is wrong is collected in `read`.

  Args:
    towers: the tower has to be one whose sizes are known; False: `hrvlm` says its sizes.
  """
  if towers:
    name = str(read.values.get('mm_vision_tower') or read.values.get('vision_tower') or '')
    if name.rstrip('/').rpartition('/')[2] not in TOWERS:
      read.bad('mm_vision_tower', 'a tower whose sizes are known: openai/'
               + ', '.join(TOWERS))
  kind = read.word('mm_projector_type', 'linear')
  if kind != 'linear' and not (
      kind.startswith('mlp') and kind.endswith('x_gelu') and kind[3:-6] in map(str, range(1, 9))):
    if not (is_projector(kind) and not towers):
      read.bad('mm_projector_type', 'linear, or mlp2x_gelu with a digit from 1 to 8')
    kind = 'linear'
  layer = read.integer('mm_vision_select_layer', -2, least=-1000, most=-1)
  return Llava(layer, kind, read.word('image_aspect_ratio', None, null=True), _template(read))


def _template(read: Reader) -> str:
  """The chat template: config.json of LLaVA names none, its code goes by the model's name."""
  if 'chat' in read:
    return read.word('chat', 'vicuna_v1', TEMPLATES)
  advice = ("nothing here says which template it was trained with; if it is one of "
            f"{', '.join(TEMPLATES)}, name it under the key 'chat' in config.json")
  name = str(read.values.get('_name_or_path') or '').rstrip('/').rpartition('/')[2].lower()
  ends = read.values.get('eos_token_id')
  if any(word in name for word in _OTHER_TEMPLATES):
    read.problems.append(f'_name_or_path: {name!r} has another chat template in LLaVA than '
                         f'vicuna_v1; {advice}')
  elif ends is not None and 2 not in (ends if isinstance(ends, list) else [ends]):
    read.problems.append(f'eos_token_id: is {shown(ends)}, the template of LLaVA-1.5 (vicuna_v1) '
                         f'ends answers with token 2; {advice}')
  elif read.integer('vocab_size', 32000) > _VICUNA_ROWS:
    read.problems.append(f'vocab_size: is {read.values["vocab_size"]}, no Vicuna (vicuna_v1) has '
                         f'so many; {advice}')
  return 'vicuna_v1'
