"""Folders that transformers opens: config, tensor names, tokenizer, processor, and the model code.

The code is that of `interop/torch`, copied as it is; a model for which transformers has the class
(`interop.native`) comes with the processor's files alone. Tensor names of our model code are our
paths with dots, except where transformers' own classes stand: the language model and the layers of
vision transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import math
import pathlib
import re
from typing import Any

from hrvlm_jax.checkpoint import rows
from hrvlm_jax.checkpoint.formats import GENERIC, VISION, same, used
from hrvlm_jax.checkpoint.rows import Row, Table
from hrvlm_jax.checkpoint.settings import Keys
from hrvlm_jax.core import json_text, paths
from hrvlm_jax.core.config import from_dict, to_dict
from hrvlm_jax.core.errors import UserError, raise_all
from hrvlm_jax.interop import adapters, native
from hrvlm_jax.interop.card import towers
from hrvlm_jax.interop.jinja import chat_template
from hrvlm_jax.interop.sentencepieces import tokenizer_json
from hrvlm_jax.language import config as language
from hrvlm_jax.language.chat import get_template, prompt_end_marker
from hrvlm_jax.language.tokenizer import ROLES, JsonTokenizer, SentencePieceTokenizer, Tokenizer
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.contract import FORMAT, ModelConfig
from hrvlm_jax.vision import vit
from hrvlm_jax.vision.vit import ViTConfig
from hrvlm_jax.vlm import model as vlm
from hrvlm_jax.vlm.answer import text_of

LAYOUT = 'transformers'  # `layout` in config.json
VERSIONS = 'transformers>=5.0,<6'  # of pyproject.toml; scripts/test_matrix.sh runs the oldest
CODE = pathlib.Path(__file__).parent / 'torch'
# First part of the names of a system's classes in `interop/torch`.
CLASSES = {'anyres': 'AnyRes', 'llava_hr': 'LlavaHr', 'mc_llava': 'McLlava',
           'pheye': 'Pheye', 'ps3': 'Ps3', 'reduced': 'Reduced', 's2': 'S2',
           's2_dynamic': 'DynamicS2', 'single_view': 'SingleView', 'tiling': 'Tiling',
           'vila_hd': 'VilaHd'}
FUSIONS = ('cross_attention', 'prefix', 'two_pass')

_ORIGINAL = 'export with --for original'
_STACKS = ('blocks', 'layers')  # their leaves carry a layer axis
_ADAPTED = ('blocks/attn/', 'blocks/mlp/', 'patch_embed/')  # of a vision transformer with LoRA
_PROCESSOR = 'processing_hrvlm'


def check(config: ModelConfig, *, what: str) -> None:
  """Refuses a model for which there is no code in `interop/torch`.

  Raises:
    UserError: what of it has none (all reasons).
  """
  problems = []
  if config.system not in CLASSES:
    problems.append(f'system {config.system}: only {", ".join(sorted(CLASSES))} have model code '
                    f'for transformers; {_ORIGINAL}')
  if config.fusion.kind not in FUSIONS:
    problems.append(f'fusion {config.fusion.kind}: only {", ".join(FUSIONS)}; {_ORIGINAL}')
  if config.fusion.kind == 'two_pass' and config.fusion.selection_weight:
    problems.append('fusion.selection_weight: the loss in PyTorch is that of the text alone; '
                    'set it to 0, or ' + _ORIGINAL)
  inner = config.encoder.inner if config.system == 'reduced' else None
  if inner is not None and (inner not in CLASSES or inner == 'vila_hd'):
    problems.append(f'reduced with inner {inner}: it has no model code here; {_ORIGINAL}')
  if config.system == 'vila_hd' and config.fusion.kind != 'two_pass':
    problems.append(f'vila_hd with fusion {config.fusion.kind}: only two_pass; {_ORIGINAL}')
  if config.text is None and (config.system != 'ps3' or config.encoder.text is None):
    problems.append(f'{config.system} without a language model; {_ORIGINAL}')
  problems += [f'{said}: no code for it here; {_ORIGINAL}' for said in _uncoded(config)]
  problems += [] if config.text is None else text_problems(config.text)
  if any(not spec.name for spec in adapters.lora_sets(config).get('vision/', ())):
    problems.append('LoRA sets of the vision tower: merge them with --merge-lora')
  raise_all(f'{what}: cannot be exported for transformers', problems)


def _uncoded(config: ModelConfig) -> list[str]:
  """Settings of the papers' ablations that the PyTorch code does not have."""
  encoder, found = config.encoder, []
  if getattr(config.fusion, 'inside', False):
    found.append('fusion.inside')
  if config.text is not None and config.text.family == 'gpt2':
    found.append('text.family gpt2')
  if getattr(encoder, 'class_only', False):
    found.append('encoder.class_only')
  if getattr(encoder, 'mode', '') == 'random':
    found.append("encoder.mode 'random'")
  if config.system == 'reduced' and encoder.step.kind == 'single_layer':
    queries, maps = encoder.step.queries, encoder.key_maps
    side = math.isqrt(queries)
    if side * side != queries or len(maps) != 1 or maps[0].rows != maps[0].columns or (
        encoder.inner_grid is None):
      found.append('step single_layer with queries or tokens that form no one square')
  return found


def text_problems(text: language.DecoderConfig) -> list[str]:
  """Settings of the language model that its class of transformers does not have."""
  again = language.config_from_hf(language.config_to_hf(text))
  left = ('lora', 'pad_vocab_to')
  wrong = [f.name for f in dataclasses.fields(text) if f.name not in left
           and getattr(text, f.name) != getattr(again, f.name)]
  return [f'model.text.{name} is {getattr(text, name)!r}, a {text.family} of transformers has '
              f'{getattr(again, name)!r}; {_ORIGINAL}' for name in wrong]


def table(config: ModelConfig) -> Table:
  """Tensor names of the whole model in the model code of `interop/torch`."""
  parts = [] if config.text is None else [
    rows.prefixed(language.table(config.text), ours='language/', theirs='language_model.')]
  found = registry.get(config.system).backbones(config.encoder)
  found = {path: tower for path, tower in found.items() if isinstance(tower, ViTConfig)} or {
    f'{path}/tower': whole.vision for path, whole in found.items() if hasattr(whole, 'vision')}
  towers = {}
  for path, tower in found.items():
    if isinstance(tower, ViTConfig):
      inner = getattr(config.encoder, 'encoder', config.encoder)
      sets = getattr(inner, 'tower', tower)  # Pheye's, with its named sets
      towers[path] = sets if isinstance(sets, ViTConfig) else tower
  return part_table(vlm.build(config).abstract, towers, *parts)


def part_table(abstract: Mapping[str, Any], towers: Mapping[str, ViTConfig], *parts: Table
               ) -> Table:
  """Tensor names of a part of a model.

  Args:
    abstract: its parameters.
    towers: the vision transformers among them by their paths; '' for the part itself.
    parts: rows that are known already.
  """
  found = list(parts)
  for path, tower in towers.items():
    prefix = f'{path}/' if path else ''
    found.append(rows.prefixed(_vit_table(tower), ours=prefix, theirs=prefix.replace('/', '.')))
  named = {path for part in found for row in part.rows for path in row.our_paths}
  rest = Table(tuple(_row(path, leaf.ndim) for path, leaf in paths.flatten(abstract).items()
                     if path not in named and not adapters.is_adapter(path)))
  return rows.joined(*found, rest)


def _vit_table(config: ViTConfig) -> Table:
  """`Tower` of interop/torch/towers.py: layers and pool of transformers' SigLIP, which CLIP's
  equal; the rest by what the tower has."""
  base = vit.siglip_table(config)
  found = [row for row in base.rows if config.patch_bias or row.ours != 'patch_embed/bias']
  if config.class_token:
    found.append(Row('class_token', 'embeddings.class_embedding'))
  if config.pre_norm:
    found += rows.norm('pre_norm', 'pre_layrnorm')
  for row in list(found):
    if not config.lora or not str(row.ours).startswith(_ADAPTED) or row.ours[-7:] != '/kernel':
      continue
    ours, theirs = row.ours.removesuffix('/kernel'), row.names[0].removesuffix('.weight')
    for spec in config.lora:
      down, up = spec.leaves
      found += [Row(f'{ours}/{down}', f'{theirs}.{down}', row.op),
                Row(f'{ours}/{up}', f'{theirs}.{up}', rows.transpose)]
  return dataclasses.replace(base, rows=tuple(found), ignored={})


def _row(path: str, ndim: int) -> Row:
  """A parameter under its own path; layers of a stack are numbered."""
  parts = path.split('/')
  stacked = [i for i, part in enumerate(parts[:-1]) if part in _STACKS
             and not parts[i + 1].isdigit()]
  for i in stacked:
    parts[i] += '.{i}'
  leaf = parts[-1]
  parts[-1] = {'kernel': 'weight', 'scale': 'weight', 'embedding': 'weight'}.get(leaf, leaf)
  op = rows.identity
  if leaf == 'kernel':
    op = rows.transpose if ndim - len(stacked) == 2 else rows.conv_kernel
  return Row(path, '.'.join(parts), op)


def recognise(values: Mapping[str, Any]) -> ModelConfig | None:
  """The model of the config.json of such a folder; None when it is another layout.

  Raises:
    UserError: another version of the format, settings that are no model of ours.
  """
  if values.get('layout') != LAYOUT:
    return None
  if values.get('format') != FORMAT:
    raise UserError(f'config.json: format is {values.get("format")!r}, expected {FORMAT!r}; '
                    'convert with the version that wrote it')
  model = dict(values.get('model') or {})
  rows_ = (values.get('text_config') or {}).get('vocab_size')
  own = (model.get('text') or {}).get('vocab_size')
  if rows_ not in (None, own):  # resized in PyTorch
    model['text'] = model['text'] | {'vocab_size': rows_}
  return from_dict(ModelConfig, model, path='model', title='config.json')


# Keys of config.json; see `checkpoint.settings`.
KEYS: Keys = {
  **GENERIC, 'text_config': language.KEYS, 'vision_config': {**VISION, **native.VISION_KEYS},
  **used('format', 'layout', 'model'), **native.KEYS,
  **same('the model says it', 'token_maps', 'inner_width', 'image_token_id', 'prompt_marker',
         'tie_word_embeddings', 'system'),
}


def contradictions(values: Mapping[str, Any], config: ModelConfig) -> list[str]:
  """Settings that transformers runs and that are not those under `model`: the language model's
  under `text_config`, and all of a class of transformers."""
  if config.text is None:
    return []
  problems = native.contradictions(values, config) if native.is_native(values) else []
  theirs = language.config_from_hf(values.get('text_config', {}), where='config.json',
                                   prefix='text_config.')
  ours = language.config_from_hf(language.config_to_hf(config.text))
  return problems + [f'text_config says {f.name} {getattr(theirs, f.name)!r}, model.text says '
                     f'{getattr(ours, f.name)!r}; change them together'
                     for f in dataclasses.fields(ours)
                     if getattr(theirs, f.name) != getattr(ours, f.name)]


def model_values(config: ModelConfig) -> dict[str, Any]:
  """What config.json says of the model, language model and prompts apart."""
  values = {
    'model_type': f'hrvlm_{config.system}', 'format': FORMAT, 'layout': LAYOUT,
    'vision_config': _vision_config(config), 'model': to_dict(config)}
  if config.system == 'reduced':
    values |= {'token_maps': _token_maps(config), 'inner_width': config.encoder.inner_width}
  return values


def _token_maps(config: ModelConfig) -> list[list[int]] | None:
  grid = config.encoder.inner_grid
  return None if grid is None else [[one.rows, one.columns] for one in grid.maps]


def files(config: ModelConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
  """Everything beside weights, card and manifest: {name: JSON value, text or bytes}.

  Args:
    tokenizer: None where there is no language model.
  """
  name = CLASSES[config.system]
  images = {
    'image_processor_type': 'HrvlmImageProcessor',
    'auto_map': {'AutoImageProcessor': 'processing_hrvlm.HrvlmImageProcessor'},
    'system': config.system, 'encoder': to_dict(config.encoder)}
  values, native_class = model_values(config), native.fits(config, tokenizer)
  if config.system == 'reduced':
    images |= {'token_maps': values['token_maps']}
  code = {f'{part}.py': (CODE / f'{part}.py').read_bytes() for part in (
    _needed(_PROCESSOR) if native_class else
    sorted(path.stem for path in CODE.glob('*.py') if path.stem != '__init__'))}
  if config.text is None:
    kind = f'{name}Model'
    return code | {'preprocessor_config.json': images, 'config.json': values | {
      'architectures': [kind], 'auto_map': {'AutoConfig': f'configuration_hrvlm.{name}Config',
                                            'AutoModel': f'modeling_ps3.{kind}'}}}
  text = text_of(config, tokenizer)
  own = config.image_token is not None and text.image_sentinel is None
  place = None
  if config.fusion.in_prompt:
    place = text.image_id if own else max(tokenizer.vocab_size, config.text.vocab_size)
  if native_class:
    place = native.placeholder(config, tokenizer)
  template = get_template(config.chat)
  marker = None
  if config.fusion.kind == 'two_pass' and template.steers:
    marker = prompt_end_marker(template, tokenizer)[1]
  # transformers 5.0 asks for `pad_token_id`, which its PhiConfig does not have by itself.
  values['text_config'] = language.config_to_hf(config.text) | {'pad_token_id': None}
  if native_class:
    values |= native.values(config) | {'image_token_index': place}
    images |= {'model_class': values['architectures'][0]}
  else:
    kind = f'{name}ForConditionalGeneration'
    values |= {
      'architectures': [kind],
      'auto_map': {'AutoConfig': f'configuration_hrvlm.{name}Config',
                   'AutoModelForImageTextToText': f'modeling_hrvlm.{kind}'},
      'image_token_id': place, 'prompt_marker': marker}
  return code | _tokenizer_files(tokenizer) | {
    'config.json': values,
    'processor_config.json': {
      'processor_class': 'HrvlmProcessor',
      'auto_map': {'AutoProcessor': 'processing_hrvlm.HrvlmProcessor'},
      'image_token_id': place, 'split': not own, 'after_image': config.after_image},
    'preprocessor_config.json': images | {'processor_class': 'HrvlmProcessor'},
    'chat_template.jinja': chat_template(template), 'generation_config.json': _generation(text)}


def _needed(name: str) -> list[str]:
  """The file of a name in `interop/torch` and those that it imports, at any depth."""
  found, left = set(), [name]
  while left:
    part = left.pop()
    found.add(part)
    named = re.findall(r'^ *from \.(\w+) import', (CODE / f'{part}.py').read_text(), re.M)
    left += [other for other in named if other not in found]
  return sorted(found)


def _vision_config(config: ModelConfig) -> dict[str, Any] | None:
  """Of the vision transformer, for transformers' SigLIP layers."""
  found = next((t for t in towers(config.encoder) if isinstance(t, ViTConfig)), None)
  return None if found is None else vit_config(found)


def vit_config(found: ViTConfig) -> dict[str, Any]:
  """A vision transformer, CLIP's too, for transformers' SigLIP layers."""
  return vit.config_to_hf(found) | {'model_type': 'siglip_vision_model'}


def _generation(text: Any) -> dict[str, Any]:
  stops, tokenizer = text.stop_ids(), text.tokenizer
  pad = tokenizer.pad_id if tokenizer.pad_id is not None else stops[0]
  return {'bos_token_id': tokenizer.bos_id, 'do_sample': False, 'pad_token_id': pad,
          'eos_token_id': stops[0] if len(stops) == 1 else list(stops)}


def _tokenizer_files(tokenizer: Tokenizer) -> dict[str, Any]:
  """A tokenizer.json with the same ids, read by transformers as it stands."""
  found: dict[str, Any] = {name: data for name, data in tokenizer.files.items()
                           if not name.startswith(('chat_template', 'special_tokens_map'))}
  if isinstance(tokenizer, JsonTokenizer):
    found['tokenizer.json'] = tokenizer._native.to_str().encode()
  elif isinstance(tokenizer, SentencePieceTokenizer):
    found['tokenizer.json'] = tokenizer_json(tokenizer)
  values = json_text.loads(found.get('tokenizer_config.json') or b'{}')
  kept = {key: values[key] for key in ('model_max_length',) if key in values}
  roles = {f'{role}_token': tokenizer.roles[role] for role in ROLES if role in tokenizer.roles}
  found['tokenizer_config.json'] = {
    'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False,
    **kept, **roles}
  return found


def usage(config: ModelConfig, tokenizer: Tokenizer | None = None) -> list[str]:
  """Lines of the model card: how transformers opens the folder, and what that runs."""
  if config.text is None:
    use = [
      'from transformers import AutoImageProcessor, AutoModel', '',
      'images = AutoImageProcessor.from_pretrained(FOLDER, trust_remote_code=True)',
      'model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True)',
      "out = model(images([picture], return_tensors='pt')['pixel_values'], looks=2)",
      'out.last_hidden_state, out.selection_maps']
  else:
    use = [
      'from transformers import pipeline', '',
      "ask = pipeline('image-text-to-text', model=FOLDER, trust_remote_code=True)",
      "message = {'role': 'user', 'content': [{'type': 'image', 'path': 'photo.jpg'},",
      "                                       {'type': 'text', 'text': 'What is on the sign?'}]}",
      "print(ask(text=[message], max_new_tokens=64)[0]['generated_text'][-1]['content'])"]
  runs = 'they are those of hrvlm_jax'
  if native.fits(config, tokenizer):
    kind = native.CLASSES[native.model_type(config)]
    runs = (f"they are hrvlm_jax's processor of pictures and text. The model is `{kind}` of "
            'transformers, which opens without it')
  return [
    '## Use', '', '```python', *use, '```', '',
    f'Needs PyTorch and `{VERSIONS}`. `trust_remote_code` runs the Python files of this folder, '
    f'and nothing else; {runs}. `manifest.json` holds their sha256.', '']
