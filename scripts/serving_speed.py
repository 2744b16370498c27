"""Continuous batching beside fixed batches: steps, tokens per second, time to the first token.

    python scripts/serving_speed.py --size 100m --out serving_cpu.json

32 requests that all arrive at once, 8 slots, images prepared beforehand, new tokens per request
round(2**u) with u uniform in 1..7. Fixed batches of 8, in the order of arrival, run until their
longest answer ends. Slots take the requests in that order (`arrival`, as the server does), or those
that may grow longest first (`known`, as `Engine.run` does with a list). Programs are compiled
before. Beside the seconds of the clock stand those of the processor, which other work on the
machine touches less. The three take turns, `--rounds` of each; kept are the medians, and the ratio
to the fixed batches of the same round. `prompts` is what reading the prompts takes, on both sides
alike.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
import json
import pathlib
import statistics
import sys
import time
from typing import Any

import jax
import numpy as np
from PIL import Image

from benchmarks.ours.train import model_config
from hrvlm_jax.core import machine
from hrvlm_jax.evaluation.provenance import git_commit
from hrvlm_jax.language.generate import Sampling
from hrvlm_jax.language.prompt import tokenizer_of
from hrvlm_jax.serving.engine import Engine, again
from hrvlm_jax.serving.requests import Prepared, Request
from hrvlm_jax.vlm import model as vlm
from hrvlm_jax.vlm.answer import Answerer

SLOTS, REQUESTS, SEED = 8, 32, 0
QUESTION = 'What is written on the sign?'


def lengths() -> list[int]:
  """New tokens of each request."""
  draws = np.random.default_rng(SEED).uniform(1, 7, REQUESTS)
  return np.rint(2 ** draws).astype(int).tolist()


def continuous(engine: Engine, prepared: list[Prepared]) -> dict[str, Any]:
  """All requests in their order: steps, seconds until each one's first token."""
  state, waiting, begin, first = engine.start(), list(prepared), time.perf_counter(), []
  while waiting or state.busy:
    if waiting and state.free is not None:
      state, row, piece = engine.admit(state, waiting.pop(0))
      first.append(time.perf_counter() - begin)
      pieces = {row: piece}
    else:
      state, pieces = engine.step(state)
    for row, piece in pieces.items():
      if piece.reason:
        state = state.release(row)
  return {'steps': state.counts.steps, 'first_p50': float(np.quantile(first, .5)),
          'first_p95': float(np.quantile(first, .95))}


def fixed(answerer: Answerer, batches: list[dict[str, Any]], budgets: list[int]) -> dict[str, Any]:
  """Batches in the order of arrival, each one loop on the device until its longest answer ends."""
  steps = 0
  for number, batch in enumerate(batches):
    longest = max(budgets[number * SLOTS:(number + 1) * SLOTS])
    embeds, valid, extras = answerer.generator.prompt(batch)
    made = answerer.generator.generate(embeds, valid, Sampling(max_new_tokens=longest),
                                       extras=extras)
    assert (made.lengths == longest).all()
    steps += longest - 1  # the first token comes from reading the prompt
  return {'steps': steps}


def timed(run: Callable[[], dict[str, Any]], tokens: int) -> dict[str, Any]:
  """What a side found, its seconds and its tokens per second of clock and of processor."""
  clock, processor = time.perf_counter(), time.process_time()
  found = run()
  clock, processor = time.perf_counter() - clock, time.process_time() - processor
  return {**found, 'seconds': clock, 'processor_seconds': processor,
          'tokens_per_second': tokens / clock, 'tokens_per_processor_second': tokens / processor}


def middle(found: list[dict[str, Any]]) -> dict[str, Any]:
  """The median of every number."""
  return {key: statistics.median(one[key] for one in found) for key in found[0]}


def main() -> int:
  """See the head of this file."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--size', choices=('tiny', '100m'), default='100m')
  parser.add_argument('--system', choices=('mc_llava', 'pheye', 'llava_hr'), default='mc_llava')
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--out', type=pathlib.Path)
  arguments = parser.parse_args()
  config = model_config(arguments.system, arguments.size)
  params = jax.jit(vlm.build(config).init)(jax.random.key(0))
  answerer = Answerer(config, params, tokenizer_of('byte'))
  budgets = lengths()
  rng = np.random.default_rng(1)
  images = [Image.fromarray(rng.integers(0, 256, (100, 100, 3), np.uint8)) for _ in budgets]
  probe = len(answerer.batch([([images[0]], QUESTION)])['tokens'][0])
  engine = Engine(answerer, slots=SLOTS, length=probe + 128)
  prepared = [engine.prepare(Request(images=[image], question=QUESTION, max_new_tokens=budget,
                                     stop_ids=()))
              for image, budget in zip(images, budgets, strict=True)]
  continuous(engine, prepared[:1])  # compiled
  compiled = engine.compilations()
  batches = [answerer.batch([([image], QUESTION) for image in images[start:start + SLOTS]])
             for start in range(0, len(images), SLOTS)]
  fixed(answerer, batches, budgets)  # every budget is a program of its own
  longest = sorted(prepared, key=lambda one: -one.request.max_new_tokens)
  only = [again(one, max_new_tokens=1) for one in prepared]
  tokens, rounds = sum(budgets), []
  for _ in range(arguments.rounds):
    rounds.append({
      'arrival': timed(lambda: continuous(engine, prepared), tokens),
      'known': timed(lambda: continuous(engine, longest), tokens),
      'fixed': timed(lambda: fixed(answerer, batches, budgets), tokens)})
  result = {
    'date': time.strftime('%Y-%m-%d'), 'commit': git_commit(), 'machine': machine.here().title,
    'system': arguments.system, 'size': arguments.size, 'slots': SLOTS, 'requests': REQUESTS,
    'seed': SEED, 'tokens': tokens, 'device': str(jax.devices()[0]),
    **{side: middle([one[side] for one in rounds]) for side in rounds[0]},
    'prompts': timed(lambda: continuous(engine, only), len(budgets)),
    'compiled_meanwhile': engine.compilations() - compiled}
  for order in ('arrival', 'known'):
    for key in ('steps', 'tokens_per_second', 'tokens_per_processor_second'):
      ratios = [one[order][key] / one['fixed'][key] for one in rounds]
      result[order] |= {f'{key}_ratio': statistics.median(ratios)}
      if key == 'tokens_per_second':
        result[order]['of_each_round'] = ratios
  text = json.dumps(result, indent=2)
  print(text)
  if arguments.out:
    arguments.out.write_text(f'{text}\n')
  return 0


if __name__ == '__main__':
  sys.exit(main())
