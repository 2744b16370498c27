"""ToMe and VisionZip behind a trained model: fewer visual tokens in its prompt, no training.

The form of PS3's comparison (paper 2503.19903, Table 4): the encoder runs whole, its finished
tokens are merged (ToMe) or selected (VisionZip), and the language model reads a shorter prompt.
What the paper leaves open is chosen here: ToMe merges in rounds of at most half, measured on the
tokens themselves; VisionZip takes a tenth of its tokens as contextual ones, and its scores and keys
come from the block that reads the features (the one that made them is not kept), averaged over the
patches of a token. Methods: `systems/baselines/pruning.py`.

Axis letters: b rows, i images of a row, n tokens of an image, k kept of them, t positions, d width.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from hrvlm_jax.core.attention import first_true
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.execution import HERE, Execution
from hrvlm_jax.core.module import Functional
from hrvlm_jax.core.registry import load_object
from hrvlm_jax.language.generate import Generator
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.baselines import pruning
from hrvlm_jax.systems.contract import ModelConfig, VisualTokens
from hrvlm_jax.vlm.answer import Answerer, Items
from hrvlm_jax.vlm.model import VLM, Batch
from hrvlm_jax.vlm.two_pass import TwoPassVLM


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prune:
  """Settings.

  Attributes:
    method: 'tome' or 'visionzip'.
    keep: share of the visual tokens of an image that stays.
    contextual: of VisionZip: share of those that gather what was not selected.
  """

  method: Literal['tome', 'visionzip'] = 'tome'
  keep: float = 0.5
  contextual: float = 0.1

  def __post_init__(self):
    problems = [] if self.method in ('tome', 'visionzip') else [
      f"method must be 'tome' or 'visionzip', got {self.method!r}"]
    problems += [f'{name} must lie in {span}, got {value}' for name, value, span, good in (
      ('keep', self.keep, '(0, 1]', 0 < self.keep <= 1),
      ('contextual', self.contextual, '[0, 1)', 0 <= self.contextual < 1)) if not good]
    if problems:
      raise ValueError('Prune: ' + '; '.join(problems))

  def kept(self, tokens: int) -> int:
    """How many of an image's tokens stay."""
    return max(1, round(self.keep * tokens))


class _Pruned(VLM):
  """A model with visual tokens in its prompt, which are made fewer first."""

  def __init__(self, config: ModelConfig, prune: Prune, **options):
    super().__init__(config, **options)
    self.prune = prune
    self.per_image = registry.get(config.system).tokens(config.encoder)

  def seen(self, batch: Batch, *, ex: Execution = HERE) -> VisualTokens:
    """The finished visual tokens of all rows."""
    return self.encode(batch['views'], ex=ex)

  def fewer(self, batch: Batch, visual: VisualTokens, *, ex: Execution = HERE) -> VisualTokens:
    """The same places; of each image's the first hold what stays, the others are padding."""
    each, keep = self.per_image, self.prune.kept(self.per_image)
    rows, places, width = visual.values.shape
    images = places // each
    x = visual.values.reshape(rows * images, each, width)
    if self.prune.method == 'tome':
      x = pruning.tome_reduce(x, keep)
    else:
      scores, keys = self.vision.token_attention(visual.info, ex=ex)
      index = batch['views']['index']
      pick = lambda a: jnp.take(a.reshape(-1, *a.shape[2:]), index, axis=0).reshape(
        rows * images, each, *a.shape[2:])
      contextual = min(round(self.prune.contextual * keep), keep - 1)
      x = pruning.visionzip(x, pick(scores), pick(keys), dominant=keep - contextual,
                            contextual=contextual, class_token=False)
    x = jnp.pad(x, ((0, 0), (0, each - keep), (0, 0))).reshape(rows, places, width)
    first = jnp.arange(places) % each < keep
    whole = visual.valid.reshape(rows, images, each)[:, :, :1]
    valid = jnp.broadcast_to(whole, (rows, images, each)).reshape(rows, places) & first
    return VisualTokens(x, valid, visual.info)

  def prompt(self, batch: Batch, *, ex: Execution = HERE):
    """See `VLM.prompt`; as many positions less as `dropped` of the batch is long."""
    visual = self.fewer(batch, self.seen(batch, ex=ex), ex=ex)
    embeds, valid = self.embed(batch, visual, ex=ex)
    index, real = first_true(valid, valid.shape[1] - len(batch['dropped']))
    return jnp.take_along_axis(embeds, index[..., None], axis=1), real, {}


class PrunedVLM(_Pruned, VLM):
  """A prefix model."""


class PrunedTwoPassVLM(_Pruned, TwoPassVLM):
  """A two-pass model; its second pass reads fewer tokens."""

  def seen(self, batch: Batch, *, ex: Execution = HERE) -> VisualTokens:
    """See `_Pruned.seen`."""
    return self.look(batch, ex=ex)[0]


def build(config: ModelConfig, prune: Prune, *, param_dtype=jnp.float32) -> Functional:
  """The model for generation (layers unrolled); its parameters are those of `vlm.model.build`.

  Raises:
    UserError: a model this cannot work with, and why.
  """
  kind = load_object(config.fusion.model, f'fusion {config.fusion.kind}')
  kind = {VLM: PrunedVLM, TwoPassVLM: PrunedTwoPassVLM}.get(kind)
  system, encoder = registry.get(config.system), config.encoder
  problems = []
  if kind is None:
    problems.append('it makes the visual tokens of the prompt fewer; fusion '
                    f'{config.fusion.kind!r} has none')
  if system.tokens(encoder) is None:
    problems.append(f'the number of visual tokens of {config.system} depends on the image')
  if getattr(encoder, 'looks', 'all') != 'all' or getattr(encoder, 'budgets', None):
    problems.append(f'{config.system} selects patches already; ask for all with '
                    '--encoder.looks=all (and neither tokens nor budgets)')
  elif hasattr(encoder, 'looks') and encoder.tokens is not None:
    problems.append('encoder.tokens selects patches already; leave it out')
  elif hasattr(encoder, 'plan') and (left := _left_out(encoder.plan())):
    problems.append(f'the looks of {config.system} leave {left} patches out even with looks=all '
                    '(shares per scale that do not come out even); set tower.budgets or max_select')
  if prune.method == 'visionzip' and not hasattr(system.encoder, 'token_attention'):
    problems.append(f"visionzip needs the attention of the tower, which {config.system} does not "
                    "give; use method 'tome', or the system 'reduced' with a step VisionZip")
  if problems:
    raise UserError('Pruning cannot work here: ' + '; '.join(problems))
  return Functional(lambda rngs: kind(config, prune, unrolled=True, param_dtype=param_dtype,
                                      rngs=rngs))


def _left_out(plan: Any) -> int:
  """How many patches no look takes."""
  taken = sum(sum(look) for look in plan.counts[0])
  return sum(rows * columns for rows, columns in plan.grids[1:]) - taken


class PruneAnswerer(Answerer):
  """The same model, answering from fewer visual tokens.

  Raises:
    UserError: as `build`, and for a model that FastV is laid over.
  """

  def __init__(self, answerer: Answerer, prune: Prune = Prune()):
    if 'fastv' in answerer.methods:
      raise UserError('prune and fastv both make the visual tokens fewer; choose one')
    vars(self).update(vars(answerer))
    old, self.prune = answerer.generator, prune
    self.generator = Generator(build(answerer.config, prune), old.params, ex=old.ex)
    self.methods = {**answerer.methods, 'prune': dataclasses.asdict(prune)}

  def batch(self, items: Items) -> dict[str, Any]:
    """See `Answerer.batch`; the length of `dropped` is what every row has less."""
    batch = super().batch(items)
    each = self.system.tokens(self.config.encoder)
    images = ((batch['visual_index'] >= 0) & batch['valid']).sum(axis=1) // each
    fewest = int(images.min()) if len(images) else 0
    return batch | {'dropped': np.zeros(fewest * (each - self.prune.kept(each)), bool)}
