"""Whether slots answer as fixed batches do, token by token, and how near a tie was where not.

    python scripts/serving_equal.py runs/quickstart/checkpoint runs/quickstart/data/eval

The two have arrays of different shapes, so their sums differ by rounding: a token may fall the
other way where the two best are that near. Says how many answers differ, how many of these at two
tokens within 1e-4 in log-probability, and the smallest gap met. Status 1: an answer differs that is
no tie.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time

from hrvlm_jax.core import machine
from hrvlm_jax.evaluation.provenance import git_commit
from hrvlm_jax.lab.needle.write import read_records
from hrvlm_jax.serving.engine import Engine
from hrvlm_jax.serving.requests import Request
from hrvlm_jax.vlm.answer import Answerer, answer_all

TIE = 1e-4


def compare(answerer: Answerer, items: list, *, slots: int, batch_size: int, new_tokens: int
            ) -> dict:
  """What differs between both ways of answering (paths of images, question)."""
  requests = [Request(images=images, question=question, max_new_tokens=new_tokens, logprobs=2)
              for images, question in items]
  engine = Engine(answerer, slots=slots)
  found = sorted(engine.run(requests), key=lambda result: result.index)
  sampling, rows = answerer.sampling(max_new_tokens=new_tokens), []

  def ask(part: list) -> list[list[int]]:
    batch = answerer.batch([answerer.opened(item) for item in part])
    return answerer.generated(answerer.generator.prompt(batch), sampling).rows()

  for _, answers in answer_all(ask, items, batch_size=batch_size):
    rows += answers
  gap = lambda report: report.best[0][1] - report.best[1][1]
  gaps = [gap(report) for result in found for report in result.reports]
  differing = []
  for row, result in zip(rows, found, strict=True):
    place = next((i for i, (a, b) in enumerate(zip(row, result.tokens)) if a != b), None)
    if place is not None:
      differing.append(gap(result.reports[place]))
    elif len(row) != len(result.tokens):
      raise AssertionError(f'{row} and {result.tokens} end apart')
  return {'answers': len(rows), 'tokens': len(gaps), 'differing': len(differing),
          'ties': sum(value < TIE for value in differing), 'smallest_gap': min(gaps)}


def main() -> int:
  """See the head of this file."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('checkpoint')
  parser.add_argument('task', type=pathlib.Path, help='a folder of `hrvlm needle`')
  parser.add_argument('--limit', type=int, default=200)
  parser.add_argument('--new-tokens', type=int, default=16)
  parser.add_argument('--out', type=pathlib.Path)
  arguments = parser.parse_args()
  items = [([str(arguments.task / record['image'])], record['question'])
           for record in read_records(arguments.task)[:arguments.limit]]
  result = {'date': time.strftime('%Y-%m-%d'), 'commit': git_commit(),
            'machine': machine.here().title,
            **compare(Answerer.load(arguments.checkpoint), items, slots=8, batch_size=5,
                      new_tokens=arguments.new_tokens)}
  text = json.dumps(result, indent=2)
  print(text)
  if arguments.out:
    arguments.out.write_text(f'{text}\n')
  return int(result['differing'] > result['ties'])


if __name__ == '__main__':
  sys.exit(main())
