"""How visual tokens reach the language model: one object per way, which answers for it everywhere.

    FUSIONS.register('mine', 'my_module:MyFusion')     # or a line of FUSIONS

A fusion is a frozen dataclass derived from `Fusion`. It names the class of the joined model by
import string, so that data, training and planning, which ask it what they need to know, import no
model, and a new fusion is one file beside its model.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from hrvlm_jax.core import bounds
from hrvlm_jax.core.registry import Registry

FUSIONS = Registry('fusion', {
  'cross_attention': 'hrvlm_jax.systems.fusion:CrossAttentionFusion',
  'prefix': 'hrvlm_jax.systems.fusion:PrefixFusion',
  'two_pass': 'hrvlm_jax.systems.fusion:TwoPassFusion',
}, variable='HRVLM_FUSIONS')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fusion:
  """What all fusions say of themselves.

  Attributes:
    kind: name in `FUSIONS`.
    model: 'module:Class' of the joined model; called with (ModelConfig, unrolled=, param_dtype=,
      rngs=), see `vlm.model.VLM`.
    in_prompt: visual tokens take positions in the prompt.
    one_pass: all of them are known before the prompt is read, so that the attention on them can be
      read and some can be dropped (`vlm.vicrop`, `vlm.fastv`).
    unrolled: sub-trees of the parameters whose stacked layers (`blocks`) generation holds unrolled.
    objective: the training objective of its models.
    boxes: training reads the box of an image that a question is about.
    unpackable: why a row cannot hold several examples; '' where it can.
  """

  kind: str
  model: ClassVar[str]
  in_prompt: ClassVar[bool] = True
  one_pass: ClassVar[bool] = True
  unrolled: ClassVar[tuple[str, ...]] = ('language',)
  objective: ClassVar[str] = 'next_token'
  boxes: ClassVar[bool] = False
  unpackable: ClassVar[str] = ''

  def positions(self, tokens: int) -> int:
    """Positions of the prompt that so many visual tokens take."""
    return tokens if self.in_prompt else 0

  def reads(self, model: Any) -> tuple[str, int] | None:
    """The width that visual tokens must have: the key of a `ModelConfig` that says it, and it.

    Default: the projector's; without one None, what the fusion's own model takes is not known.
    """
    return None if model.projector is None else ('projector.n_in', model.projector.n_in)

  def check(self, model: Any) -> list[str]:
    """What of a `ModelConfig` does not fit this fusion, in sentences.

    Default: the projector's width is the language model's, and without a language model there is
    no projector.
    """
    if model.text is None:
      return [] if model.projector is None and self.in_prompt else [
        'text is None, an encoder alone: projector must be None too, and fusion a prefix fusion']
    if model.projector is not None and model.projector.n_out != model.text.width:
      return [f'projector.n_out {model.projector.n_out} is not text.width {model.text.width}']
    return []


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixFusion(Fusion):
  """Visual tokens take positions in the prompt."""

  model: ClassVar[str] = 'hrvlm_jax.vlm.model:VLM'
  kind: str = 'prefix'

  def reads(self, model: Any) -> tuple[str, int]:
    """See `Fusion.reads`; without a projector, the language model itself."""
    return super().reads(model) or ('text.width', model.text.width)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoPassFusion(Fusion):
  """Prefix fusion in two passes: the language model reads a first look and says where to look.

  Attributes:
    selection_weight: weight of the loss of the selection beside the text's (training).
  """

  model: ClassVar[str] = 'hrvlm_jax.vlm.two_pass:TwoPassVLM'
  one_pass: ClassVar[bool] = False
  objective: ClassVar[str] = 'two_pass'
  boxes: ClassVar[bool] = True
  unpackable: ClassVar[str] = 'the first pass asks one question per row where to look'
  kind: str = 'two_pass'
  selection_weight: float = 0.0

  BOUNDS: ClassVar = {'selection_weight': bounds.COUNT}

  def reads(self, model: Any) -> tuple[str, int]:
    """See `Fusion.reads`; the encoder projects by itself."""
    return 'text.width', model.text.width

  def __post_init__(self):
    bounds.check(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossAttentionFusion(Fusion):
  """Dense cross-attention blocks in front of decoder layers (Pheye, section 3.3).

  Attributes:
    width: width of the visual tokens.
    interval: a block stands before layer i (from 0) iff (i + 1) % interval == 0 and
      i >= from_layer.
    reduce: divides the inner width and the feed-forward width.
    inside: a block is attention alone, between the self-attention and the MLP of layer i (SmallCap;
      Pheye, appendix B.1), instead of a block with its own feed-forward in front of the layer.
  """

  model: ClassVar[str] = 'hrvlm_jax.vlm.cross_attention:CrossAttentionVLM'
  in_prompt: ClassVar[bool] = False
  one_pass: ClassVar[bool] = False
  unrolled: ClassVar[tuple[str, ...]] = ('language', 'fusion')
  unpackable: ClassVar[str] = 'cross-attention reads one image per row'
  kind: str = 'cross_attention'
  width: int
  interval: int
  from_layer: int = 0
  reduce: int = 1
  inside: bool = False

  BOUNDS: ClassVar = {
    **dict.fromkeys(('width', 'interval', 'reduce'), bounds.SIZE), 'from_layer': bounds.COUNT}

  def __post_init__(self):
    bounds.check(self)

  def layers(self, depth: int) -> tuple[int, ...]:
    """The decoder layers, of `depth`, with a block in front."""
    return tuple(i for i in range(self.from_layer, depth) if (i + 1) % self.interval == 0)

  def reads(self, model: Any) -> tuple[str, int]:
    """See `Fusion.reads`; without a projector, the width of the blocks."""
    return super().reads(model) or ('fusion.width', self.width)

  def check(self, model: Any) -> list[str]:
    """See `Fusion.check`; the visual tokens keep a width of their own."""
    if model.text is None:
      return super().check(model)
    if self.inside and model.text.parallel_block:
      return ['fusion.inside needs a decoder whose MLP follows its attention (GPT-2, LLaMA, '
              'Qwen2); text.parallel_block is True']
    return [] if self.layers(model.text.depth) else [
      f'no decoder layer gets a cross-attention block: fusion.interval {self.interval}, '
      f'fusion.from_layer {self.from_layer}, text.depth {model.text.depth}']
