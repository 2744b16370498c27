"""Parts of a model from releases of their own: what a new run starts from.

A part is named by its parameter path and gets its weights from the release of a backbone (CLIP,
SigLIP, ConvNeXt, PS3; Phi, LLaMA/Vicuna, Qwen2, GPT-2), from a file that holds this part of the
system's own layout (`mm_projector.bin`), or from an adapter folder of peft. `assemble` writes them
as a checkpoint that `training.init_from` reads; what no part gives starts fresh there, and has to
be named in `training.init_allow`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import json
import os
import pathlib
from typing import Any

import numpy as np

from hrvlm_jax import __version__
from hrvlm_jax.checkpoint import files as store_files, hf, store
from hrvlm_jax.checkpoint.rows import Op, Row, Table, import_tensors, linear, norm, prefixed
from hrvlm_jax.checkpoint.settings import Reader
from hrvlm_jax.core import paths
from hrvlm_jax.core.config import to_dict
from hrvlm_jax.core.errors import UserError, raise_all, shortened, unknown
from hrvlm_jax.interop import adapters, hub
from hrvlm_jax.interop.account import preprocessor
from hrvlm_jax.language import config as language
from hrvlm_jax.language.tokenizer import FILES as TOKENIZER_FILES
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.systems.ps3 import weights as ps3_weights
from hrvlm_jax.systems.ps3.config import PS3Config
from hrvlm_jax.vision import convnext, vit
from hrvlm_jax.vision.convnext import ConvNeXtConfig
from hrvlm_jax.vision.vit import ViTConfig
from hrvlm_jax.vlm import model as vlm

# Modules that trainers put around a model; the first under which all names of a part are found.
WRAPPERS = ('', 'module.', 'model.', 'base_model.model.', 'model.base_model.model.',
            'base_model.model.model.')
LORA = 'lora'
# What shapes do not show, or only where they differ; the vocabulary may have fewer rows.
_TEXT_SETTINGS = ('width', 'depth', 'heads', 'kv_heads', 'head_dim', 'mlp_width', 'activation',
                  'norm_eps', 'rotary_dim', 'rope_theta', 'rope_linear_factor', 'tie_embeddings')
_TOWER_SETTINGS = ('width', 'depth', 'heads', 'mlp_width', 'patch_size', 'activation', 'norm_eps')
OTHER = 'another part of the model'
_IMAGE_TEXT = {'text_model.*': 'text tower', 'visual_projection.weight': 'contrastive head',
               'text_projection.weight': 'contrastive head', 'logit_scale': 'contrastive head',
               'logit_bias': 'contrastive head'}
_VISION_TYPES = {'clip': True, 'clip_vision_model': True, 'siglip': False,
                 'siglip_vision_model': False}


@dataclasses.dataclass(frozen=True)
class Part:
  """One part of a starting point: paths of the model, where they come from, and the table.

  `table` covers exactly the model's parameters below `names`.
  """

  names: tuple[str, ...]
  source: pathlib.Path
  origin: Mapping[str, Any]
  tensors: Mapping[str, np.ndarray]
  table: Table


def assemble(
  config: ModelConfig, parts: Sequence[str], target: str | os.PathLike, *, dtype=None,
  say: Callable[[str], None] = lambda text: None,
) -> list[str]:
  """Writes a checkpoint of the parts, for `training.init_from`.

  Args:
    parts: `PATH=SOURCE` each. PATH is a parameter path (`language`, `vision/tower`, `projector`,
      several joined by `+`) or `lora`; SOURCE a folder, a weight file or a pinned name on the hub.
    target: the checkpoint to be made.
    say: told what each part gives and what is left to start fresh.

  Returns:
    Paths of the parameters that no part gives.

  Raises:
    UserError: unknown parts, sources of another kind, and every damaged, missing, unexpected or
      misshapen tensor, of all parts in one message.
  """
  abstract = vlm.build(config).abstract
  flat = paths.flatten(abstract)
  problems: list[str] = []
  found: dict[str, np.ndarray] = {}
  opened: list[Part] = []
  for text in parts:
    try:
      opened.append(open_part(config, flat, text, say=say))
    except UserError as error:
      problems.append(str(error))
  given = {part.source.resolve() for part in opened}
  for i, part in enumerate(opened):
    beside = part.source / adapters.BESIDE
    if part.names == (LORA,) and beside.is_file() and beside.resolve() not in given:
      problems.append(f'{beside}: holds other parts that were trained with the adapter, which '
                      f'{LORA}= does not read; add --part projector={beside}')
    for other in opened[:i]:
      if both := sorted(_paths(part) & _paths(other)):
        problems.append(f'{both[0]}: given by {"+".join(other.names)} and {"+".join(part.names)}')
  with store_files.scratch_arrays(pathlib.Path(target).absolute().parent) as allocate:
    for part in opened:
      own = paths.unflatten({path: flat[path] for path in _paths(part)})
      try:
        found |= paths.flatten(import_tensors(
          part.tensors, part.table, own, what=f'source {part.source}', dtype=dtype,
          allocate=allocate, finite=True))
      except UserError as error:
        problems.append(str(error))
    raise_all(f'parts of a {config.system}', problems)
    for part in opened:
      say(f'{"+".join(part.names)}: {len(_paths(part))} parameters from {part.source}')
    fresh = [path for path in flat if path not in found]
    files: dict[str, str | bytes] = {}
    for part in opened:
      if part.names == ('language',) and part.source.is_dir():
        files |= {f'tokenizer/{name}': (part.source / name).read_bytes()
                  for name in TOKENIZER_FILES if (part.source / name).exists()}
    files[hub.SOURCE] = json.dumps(
      {'parts': [_facts(part) for part in opened], 'hrvlm_jax': __version__, 'fresh': fresh},
      indent=2) + '\n'
    store.save_params(target, paths.unflatten({p: found[p] for p in flat if p in found}),
                      {'model': to_dict(config)}, extra_files=files)
  return fresh


def _paths(part: Part) -> set[str]:
  return {path for row in part.table.rows for path in row.our_paths}


def _facts(part: Part) -> dict[str, Any]:
  root = part.source if part.source.is_dir() else part.source.parent
  described = store_files.describe(part.tensors.files, root)
  return {'part': '+'.join(part.names), 'origin': dict(part.origin), 'files': described,
          'sha256': store_files.digest(described), 'table': part.table.fingerprint()}


def open_part(config: ModelConfig, flat: Mapping[str, Any], text: str, *,
              say: Callable[[str], None] = lambda text: None) -> Part:
  """One `PATH=SOURCE` of a model whose parameters are `flat`; nothing of the weights is read.

  Raises:
    UserError: not of this form, an unknown path, a source of another kind.
  """
  name, equals, place = text.partition('=')
  if not equals or not name or not place:
    raise UserError(f'part {text!r}: expected PATH=SOURCE, as in language=FOLDER')
  names = tuple(part.strip('/') for part in name.split('+'))
  for part in names:
    if names != (LORA,) and not any(path == part or path.startswith(f'{part}/') for path in flat):
      known = {'/'.join(p.split('/')[:i]) for p in flat for i in (1, 2)}
      raise UserError(f'{text}: {unknown(part, known, what="part")}')
  source, origin = hub.resolve(place)
  if names == (LORA,):
    tensors, table = _lora(config, flat, source)
    return Part(names, source, origin, tensors, table)
  tensors: Mapping[str, np.ndarray] = hf.TensorFolder(source, strict=False)
  values = _settings(source)
  raise_all(text, _contradictions(config, names, source, values))
  makers = {'language': lambda: _language(config, values, tensors)} if (
    config.text is not None) else {}
  backbones = registry.get(config.system).backbones(config.encoder)
  for path, tower in backbones.items():
    makers[path] = lambda path=path, tower=tower: _tower(config, path, tower, values, tensors)
  if config.system == 'ps3' and values.get('model_type') == 'siglip':
    makers['text'] = _siglip_text
  if len(names) == 1 and names[0] in makers and not _own_layout(config, names, tensors):
    table = makers[names[0]]()
  else:
    table = _subset(config, names)
    if names[0] in backbones:
      table = dataclasses.replace(table, ignored={**table.ignored, **_IMAGE_TEXT})
  table = Table(tuple(row for row in table.rows if all(p in flat for p in row.our_paths)),
                table.ignored, table.unused, table.tied)
  tensors = _unwrapped(tensors, table)
  other = Table((), {p: why for p, why in table.ignored.items() if why == OTHER})
  if unused := [name for name in tensors.shapes if other.is_ignored(name)]:
    say(f'{len(unused)} tensors of {source} belong to other parts and are not used: '
        f'{shortened(unused)}')
  if names == ('language',):
    tensors = _grown(tensors, table, flat, say)
  return Part(names, source, origin, tensors, table)


def _settings(source: pathlib.Path) -> dict[str, Any]:
  """config.json beside the weights, and what an open_clip release says instead."""
  folder = source if source.is_dir() else source.parent
  for name in ('config.json', 'open_clip_config.json'):
    if (folder / name).is_file():
      values = hf.read_json(folder / name)
      return values if name == 'config.json' else {
        'open_clip': values.get('model_cfg') or {},
        'open_clip_preprocess': values.get('preprocess_cfg')}
  return {}


def _contradictions(config: ModelConfig, names: tuple[str, ...], source: pathlib.Path,
                    values: Mapping[str, Any]) -> list[str]:
  """Settings of a source that no tensor shows and that are not those of the run's model.

  A backbone is what its settings say as much as its weights: with another rotary base, epsilon,
  activation, number of heads or another image mean it computes something else.
  """
  if len(names) != 1:
    return []
  where = f'{source if source.is_dir() else source.parent}/config.json'
  if names == ('language',) and config.text is not None and (
      values.get('model_type') == config.text.family):
    theirs = language.config_from_hf(values, where=where)
    return [f'{key} of the source is {getattr(theirs, key)!r}, config.model.text.{key} is '
            f'{getattr(config.text, key)!r}; set the latter to the former, or take another source'
            for key in _TEXT_SETTINGS if getattr(theirs, key) != getattr(config.text, key)]
  tower = registry.get(config.system).backbones(config.encoder).get(names[0])
  if isinstance(tower, ConvNeXtConfig):
    given = values.get('pretrained_cfg') or values.get('open_clip_preprocess') or {}
    return _colours(config, given if isinstance(given, Mapping) else {}, ('mean', 'std'),
                    'config.json')
  problems = []
  kind = values.get('model_type')
  if isinstance(tower, ViTConfig) and _VISION_TYPES.get(str(kind)) is tower.class_token:
    inside = 'vision_config' in values
    theirs = vit.config_from_hf(
      Reader(values.get('vision_config', {}) if inside else values, where=where,
             prefix='vision_config.' if inside else ''), clip=tower.class_token)
    # The original of PS3 starts from SigLIP, whose GELU is the tanh form, and computes the exact.
    free = isinstance(config.encoder, PS3Config) and {theirs.activation, tower.activation} == {
      'gelu', 'gelu_tanh'}
    problems = [f'{key} of the source is {getattr(theirs, key)!r}, the model has '
                f'{getattr(tower, key)!r} at {names[0]}; set it to that of the source, or take '
                'another source' for key in _TOWER_SETTINGS
                if getattr(theirs, key) != getattr(tower, key)
                and not (key == 'activation' and free)]
  elif isinstance(tower, PS3Config):
    said = values.get('vision_config', values)
    if isinstance(said, Mapping) and 'model_name' in said:
      theirs = ps3_weights.vision_from_hf(said)
      problems = [f'{key} of the source is {getattr(theirs.vision, key)!r}, the model has '
                  f'{getattr(tower.vision, key)!r} at {names[0]}' for key in _TOWER_SETTINGS
                  if getattr(theirs.vision, key) != getattr(tower.vision, key)]
      problems += [f'{key} of the source is {getattr(theirs, key)!r}, the model has '
                   f'{getattr(tower, key)!r}' for key in ('mean', 'std')
                   if getattr(theirs, key) != getattr(tower, key)]
  path = (source if source.is_dir() else source.parent) / 'preprocessor_config.json'
  if tower is not None and path.is_file():
    problems += _colours(config, hf.read_json(path), ('image_mean', 'image_std'), path.name)
  return problems


def _colours(config: ModelConfig, given: Mapping[str, Any], keys: tuple[str, str], file: str
             ) -> list[str]:
  """Mean and standard deviation of the colours that are not those of the model."""
  named = dict(zip(('image_mean', 'image_std'), (given.get(key) for key in keys), strict=True))
  return [f'{file}: {problem}; set config.model.encoder to it, or take another source'
          for problem in preprocessor(named, config)]


def _language(config: ModelConfig, values: Mapping[str, Any], tensors: Mapping[str, Any]) -> Table:
  kind = values.get('model_type', config.text.family)
  if kind != config.text.family:
    raise UserError(f'language: the model is of the family {config.text.family!r}, the source has '
                    f'model_type {kind!r}')
  table = language.table(config.text)
  if kind == 'gpt2' and 'wte.weight' in tensors:  # OpenAI's own release has the bare model
    bare = lambda name: name.removeprefix('transformer.')
    table = dataclasses.replace(
      table, rows=tuple(dataclasses.replace(row, theirs=bare(row.theirs)) for row in table.rows),
      tied={name: bare(to) for name, to in table.tied.items()})
  return prefixed(table, ours='language/')


def _tower(config: ModelConfig, path: str, tower: Any, values: Mapping[str, Any],
           tensors: Mapping[str, Any]) -> Table:
  ours = f'{path}/'
  if isinstance(tower, PS3Config):
    if values.get('model_type', 'ps3') not in ('ps3', 'ps3_vision_model'):
      raise UserError(f'{path}: expected a PS3 release, the source has model_type '
                      f'{values["model_type"]!r}')
    table = prefixed(ps3_weights.vision_table(tower), ours=ours, theirs='vision_model.')
    return dataclasses.replace(table, ignored=_IMAGE_TEXT)
  if isinstance(tower, ConvNeXtConfig):
    return _convnext(path, tower, values, tensors)
  kind = values.get('model_type')
  if kind is not None and _VISION_TYPES.get(kind) is not tower.class_token:
    wanted = sorted(k for k, token in _VISION_TYPES.items() if token is tower.class_token)
    raise UserError(f'{path}: expected a release of model_type {" or ".join(wanted)}, the source '
                    f'has {kind!r}')
  pool = isinstance(config.encoder, PS3Config)  # its pool stands beside the tower
  build = vit.clip_table if tower.class_token else vit.siglip_table
  table = build(dataclasses.replace(tower, pool='map', lora=()) if pool else tower)
  theirs = '' if 'embeddings.position_embedding.weight' in tensors else 'vision_model.'
  rows = prefixed(Table(table.rows), ours=ours, theirs=theirs).rows
  if pool:
    move = lambda p: p.replace(f'{ours}pool/', f'{path.rpartition("/")[0]}/pool_head/')
    rows = tuple(dataclasses.replace(row, ours=(
      move(row.ours) if isinstance(row.ours, str) else tuple(map(move, row.ours))))
      for row in rows)
  ignored = _IMAGE_TEXT | {f'{theirs}{pattern}': why for pattern, why in table.ignored.items()}
  if not tower.class_token and not tower.pool and not pool:
    ignored |= {f'{theirs}head.*': 'attention pool, which this tower has not'}
  return Table(tuple(rows), ignored)


def _convnext(path: str, tower: ConvNeXtConfig, values: Mapping[str, Any],
              tensors: Mapping[str, Any]) -> Table:
  """timm names its architecture in config.json, open_clip its timm model in its own file."""
  clip = values.get('open_clip', {}).get('vision_cfg', {}).get('timm_model_name')
  name = clip or values.get('architecture') or ''
  if not str(name).startswith('convnext'):
    raise UserError(f"{path}: expected a ConvNeXt of timm (config.json with its 'architecture') or "
                    f'of open_clip (open_clip_config.json), found {name or "neither"!r}')
  table = convnext.table(tower, layout='open_clip' if clip else 'timm')
  heads = [row for row in table.rows if row.our_paths[0].startswith('head/')]
  rows, ignored = table.rows, dict(table.ignored)
  width = tower.head_width or tower.widths[-1]
  if tensors.shapes.get('head.fc.weight') != (tower.classes, width):
    # The classifier is never run: one of another size is left where it is.
    rows = tuple(row for row in rows if row not in heads)
    ignored |= {'head.*': 'classifier of the release'}
  return prefixed(Table(rows, ignored), ours=f'{path}/')


# SigLIP holds its two scalars as vectors of one.
_SCALAR = Op('scalar', lambda x: x.reshape(()), lambda x: np.reshape(x, 1), lambda s: (1,))


def _siglip_text() -> Table:
  """Rows of SigLIP's text tower (Hugging Face) for PS3's, without its prompt head; scale and bias
  of the contrastive logits come with it, as in PS3's pre-training."""
  layer = 'text_model.encoder.layers.{i}'
  names = (('q', 'q_proj'), ('k', 'k_proj'), ('v', 'v_proj'), ('out', 'out_proj'))
  rows = [
    Row('text/embed/embedding', 'text_model.embeddings.token_embedding.weight'),
    Row('text/pos_embed', 'text_model.embeddings.position_embedding.weight'),
    *norm('text/blocks/norm1', f'{layer}.layer_norm1'),
    *norm('text/blocks/norm2', f'{layer}.layer_norm2'),
    *(row for ours, theirs in names
      for row in linear(f'text/blocks/attn/{ours}', f'{layer}.self_attn.{theirs}')),
    *linear('text/blocks/mlp/fc1', f'{layer}.mlp.fc1'),
    *linear('text/blocks/mlp/fc2', f'{layer}.mlp.fc2'),
    *norm('text/norm', 'text_model.final_layer_norm'),
    *linear('text/projection', 'text_model.head'),
    *(Row(name, name, _SCALAR) for name in ('logit_scale', 'logit_bias'))]
  return Table(tuple(rows), {'vision_model.*': 'vision tower', '*.position_ids': 'buffer'})


def _subset(config: ModelConfig, names: tuple[str, ...]) -> Table:
  """Rows of the system's own layout for some parts; names without the folder of a part."""
  system = registry.get(config.system)
  table = system.table(config)
  inside = lambda path: any(path == name or path.startswith(f'{name}/') for name in names)
  local = (lambda name: name.partition('/')[2]) if system.folders else (lambda name: name)
  rows, ignored = [], {local(pattern): why for pattern, why in table.ignored.items()}
  for row in table.rows:
    theirs = tuple(map(local, row.names))
    if all(map(inside, row.our_paths)):
      rows.append(dataclasses.replace(row, theirs=theirs))
    else:
      ignored |= {name.replace('{i}', '*'): OTHER for name in theirs}
  return Table(tuple(rows), ignored)


def _own_layout(config: ModelConfig, names: tuple[str, ...], tensors: Mapping[str, Any]) -> bool:
  """Whether a source names its tensors as this system's whole release does."""
  wanted = {name for row in _subset(config, names).rows for name in row.names
            if '{i}' not in name}
  return bool(wanted) and wanted <= set(tensors)


def _lora(config: ModelConfig, flat: Mapping[str, Any], source: pathlib.Path
          ) -> tuple[Mapping[str, np.ndarray], Table]:
  """An adapter folder of peft for the language model's LoRA set."""
  spec = adapters.read_adapter_config(source)
  sets = [s for s in (config.text.lora if config.text is not None else ()) if not s.name]
  if not sets or (sets[0].rank, sets[0].alpha) != (spec.rank, spec.alpha):
    here = 'none' if not sets else f'rank {sets[0].rank}, alpha {sets[0].alpha:g}'
    raise UserError(f'{source}: a LoRA set of rank {spec.rank}, alpha {spec.alpha:g}; the model '
                    f'has {here}; set config.model.text.lora to it')
  system = registry.get(config.system)
  base = system.table(adapters.without_sets(config))
  table = adapters.adapter_table(base, paths.unflatten(dict(flat)), dotted=bool(system.folders))
  tensors = adapters.open_adapter(source)
  problems = adapters.halves(source, tensors, base, config.text.depth, dotted=bool(system.folders))
  raise_all(str(source), problems)
  present = set(tensors)
  rows = tuple(row for row in table.rows
               if any(name.replace('{i}', str(i)) in present for name in row.names
                      for i in (row.indices or range(10_000))[:1]))
  return tensors, Table(rows)


class _View(Mapping[str, np.ndarray]):
  """A folder's tensors under other names, or with rows added."""

  def __init__(self, base: Any, names: Mapping[str, str]):
    self._base, self._names = base, dict(names)
    self.files, self.problems = base.files, base.problems
    self.shapes = {new: base.shapes[old] for new, old in self._names.items()}
    self.dtypes = {new: base.dtypes[old] for new, old in self._names.items()}
    self.unreadable = base.unreadable
    self.rows: dict[str, int] = {}

  def __getitem__(self, name: str) -> np.ndarray:
    value = np.asarray(self._base[self._names[name]])
    if name not in self.rows:
      return value
    mean = value.astype(np.float32).mean(axis=0, keepdims=True).astype(value.dtype)
    more = np.broadcast_to(mean, (self.rows[name] - len(value), *value.shape[1:]))
    return np.concatenate([value, more])

  def __iter__(self) -> Iterator[str]:
    return iter(self.shapes)

  def __len__(self) -> int:
    return len(self.shapes)


def _unwrapped(tensors: Any, table: Table) -> Any:
  """The tensors without what a trainer wrapped around the model."""
  wanted = [name for row in table.rows if not row.optional for name in row.names
            if '{i}' not in name]
  for wrapper in WRAPPERS:
    if wanted and all(f'{wrapper}{name}' in tensors for name in wanted):
      if not wrapper:
        return tensors
      return _View(tensors, {name.removeprefix(wrapper): name for name in tensors})
  return tensors


def _grown(tensors: Any, table: Table, flat: Mapping[str, Any], say: Callable[[str], None]) -> Any:
  """Vocabulary rows that the source lacks are the mean of its own, as the originals add tokens."""
  grown = {}
  for row in table.rows:
    path = row.our_paths[0]
    if path not in ('language/embed/embedding', 'language/head/kernel', 'language/head/bias'):
      continue
    name, wanted = row.names[0], row.op.shape(tuple(flat[path].shape))
    have = tensors.shapes.get(name)
    if have is not None and have[1:] == wanted[1:] and have[0] < wanted[0]:
      grown[name] = wanted[0]
      say(f"{path}: rows {have[0]} to {wanted[0] - 1} are the mean of the source's rows")
  if not grown:
    return tensors
  view = _View(tensors, {name: name for name in tensors})
  view.rows = grown
  view.shapes |= {name: (rows, *view.shapes[name][1:]) for name, rows in grown.items()}
  return view
