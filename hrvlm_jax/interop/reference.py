"""Parts of a checkpoint beside the model code for PyTorch, `interop.torch`, and transformers.

Encoder, projector, cross-attention, PS3's text tower: written from the specifications a second
time, they get the tensors of the release as they are, where both tables of names agree on the
form. Numbered layers (a projector's, a coordinate MLP's) go by their numbers in the release and not
by a table. Needs the extra `torch`, imported where it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from hrvlm_jax.checkpoint.leaves import StoredParams
from hrvlm_jax.checkpoint.rows import Entry, entries
from hrvlm_jax.core.config import to_dict
from hrvlm_jax.core.module import Functional
from hrvlm_jax.core.resample import normalise
from hrvlm_jax.interop import adapters, folder
from hrvlm_jax.interop.replay import Outputs, PlainTensors, bound, difference
from hrvlm_jax.interop.side_by_side import NotChecked
from hrvlm_jax.language.config import config_to_hf
from hrvlm_jax.language.decoder import Decoder
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.contract import ModelConfig, VisualTokens
from hrvlm_jax.systems.ps3.encoder import Encoder as PS3
from hrvlm_jax.systems.ps3.plan import make_plan
from hrvlm_jax.systems.ps3.text import TextTower
from hrvlm_jax.systems.vila_hd.prompt_head import PromptHead
from hrvlm_jax.vision.blocks import BlockProjector
from hrvlm_jax.vlm import model as vlm
from hrvlm_jax.vlm.cross_attention import CrossAttention
from hrvlm_jax.vlm.model import Projector

AGAINST = 'PyTorch, interop.torch'
SIZE = (700, 420)  # of the picture: several views in every system that has them
# What stands in front of the numbered layers of a projector or coordinate MLP.
_LAYERS = re.compile(
  r'((?:model\.|mm_projector/)?mm_projector\.(?:layers\.)?|mm_projector/layers\.'
  r'|multi_modal_projector\.linear_|vision_model\.coord_embed\.)(\d+)\.(weight|bias)')
Part = tuple[str, Callable[[], Outputs]]


def parts(config: ModelConfig, release: Any, stored: StoredParams, plain: PlainTensors
          ) -> Iterator[Part]:
  """(part, how to compare it) of everything but language model and prompts.

  A comparison raises NotChecked where there is no code, ImportError without PyTorch.

  Args:
    config: of the checkpoint.
    release: `interop.convert.Release`; what it says decides the reference.
  """
  theirs = release.config
  source = Source(theirs, release.table, plain)
  kind, encoder = config.system, config.encoder
  if kind == 'vila_hd':
    yield 'vision/ps3', lambda: _ps3('vision/ps3', encoder.tower, source, stored)
    yield 'vision/projector', lambda: _blocks(config, theirs, source, stored)
    if encoder.prompt_head is not None:
      yield 'vision/prompt_head', lambda: _prompt_head(config, theirs, source, stored)
  elif kind == 'ps3':
    yield 'vision', lambda: _ps3('vision', encoder, source, stored)
  else:
    yield 'vision', lambda: _encoder(config, theirs, source, stored)
  if kind == 'ps3' and config.text is None:
    yield 'text', lambda: _text(config, theirs, source, stored)
  if config.projector is not None:
    yield 'projector', lambda: _projector(config, theirs, source, stored)
  if config.fusion.kind == 'cross_attention':
    yield 'fusion', lambda: _fusion(config, theirs, source, stored)


class Source:
  """The tensors of a release under the names of `interop.torch`, in float32."""

  def __init__(self, config: ModelConfig, table: Any, plain: PlainTensors):
    self._plain, self.config, self._table = plain, config, table
    self._numbered: dict[str, str] | None = None

  def fill(self, module: Any, prefix: str) -> Any:
    """Gives every parameter of a module its tensor, whose names begin with `prefix`; for
    inference.

    Raises:
      NotChecked: a tensor is in no file.
    """
    import torch

    if self._numbered is None:
      self._pair()
    with torch.no_grad():
      for name, parameter in module.named_parameters():
        value = self._value(prefix + name)
        if value is not None:
          parameter.copy_(torch.from_numpy(np.array(value, np.float32)).reshape(parameter.shape))
    return module.eval()

  def _pair(self) -> None:
    whole = vlm.build(self.config).abstract
    self._theirs: dict[tuple[str, int | None], Entry] = {
      (path, entry.layer): entry for entry in entries(self._table, whole)
      for path in entry.row.our_paths}
    plain = self.config
    if any(not spec.name for group in adapters.lora_sets(plain).values() for spec in group):
      plain = adapters.without_sets(plain)
    own = folder.table(plain)
    self._own = {entry.names[0]: entry for entry in entries(own, vlm.build(plain).abstract)}
    self._numbered = {}
    where = {name: row.our_paths[0] for row in self._table.rows for name in row.names}
    layers: dict[str, dict[int, list[str]]] = {}
    for name in self._plain:
      if match := _LAYERS.fullmatch(name):
        layers.setdefault(match[1], {}).setdefault(int(match[2]), []).append(name)
    for found in layers.values():
      linear = 1
      first = next(iter(where[n] for index in sorted(found) for n in found[index]
                        if where.get(n, '').rpartition('/')[2] == 'kernel'))
      at = first.rpartition('/')[0].rpartition('/')[0].replace('/', '.')
      for index in sorted(found):
        flat = all(len(self._plain.shapes[name]) == 1 for name in found[index])
        for name in found[index]:
          kind = 'norm' if flat else 'fc'
          self._numbered[f'{at}.{kind}{linear}.{name.rpartition(".")[2]}'] = name
        linear += not flat

  def _value(self, name: str) -> np.ndarray | None:
    if name in self._numbered:
      return self._plain[self._numbered[name]]
    own = self._own[name]
    entry = self._theirs.get((own.row.our_paths[0], own.layer))
    if entry is not None and entry.row.our_paths == own.row.our_paths and (
        entry.row.op.name == own.row.op.name):
      found = self._raw(entry)  # one form in both: nothing of the tables' is used
      return None if found is None else self._plain[found]
    arrays = [self._leaf(path, own.layer) for path in own.row.our_paths]
    if any(x is None for x in arrays):
      return None
    return own.row.op.save(arrays[0] if isinstance(own.row.ours, str) else tuple(arrays))

  def _leaf(self, path: str, layer: int | None) -> np.ndarray | None:
    """One of our leaves, or a layer of it, from whatever tensors hold it."""
    if (path, layer) in self._theirs:
      return self._loaded(path, layer)
    if layer is not None:
      whole = self._loaded(path, None)
      return None if whole is None else whole[layer]
    layers = [at for other, at in self._theirs if other == path]
    return np.stack([self._loaded(path, at) for at in sorted(layers)])

  def _loaded(self, path: str, layer: int | None) -> np.ndarray | None:
    entry = self._theirs[path, layer]
    name = self._raw(entry)
    if name is None:
      return None
    loaded = entry.row.op.load(self._plain[name].astype(np.float32))
    return loaded if isinstance(entry.row.ours, str) else loaded[entry.row.our_paths.index(path)]

  def _raw(self, entry: Entry) -> str | None:
    """The tensor's name in the files; None where it may be absent and is."""
    found = next((name for name in entry.names if name in self._plain), None)
    if found is None and not entry.row.optional:
      raise NotChecked(f'the release has no tensor {entry.names[0]}')
    return found


def _built(config: ModelConfig) -> tuple[Any, Any]:
  """(settings of the model with attributes, config of transformers) of `interop.torch`."""
  import torch  # noqa: F401 - the extra, named where it is missing
  import transformers  # noqa: F401

  from hrvlm_jax.interop.torch import configuration_hrvlm

  if config.system not in folder.CLASSES:
    raise NotChecked(f'there is no model code for {config.system} in interop.torch')
  values = folder.model_values(config)
  kind = getattr(configuration_hrvlm, f'{folder.CLASSES[config.system]}Config')
  made = kind(**{key: value for key, value in values.items() if key != 'model_type'})
  made._attn_implementation = 'eager'
  if made.vision_config is not None:
    made.vision_config._attn_implementation = 'eager'
  return made.settings, made


def language(config: ModelConfig, release: Any, stored: StoredParams, plain: PlainTensors
             ) -> tuple[str, Outputs]:
  """(class, logits of random ids) of transformers, for layouts whose names are not its own.

  Raises:
    NotChecked: LoRA sets, settings that its class does not have.
  """
  import torch
  from transformers import AutoConfig, AutoModelForCausalLM

  text = release.config.text
  if text.lora or folder.text_problems(text):
    raise NotChecked('transformers has no class for it with these settings')
  values = config_to_hf(text) | {'pad_token_id': None}
  source = Source(release.config, release.table, plain)
  made = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
  reference = source.fill(made.float(), 'language_model.')
  ids = np.random.default_rng(0).integers(0, text.vocab_size, (2, 64))
  with torch.no_grad():
    expected = reference(torch.from_numpy(ids), use_cache=False).logits.numpy()
  module = bound(Functional(lambda rngs: Decoder(config.text, rngs=rngs)), stored, 'language/')
  run = jax.jit(lambda ids: module.logits(module(module.embed(ids), jnp.ones(ids.shape, bool))))
  found = run(jnp.asarray(ids))[..., :text.vocab_size]
  return f'transformers.{type(reference).__name__}', {'logits': difference(found, expected)}


def picture(size: tuple[int, int] = SIZE) -> Image.Image:
  """Blocks of random colours under noise: places differ."""
  rng = np.random.default_rng(0)
  coarse = Image.fromarray(rng.integers(0, 200, (24, 24, 3)).astype(np.uint8))
  noise = rng.integers(0, 56, (size[1], size[0], 3))
  return Image.fromarray((np.asarray(coarse.resize(size, Image.Resampling.NEAREST))
                          + noise).astype(np.uint8))


def _random(*shape: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).standard_normal(shape, np.float32)


def _encoder(config: ModelConfig, theirs: ModelConfig, source: Source, stored: StoredParams
             ) -> Outputs:
  """Visual tokens of a picture."""
  settings, made = _built(theirs)
  import torch

  from hrvlm_jax.interop.torch.modeling_hrvlm import encoder_of, visual_tokens
  from hrvlm_jax.interop.torch.processing_hrvlm import HrvlmImageProcessor

  reference = source.fill(encoder_of(settings, made), 'vision.')
  processor = HrvlmImageProcessor(theirs.system, to_dict(theirs.encoder),
                                  getattr(made, 'token_maps', None))
  data = dict(processor.preprocess([picture()]))
  data.pop('tokens')
  with torch.no_grad():
    expected = visual_tokens(reference, **{k: torch.from_numpy(v) for k, v in data.items()})
  system = registry.get(config.system)
  views = system.batch([system.views([picture()], config.encoder)], config.encoder)
  module = bound(Functional(lambda rngs: system.encoder(config.encoder, rngs=rngs)), stored,
                 'vision/')
  visual = jax.jit(lambda views: module(views))(jax.tree.map(jnp.asarray, views))
  return {'tokens': difference(np.asarray(visual.values)[np.asarray(visual.valid)],
                               expected.numpy())}


def _ps3(path: str, config: Any, source: Source, stored: StoredParams) -> Outputs:
  """Thumbnail pass, probabilities without and with a prompt, one look at what they say, pool.

  Both sides look where the reference says: which of two nearly equal cells is taken is no property
  of the tensors.
  """
  settings, made = _built(source.config)
  import torch

  from hrvlm_jax.interop.torch.ps3 import PS3 as Reference
  from hrvlm_jax.interop.torch.ps3_plan import Plan

  c = settings.encoder if path == 'vision' else settings.encoder.tower
  reference = source.fill(Reference(c, made), f'{path.replace("/", ".")}.')
  side = config.scales[-1]
  pixels = np.asarray(picture((side, side)))[None]
  floats, prompt = normalise(pixels, config.mean, config.std), _random(1, config.vision.width)
  module = bound(Functional(lambda rngs: PS3(config, rngs=rngs)), stored, f'{path}/')
  plan, plain = make_plan(side, side, config, num_looks=1), Plan(c, 1)
  start, outputs = plan.grids[0][0] * plan.grids[0][1], {}

  def first(images, prompt):
    low = module.encode_low(images)
    return low, [module.probabilities(low, one, plan) for one in (None, prompt)]

  def second(low, images, probs):
    last = module.encode_high(low, images, probs, plan).last
    return last, module.pool(last[:, start:])

  ours, probs = jax.jit(first)(floats, jnp.asarray(prompt))
  with torch.no_grad():
    images = torch.from_numpy(np.array(floats).transpose(0, 3, 1, 2))
    low = reference.low(images)
    for name, one, found in zip(('saliency', 'prompted'), (None, torch.from_numpy(prompt)), probs,
                                strict=True):
      expected = reference.probabilities(low, one, plain)
      outputs |= {f'{name} {number}': difference(mine, other.numpy()) for number, (mine, other)
                  in enumerate(zip(found, expected, strict=True), 1)}
    last = reference.look(low, images, expected, plain).hidden[c.vision.depth - 1]
    pooled = reference.pool(last[:, start:])
  last_ours, pooled_ours = jax.jit(second)(ours, floats, tuple(
    jnp.asarray(one.numpy()) for one in expected))
  return outputs | {'tokens': difference(last_ours, last.numpy()),
                    'pooler_output': difference(pooled_ours, pooled.numpy())}


def _blocks(config: ModelConfig, theirs: ModelConfig, source: Source, stored: StoredParams
            ) -> Outputs:
  """VILA-HD's projector with its position and scale embeddings, on random patches."""
  settings, _ = _built(theirs)
  import torch

  from hrvlm_jax.interop.torch.blocks import BlockProjector as Reference

  make = lambda c, tower: dict(grid=tower.scales[0] // tower.vision.patch_size if c.positions
                               else None, scales=len(tower.scales))
  c, mine = settings.encoder, config.encoder
  width = c.tower.vision.width
  reference = source.fill(Reference(c.projector, width, c.width, **make(c, c.tower)),
                          'vision.projector.')
  module = bound(Functional(lambda rngs: BlockProjector(
    mine.projector, mine.tower.vision.width, mine.width, **make(mine, mine.tower), rngs=rngs)),
    stored, 'vision/projector/')
  grid, outputs = mine.tower.grid, {}
  x = _random(1, grid**2, width)
  with torch.no_grad():
    outputs['tokens'] = difference(module(jnp.asarray(x)), reference(torch.from_numpy(x)).numpy())
    for scale in range(len(mine.tower.scales) if mine.positions else 0):
      size = -(-grid * mine.tower.scales[scale] // mine.tower.scales[0] // mine.ratio)
      ours = module.positions(scale, size, jnp.arange(size * size)[None])
      outputs[f'positions {scale}'] = difference(ours[0], reference.positions(scale, size).numpy())
  return outputs


def _prompt_head(config: ModelConfig, theirs: ModelConfig, source: Source, stored: StoredParams
                 ) -> Outputs:
  settings, _ = _built(theirs)
  import torch

  from hrvlm_jax.interop.torch.vision_vila_hd import prompt_head

  reference = source.fill(prompt_head(settings.encoder), 'vision.prompt_head.')
  c = config.encoder
  module = bound(Functional(lambda rngs: PromptHead(
    c.prompt_head, c.width, c.tower.vision.width, rngs=rngs)), stored, 'vision/prompt_head/')
  x = _random(3, c.width)
  with torch.no_grad():
    return {'outputs': difference(module(jnp.asarray(x)), reference(torch.from_numpy(x)).numpy())}


def _text(config: ModelConfig, theirs: ModelConfig, source: Source, stored: StoredParams
          ) -> Outputs:
  """Features and selection prompts of random captions."""
  settings, made = _built(theirs)
  import torch

  from hrvlm_jax.interop.torch.modeling_ps3 import TextTower as Reference

  c = config.encoder.text
  reference = source.fill(Reference(settings.encoder.text, made.vision_config), 'text.')
  module = bound(Functional(lambda rngs: TextTower(c, rngs=rngs)), stored, 'text/')
  ids = np.random.default_rng(0).integers(0, c.vocab_size, (2, c.context))
  features = jax.jit(lambda ids: module.features(ids))(jnp.asarray(ids))
  with torch.no_grad():
    expected = reference(torch.from_numpy(ids))
    prompt = reference.prompt_head(expected)
  return {'features': difference(features, expected.numpy()),
          'prompt': difference(module.prompt(jnp.asarray(expected.numpy())), prompt.numpy())}


def _projector(config: ModelConfig, theirs: ModelConfig, source: Source, stored: StoredParams
               ) -> Outputs:
  import torch
  import transformers  # noqa: F401

  from hrvlm_jax.interop.torch.configuration_hrvlm import settings
  from hrvlm_jax.interop.torch.modeling_hrvlm import Projector as Reference

  reference = source.fill(Reference(settings(to_dict(theirs.projector))), 'projector.')
  module = bound(Functional(lambda rngs: Projector(config.projector, rngs=rngs)), stored,
                 'projector/')
  x = _random(8, theirs.projector.n_in)
  with torch.no_grad():
    return {'outputs': difference(module(jnp.asarray(x)), reference(torch.from_numpy(x)).numpy())}


def _fusion(config: ModelConfig, theirs: ModelConfig, source: Source, stored: StoredParams
            ) -> Outputs:
  """Every cross-attention block on random states and visual tokens."""
  settings, made = _built(theirs)
  import torch

  from hrvlm_jax.interop.torch.fusion import CrossAttention as Reference

  reference = source.fill(Reference(settings.fusion, settings.text.width, settings.text.depth,
                                    made), 'fusion.')
  module = bound(Functional(lambda rngs: CrossAttention(config.fusion, config.text, rngs=rngs)),
                 stored, 'fusion/')
  x, visual = _random(1, 7, config.text.width), _random(1, 33, config.fusion.width, seed=1)

  def run(x, visual):
    media = module.media(VisualTokens(visual, jnp.ones(visual.shape[:2], bool)))
    found = []
    for block, keys, values in zip(module._blocks(), media.keys, media.values, strict=True):
      found.append(block(x, keys, values, media.valid))
    return found

  ours, outputs = jax.jit(run)(jnp.asarray(x), jnp.asarray(visual)), {}
  with torch.no_grad():
    media = reference.media(torch.from_numpy(visual[0]), [visual.shape[1]])
    for number, (block, pair, mine) in enumerate(zip(reference.blocks, media, ours, strict=True)):
      expected = block(torch.from_numpy(x), *pair)
      outputs[f'block {number}'] = difference(mine, expected.numpy())
  return outputs
