"""Language model, vision towers and prompts of a checkpoint beside transformers.

A reference is built from the release's own config.json and gets the release's tensors by the names
that transformers gives them: neither our config nor our weight tables take part. Needs the extra
`torch`, imported where it is used so that this module can always be imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hrvlm_jax.checkpoint.hf import read_json
from hrvlm_jax.checkpoint.leaves import StoredParams
from hrvlm_jax.core.module import Functional
from hrvlm_jax.interop import adapters
from hrvlm_jax.interop.replay import Outputs, PlainTensors, bound, difference
from hrvlm_jax.language.chat import encode_prompt, get_template, question
from hrvlm_jax.language.decoder import Decoder
from hrvlm_jax.language.prompt import Text
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.vision.convnext import ConvNeXt, ConvNeXtConfig
from hrvlm_jax.vision.vit import ViT, ViTConfig

_TOKENS = (2, 64)
_QUESTIONS = ('What is written on the sign?', 'Où est le chat ?\nAnswer in 2 words: "这里".')
# Wrappers around modules whose names transformers knows without them.
_WRAPPERS = ('.base_layer', '.decoder_layer', 'base_model.model.')
_CAUSAL = {'phi': 'PhiForCausalLM', 'llama': 'LlamaForCausalLM', 'qwen2': 'Qwen2ForCausalLM'}
# What a release names without its sizes: heads, activation and epsilon, which no shape tells.
# Width, depth, patch and image size follow from the tensors. Source: config.json of these models.
_CLIP = {'clip': True, 'hidden_act': 'quick_gelu', 'layer_norm_eps': 1e-5}
_SIGLIP = {'clip': False, 'hidden_act': 'gelu_pytorch_tanh', 'layer_norm_eps': 1e-6}
_TOWERS = {
  'openai/clip-vit-large-patch14-336': _CLIP | {'num_attention_heads': 16},
  'apple/DFN5B-CLIP-ViT-H-14': _CLIP | {'num_attention_heads': 16},
  'google/siglip-so400m-patch14-384': _SIGLIP | {'num_attention_heads': 16},
}
_PHI = {'model_type': 'phi', 'num_attention_heads': 32, 'partial_rotary_factor': 0.5}
_DECODERS = {'miguelcarv/phi-1_5-slimorca': _PHI, 'microsoft/phi-1_5': _PHI}
_CONVNEXT_EPS = {'convnext_large': 1e-6, 'convnext_xxlarge': 1e-5}


class NotChecked(Exception):
  """A part that has no reference here; the message says why."""


def settings(folder: pathlib.Path) -> dict[str, Any]:
  """config.json of a release; that of its language model in `llm/` joins as `text_config`."""
  values = read_json(folder / 'config.json')
  if (folder / 'llm' / 'config.json').exists():
    values['text_config'] = read_json(folder / 'llm' / 'config.json')
  return values


def language(config: ModelConfig, values: Mapping[str, Any], stored: StoredParams,
             plain: PlainTensors) -> tuple[str, Outputs]:
  """(class, outputs): logits of the language model on random ids.

  Raises:
    NotChecked: config.json says too little about it.
  """
  import torch
  import transformers

  names = _Names(plain, 'model.embed_tokens.weight')
  kind, sizes = _text_settings(values)
  sizes |= {'vocab_size': len(names['model.embed_tokens.weight'])}  # as many as there are rows
  reference = getattr(transformers, _CAUSAL[kind])
  reference = reference(reference.config_class(**sizes)).eval().float()
  _load(reference, names, spec=values.get('adapter'))
  rows = config.text.vocab_size
  ids = np.random.default_rng(0).integers(0, rows, _TOKENS)
  with torch.no_grad():
    expected = reference(torch.tensor(ids), use_cache=False).logits.numpy()
  module = bound(Functional(lambda rngs: Decoder(config.text, rngs=rngs)), stored, 'language/')
  run = jax.jit(lambda ids: module.logits(module(module.embed(ids), jnp.ones(ids.shape, bool))))
  logits = run(jnp.asarray(ids))
  return f'transformers.{_CAUSAL[kind]}', {
    'logits': difference(logits[..., :rows], expected[..., :rows])}


def _text_settings(values: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
  """(model type, what its config class takes) from config.json."""
  own = values.get('text_config') or values.get('llm_cfg')
  if not isinstance(own, Mapping):
    own = values
  if 'hidden_size' not in own:
    own = _DECODERS.get(values.get('decoder')) or _own_text(values)
  architecture = (own.get('architectures') or [''])[0].lower()
  kinds = (own.get('text_type'), own.get('model_type'),
           *(kind for kind in _CAUSAL if kind in architecture))
  kind = next((kind for kind in kinds if kind in _CAUSAL), None)
  if kind is None:
    raise NotChecked(f'config.json names no language model of {sorted(_CAUSAL)}')
  left = ('model_type', 'architectures', 'text_type', 'hrvlm', 'torch_dtype', 'dtype',
          'quantization_config', '_name_or_path', 'text_config', 'vision_config', 'adapter')
  return kind, {key: value for key, value in own.items() if key not in left}


def _own_text(values: Mapping[str, Any]) -> dict[str, Any]:
  """The language model of a tiny Pheye, which its config.json describes in our own words."""
  c = values.get('hrvlm', {}).get('text')
  if not c:
    raise NotChecked('config.json says nothing about the language model')
  return {
    'model_type': c['family'], 'hidden_size': c['width'], 'num_hidden_layers': c['depth'],
    'num_attention_heads': c['heads'], 'num_key_value_heads': c['kv_heads'],
    'intermediate_size': c['mlp_width'], 'max_position_embeddings': c['max_positions'],
    'rope_theta': c['rope_theta'], 'partial_rotary_factor': c['rotary_dim'] / c['head_dim']}


def tower(path: str, config: ViTConfig, values: Mapping[str, Any], stored: StoredParams,
          plain: PlainTensors) -> tuple[str, Outputs]:
  """(class, outputs) of a CLIP or SigLIP tower on random pixels.

  Raises:
    NotChecked: config.json says too little about it, or transformers has no class for it.
  """
  import torch
  import transformers

  names = _Names(plain, 'embeddings.patch_embedding.weight')
  patches, table = (names[f'embeddings.{name}.weight']
                    for name in ('patch_embedding', 'position_embedding'))
  sizes = _tower_settings(path, values)
  clip = sizes.pop('clip')
  side = patches.shape[-1] * round((len(table) - clip) ** 0.5)
  layers = {int(m[1]) for n in names if (m := re.match(r'encoder\.layers\.(\d+)\.', n))}
  kind = transformers.CLIPVisionModel if clip else transformers.SiglipVisionModel
  reference = kind(kind.config_class(**sizes | {
    'image_size': side, 'patch_size': patches.shape[-1], 'hidden_size': patches.shape[0],
    'num_channels': patches.shape[1], 'num_hidden_layers': len(layers),
    'intermediate_size': len(names['encoder.layers.0.mlp.fc1.weight'])})).eval().float()
  pooled = clip or 'head.probe' in names
  _load(reference, names, optional='\0' if pooled else 'head.')
  pixels = np.random.default_rng(1).standard_normal((1, side, side, patches.shape[1]), np.float32)
  with torch.no_grad():
    out = reference(torch.tensor(pixels.transpose(0, 3, 1, 2)))
  module = bound(Functional(lambda rngs: ViT(config, rngs=rngs)), stored, f'{path}/')
  x = jax.jit(lambda pixels: module(pixels))(jnp.asarray(pixels))
  if clip:
    return f'transformers.{kind.__name__}', {
      'last_hidden_state': difference(x, out.last_hidden_state.numpy())}
  x = module.post_norm(x)
  outputs = {'last_hidden_state': difference(x, out.last_hidden_state.numpy())}
  if pooled and config.pool:
    outputs['pooler_output'] = difference(module.pool(x), out.pooler_output.numpy())
  return f'transformers.{kind.__name__}', outputs


def _tower_settings(path: str, values: Mapping[str, Any]) -> dict[str, Any]:
  """Family, heads, activation and epsilon of a ViT, from config.json."""
  own = values.get('vision_config')
  # A folder for transformers describes layers there, whatever the tower; `model` says which it is.
  if isinstance(own, Mapping) and 'num_attention_heads' in own and 'layout' not in values:
    family = _CLIP if 'clip' in own.get('model_type', 'siglip').replace('siglip', '') else _SIGLIP
    return family | {key: own[key] for key in (
      'num_attention_heads', 'hidden_act', 'layer_norm_eps') if key in own}
  for key in ('mm_vision_tower', 'vision_tower', 'encoder'):
    if (name := values.get(key)) in _TOWERS:
      return dict(_TOWERS[name])
  own = _own_settings(values, ('vision', 'fast'), 'patch_size')
  if own is None:
    raise NotChecked('config.json says too little about it')
  return {'clip': own['class_token'], 'num_attention_heads': own['heads'],
          'layer_norm_eps': own['norm_eps'],
          'hidden_act': own['activation'].replace('gelu_tanh', 'gelu_pytorch_tanh')}


def _own_settings(values: Mapping[str, Any], keys: tuple[str, ...], has: str) -> Any:
  """What a release of a tiny model says of a tower in our own words, at any depth."""
  for key, value in values.items():
    if isinstance(value, Mapping):
      if key in keys and has in value:
        return value
      if (found := _own_settings(value, keys, has)) is not None:
        return found
  return None


def convnext(path: str, config: ConvNeXtConfig, values: Mapping[str, Any], stored: StoredParams,
             plain: PlainTensors) -> tuple[str, Outputs]:
  """(class, outputs) of a ConvNeXt trunk on random pixels, see `tower`."""
  import torch
  import transformers

  names = _Names(plain, 'stages.0.blocks.0.conv_dw.weight')
  eps = next((eps for name, eps in _CONVNEXT_EPS.items()
              if f'{name}_' in f'{values.get("vision_tower_slow")}_'.replace('.', '_')), None)
  if eps is None:
    own = _own_settings(values, ('slow',), 'depths')
    if own is None:
      raise NotChecked('config.json says too little about it')
    eps = own['norm_eps']
  found = [re.match(r'stages\.(\d+)\.blocks\.(\d+)\.conv_dw\.weight', name) for name in names]
  blocks = [(int(m[1]), int(m[2])) for m in found if m]
  depths = [sum(stage == other for other, _ in blocks) for stage in range(1 + max(blocks)[0])]
  stem = names['stem.0.weight']
  reference = transformers.ConvNextModel(transformers.ConvNextConfig(
    num_channels=stem.shape[1], patch_size=stem.shape[-1], depths=depths, hidden_sizes=[
      len(names[f'stages.{i}.blocks.0.conv_dw.weight']) for i in range(len(depths))])).eval()
  for module in reference.modules():
    if hasattr(module, 'eps'):
      module.eps = eps
  scale = 'gamma' if 'stages.0.blocks.0.gamma' in names else 'weight'
  renamed = (
    (r'embeddings\.patch_embeddings', 'stem.0'), (r'embeddings\.layernorm', 'stem.1'),
    (r'encoder\.', ''), (r'downsampling_layer', 'downsample'), (r'\.layers\.', '.blocks.'),
    (r'layer_scale_parameter', scale), (r'dwconv', 'conv_dw'), (r'layernorm', 'norm'),
    (r'pwconv(\d)', r'mlp.fc\1'))

  def rename(name: str) -> str:
    for pattern, new in renamed:
      name = re.sub(pattern, new, name)
    return name

  _load(reference, names, optional='layernorm.', rename=rename)  # the norm of its pooled output
  side = stem.shape[-1] * 2 ** len(depths)
  pixels = np.random.default_rng(2).standard_normal((1, side, side, stem.shape[1]), np.float32)
  with torch.no_grad():
    out = reference(torch.tensor(pixels.transpose(0, 3, 1, 2))).last_hidden_state.numpy()
  module = bound(Functional(lambda rngs: ConvNeXt(config, rngs=rngs)), stored, f'{path}/')
  x = jax.jit(lambda pixels: module(pixels))(jnp.asarray(pixels))
  return 'transformers.ConvNextModel', {
    'last_hidden_state': difference(x, out.transpose(0, 2, 3, 1))}


def prompts(config: ModelConfig, text: Text, folder: pathlib.Path) -> tuple[str, Outputs]:
  """(library, outputs): ids of chat prompts about one image by the release's own tokenizer.

  Args:
    text: of the checkpoint, with the tokenizer saved there.
    folder: where the release's tokenizer lies.

  Raises:
    NotChecked: no tokenizer in the release.
  """
  library, encode = _tokenizer(folder)
  template, image = get_template(text.chat), text.image_id
  images = 0 if image is None else 1
  outputs = {}
  for number, asked in enumerate(_QUESTIONS):
    encoded = encode_prompt([question(template, asked, images)], template, text.tokenizer,
                            image_id=image)
    pieces = [encoded.text] if image is None else encoded.text.split('<image>')
    # What stands between two images was tokenised on its own by the originals.
    expected = [encode(piece, first=not i) for i, piece in enumerate(pieces)]
    found, rest = [], list(encoded.ids)
    while image in rest:
      found.append(rest[:rest.index(image)])
      rest = rest[rest.index(image) + 1:]
    wrong = sum(a != b for a, b in zip([*found, rest], expected, strict=False))
    outputs[f'prompt {number}'] = {
      'difference': float(wrong + abs(len(found) + 1 - len(expected))), 'limit': 0.0,
      'status': 'ok' if [*found, rest] == expected else 'different'}
  return library, outputs


def _tokenizer(folder: pathlib.Path) -> tuple[str, Callable[..., list[int]]]:
  """The library that reads a release's tokenizer, and (text, first=) -> ids."""
  if (folder / 'tokenizer.model').exists():
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / 'tokenizer.model'))
    return 'sentencepiece', lambda piece, first: model.encode(piece, add_bos=first)
  if (folder / 'tokenizer.json').exists():
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_file=str(folder / 'tokenizer.json'))
  elif (folder / 'vocab.json').exists():
    from transformers import AutoTokenizer

    fast = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
  else:
    raise NotChecked('the release holds no tokenizer')
  return 'transformers tokenizer', lambda piece, first: fast.encode(
    piece, add_special_tokens=first)


class _Names(Mapping[str, np.ndarray]):
  """The tensors of one module of a release under the names that its class has, in float32.

  Args:
    anchor: a name of the class; what stands in front of it in the release is the module's prefix.
  """

  def __init__(self, plain: PlainTensors, anchor: str):
    self._plain = plain
    short = {}
    for name in plain:
      new = name
      for wrapper in _WRAPPERS:
        new = new.replace(wrapper, '')
      short[new] = name
    found = [name.removesuffix(anchor) for name in short
             if name.endswith(anchor) and not name.startswith(f'{adapters.FOLDER}/')]
    if len(found) != 1:
      raise NotChecked(f'{len(found)} tensors of the release are named ...{anchor}')
    self._names = {new.removeprefix(found[0]): name for new, name in short.items()
                   if new.startswith(found[0])}

  def __getitem__(self, name: str) -> np.ndarray:
    if name not in self._names:
      raise NotChecked(f'the release has no tensor ...{name}')
    return self._plain[self._names[name]].astype(np.float32)

  def __contains__(self, name: object) -> bool:
    return name in self._names

  def __iter__(self) -> Iterator[str]:
    return iter(self._names)

  def __len__(self) -> int:
    return len(self._names)

  def added(self, module: str, scale: float) -> np.ndarray | float:
    """scale * B @ A of an adapter folder of peft for a module, 0 without one."""
    for name in self._plain:
      if name.startswith(f'{adapters.FOLDER}/') and name.endswith(f'{module}.lora_A.weight'):
        down, up = (self._plain[n].astype(np.float32)
                    for n in (name, name.replace('.lora_A.', '.lora_B.')))
        return scale * (up @ down)
    return 0.0


def _load(reference: Any, names: _Names, *, optional: str = '\0',
          rename: Callable[[str], str] = lambda name: name, spec: Any = None) -> None:
  """Gives every parameter of a class its tensor, whose name has to be there."""
  import torch

  scale = 0.0 if spec is None else spec['lora_alpha'] / spec['r']
  with torch.no_grad():
    for own, parameter in reference.named_parameters():
      # transformers 5 drops one level of names inside its vision models.
      own = own.removeprefix('vision_model.')
      name = rename(own)
      if name not in names:
        if own.startswith(optional):
          continue
        raise NotChecked(f'the release has no tensor {name} of {type(reference).__name__}')
      value = names[name]
      if spec is not None and name.endswith('.weight'):
        value = value + names.added(name.removesuffix('.weight'), scale)
      parameter.copy_(torch.from_numpy(np.array(value)).reshape(parameter.shape))
