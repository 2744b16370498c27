"""What a system is: the data types every system shares and the class a new one derives from.

A system turns images into visual tokens. Host side (`views`, `batch`) makes every shape static;
device side (`Encoder`) is pure. Nothing here knows any single system.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import types
from typing import Any, ClassVar

import jax
import numpy as np
from PIL import Image, ImageDraw

from hrvlm_jax.checkpoint.rows import Table
from hrvlm_jax.checkpoint.settings import USED, Keys
from hrvlm_jax.core import bounds
from hrvlm_jax.core.config import from_dict, to_dict
from hrvlm_jax.core.errors import UserError, raise_all
from hrvlm_jax.core.images import to_rgb
from hrvlm_jax.core.layers import activation
from hrvlm_jax.core.module import Module
from hrvlm_jax.language.config import DecoderConfig
from hrvlm_jax.parallel.rules import RULES, Rule
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.fusion import FUSIONS, Fusion, PrefixFusion
from hrvlm_jax.systems.grid import Grid
from hrvlm_jax.systems.packing import BLANK, Packed, Views

FORMAT = 'hrvlm-1'  # of the house's own layout, for systems without one of an original
HOUSE: Keys = dict.fromkeys(('model_type', 'format', 'model'), USED)


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

  BOUNDS: ClassVar = dict.fromkeys(('n_in', 'n_out', 'depth'), bounds.SIZE)

  def __post_init__(self):
    bounds.check(self)
    if self.kind not in ('mlp', 'linear'):
      raise ValueError(f"ProjectorConfig: kind must be 'mlp' or 'linear', got {self.kind!r}")
    activation(self.activation)


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
  fusion: Fusion = PrefixFusion()
  chat: str = 'mc_llava'
  image_token: str | None = '<image>'
  after_image: str = ''

  def __post_init__(self):
    problems = self.fusion.check(self)
    if problems:
      raise ValueError('ModelConfig: ' + '; '.join(problems))

  @classmethod
  def field_types(cls, values: Mapping[str, Any]) -> dict[str, type]:
    """The encoder's dataclass follows from the system's name, the fusion's from its kind (see
    `core.config.from_dict`)."""
    name, fusion = values.get('system'), values.get('fusion')
    found = {'encoder': registry.get(name).config} if isinstance(name, str) else {}
    if isinstance(fusion, Fusion):
      return found | {'fusion': type(fusion)}
    kind = fusion.get('kind', 'prefix') if isinstance(fusion, Mapping) else 'prefix'
    return found | {'fusion': FUSIONS.get(kind)}


class System(Packed):
  """A system: what the verbs need of it. One object of it, or of a subclass, is registered.

  Every system has `config`, `encoder`, `count` and `views`; everything else has a default. The
  parts are methods of a subclass, or functions of the same arguments given to `System(...)`. Views
  with a number of their own per image, learned tokens between views or indices need `packing`; the
  places of tokens on the image, `grid`; an original's checkpoint layout, `table`, `from_release`
  and `to_release` together.

  Attributes:
    name: in the registry, which sets it where it is empty.
    config: the encoder's frozen dataclass.
    encoder: (encoder config, param_dtype=, rngs=) -> Module; called with the batch's views it
      returns VisualTokens.
    boxes: `views` takes `boxes=`, per image the region its question is about.
    per_image: settings of the config that may differ from image to image of an example; `views`
      then takes `configs=`, the config of each image.
    frozen: regular expression over the paths of parameters that stay as they are when a whole model
      is tuned further: those that nothing reads, and those that the last published stage freezes.
      '' for none.
    overlay_needs_info: the picture needs the encoder's `info` (a forward pass), not only sizes.
    released: ModelConfig by release name.
    folders: sub-folders of the original's layout that hold the tensors, in the order of the table's
      rows; a tensor is then named `folder/name`. () for one folder.
    pickled: file that the original's own loader reads where that is a pickled state dict; export
      writes it too, with PyTorch at hand.
    keys: what becomes of every key of the layout's config.json (see `checkpoint.settings`).
    alone: (encoder config, param_dtype=, rngs=) -> Module, the whole model of a config without a
      language model (PS3's image-text model); None where there is none.
  """

  name: str = ''
  config: type
  encoder: Callable[..., Module]
  boxes: bool = False
  per_image: tuple[str, ...] = ()
  frozen: str = ''
  overlay_needs_info: bool = False
  released: Mapping[str, ModelConfig] = types.MappingProxyType({})
  folders: tuple[str, ...] = ()
  pickled: str | None = None
  keys: Keys = types.MappingProxyType(HOUSE)
  alone: Callable[..., Module] | None = None

  def __init__(self, **parts: Any):
    for name, part in parts.items():
      if not hasattr(System, name) and name not in System.__annotations__:
        raise TypeError(f'System has no part {name!r}')
      setattr(self, name, part)

  def complete(self, name: str) -> System:
    """Itself, once it is seen to have what a system must have, under its name in the registry.

    Raises:
      UserError: parts that are missing, another name.
    """
    self.name = self.name or name
    missing = [part for part in ('config', 'encoder') if not hasattr(self, part)]
    missing += [part for part in ('count', 'views') if self._is_default(part)]
    raise_all(f'system {name!r}', [f'{part}: missing, every system must define it'
                                   for part in missing])
    if self.name != name:
      raise UserError(f'system {name!r}: its object is named {self.name!r}')
    return self

  def _is_default(self, part: str) -> bool:
    return getattr(getattr(self, part), '__func__', None) is getattr(System, part)

  def count(self, width: int, height: int, config: Any) -> Count:
    """What an image of that size costs."""
    raise NotImplementedError

  def views(self, images: Sequence[Image.Image], config: Any) -> Views:
    """Arrays of one example, unpadded, as `packing` declares them.

    `tokens` int32 [images] are the visual tokens of each image.
    """
    raise NotImplementedError

  def tokens(self, config: Any) -> int | None:
    """Visual tokens of every image; None: they depend on the image."""
    if not self._is_default('packing'):
      return None
    return self.count(BLANK.width, BLANK.height, config).tokens

  def places(self, config: Any) -> int | None:
    """Patches of a picture that run through the tower, where a selection leaves most of them out;
    None: all. What a step needs is counted with it (`training.fitting`)."""
    return None

  def width(self, config: Any) -> int | None:
    """Width of the visual tokens; default: the `width` of the config, else of its `vision`; None
    where it has neither: then nothing holds it against the projector."""
    found = getattr(config, 'width', None)
    return getattr(getattr(config, 'vision', None), 'width', None) if found is None else found

  def grid(self, config: Any) -> Grid | None:
    """How the tokens lie on the image; None: not known, so that nothing that needs it can run."""
    return None

  def whole_grid(self, config: Any, *, what: str) -> Grid:
    """The grid, one map of which (`Grid.whole`) shows the whole picture.

    Args:
      what: needs it; for the error.

    Raises:
      UserError: there is no such map.
    """
    grid = self.grid(config)
    if grid is None or grid.whole is None:
      raise UserError(f'{what} needs a map of visual tokens that shows the whole image; '
                      f'{self.name} with these settings has none')
    return grid

  def prompt_ids(self, texts: Sequence[str], tokenizer: Any, config: Any) -> np.ndarray | None:
    """int32 [n t]: rows of texts that say where an encoder alone looks; None: it takes none."""
    return None

  def rules(self, config: Any) -> tuple[Rule, ...]:
    """Sharding rows of the encoder's own parameters, before the general ones of `parallel.rules`.

    A parameter without any row is placed by the general rule, with a line in the log.
    """
    return ()

  def overlay(self, image: Image.Image, config: Any, info: Mapping[str, Any]) -> Image.Image:
    """The picture with what the encoder looks at; default: the boxes of its token maps."""
    del info
    grid = self.grid(config)
    if grid is None:
      return to_rgb(image).copy()
    picture = to_rgb(grid.picture(image)).copy()
    draw = ImageDraw.Draw(picture)
    for one in grid.maps:
      if one.box is not None:
        ends = [round(x * n) for x, n in zip(one.box, picture.size * 2, strict=True)]
        draw.rectangle((ends[0], ends[1], max(ends[2] - 1, ends[0]), max(ends[3] - 1, ends[1])),
                       outline=(255, 80, 80))
    return picture

  def tiny(self) -> ModelConfig:
    """A ModelConfig that trains on a laptop."""
    raise UserError(f'system {self.name!r} has no tiny model; name its model in a config')

  def backbones(self, config: Any) -> Mapping[str, Any]:
    """{parameter path: its ViTConfig, ConvNeXtConfig or PS3Config}: the parts of the encoder that
    can start from a release of their own (`interop.starts`)."""
    return {}

  def table(self, config: ModelConfig) -> Table:
    """Weight table of the whole model; default: every parameter under its own path."""
    del config
    return Table((), by_path=True)

  def from_release(self, values: Mapping[str, Any]) -> ModelConfig | None:
    """The model of a config.json, or None when it is not this system's.

    Raises:
      UserError: another version of the house's own layout, keys that are no model of ours.
    """
    if values.get('model_type') != f'hrvlm_{self.name}':
      return None
    if values.get('format') != FORMAT:
      raise UserError(f'config.json: format is {values.get("format")!r}, expected {FORMAT!r}; '
                      'convert with the version that wrote it')
    return from_dict(ModelConfig, values.get('model', {}), path='model', title='config.json')

  def to_release(self, config: ModelConfig) -> dict[str, Any]:
    """{file name: JSON value} of the layout beside the tensors; default: the house's own."""
    return {'config.json': {'model_type': f'hrvlm_{self.name}', 'format': FORMAT,
                            'model': to_dict(config)}}


def sharding_rules(model: ModelConfig) -> tuple[Rule, ...]:
  """The sharding table of a model: its system's rows, then those for every model."""
  return (*registry.get(model.system).rules(model.encoder), *RULES)
