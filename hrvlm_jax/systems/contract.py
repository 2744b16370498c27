"""What a system is: the data types every system shares and the record that registers one.

A system turns images into visual tokens. Host side (`views`, `batch`) makes every shape static;
device side (`Encoder`) is pure. Nothing here knows any single system.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

import jax
import numpy as np
from PIL import Image

from hrvlm_jax.checkpoint.rows import Table
from hrvlm_jax.core.layers import activation
from hrvlm_jax.core.module import Module
from hrvlm_jax.language.config import DecoderConfig

Views = dict[str, np.ndarray]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VisualTokens:
  """What an encoder returns.

  Attributes:
    values: [b n d].
    valid: bool [b n]; False places are padding and are never read.
    info: named extras for overlays and analyses (selection maps, gates, ...).
  """

  values: jax.Array
  valid: jax.Array
  info: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Count:
  """What one image costs: encoder views and visual tokens in the language model.

  Attributes:
    slots: crop slots of a batch; None: one per view. S2 cuts its views on the device, from one.
  """

  views: int
  tokens: int
  slots: int | None = None

  def __post_init__(self):
    if self.slots is None:
      object.__setattr__(self, 'slots', self.views)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
  """Visual width -> language width.

  Attributes:
    kind: 'mlp' (`depth` linear layers with an activation in between) or 'linear'.
  """

  n_in: int
  n_out: int
  kind: str = 'mlp'
  depth: int = 2
  activation: str = 'gelu'

  def __post_init__(self):
    if self.kind not in ('mlp', 'linear'):
      raise ValueError(f"ProjectorConfig: kind must be 'mlp' or 'linear', got {self.kind!r}")
    activation(self.activation)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixFusion:
  """Visual tokens take places in the prompt."""

  kind: str = 'prefix'


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoPassFusion(PrefixFusion):
  """Prefix fusion in two passes: the language model reads a first look and says where to look.

  Attributes:
    selection_weight: weight of the loss of the selection beside the text's (training).
  """

  kind: str = 'two_pass'
  selection_weight: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossAttentionFusion:
  """Dense cross-attention blocks in front of decoder layers (Pheye, section 3.3).

  Attributes:
    width: width of the visual tokens.
    interval: a block stands before layer i (from 0) iff (i + 1) % interval == 0 and
      i >= from_layer.
    reduce: divides the inner width and the feed-forward width.
  """

  kind: str = 'cross_attention'
  width: int
  interval: int
  from_layer: int = 0
  reduce: int = 1

  def __post_init__(self):
    if self.interval < 1 or self.from_layer < 0 or self.reduce < 1:
      raise ValueError('CrossAttentionFusion: interval and reduce must be at least 1, from_layer '
                       f'at least 0, got {self.interval}, {self.reduce}, {self.from_layer}')

  def layers(self, depth: int) -> tuple[int, ...]:
    """The decoder layers, of `depth`, with a block in front."""
    return tuple(i for i in range(self.from_layer, depth) if (i + 1) % self.interval == 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """A whole model: encoder, projector, fusion, language model, chat template.

  Attributes:
    system: name in the registry.
    encoder: the system's own frozen dataclass.
    text: the language model; None for an encoder alone (PS3 as released).
    chat: name of the chat template (`language.chat`).
    image_token: the special token that stands for an image in the prompt; None where the template
      has no placeholder (Pheye).
    after_image: text that follows the visual tokens of every image (VILA-HD: a newline).
  """

  system: str
  encoder: Any
  text: DecoderConfig | None
  projector: ProjectorConfig | None = None
  fusion: PrefixFusion | TwoPassFusion | CrossAttentionFusion = PrefixFusion()
  chat: str = 'mc_llava'
  image_token: str | None = '<image>'
  after_image: str = ''

  def __post_init__(self):
    problems = []
    if self.text is None:
      if self.projector is not None or isinstance(self.fusion, CrossAttentionFusion):
        problems.append('text is None, an encoder alone: projector must be None too, and fusion a '
                        'prefix fusion')
    elif self.projector is not None and isinstance(self.fusion, PrefixFusion):
      if self.projector.n_out != self.text.width:
        problems.append(f'projector.n_out {self.projector.n_out} is not text.width '
                        f'{self.text.width}')
    if self.text is not None and isinstance(self.fusion, CrossAttentionFusion):
      if not self.fusion.layers(self.text.depth):
        problems.append(f'no decoder layer gets a cross-attention block: fusion.interval '
                        f'{self.fusion.interval}, fusion.from_layer {self.fusion.from_layer}, '
                        f'text.depth {self.text.depth}')
    if problems:
      raise ValueError('ModelConfig: ' + '; '.join(problems))

  @classmethod
  def field_types(cls, values: Mapping[str, Any]) -> dict[str, type]:
    """The encoder's dataclass follows from the system's name (see `core.config.from_dict`)."""
    from hrvlm_jax.systems import registry  # the registry imports this module

    name = values.get('system')
    return {'encoder': registry.get(name).config} if isinstance(name, str) else {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class System:
  """One line of the registry: everything the verbs need of a system.

  Attributes:
    config: the encoder's dataclass.
    count: (width, height, encoder config) -> Count.
    views: (images, encoder config) -> Views of one example, unpadded; `tokens` int32 [images] are
      the visual tokens of each image.
    batch: (list of Views, encoder config, slots=None) -> static arrays of a batch; crops share
      `slots` places, per-row indices point into them.
    encoder: (encoder config, param_dtype=, rngs=) -> Module; called with the batch's views it
      returns VisualTokens.
    table: (ModelConfig) -> weight table of the whole model.
    from_release: config.json of the original -> ModelConfig, or None when it is not this system's.
    to_release: ModelConfig -> {file name: JSON value} of the original's layout.
    overlay: (image, encoder config, info) -> picture with crops, selection or gates drawn.
    overlay_needs_info: the picture needs the encoder's `info` (a forward pass), not only sizes.
    folders: sub-folders of the original's layout that hold the tensors, in the order of the table's
      rows; a tensor is then named `folder/name`. () for one folder.
    released: ModelConfig by release name.
    tiny: a ModelConfig that trains on a laptop.
    shift: (views of a batch, encoder config, slots) -> the same views, whose indices count so many
      more crop slots before them (lanes of a batch that hosts make apart); None: the batch of this
      system cannot be made in lanes.
    alone: (encoder config, param_dtype=, rngs=) -> Module, the whole model of a config without a
      language model (PS3's image-text model); None where there is none.
    backbones: encoder config -> {parameter path: its ViTConfig, ConvNeXtConfig or PS3Config}, the
      parts that can start from a release of their own (`vlm.starts`).
    pickled: file that the original's own loader reads where that is a pickled state dict; export
      writes it too, with PyTorch at hand.
  """

  name: str
  config: type
  count: Callable[[int, int, Any], Count]
  views: Callable[[Sequence[Image.Image], Any], Views]
  batch: Callable[..., Views]
  encoder: Callable[..., Module]
  table: Callable[[ModelConfig], Table]
  from_release: Callable[[Mapping[str, Any]], ModelConfig | None]
  to_release: Callable[[ModelConfig], dict[str, Any]]
  overlay: Callable[[Image.Image, Any, Mapping[str, Any]], Image.Image]
  released: Mapping[str, ModelConfig]
  tiny: Callable[[], ModelConfig]
  overlay_needs_info: bool = False
  folders: tuple[str, ...] = ()
  shift: Callable[[Views, Any, int], Views] | None = None
  alone: Callable[..., Module] | None = None
  backbones: Callable[[Any], Mapping[str, Any]] = lambda encoder: {}
  pickled: str | None = None
