"""Any system, then fewer tokens: pooling, resamplers, ToMe, VisionZip as a step behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from hrvlm_jax.checkpoint.rows import Row, Table, identity, joined, linear, norm
from hrvlm_jax.core import bounds
from hrvlm_jax.core.config import to_dict
from hrvlm_jax.core.execution import HERE, Execution
from hrvlm_jax.core.module import Module, Rngs, layer_at
from hrvlm_jax.core.resample import normalise
from hrvlm_jax.language import config as language
from hrvlm_jax.parallel.rules import WHOLE_VECTORS, Rule
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.baselines import layout, pruning, resamplers
from hrvlm_jax.systems.contract import Count, ModelConfig, ProjectorConfig, System, VisualTokens
from hrvlm_jax.systems.grid import Grid, TokenMap
from hrvlm_jax.systems.packing import Views


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pool:
  """Mean of factor x factor neighbours, in each map of the image's tokens."""

  kind: str = 'pool'
  factor: int = 2

  BOUNDS: ClassVar = {'factor': bounds.SIZE}

  def __post_init__(self):
    bounds.check(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perceiver:
  """Flamingo's resampler (Pheye, appendix B.2: 6 layers, 257 queries)."""

  kind: str = 'perceiver'
  queries: int = 257
  depth: int = 6
  heads: int = 8
  head_dim: int = 64
  mlp_ratio: int = 4
  activation: str = 'gelu'

  BOUNDS: ClassVar = {
    **dict.fromkeys(('queries', 'depth', 'heads', 'head_dim', 'mlp_ratio'), bounds.SIZE)}

  def __post_init__(self):
    bounds.check(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SingleLayer:
  """Qwen-VL's and Monkey's resampler: one cross-attention from learned queries."""

  kind: str = 'single_layer'
  queries: int = 256
  width: int | None = None
  heads: int | None = None

  BOUNDS: ClassVar = dict.fromkeys(('queries', 'width', 'heads'), bounds.SIZE)

  def __post_init__(self):
    bounds.check(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToMe:
  """Rounds of token merging on the finished tokens until `keep` are left (PS3's comparison)."""

  kind: str = 'tome'
  keep: int

  BOUNDS: ClassVar = {'keep': bounds.SIZE}

  def __post_init__(self):
    bounds.check(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionZip:
  """The most attended tokens and a few that gather the rest."""

  kind: str = 'visionzip'
  dominant: int
  contextual: int

  BOUNDS: ClassVar = {'dominant': bounds.SIZE, 'contextual': bounds.COUNT}

  def __post_init__(self):
    bounds.check(self)


Step = Pool | Perceiver | SingleLayer | ToMe | VisionZip


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReducedConfig:
  """A system and a step that follows its encoder.

  Attributes:
    inner: name of the system. encoder: its configuration.
    step: what makes the tokens of an image fewer. All but the Perceiver need a number of tokens
      that is the same for every image; what cannot work is refused.
  """

  inner: str
  encoder: Any
  step: Step

  @classmethod
  def field_types(cls, values: Mapping[str, Any]) -> dict[str, type]:
    """The inner encoder's dataclass follows from its name."""
    name = values.get('inner')
    return {'encoder': registry.get(name).config} if isinstance(name, str) else {}

  def __post_init__(self):
    problems = []
    if self.inner == 'reduced':
      problems.append('a reduced system cannot be reduced again')
    tokens = self.inner_tokens
    if tokens is None and self.step.kind != 'perceiver':
      problems.append(f'step {self.step.kind} needs the same number of tokens for every image, the '
                      f'number of {self.inner} depends on the image; use the perceiver')
    problems += self._step_problems(tokens)
    if problems:
      raise ValueError('ReducedConfig: ' + '; '.join(problems))

  def _step_problems(self, tokens: int | None) -> list[str]:
    step, problems = self.step, []
    grid = self.inner_grid
    if isinstance(step, Pool) and tokens is not None and grid is None or (
        isinstance(step, SingleLayer) and tokens is not None and self.key_maps is None):
      problems.append(f'step {step.kind} needs to know how the tokens lie on the image; the '
                      f'{tokens} of {self.inner} with these settings form no map')
    if isinstance(step, SingleLayer):
      width = step.width or self.inner_width
      if width % 4:
        problems.append(f'single_layer: the width must be a multiple of 4, got {width}')
      elif width % (step.heads or max(width // 128, 1)):
        problems.append(f'single_layer: width {width} is not divisible by its heads')
    if isinstance(step, ToMe) and tokens is not None and not 1 <= step.keep <= tokens:
      problems.append(f'tome: keep must lie in 1..{tokens}, got {step.keep}')
    if isinstance(step, VisionZip):
      if self.inner != 'single_view' or self.encoder.last_tokens is not None:
        problems.append('visionzip needs the attention of one tower over one whole view: use it on '
                        'single_view without last_tokens')
      elif tokens is not None:
        total = tokens + int(self.encoder.vision.class_token)
        if not 1 <= step.dominant <= total - step.contextual:
          problems.append(f'visionzip: dominant + contextual must lie in 1..{total}, got '
                          f'{step.dominant} + {step.contextual}')
    return problems

  @property
  def system(self) -> Any:
    """The inner system."""
    return registry.get(self.inner)

  @property
  def inner_tokens(self) -> int | None:
    """Tokens of an image before the step; None where they depend on the image."""
    return self.system.tokens(self.encoder)

  @property
  def inner_grid(self) -> Grid | None:
    """The maps of the tokens before the step, where they hold all of them."""
    grid = self.system.grid(self.encoder)
    return grid if grid is not None and grid.covers(self.inner_tokens) else None

  @property
  def key_maps(self) -> tuple[TokenMap, ...] | None:
    """Where the tokens before the step lie, those in no map (class tokens) aside; None: unknown."""
    grid = self.system.grid(self.encoder)
    known = grid is not None and all(one.box is not None for one in grid.maps)
    return grid.maps if known else None

  @property
  def grid(self) -> Grid | None:
    """The maps of the tokens that leave; merged, selected or resampled ones form none."""
    grid = self.inner_grid
    if not isinstance(self.step, Pool) or grid is None:
      return None
    maps, start = [], 0
    for one in grid.maps:
      rows, columns = (-(-n // self.step.factor) for n in (one.rows, one.columns))
      maps.append(dataclasses.replace(one, rows=rows, columns=columns, start=start))
      start = maps[-1].tokens.stop
    return dataclasses.replace(grid, maps=tuple(maps))

  @property
  def inner_width(self) -> int:
    """Width of the tokens before the step."""
    return self.system.width(self.encoder)

  @property
  def width(self) -> int:
    """Width of the tokens that leave."""
    if isinstance(self.step, SingleLayer) and self.step.width is not None:
      return self.step.width
    return self.inner_width

  @property
  def tokens(self) -> int:
    """Visual tokens of an image, whatever its size."""
    step = self.step
    if isinstance(step, Pool):
      return self.grid.maps[-1].tokens.stop
    if isinstance(step, (Perceiver, SingleLayer)):
      return step.queries
    return step.keep if isinstance(step, ToMe) else step.dominant + step.contextual


def tiny(*, vocab_size: int = 264, step: Step = Perceiver(queries=9, depth=2, heads=4, head_dim=24)
         ) -> ModelConfig:
  """The tiny single view and a step."""
  base = registry.get('single_view').tiny(vocab_size=vocab_size)
  encoder = ReducedConfig(inner='single_view', encoder=base.encoder, step=step)
  text = language.phi(vocab_size=vocab_size, width=128, depth=2, heads=4, mlp_width=256,
                      max_positions=512)
  return ModelConfig(system='reduced', encoder=encoder, text=text,
                     projector=ProjectorConfig(n_in=encoder.width, n_out=128))


# Reduced systems on the host: every image is a row of the inner system's batch.

IMAGE_INDEX, IMAGE_VALID = 'image_index', 'image_valid'


def count(width: int, height: int, config: ReducedConfig) -> Count:
  """The inner system's views, the step's tokens."""
  inner = config.system.count(width, height, config.encoder)
  return Count(inner.views, config.tokens, slots=inner.slots)


def views(images: Sequence[Image.Image], config: ReducedConfig) -> Views:
  """Arrays of one example: those of image i under `i/`, tokens int32 [m]."""
  system = config.system
  out: Views = {'tokens': np.full(len(images), config.tokens, np.int32)}
  for number, image in enumerate(images):
    found = system.views([image], config.encoder)
    out |= {f'{number}/{name}': value for name, value in found.items()}
  return out


def batch(examples: Sequence[Views], config: ReducedConfig, *, slots: int | None = None) -> Views:
  """The inner system's batch of all images, and which of its rows belong to which row.

  Returns:
    the inner arrays; image_index int32 [b m], image_valid bool [b m].
  """
  system, inner = config.system, []
  most = max((len(e['tokens']) for e in examples), default=1) or 1
  index = np.zeros((len(examples), most), np.int32)
  valid = np.zeros((len(examples), most), bool)
  for row, example in enumerate(examples):
    for number in range(len(example['tokens'])):
      prefix = f'{number}/'
      index[row, number], valid[row, number] = len(inner), True
      inner.append({name.removeprefix(prefix): value for name, value in example.items()
                    if name.startswith(prefix)})
  rows = len(examples) * most
  if len(inner) < rows:  # rows without an image, so that the shape does not depend on them
    inner += [system.views([], config.encoder)] * (rows - len(inner))
  packed = system.batch(inner, config.encoder, slots=slots)
  return {**packed, IMAGE_INDEX: index, IMAGE_VALID: valid}


def tokens(config: ReducedConfig) -> int:
  """Visual tokens of every image."""
  return config.tokens


def grid(config: ReducedConfig) -> Grid | None:
  """The inner system's maps, pooled; other steps leave none."""
  return config.grid


def rules(config: ReducedConfig) -> tuple[Rule, ...]:
  """The inner system's sharding rows, and those of the resamplers."""
  return (Rule(r'vision/resampler/(query|latents|time)', (), why=WHOLE_VECTORS),
          Rule(r'vision/resampler/proj', ('fsdp', None)),
          *config.system.rules(config.encoder))


def overlay(image: Image.Image, config: ReducedConfig, info: Mapping[str, object]) -> Image.Image:
  """What the inner system draws."""
  return config.system.overlay(image, config.encoder, info)


# Reduced systems on the device: the inner encoder, then the step, image by image.

def _resampler(config: ReducedConfig, **options) -> Module | None:
  step = config.step
  if isinstance(step, Perceiver):
    return resamplers.PerceiverResampler(
      config.inner_width, queries=step.queries, depth=step.depth, heads=step.heads,
      head_dim=step.head_dim, mlp_ratio=step.mlp_ratio, activation_name=step.activation, **options)
  if isinstance(step, SingleLayer):
    return resamplers.SingleLayerResampler(config.inner_width, config.width, queries=step.queries,
                                           maps=config.key_maps, heads=step.heads, **options)
  return None


class Encoder(Module):
  """Inner encoder and, for resamplers, their parameters."""

  def __init__(self, config: ReducedConfig, *, param_dtype=jnp.float32, rngs: Rngs):
    self.config = config
    self.inner = config.system.encoder(config.encoder, param_dtype=param_dtype, rngs=rngs)
    self.resampler = _resampler(config, param_dtype=param_dtype, rngs=rngs)

  def __call__(self, views: dict[str, jax.Array], *, key=None, ex: Execution = HERE
               ) -> VisualTokens:
    """Views of a batch -> [b m*tokens d]."""
    c = self.config
    own = {name: value for name, value in views.items() if name not in (IMAGE_INDEX, IMAGE_VALID)}
    if c.step.kind == 'visionzip':
      x = self._zipped(own, key, ex)
    else:
      x = self._reduce(self.inner(own, key=key, ex=ex), ex)
    rows, images = views[IMAGE_INDEX].shape
    values = jnp.take(x, views[IMAGE_INDEX], axis=0).reshape(rows, images * c.tokens, -1)
    return VisualTokens(values, jnp.repeat(views[IMAGE_VALID], c.tokens, axis=1))

  def _reduce(self, visual: VisualTokens, ex: Execution) -> jax.Array:
    step, x = self.config.step, visual.values
    if isinstance(step, Perceiver):
      return self.resampler(x[:, None], valid=visual.valid, ex=ex)
    if isinstance(step, SingleLayer):
      return self.resampler(x, ex=ex)
    if isinstance(step, Pool):
      sizes = [(m.rows, m.columns) for m in self.config.inner_grid.maps]
      return resamplers.pool_maps(x, sizes, step.factor)
    assert isinstance(step, ToMe)
    return pruning.tome_reduce(x, step.keep)

  def _zipped(self, views, key, ex: Execution) -> jax.Array:
    """VisionZip: the scores come from the block whose output is read."""
    c, step = self.config.encoder, self.config.step
    tower, last = self.inner.tower, c.vision.depth + c.layer
    pixels = normalise(views['pixels'], c.mean, c.std).astype(ex.dtype)
    x = tower.run(tower.embed(pixels, ex=ex), stop=last, key=key, ex=ex).x
    block = layer_at(tower.blocks, last)
    q, k, _ = block.attn.project(block.norm1(x), ex=ex)
    x, _, _ = block(x, ex=ex)
    first = c.vision.class_token
    zipped = pruning.visionzip(
      x, pruning.importance(q, k, class_token=first), k.mean(axis=2), dominant=step.dominant,
      contextual=step.contextual, class_token=first)
    return jnp.take(zipped, views['index'][:, 0], axis=0)


# Names of the tensors: the inner system's, and our own for a resampler.

_OURS, _THEIRS = 'vision/resampler', 'model.resampler'


def inner_model(config: ModelConfig) -> ModelConfig:
  """The model without the step (its projector keeps this model's input width)."""
  encoder: ReducedConfig = config.encoder
  return dataclasses.replace(config, system=encoder.inner, encoder=encoder.encoder)


def table(config: ModelConfig) -> Table:
  """Rows of the whole model."""
  inner = config.encoder.system.table(inner_model(config))
  move = lambda path: path.replace('vision/', 'vision/inner/', 1) if (
    path.startswith('vision/')) else path
  rows = tuple(dataclasses.replace(row, ours=(
    move(row.ours) if isinstance(row.ours, str) else tuple(map(move, row.ours))))
    for row in inner.rows)
  moved = dataclasses.replace(
    inner, rows=rows, unused={move(path): why for path, why in inner.unused.items()})
  return joined(moved, Table(tuple(_resampler_rows(config.encoder))))


def backbones(encoder: ReducedConfig) -> dict[str, Any]:
  """The inner system's parts that have releases of their own."""
  inner = encoder.system.backbones(encoder.encoder)
  return {path.replace('vision/', 'vision/inner/', 1): part for path, part in inner.items()}


def _resampler_rows(encoder: ReducedConfig) -> list[Row]:
  if isinstance(encoder.step, Perceiver):
    layer, theirs = f'{_OURS}/layers', f'{_THEIRS}.layers.{{i}}'
    return [
      Row(f'{_OURS}/latents', f'{_THEIRS}.latents', identity),
      Row(f'{_OURS}/time', f'{_THEIRS}.frame_embs', identity),
      *norm(f'{_OURS}/norm', f'{_THEIRS}.norm'),
      *(row for name in ('norm_media', 'norm_latents', 'norm_ff')
        for row in norm(f'{layer}/{name}', f'{theirs}.{name}')),
      *(row for name in ('q', 'k', 'v', 'out', 'fc1', 'fc2')
        for row in linear(f'{layer}/{name}', f'{theirs}.{name}', bias=False))]
  if isinstance(encoder.step, SingleLayer):
    rows = [Row(f'{_OURS}/query', f'{_THEIRS}.query', identity),
            Row(f'{_OURS}/proj', f'{_THEIRS}.proj', identity),
            *(row for ours, name in (('q', 'q'), ('kv', 'kv'), ('post', 'post'))
              for row in norm(f'{_OURS}/norm_{ours}', f'{_THEIRS}.ln_{name}')),
            *(row for name in ('q', 'k', 'v') for row in linear(
              f'{_OURS}/{name}', f'{_THEIRS}.attn.{name}_proj')),
            *linear(f'{_OURS}/out', f'{_THEIRS}.attn.out_proj')]
    if encoder.inner_width != encoder.width:
      rows += linear(f'{_OURS}/kv_proj', f'{_THEIRS}.kv_proj', bias=False)
    return rows
  return []


def from_release(values: Mapping[str, Any]) -> ModelConfig | None:
  """config.json that `to_release` wrote -> ModelConfig; None for anything else."""
  return layout.own_config(values, 'reduced')


def to_release(config: ModelConfig) -> dict[str, Any]:
  """The inner system's files; config.json names this system and holds the whole model."""
  files = config.encoder.system.to_release(inner_model(config))
  values = files['config.json'] | {'hrvlm': {'system': 'reduced', 'model': to_dict(config)},
                                   'model_type': 'hrvlm_reduced'}
  return files | {'config.json': values}


SYSTEM = System(
  name='reduced', config=ReducedConfig, encoder=Encoder, tiny=tiny, backbones=backbones,
  count=count, views=views, batch=batch, shift=None, grid=grid, rules=rules, tokens=tokens,
  overlay=overlay, table=table, from_release=from_release, to_release=to_release)
