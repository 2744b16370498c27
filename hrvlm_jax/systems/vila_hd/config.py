"""Settings of VILA-HD; released and tiny sizes.

Source: `NVlabs/VILA: llava/model/language_model/llava_topdown_llama.py`, `llava/train/args.py`,
`vila_hd/README.md`.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from hrvlm_jax.core import bounds
from hrvlm_jax.core.errors import unknown
from hrvlm_jax.language import config as language
from hrvlm_jax.language.config import DecoderConfig
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.systems.fusion import TwoPassFusion
from hrvlm_jax.systems.ps3.config import LookConfig, PS3Config, c_radio, siglip, tiny_encoder
from hrvlm_jax.systems.ps3.plan import Plan, make_plan, scale_sizes
from hrvlm_jax.vision.blocks import PROJECTORS, block_side, block_slots, is_projector


@dataclasses.dataclass(frozen=True, kw_only=True)
class VilaHDConfig:
  """PS3, a block projector, a head that turns a language state into a selection prompt.

  Attributes:
    tower: PS3 without its text tower; its `look` is not read, the settings below are.
    width: of the language model.
    projector: type string of the original (`vision.blocks.PROJECTORS`).
    prompt_head: 'mlp' or 'linear'; None: the model has none (trained with mode 'after_image').
    positions: extra position and scale embeddings behind the projector.
    select_layer: block whose output is read, counted from the end; -2 is the last but one.
    mode: 'after_prompt' asks the language model where to look, 'after_image' follows saliency,
      'random' chooses patches at random (the comparison of PS3, Table 7).
    looks: looks of a full budget, or 'all'; 0: the low-resolution tokens and a copy of the first.
    tokens: selected patches instead of `looks`; it wins when both are given.
    budgets: patches per scale and look instead of the tower's.
    smooth: smooth the selection probabilities over 6x6 areas.
    dynamic_aspect: 'on': images whose longer side is not above the last threshold between scales
      go without the top scale; 'stored': the checkpoint was trained so, but, as in the original's
      `generate_content`, image sizes are not handed on and every image uses all scales.
    select_target: ground-truth boxes of a batch steer the selection (training).
  """

  tower: PS3Config
  width: int = 3584
  projector: str = 'mlp_downsample'
  prompt_head: Literal['mlp', 'linear'] | None = 'mlp'
  positions: bool = True
  select_layer: int = -2
  mode: Literal['after_prompt', 'after_image', 'random'] = 'after_prompt'
  looks: int | Literal['all'] = 6
  tokens: int | None = None
  budgets: tuple[int, ...] | None = None
  smooth: bool = False
  dynamic_aspect: Literal['off', 'stored', 'on'] = 'off'
  select_target: bool = False

  BOUNDS: ClassVar = {
    'width': bounds.SIZE, 'select_layer': bounds.FROM_END,
    **dict.fromkeys(('looks', 'tokens', 'budgets'), bounds.COUNT)}

  def __post_init__(self):
    bounds.check(self)
    problems = []
    if not is_projector(self.projector):
      problems.append(unknown(self.projector, (*PROJECTORS, 'mlp2x_gelu'), what='projector'))
    if self.mode == 'after_prompt' and self.prompt_head is None:
      problems.append("mode 'after_prompt' needs a prompt_head ('mlp' or 'linear')")
    if not -self.tower.vision.depth <= self.select_layer <= -1:
      problems.append(f'select_layer must lie in -{self.tower.vision.depth}..-1, got '
                      f'{self.select_layer}')
    if self.mode == 'random' and self.select_target:
      problems.append("mode 'random' follows no boxes: select_target must be False")
    if self.tower.look != LookConfig():
      problems.append('tower.look is not read; set looks, tokens and smooth beside tower')
    side, scales = self.tower.scales[-1], self.tower.high_scales
    if any(h != w for h, w in scale_sizes(side, side, self.tower)):
      problems.append(f'a square of {side} pixels does not give square grids with scales '
                      f'{self.tower.scales}; every scale must be a whole multiple of the first')
    if self.budgets is not None and len(self.budgets) != scales:
      problems.append(f'budgets needs one number per high scale ({scales}), got {self.budgets}')
    if self.dynamic_aspect == 'on' and scales < 2:
      problems.append('dynamic_aspect needs at least two high scales')
    if problems:
      raise ValueError('VilaHDConfig: ' + '; '.join(problems))

  @property
  def side(self) -> int:
    """Pixels of the square every image is squashed to."""
    return self.tower.scales[-1]

  @property
  def ratio(self) -> int:
    """Side of the patch blocks that become one token."""
    return block_side(self.projector)

  @property
  def layer(self) -> int:
    """Index of the block whose output is read."""
    return self.tower.vision.depth + self.select_layer

  @property
  def low_tokens(self) -> int:
    """Low-resolution tokens of an image in the prompt."""
    return (-(-self.tower.grid // self.ratio))**2

  @property
  def scale_choices(self) -> tuple[int | None, ...]:
    """How many high scales an image may use; None: all, and no rule about it."""
    scales = self.tower.high_scales
    return (scales - 1, scales) if self.dynamic_aspect == 'on' else (None,)

  def plan(self, first_scales: int | None = None) -> Plan:
    """Static counts of one image."""
    tower = self.tower if self.budgets is None else dataclasses.replace(
      self.tower, budgets=self.budgets)
    return make_plan(
      self.side, self.side, tower, num_looks=None if self.tokens is not None else self.looks,
      num_tokens=self.tokens, first_scales=first_scales)

  @property
  def slots(self) -> tuple[int, ...]:
    """Places for complete blocks per high scale; each is enough whatever is selected."""
    plans = [self.plan(first) for first in self.scale_choices]
    return tuple(
      max(block_slots(grid[0], sum(look[i] for look in plan.counts[0]), self.ratio)
          for plan in plans)
      for i, grid in enumerate(plans[0].grids[1:]))

  @property
  def high_tokens(self) -> int:
    """Places for high-resolution tokens of an image; one at least, for the fallback."""
    return max(sum(self.slots), 1)

  @property
  def image_tokens(self) -> int:
    """Places of an image in the prompt."""
    return self.low_tokens + self.high_tokens

  @property
  def looks_closer(self) -> bool:
    """Some patches are selected at all."""
    return self.plan(self.scale_choices[-1]).looks > 0


def _model(encoder: VilaHDConfig, text) -> ModelConfig:
  return ModelConfig(system='vila_hd', encoder=encoder, text=text, fusion=TwoPassFusion(),
                     chat='vila_qwen2', after_image='\n')


def laid_out(text: DecoderConfig) -> DecoderConfig:
  """The decoder with a vocabulary that divides: the released one, 151651, divides by nothing, and
  an output layer that cannot be cut costs a fifth of a train step on a pod of TPUs. 512: columns of
  128 for four devices. Where that would add more than a sixteenth, the vocabulary stays."""
  return dataclasses.replace(text, pad_vocab_to=512) if text.vocab_size >= 16 * 512 else text


def _released(tower: PS3Config) -> ModelConfig:
  return _model(VilaHDConfig(tower=dataclasses.replace(tower, text=None)),
                laid_out(language.qwen2(vocab_size=151651)))


_1_5K, _4K = (378, 756, 1512), (378, 756, 1512, 3780)
# SigLIP and SigLIP2 differ in their weights and in PS3's text tower, which is not part of VILA-HD.
RELEASED = {
  'vila_hd_8b_1_5k_siglip': _released(siglip(_1_5K, None)),
  'vila_hd_8b_4k_siglip': _released(siglip(_4K, None)),
  'vila_hd_8b_1_5k_siglip2': _released(siglip(_1_5K, None)),
  'vila_hd_8b_4k_siglip2': _released(siglip(_4K, None)),
  'vila_hd_8b_1_5k_cradio_v2': _released(c_radio((384, 768, 1536))),
}


def tiny(*, vocab_size: int = 264, looks: int | str = 1) -> ModelConfig:
  """A model that trains on a laptop: images of 160 pixels, 32 patches a look."""
  tower = dataclasses.replace(tiny_encoder(), text=None)
  return _model(
    VilaHDConfig(tower=tower, width=128, looks=looks),
    language.qwen2(vocab_size=vocab_size, width=128, depth=2, heads=4, kv_heads=2, mlp_width=256,
                   max_positions=512))
