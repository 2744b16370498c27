"""Pre-training of a tiny language model for the built-in task: signs as symbols, no pixels.

Real systems start from a language model that can already read; one drawn at random spends most of a
short run on learning to look up an answer at all, whatever its encoder shows. Here a decoder learns
that part once: in the places of the visual tokens stand learned vectors for "a sign of this colour
with this letter" among vectors for nothing, the text is the task's own. What no pixel-free training
can give stays to be learned: what the visual tokens of an encoder mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import concurrent.futures
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hrvlm_jax.core import paths
from hrvlm_jax.core.layers import Embedding
from hrvlm_jax.core.module import Functional, Module, Rngs
from hrvlm_jax.lab.needle import NeedleConfig, plan, record
from hrvlm_jax.language.chat import get_template
from hrvlm_jax.language.config import DecoderConfig
from hrvlm_jax.language.conversation import messages_from_llava
from hrvlm_jax.language.decoder import Decoder
from hrvlm_jax.language.prompt import Text, choose_bucket, pad_batch
from hrvlm_jax.systems.contract import VisualTokens
from hrvlm_jax.training.losses import chunked_cross_entropy
from hrvlm_jax.training.optimizer import muon
from hrvlm_jax.training.schedules import learning_rate
from hrvlm_jax.vlm.model import merge

NOTHING = -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class SymbolsConfig:
  """The pre-training run.

  Attributes:
    needle: the task; `turns` questions per scene.
    slots: numbers of visual tokens a scene may have; one is drawn for every step.
    spread: most tokens that show one sign.
    noise: standard deviation of what is added to every token's vector.
    lengths: buckets of text plus visual tokens.
  """

  needle: NeedleConfig
  text: DecoderConfig
  steps: int
  slots: tuple[int, ...] = (25, 64)
  spread: int = 4
  noise: float = 0.05
  batch_size: int = 32
  learning_rate: float = 2e-3
  warmup: int = 50
  weight_decay: float = 0.01
  lengths: tuple[int, ...] = (64, 96, 128, 160, 192, 256, 384)
  seed: int = 0


class SymbolReader(Module):
  """The decoder, and the vectors that stand for what an encoder would show."""

  def __init__(self, config: SymbolsConfig, *, rngs: Rngs):
    self.config, width, std = config, config.text.width, config.text.init_std
    self.language = Decoder(config.text, rngs=rngs)
    self.colours = Embedding(len(config.needle.colours), width, std=std, rngs=rngs)
    self.letters = Embedding(len(config.needle.alphabet), width, std=std, rngs=rngs)
    self.nothing = Embedding(1, width, std=std, rngs=rngs)

  def __call__(self, batch: Mapping[str, Any], key) -> jax.Array:
    """Final-normed states [b t d].

    batch: of `pad_batch`, with `colours` and `letters` int32 [b n] of every visual token.
    """
    colours, letters = batch['colours'], batch['letters']
    shown = self.colours(jnp.clip(colours, 0)) + self.letters(jnp.clip(letters, 0))
    values = jnp.where(colours[..., None] >= 0, shown, self.nothing(jnp.zeros_like(colours)))
    values += self.config.noise * jax.random.normal(key, values.shape)
    visual = VisualTokens(values, jnp.ones(colours.shape, bool))
    embeds = merge(self.language.embed(batch['tokens']), visual, batch['visual_index'])
    return self.language(embeds, jnp.asarray(batch['valid']))

  def logits(self, hidden: jax.Array) -> jax.Array:
    """float32 logits [... v]."""
    return self.language.logits(hidden)


def _draw(config: SymbolsConfig, texts: tuple[Text, ...], step: int) -> dict[str, np.ndarray]:
  """The batch of a step, a function of (seed, step): one way of writing, one number of slots."""
  rng = np.random.default_rng(np.random.SeedSequence([config.seed, step]))
  text, slots = texts[step % len(texts)], int(rng.choice(config.slots))
  # Where the first question of a row says where to look, rows have one question.
  turns = 1 if get_template(text.chat).steers else config.needle.turns
  colours = np.full((config.batch_size, slots), NOTHING, np.int32)
  letters = colours.copy()
  examples = []
  for row in range(config.batch_size):
    made = plan(config.needle, config.seed, step * config.batch_size + row)
    messages = messages_from_llava(record(made, '')['conversations'])[:2 * turns]
    examples.append(text.conversation(messages, [slots]))
    places = iter(rng.permutation(slots).tolist())
    for sign in made.signs:
      for _ in range(int(rng.integers(1, config.spread + 1))):
        place = next(places)
        colours[row, place] = config.needle.colours.index(sign.colour)
        letters[row, place] = config.needle.alphabet.index(sign.text[0])
  longest = max(len(example['tokens']) for example in examples)
  batch = pad_batch(examples, choose_bucket(longest, config.lengths))
  return {key: batch[key] for key in ('tokens', 'visual_index', 'valid', 'labels')} | {
    'colours': colours, 'letters': letters}


def pretrain(
  config: SymbolsConfig, texts: tuple[Text, ...], *,
  report: Callable[[int, float, float], None] | None = None,
) -> tuple[dict[str, Any], float]:
  """Trains the decoder; returns (its parameters, share of right targets in the last 20 batches).

  Args:
    texts: ways of writing (template and tokenizer), which take turns; image tokens must have places
      in all of them.
    report: called with (step, loss, accuracy) every step.
  """
  fn = Functional(lambda rngs: SymbolReader(config, rngs=rngs))
  flat = paths.flatten(jax.jit(fn.init)(jax.random.key(config.seed)))
  rate = learning_rate('cosine', peak=config.learning_rate, total_steps=config.steps,
                       warmup_steps=min(config.warmup, config.steps))
  tx = optax.chain(optax.clip_by_global_norm(1.0), muon(rate, config.weight_decay, b2=0.98))

  def loss_of(flat, batch, key):
    module = fn.bind(paths.unflatten(flat))
    hidden = module(batch, key)
    total, count = chunked_cross_entropy(hidden, batch['labels'], module.logits)
    targets = batch['labels'][:, 1:]
    counted = targets >= 0
    right = (module.logits(hidden[:, :-1]).argmax(-1) == targets) & counted
    return total / jnp.maximum(count, 1), right.sum() / jnp.maximum(counted.sum(), 1)

  @jax.jit
  def update(flat, opt, step, batch):
    key = jax.random.fold_in(jax.random.key(config.seed), step)
    (loss, accuracy), grads = jax.value_and_grad(loss_of, has_aux=True)(flat, batch, key)
    updates, opt = tx.update(grads, opt, flat)
    return optax.apply_updates(flat, updates), opt, loss, accuracy

  opt, history = tx.init(flat), []
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    ahead = pool.submit(_draw, config, texts, 0)
    for step in range(config.steps):
      batch = ahead.result()
      ahead = pool.submit(_draw, config, texts, step + 1)
      flat, opt, loss, accuracy = update(flat, opt, step, batch)
      history.append(float(accuracy))
      if report is not None:
        report(step + 1, float(loss), history[-1])
  return paths.unflatten(flat)['language'], float(np.mean(history[-20:]))
