"""Settings of a comparison, which systems can take part in it, and where the shared tower goes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import dataclasses
import json
from typing import Any, Literal

import numpy as np

from hrvlm_jax.core import paths
from hrvlm_jax.core.config import to_dict
from hrvlm_jax.core.errors import UserError, raise_all
from hrvlm_jax.data.background import PasteOnBackground
from hrvlm_jax.lab import scenes
from hrvlm_jax.lab.claims import Claim
from hrvlm_jax.lab.needle import NeedleConfig
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.systems.ps3.pretrain import PretrainOptions
from hrvlm_jax.systems.vila_hd.config import VilaHDConfig
from hrvlm_jax.training.config import OptimizerConfig
from hrvlm_jax.vision.vit import ViTConfig
from hrvlm_jax.vlm import model as vlm

FIRST = 'first'  # of an encoder: what it learns before the comparison's own task


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
  """Pre-training of the encoder that all systems share (`lab.glyphs`).

  Attributes:
    window: side of the crops in canvas pixels. last_tokens: what the readout sees of a view.
    colour_weight: of the loss that asks every patch for the colour of its sign.
    first, first_steps: a simpler task to learn to read on before the comparison's own, and for how
      many steps; None and 0: there is none.
  """

  vision: ViTConfig
  window: int
  last_tokens: int
  steps: int
  colour_weight: float = 1.0
  first: NeedleConfig | None = None
  first_steps: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageConfig:
  """Pre-training of the language model that all systems share (`lab.symbols`).

  Attributes:
    uncued: share of the steps, the first ones, whose questions have one reading and no cue.
    uncued_ask: kinds of questions of those steps; (): the task's own.
  """

  steps: int
  uncued: float = 0.0
  uncued_ask: tuple[str, ...] = ()
  slots: tuple[int, ...] = (25, 64)
  batch_size: int = 32
  learning_rate: float = 2e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptConfig:
  """Pre-training of a part of one system on scenes (`lab.scenes`).

  Attributes:
    like: use what another system of `adapt` learned instead; its parts must be the same.
    window: learn from crops of so many canvas pixels (`SceneConfig`); None: from whole scenes.
    regions: PS3's own pre-training, by captions of regions (`lab.contrast`), instead of scenes.
  """

  steps: int = 0
  like: str | None = None
  window: int | None = None
  regions: PretrainOptions | None = None
  batch_size: int = 32
  learning_rate: float = 2e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChangesConfig:
  """What the training of one system does otherwise than that of the others.

  Attributes:
    frozen: pattern of paths that keep their start, beside what was pre-trained of the encoder
      ('language/.*': the language model too).
    learns: pattern of pre-trained paths of the encoder that learn on.
    zeros: pattern of paths that start at zero and learn: a path that is added to another starts
      silent.
    times: its training takes so many times the steps of the others.
    draw, background: as in `DataConfig`.
  """

  frozen: str = ''
  learns: str = ''
  zeros: str = ''
  times: int = 1
  draw: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
  background: PasteOnBackground | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig:
  """One comparison.

  Attributes:
    task: the built-in task (needle, relate or page: docs/tasks.md), with one question per image;
      training images have `turns` of them.
    systems: models by the name they have in the table. All have the same language model and a
      tower of the shared encoder's sizes.
    train_steps, batch_size, optimizer: the same for every system; what was pre-trained (the tower,
      the parts of `adapt`) stays frozen. A batch holds `batch_size` images with all their
      questions; two-pass systems, which look where the FIRST question of a row points, read the
      same questions as rows of their own, with the box of each sign for the selection's loss.
    described: of composed tasks, training conversations, those of the language model too, end with
      a turn that tells all there is (`needle.description`). Two-pass systems, which see a part, are
      told the cue alone (`cue_description`).
    language: pre-training of the language model; None: every system draws its own.
    encoders: by name, further encoders: systems whose tower has the settings of one start from
      that one. None may have those of `encoder`.
    adapt: by name, systems a part of which is first pre-trained on scenes.
    changes: by name, what the training of a system does otherwise.
    claims: by name, what papers say about some of the systems (`lab.claims`).
    seeds: of a study (`lab.study`): every claim's systems are trained on its task with each of
      these; (): one comparison, with `seed`.
    everywhere: of a study: systems that are trained on every task, with the first seed.
    rates: learning rate of systems that have another than the optimizer's (`lab.rates`).
    dtype, remat, accumulate: as in `TrainingConfig`, the same for every system.
    lengths: buckets of text plus visual tokens.
    answer_batch: questions answered at once in evaluation.
    latency_answers: answers, one at a time, whose median time is reported.
  """

  task: NeedleConfig
  encoder: EncoderConfig
  systems: dict[str, ModelConfig]
  optimizer: OptimizerConfig
  language: LanguageConfig | None = None
  encoders: dict[str, EncoderConfig] = dataclasses.field(default_factory=dict)
  adapt: dict[str, AdaptConfig] = dataclasses.field(default_factory=dict)
  changes: dict[str, ChangesConfig] = dataclasses.field(default_factory=dict)
  claims: dict[str, Claim] = dataclasses.field(default_factory=dict)
  seeds: tuple[int, ...] = ()
  everywhere: tuple[str, ...] = ()
  rates: dict[str, float] = dataclasses.field(default_factory=dict)
  train_images: int
  eval_images: int
  train_steps: int
  batch_size: int
  dtype: Literal['float32', 'bfloat16'] = 'float32'
  remat: Literal['none', 'attention', 'dots', 'layers'] = 'none'
  accumulate: int = 1
  turns: int = 3
  described: bool = False
  lengths: tuple[int, ...] = (128, 256, 512)
  answer_batch: int = 25
  latency_answers: int = 20
  max_new_tokens: int = 4
  seed: int = 0

  def __post_init__(self):
    raise_all('these systems cannot be compared', problems(self))


def problems(config: CompareConfig) -> list[str]:
  """Why systems of a comparison cannot take part in it, one sentence each."""
  found = []
  if not config.systems:
    return ['systems: none is named']
  if config.described and config.task.task == 'needle':
    found.append('described: the task needle has no descriptions; set it to False')
  texts = {json.dumps(to_dict(m.text), sort_keys=True) if m.text else None
           for m in config.systems.values()}
  if len(texts) > 1:
    found.append('the language models of ' + ', '.join(config.systems) + ' are not equal; a '
                 'comparison needs the same one in all systems')
  found += [f'{key}: no system is called {name}' for key in ('adapt', 'changes')
            for name in getattr(config, key) if name not in config.systems]
  found += [f'changes.{name}.times: found {change.times}, expected 1 or more'
            for name, change in config.changes.items() if change.times < 1]
  if config.language is not None and config.language.uncued_ask:
    try:
      dataclasses.replace(config.task, ask=config.language.uncued_ask, turns=config.turns)
    except UserError as error:
      found.append(f'language.uncued_ask: {error}')
  visions = [plain(encoder.vision) for encoder in (config.encoder, *config.encoders.values())]
  found += [f'encoders.{name}: its tower is that of an encoder before it'
            for place, name in enumerate(config.encoders, 1) if visions[place] in visions[:place]]
  found += [f'encoder {name}'.rstrip() + ': first and first_steps are given together, found '
            f'{e.first and e.first.task} and {e.first_steps}'
            for name, e in {'': config.encoder, **config.encoders}.items()
            if (e.first is None) != (e.first_steps == 0)]
  found += [f'encoders: {name} ends in "{FIRST}", as the steps on a simpler task do'
            for name in config.encoders if name.split()[-1:] == [FIRST]]
  found += [f'adapt.{name}: like {a.like}, which learns nothing of its own'
            for name, a in config.adapt.items()
            if a.like is not None and getattr(config.adapt.get(a.like), 'like', '') is not None]
  found += [f'claims.{name}: no system is called {wanted}' for name, claim in config.claims.items()
            for wanted in sorted(systems_of(claim)) if wanted not in config.systems]
  found += [f'{key}: no system is called {name}' for key in ('everywhere', 'rates')
            for name in getattr(config, key) if name not in config.systems]
  for name, model in config.systems.items():
    found += [f'{name}: {reason}' for reason in _unfit(config, name, model)]
    if name in config.adapt:
      try:
        scenes.part(model.encoder)
      except UserError as error:
        found.append(f'adapt.{name}: {error}')
      if config.adapt[name].regions is not None and not isinstance(model.encoder, VilaHDConfig):
        found.append(f'adapt.{name}: regions are for PS3 in VILA-HD, found {model.system}')
  return found


def systems_of(claim: Claim) -> set[str]:
  """Names of the systems whose answers a claim needs."""
  return {point.system for point in claim.points} | ({claim.minus} - {None})


def towers(encoder: Any, path: str = '') -> Iterator[tuple[str, ViTConfig]]:
  """(path, config) of every ViT in an encoder's settings."""
  for field in dataclasses.fields(encoder):
    value, place = getattr(encoder, field.name), f'{path}{field.name}'
    if isinstance(value, ViTConfig):
      yield place, value
    elif dataclasses.is_dataclass(value):
      yield from towers(value, f'{place}.')


def plain(vision: ViTConfig) -> ViTConfig:
  """Without what a tower may have beside its blocks: LoRA sets, a pool."""
  return dataclasses.replace(vision, lora=(), pool=None, pool_width=None, pool_mlp_width=None)


def encoder_of(config: CompareConfig, model: ModelConfig) -> str | None:
  """Which pre-trained encoder a system starts from: '' is `encoder`, else a name of `encoders`.

  None: none of its towers is one of them.
  """
  own = [plain(vision) for _, vision in towers(model.encoder)]
  return next((name for name, encoder in (('', config.encoder), *config.encoders.items())
               if plain(encoder.vision) in own), None)


def tower_path(model: ModelConfig, shared: Mapping[str, Any]) -> str:
  """Where in a model the shared tower belongs: 'vision/tower/', 'vision/fast/', ...

  Args:
    shared: flat parameters of the tower; all that the model has too must have equal shapes.

  Raises:
    UserError: nowhere.
  """
  flat = paths.flatten(vlm.build(model).abstract)
  places = sorted(path.removesuffix('pos_embed') for path in flat if path.endswith('/pos_embed'))
  for place in places:
    same = {path: flat.get(place + path) for path in shared}
    wrong = [path for path, leaf in same.items()
             if leaf is not None and tuple(leaf.shape) != tuple(np.shape(shared[path]))]
    if not wrong and same.get('blocks/attn/q/kernel', same.get('pos_embed')) is not None:
      return place
  raise UserError(f'{model.system}: none of its towers ({", ".join(places) or "it has none"}) has '
                  'the shapes of the shared encoder')


def _unfit(config: CompareConfig, name: str, model: ModelConfig) -> list[str]:
  if model.text is None:
    return ['an encoder without a language model cannot answer']
  system, found = registry.get(model.system), []
  wanted = config.encoder.vision
  visions = [vision for _, vision in towers(model.encoder)]
  # What has no ViT at all may learn from scenes instead.
  from_scenes = not visions and name in config.adapt
  if not from_scenes and encoder_of(config, model) is None:
    have = ', '.join(f'{v.image_size} pixels, width {v.width}, depth {v.depth}' for v in visions)
    found.append(f'its tower ({have or "no ViT"}) is not the shared encoder ({wanted.image_size} '
                 f'pixels, width {wanted.width}, depth {wanted.depth}); it could not start from it')
  try:
    tokens = system.count(config.task.width, config.task.height, model.encoder).tokens
  except UserError as error:
    return [*found, str(error)]
  taken = model.fusion.positions(tokens)
  room = min(max(config.lengths), model.text.max_positions)
  if taken >= room:
    found.append(f'{taken} visual tokens of a {config.task.width}x{config.task.height} image '
                 f'leave no room for text in {room} positions; add a bucket, raise max_positions '
                 'or lower its tokens')
  return found
