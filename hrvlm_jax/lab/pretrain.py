"""Pre-training a part of a small model on the built-in task: one loop, one head for each part.

Real systems start from encoders and language models trained elsewhere. Here is the miniature of
that stage, on examples drawn afresh at every step. What differs between parts is a head, a
`Pretraining`: `glyphs` (a ViT on crops), `scenes` (encoders that see an image in one piece),
`symbols` (a language model, without pixels).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import concurrent.futures
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hrvlm_jax.core import paths
from hrvlm_jax.core.module import Functional, Module, Rngs
from hrvlm_jax.lab.needle import NeedleConfig
from hrvlm_jax.training.optimizer import learning_rate, muon

NOTHING_WEIGHT = 0.05  # most patches show no letter; they would drown the others
Flat = Mapping[str, Any]
Report = Callable[[int, float, float], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretraining:
  """A head: what is drawn, read and kept. `steps` steps of Muon, with a warm-up and a cosine.

  Attributes:
    needle: the task whose letters are learned.
    below: the module of the reader whose parameters are handed on ('tower/'), without that name.
  """

  needle: NeedleConfig
  steps: int
  batch_size: int = 32
  learning_rate: float = 2e-3
  warmup: int = 50
  weight_decay: float = 0.01
  seed: int = 0
  below: ClassVar[str] = ''

  def reader(self, rngs: Rngs) -> Module:
    """The part that learns with its readouts."""
    raise NotImplementedError

  def draw(self, step: int) -> Any:
    """The batch of a step, a tree of arrays, a function of (seed, step)."""
    raise NotImplementedError

  def loss(self, reader: Module, batch: Any, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(loss, share of what was read rightly). `key` belongs to the step."""
    raise NotImplementedError

  def ready(self, flat: Flat) -> dict[str, Any]:
    """What the first step gets of the drawn parameters."""
    return dict(flat)

  def kept(self, flat: Flat) -> dict[str, Any]:
    """What is handed on."""
    return {path.removeprefix(self.below): leaf for path, leaf in flat.items()
            if path.startswith(self.below)}

  def judged(self) -> tuple[Pretraining, range] | None:
    """A head and its steps whose batches say at the end how well it reads; None: the last 20."""
    return None

  def rng(self, step: int) -> np.random.Generator:
    """The source of a step's randomness."""
    return np.random.default_rng(np.random.SeedSequence([self.seed, step]))


def pretrain(
  task: Pretraining, start: Flat | None = None, *, report: Report | None = None
) -> tuple[dict[str, Any], float]:
  """Trains; returns (what is kept, by path; share read rightly in fresh batches).

  The next batch is drawn in a thread while the device works.

  Args:
    start: parameters of the reader to begin with, by path; others are drawn.
    report: called with (step, loss, share read rightly) every step.
  """
  fn = Functional(lambda rngs: task.reader(rngs))
  flat = task.ready(paths.flatten(jax.jit(fn.init)(jax.random.key(task.seed))))
  flat |= {path: jnp.asarray(leaf) for path, leaf in (start or {}).items() if path in flat}
  rate = learning_rate('cosine', peak=task.learning_rate, total_steps=task.steps,
                       warmup_steps=min(task.warmup, task.steps))
  tx = optax.chain(optax.clip_by_global_norm(1.0), muon(rate, task.weight_decay, b2=0.98))

  @jax.jit
  def update(flat, opt, step, batch):
    key = jax.random.fold_in(jax.random.key(task.seed), step)
    loss_of = lambda flat: task.loss(fn.bind(paths.unflatten(flat)), batch, key)
    (loss, read), grads = jax.value_and_grad(loss_of, has_aux=True)(flat)
    updates, opt = tx.update(grads, opt, flat)
    return optax.apply_updates(flat, updates), opt, loss, read

  opt, history = tx.init(flat), []
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    ahead = pool.submit(task.draw, 0)
    for step in range(task.steps):
      batch = ahead.result()
      ahead = pool.submit(task.draw, step + 1)
      flat, opt, loss, read = update(flat, opt, step, batch)
      history.append(float(read))
      if report is not None:
        report(step + 1, float(loss), history[-1])
  if (judged := task.judged()) is not None:
    judge, steps = judged
    read_of = jax.jit(lambda flat, batch, key: judge.loss(
      fn.bind(paths.unflatten(flat)), batch, key)[1])
    key = jax.random.key(task.seed)
    history = [float(read_of(flat, judge.draw(step), key)) for step in steps]
  return task.kept(flat), float(np.mean(history[-20:]))


def weighted_entropy(logits, labels, weight, scale: float = 1):
  """Mean cross-entropy of integer labels [...] under logits [... c], weighted, times `scale`."""
  lost = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  return scale * (lost * weight).sum() / jnp.maximum(weight.sum(), 1)
