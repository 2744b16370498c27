"""`hrvlm sweep --smoke`: the rows of a paper's table with tiny models on made-up samples.

Everything that decides what a row is stays: system, parts that are there or not, switches, fusion,
family of the language model, groups, objective, what is tested. Sizes become those of the system's
tiny model, a stage two steps, an answer 16 tokens; nothing is computed twice to save memory, no
picture is drawn for a report. It shows that a row runs from its start to its place in the table;
its numbers mean nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import json
import os
import pathlib
from typing import Any

import numpy as np
from PIL import Image

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.lab.needle import NeedleConfig
from hrvlm_jax.lab.needle.regions import write_regions
from hrvlm_jax.lab.sweep import Entry
from hrvlm_jax.lab.tables import Table, Tested
from hrvlm_jax.language.config import DecoderConfig
from hrvlm_jax.parallel.mesh import MeshConfig
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.training.config import RunConfig

STEPS, ROWS, WIDTH = 2, 4, 128  # of a stage, of a batch, of the language model
NEW_TOKENS = 16  # of an answer: a model that has learned nothing ends none
# Fields of an encoder that are sizes, or follow from sizes: the tiny model's are taken.
SIZES = {
  'vision', 'fast', 'slow', 'image_size', 'fast_size', 'width', 'layer', 'select_layer', 'window',
  'num_tokens', 'view_buckets', 'growth', 'max_crops', 'select_layers', 'max_select', 'saliency',
  'pool', 'text', 'pinpoints', 'sizes', 'sub_image_rows', 'queries', 'mean', 'std'}
TOKENS = 40  # selected patches, where a row selects some


def tiny_model(model: ModelConfig) -> ModelConfig:
  """The tiny model of a row: its switches, the sizes of its system's tiny model."""
  encoder = _encoder(model.system, model.encoder)
  system = registry.get(model.system)
  if model.text is None:
    return dataclasses.replace(model, encoder=encoder)
  text = _text(model.text)
  projector = model.projector and dataclasses.replace(
    model.projector, n_in=system.width(encoder), n_out=text.width)
  fusion = model.fusion
  if not fusion.in_prompt:
    fusion = dataclasses.replace(fusion, width=system.width(encoder),
                                 interval=min(fusion.interval, 2), from_layer=0)
  return dataclasses.replace(model, encoder=encoder, text=text, projector=projector, fusion=fusion)


def _text(text: DecoderConfig) -> DecoderConfig:
  share = text.rotary_dim / text.head_dim
  return dataclasses.replace(
    text, vocab_size=264, width=WIDTH, depth=2, heads=4, kv_heads=min(text.kv_heads, 2)
    if text.kv_heads < text.heads else 4, head_dim=32, mlp_width=256,
    rotary_dim=int(32 * share), max_positions=1024, pad_vocab_to=1)


def _encoder(system: str, encoder: Any) -> Any:
  if system == 'ps3':
    return _tower(encoder, registry.get(system).tiny().encoder)
  if system == 'reduced':
    inner = _encoder(encoder.inner, encoder.encoder)
    return dataclasses.replace(encoder, encoder=inner, step=_step(encoder.step))
  return _like(encoder, registry.get(system).tiny().encoder)


def _step(step: Any) -> Any:
  """A step behind an encoder with small numbers."""
  small = {'queries': 17, 'depth': 1, 'heads': 2, 'head_dim': 16, 'width': None, 'keep': 4,
           'dominant': 3, 'contextual': 1}
  names = {field.name for field in dataclasses.fields(step)}
  return dataclasses.replace(step, **{k: v for k, v in small.items() if k in names})


def _like(full: Any, tiny: Any) -> Any:
  """`full` with the sizes of `tiny`; what is absent in `full` stays absent."""
  values = {}
  for field in dataclasses.fields(full):
    mine, small = getattr(full, field.name), getattr(tiny, field.name)
    if field.name == 'tower':
      values['tower'] = _tower(mine, small)
    elif mine is None or field.name not in SIZES:
      values[field.name] = mine
    elif field.name in ('vision', 'fast'):
      values[field.name] = dataclasses.replace(
        small, **{name: getattr(mine, name) for name in (
          'class_token', 'patch_bias', 'pre_norm', 'post_norm', 'pool', 'position', 'activation',
          'lora')})
    elif field.name == 'width':
      values['width'] = WIDTH
    elif field.name in ('sizes', 'pinpoints'):
      values[field.name] = _scaled(mine, full.vision.image_size, tiny.vision.image_size)
    else:
      values[field.name] = small
  if values.get('tokens') and 'looks' in values:
    values['tokens'] = TOKENS
  elif isinstance(values.get('looks'), int) and values['looks'] > 1:
    values['looks'] = 1
  if 'fast' in values and values['slow'] is None:  # a ViT alone sees the whole image
    values['image_size'] = tiny.fast_image_size
  elif 'fast' in values and values['fast'] is not None:
    values['fast_size'] = tiny.fast_size
  return dataclasses.replace(full, **values)


def _tower(full: Any, tiny: Any) -> Any:
  """PS3: as many scales, in the same ratios."""
  values = {name: getattr(tiny, name) for name in ('vision', 'select_layers', 'max_select', 'pool')}
  values['max_select'] = 25  # looks that cover the image come out even
  values['vision'] = dataclasses.replace(
    tiny.vision, post_norm=full.vision.post_norm, activation=full.vision.activation)
  return dataclasses.replace(
    full, **values, budgets=None, saliency=full.saliency and tiny.saliency,
    scales=tuple(tiny.scales[0] * (side // full.scales[0]) for side in full.scales),
    adapter=full.adapter and dataclasses.replace(full.adapter, hidden=64, out=64, depth=1),
    text=full.text and dataclasses.replace(tiny.text, activation=full.text.activation))


def _scaled(sizes: Sequence[Any], full: int, tiny: int) -> tuple:
  """Sides in tiles of `full` pixels -> the same in tiles of `tiny`."""
  return tuple(_scaled(size, full, tiny) if isinstance(size, Sequence) else size // full * tiny
               for size in sizes)


def tiny_run(config: RunConfig, data: pathlib.Path) -> RunConfig:
  """The run of a stage with its tiny model on made-up samples."""
  regions = config.model.text is None
  model = tiny_model(config.model)
  return dataclasses.replace(
    config, model=model, mesh=MeshConfig(),
    data=dataclasses.replace(
      config.data, train=os.fspath(data / ('regions' if regions else 'train.json')), images=None,
      tokenizer='byte', lengths=(256, 512, 1024), max_length=None,
      group=config.data.group and (2, 2), slots=None, workers=0),
    training=dataclasses.replace(
      config.training, steps=STEPS, batch_size=ROWS, accumulate=1, log_every=1, init_from=None,
      mfu=False, remat='none', objective=_objective(config.training.objective)))


def _objective(objective: Any) -> Any:
  if not hasattr(objective, 'regions'):
    return objective
  return dataclasses.replace(objective, annotations=None, regions=dataclasses.replace(
    objective.regions, clean=False))


def made(entries: Sequence[Entry], folder: str | os.PathLike) -> list[Entry]:
  """The same rows, tiny; the samples they train on are written into `folder`/samples.

  Raises:
    UserError: the sweep is no table.
  """
  if any(entry.table is None for entry in entries):
    raise UserError('--smoke belongs to a sweep file with a TABLE (configs/ablations)')
  data = pathlib.Path(folder) / 'samples'
  write_samples(data)
  if any(config.model.text is None for entry in entries
         for _, config in entry.all_stages):
    write_regions(NeedleConfig.square(), data / 'regions', 2 * ROWS, seed=0, progress=False)
  return [dataclasses.replace(
    entry, config=tiny_run(entry.config, data), table=_tested(entry.table),
    stages=[(name, _joined(tiny_run(config, data), name in entry.table.joins))
            for name, config in entry.stages]) for entry in entries]


def _joined(config: RunConfig, joins: bool) -> RunConfig:
  """A stage that takes its language model from a release starts it fresh here."""
  if not joins:
    return config
  training = dataclasses.replace(
    config.training, init_allow=(*config.training.init_allow, 'language/.*'))
  return dataclasses.replace(config, training=training)


def _tested(table: Table) -> Table:
  """Numbers of patches at test, and layers, that tiny models have; short answers."""
  def small(knobs):
    out = {name: dict(options) for name, options in knobs.items()}
    for name, value in (('tokens', 2 * TOKENS), ('budgets', None), ('max_crops', 2),
                        ('num_tokens', 18)):
      if out.get('encoder', {}).get(name) is not None:
        out['encoder'][name] = value
    if 'layer' in out.get('fastv', {}):
      out['fastv']['layer'] = 1
    return out
  return dataclasses.replace(table, max_new_tokens=NEW_TOKENS, examples=0, tested={
    row: Tested(model=t.model, knobs=small(t.knobs)) for row, t in table.tested.items()})


def write_samples(folder: pathlib.Path) -> None:
  """Eight rows in LLaVA's form, with a box each."""
  folder.mkdir(parents=True, exist_ok=True)
  rng, rows = np.random.default_rng(0), []
  for number in range(2 * ROWS):
    size = (int(rng.integers(40, 200)), int(rng.integers(40, 200)))
    name = f'{number}.png'
    Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), np.uint8)).save(folder / name)
    rows.append({'id': str(number), 'image': name, 'box': [4, 4, size[0] // 2, size[1] // 2],
                 'conversations': [{'from': 'human', 'value': '<image>\nWhat is written there?'},
                                   {'from': 'gpt', 'value': f'Sign {number}.'}]})
  (folder / 'train.json').write_text(json.dumps(rows, indent=1))
