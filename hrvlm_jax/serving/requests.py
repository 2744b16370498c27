"""What is asked of the engine, and what it says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np

from hrvlm_jax.core.errors import UserError, raise_all
from hrvlm_jax.serving.draw import TOP, Settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """One question and how it is to be answered.

  Attributes:
    images: PIL images, paths or bytes.
    question: text, or whatever else the answerer's `batch` takes for one.
    max_new_tokens: the end token counts.
    temperature: 0 is greedy.
    top_k, top_p: 0 and 1 switch them off.
    seed: of the randomness, which is this request's alone.
    choice: number of this answer among several to the same question; each draws its own numbers.
    stop: strings at which the text ends.
    stop_ids: tokens at which it ends; None: the model's own; () only at `max_new_tokens`.
    logprobs: how many of the best tokens to report beside each chosen one; None: no reports.
  """

  images: Sequence[Any] = ()
  question: Any
  max_new_tokens: int = 64
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  seed: int = 0
  choice: int = 0
  stop: tuple[str, ...] = ()
  stop_ids: tuple[int, ...] | None = None
  logprobs: int | None = None

  def __post_init__(self):
    problems = []
    if self.max_new_tokens < 1:
      problems.append(f'max_new_tokens must be at least 1, found {self.max_new_tokens}')
    if not 0 <= self.temperature < float('inf'):
      problems.append(f'temperature must be a number from 0, found {self.temperature}')
    if not 0 < self.top_p <= 1:
      problems.append(f'top_p must lie above 0 and at most at 1, found {self.top_p}')
    if not 0 <= self.top_k < 2**31:
      problems.append(f'top_k must be a whole number from 0, found {self.top_k}')
    if not -2**63 <= self.seed < 2**63:
      problems.append(f'seed must be a number of 64 bits, found {self.seed}')
    if self.logprobs is not None and not 0 <= self.logprobs <= TOP:
      problems.append(f'logprobs must lie from 0 to {TOP}, found {self.logprobs}')
    raise_all('request', problems)


@dataclasses.dataclass(frozen=True)
class Prepared:
  """A request as arrays: everything the host does before the device reads it.

  Attributes:
    batch: of one row, see `vlm.model.Batch`.
    chosen: how it draws.
    prompt_tokens: real places of the prompt, those of visual tokens among them.
    shape: names the program that reads it.
  """

  request: Request
  batch: Mapping[str, Any]
  chosen: Settings
  prompt_tokens: int
  shape: tuple


@dataclasses.dataclass(frozen=True)
class Report:
  """Log-probability of a chosen token, and the best tokens in its place as (token, value)."""

  token: int
  logprob: float
  best: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class Piece:
  """What one token adds to an answer.

  Attributes:
    text: it may be '' (half a character, a possible stop string).
    token: the new token.
    report: where the request wants one.
    reason: why the answer ends here, 'stop' or 'length'; None: it goes on.
  """

  text: str
  token: int
  report: Report | None = None
  reason: str | None = None


@dataclasses.dataclass(frozen=True)
class Counts:
  """What was done since `Engine.start`: prompts read, steps of all slots, tokens drawn."""

  prompts: int = 0
  steps: int = 0
  tokens: int = 0

  def add(self, **more: int) -> Counts:
    """The same and so many more."""
    return dataclasses.replace(self, **{
      name: getattr(self, name) + number for name, number in more.items()})


@dataclasses.dataclass(frozen=True)
class Result:
  """A whole answer.

  Attributes:
    index: number of the request among those given.
    text: without end token and outer white space.
    tokens: all new tokens, an end token included.
    reason: 'stop' or 'length'; 'error': there is no answer, see `error`.
    prompt_tokens: see `Prepared`.
    counts: what had been done when it was complete.
  """

  index: int
  text: str
  tokens: tuple[int, ...]
  reason: str
  prompt_tokens: int
  reports: tuple[Report, ...] = ()
  error: UserError | None = None
  counts: Counts = Counts()


def shape_of(batch: Mapping[str, Any]) -> tuple:
  """Names and shapes of all arrays of a batch: equal for batches that one program reads."""
  found = []
  for name in sorted(batch):
    value = batch[name]
    found.append((name, shape_of(value) if isinstance(value, Mapping) else np.shape(value)))
  return tuple(found)
