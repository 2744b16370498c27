"""Settings of "any system, then fewer tokens": pooling, resamplers, ToMe, VisionZip as steps."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

from hrvlm_jax.language import config as language
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.contract import ModelConfig, ProjectorConfig
from hrvlm_jax.systems.grid import Grid


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pool:
  """Mean of factor x factor neighbours, in each map of the image's tokens."""

  kind: str = 'pool'
  factor: int = 2


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class SingleLayer:
  """Qwen-VL's and Monkey's resampler: one cross-attention from a square number of queries."""

  kind: str = 'single_layer'
  queries: int = 256
  width: int | None = None
  heads: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToMe:
  """Rounds of token merging on the finished tokens until `keep` are left (PS3's comparison)."""

  kind: str = 'tome'
  keep: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionZip:
  """The most attended tokens and a few that gather the rest."""

  kind: str = 'visionzip'
  dominant: int
  contextual: int


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
    if isinstance(step, (Pool, SingleLayer)) and tokens is not None and grid is None:
      problems.append(f'step {step.kind} needs to know how the tokens lie on the image; the '
                      f'{tokens} of {self.inner} with these settings form no map')
    elif isinstance(step, SingleLayer) and tokens is not None and not self._is_square:
      problems.append(f'step {step.kind} needs one square map of tokens; {self.inner} with these '
                      f'settings has {[(m.rows, m.columns) for m in grid.maps]}')
    if isinstance(step, Pool) and step.factor < 1:
      problems.append(f'pool: factor must be at least 1, got {step.factor}')
    if isinstance(step, (Perceiver, SingleLayer)) and step.queries < 1:
      problems.append(f'{step.kind}: queries must be at least 1, got {step.queries}')
    if isinstance(step, SingleLayer):
      width = step.width or self.inner_width
      if math.isqrt(step.queries) ** 2 != step.queries:
        problems.append(f'single_layer: queries must be a square number, got {step.queries}')
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
        if step.contextual < 0 or not 1 <= step.dominant <= total - step.contextual:
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
  def _is_square(self) -> bool:
    grid = self.inner_grid
    return grid is not None and len(grid.maps) == 1 and grid.maps[0].rows == grid.maps[0].columns

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


RELEASED: dict[str, ModelConfig] = {}


def tiny(*, vocab_size: int = 264, step: Step = Perceiver(queries=9, depth=2, heads=4, head_dim=24)
         ) -> ModelConfig:
  """The tiny single view and a step."""
  base = registry.get('single_view').tiny(vocab_size=vocab_size)
  encoder = ReducedConfig(inner='single_view', encoder=base.encoder, step=step)
  text = language.phi(vocab_size=vocab_size, width=128, depth=2, heads=4, mlp_width=256,
                      max_positions=512)
  return ModelConfig(system='reduced', encoder=encoder, text=text,
                     projector=ProjectorConfig(n_in=encoder.width, n_out=128))
