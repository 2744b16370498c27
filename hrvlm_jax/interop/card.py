"""What goes beside the weights of an exported folder: licences, model card, processor files."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

from hrvlm_jax import __version__
from hrvlm_jax.checkpoint.rows import Table
from hrvlm_jax.language.config import RELEASED as LANGUAGE
from hrvlm_jax.language.tokenizer import Tokenizer
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.vision.convnext import CONVNEXT_L, CONVNEXT_XXL, ConvNeXtConfig
from hrvlm_jax.vision.vit import CLIP_H_224, CLIP_L_336, SIGLIP_SO400M_384, ViTConfig
from hrvlm_jax.vlm.answer import text_of


@dataclasses.dataclass(frozen=True)
class Base:
  """A published model that weights of these sizes start from: part, hub name, licence."""

  part: str
  name: str
  licence: str


# Licences as the model cards state them; the card tells the reader to look again.
_LANGUAGE = {
  'phi_1_5': Base('language model', 'microsoft/phi-1_5', 'mit'),
  'phi_2': Base('language model', 'microsoft/phi-2', 'mit'),
  'vicuna_7b': Base('language model', 'lmsys/vicuna-7b-v1.5', 'llama2'),
  'vicuna_13b': Base('language model', 'lmsys/vicuna-13b-v1.5', 'llama2'),
  'qwen2_1_5b': Base('language model', 'Qwen/Qwen2-1.5B', 'apache-2.0'),
  'qwen2_7b': Base('language model', 'Qwen/Qwen2-7B', 'apache-2.0'),
}
_VISION = (
  (SIGLIP_SO400M_384,
   Base('vision tower', 'google/siglip-so400m-patch14-384', 'apache-2.0')),
  (CLIP_L_336, Base('vision tower', 'openai/clip-vit-large-patch14-336', 'mit')),
  (CLIP_H_224, Base('vision tower', 'apple/DFN5B-CLIP-ViT-H-14', 'apple-amlr')),
  (CONVNEXT_L,
   Base('vision tower', 'timm/convnext_large_mlp.clip_laion2b_soup_ft_in12k_in1k_320',
        'apache-2.0')),
  (CONVNEXT_XXL,
   Base('vision tower', 'timm/convnext_xxlarge.clip_laion2b_soup_ft_in1k', 'apache-2.0')),
)
# Releases whose own weights are under terms of their own.
_RELEASE = {
  'ps3': Base('vision encoder', 'nvidia/PS3-4K-SigLIP', 'cc-by-nc-sa-4.0'),
  'vila_hd': Base('whole model', 'nvidia/VILA-HD-8B-PS3-4K-SigLIP', 'cc-by-nc-sa-4.0'),
}


def towers(encoder: Any) -> list[Any]:
  """The ViT and ConvNeXt configs inside an encoder's config, at any depth."""
  if isinstance(encoder, (ViTConfig, ConvNeXtConfig)):
    return [encoder]
  if not dataclasses.is_dataclass(encoder):
    return []
  return [tower for field in dataclasses.fields(encoder)
          for tower in towers(getattr(encoder, field.name))]


def bases(config: ModelConfig) -> list[Base]:
  """The published models whose sizes this one has: their licences apply if it started there."""
  found = []
  if config in registry.get(config.system).released.values() and config.system in _RELEASE:
    found.append(_RELEASE[config.system])
  if config.text is not None:
    size = lambda c: (c.family, c.width, c.depth, c.heads, c.kv_heads, c.mlp_width)
    found += [base for name, base in _LANGUAGE.items()
              if name in LANGUAGE and size(LANGUAGE[name]) == size(config.text)]
  for tower in towers(config.encoder):
    size = _vit_size if isinstance(tower, ViTConfig) else (lambda c: (c.depths, c.widths))
    found += [base for known, base in _VISION
              if type(known) is type(tower) and size(known) == size(tower)]
  return list(dict.fromkeys(found))


def _vit_size(c: ViTConfig) -> tuple:
  return (c.width, c.depth, c.heads, c.mlp_width, c.patch_size, c.class_token)


def model_card(config: ModelConfig, table: Table, *, origin: Mapping[str, Any] | None = None,
               fresh: list[str] | None = None, usage: list[str] | None = None) -> str:
  """README.md of an exported folder.

  Args:
    origin: what the checkpoint was converted from (see `vlm.convert.convert`).
    fresh: parameters that were drawn at random because their source lacked them.
    usage: lines of a folder that transformers opens (see `interop.folder`).
  """
  found = bases(config)
  licences = sorted({base.licence for base in found})
  lines = ['---', f'library_name: {"transformers" if usage else "hrvlm_jax"}']
  lines += [f'license: {licences[0]}'] if len(licences) == 1 else ['license: other']
  if found:
    lines += ['base_model:', *(f'- {base.name}' for base in found)]
  task = 'image-feature-extraction' if config.text is None else 'image-text-to-text'
  lines += [f'pipeline_tag: {task}', '---', '', f'# {config.system}', '']
  text = 'no language model' if config.text is None else (
    f'a `{config.text.family}` language model of {config.text.depth} layers and width '
    f'{config.text.width}')
  whose = "the house's own layout" if table.by_path else "the original's own layout"
  whose = 'a layout that transformers opens' if usage else whose
  lines += [f'System `{config.system}` with {text}, written by hrvlm_jax {__version__} in {whose}.',
            '']
  if origin:
    at = f' at revision `{origin["revision"]}`' if origin.get('revision') else ''
    lines += [f'The weights were converted from `{origin["name"]}`{at}.', '']
  use = "model.encode('photo.png')" if config.text is None else (
    "print(model.ask('photo.png', 'What is this?'))")
  lines += usage or ['## Use', '', '```python', 'import hrvlm_jax', '',
                     "model = hrvlm_jax.load('this folder, or owner/name on the hub')", use, '```',
                     '']
  lines += ['## Licences', '']
  if found:
    lines += ['The sizes are those of the models below. If the weights started from them, these '
              'licences apply (as their model cards stated them; look there again before use), '
              'beside that of the data this model was trained on:', '',
              '| part | base | licence |', '| --- | --- | --- |',
              *(f'| {b.part} | [{b.name}](https://huggingface.co/{b.name}) | {b.licence} |'
                for b in found), '']
  else:
    lines += ['The sizes are those of no published model. The licences of whatever language model '
              'and vision tower the weights started from apply.', '']
  if table.unused:
    lines += ['## Parameters kept for completeness', '',
              *(f'- `{pattern}`: {reason}' for pattern, reason in table.unused.items()), '']
  if fresh:
    lines += ['## Parameters without a source', '', 'Drawn at random when the checkpoint was made:',
              '', *(f'- `{path}`' for path in fresh), '']
  return '\n'.join(lines)


def processor_files(config: ModelConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
  """generation_config.json and both processor files, for layouts that do not bring their own."""
  encoder, files = config.encoder, {}
  if config.text is not None and tokenizer is not None:
    stops = text_of(config, tokenizer).stop_ids()
    files['generation_config.json'] = {
      'bos_token_id': tokenizer.bos_id, 'do_sample': False,
      'eos_token_id': stops[0] if len(stops) == 1 else list(stops),
      'pad_token_id': tokenizer.pad_id if tokenizer.pad_id is not None else stops[0]}
  sizes = towers(encoder)
  side = next((t.image_size for t in sizes if isinstance(t, ViTConfig)), None)
  side = getattr(encoder, 'image_size', side)
  files['preprocessor_config.json'] = {
    'image_processor_type': 'CLIPImageProcessor', 'do_resize': True, 'resample': 3,
    'size': {'height': side, 'width': side}, 'do_center_crop': False, 'do_rescale': True,
    'rescale_factor': 1 / 255, 'do_normalize': True, 'image_mean': list(_constant(config, 'mean')),
    'image_std': list(_constant(config, 'std'))}
  patch = next((t.patch_size for t in sizes if isinstance(t, ViTConfig)), None)
  files['processor_config.json'] = {
    'processor_class': 'LlavaProcessor', 'image_token': config.image_token, 'patch_size': patch,
    'hrvlm': {'system': config.system, 'chat': config.chat, 'after_image': config.after_image}}
  return files


def _constant(config: ModelConfig, name: str) -> tuple[float, ...]:
  """`encoder.mean` or `encoder.std`, also of an encoder inside the encoder."""
  places = [config.encoder]
  while places:
    place = places.pop(0)
    if hasattr(place, name):
      return getattr(place, name)
    places += [getattr(place, f.name) for f in dataclasses.fields(place)
               if dataclasses.is_dataclass(getattr(place, f.name))]
  raise ValueError(f'{config.system}: its encoder has no {name}')
