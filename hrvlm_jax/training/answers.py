"""The evaluator `answers`: answers to held-out questions, kept with pictures of where it looked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
import pathlib
import time
from typing import Any

import numpy as np

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.execution import Execution
from hrvlm_jax.core.registry import Registry, load_callable
from hrvlm_jax.data.rows import open_images
from hrvlm_jax.data.sources import open_source
from hrvlm_jax.language.chat import IMAGE
from hrvlm_jax.language.prompt import tokenizer_of
from hrvlm_jax.parallel import distributed
from hrvlm_jax.training.evaluators import Evaluator, EvaluatorOptions
from hrvlm_jax.vlm import model as vlm
from hrvlm_jax.vlm.answer import Answerer
from hrvlm_jax.vlm.answer_mesh import answer_over_mesh

Metric = Callable[[str, str], float]  # answer, reference -> 0 to 1

METRICS = Registry('metric', {
  'plain': 'hrvlm_jax.vlm.answer:is_correct',
  'anls': 'hrvlm_jax.evaluation.in_run:anls',
  'contains': 'hrvlm_jax.evaluation.metrics.match:contains',
  'exact': 'hrvlm_jax.evaluation.metrics.match:exact',
  'gqa': 'hrvlm_jax.evaluation.metrics.match:em_gqa',
  'ocrvqa': 'hrvlm_jax.evaluation.metrics.match:em_ocrvqa',
  'realworldqa': 'hrvlm_jax.evaluation.metrics.match:em_realworldqa',
  'relaxed': 'hrvlm_jax.evaluation.metrics.match:em_relaxed',
}, variable='HRVLM_METRICS')


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswersOptions(EvaluatorOptions):
  """Which questions, and how their answers are scored.

  Attributes:
    data: any data set that training reads; None: `data.eval`.
    images: folder that its image paths are relative to; None: `data.images`.
    rows: how many of its rows are used; None: all.
    metric: a name in `METRICS`, or `module:function` of (answer, reference) -> 0 to 1.
    overlays: pictures kept per evaluation of where the model looked.
    max_new_tokens: of an answer; where all references are shorter, two more than the longest.
    batch_size: questions at a time.
  """

  name: str = 'answers'
  data: str | None = None
  images: str | None = None
  rows: int | None = None
  metric: str = 'plain'
  overlays: int = 2
  max_new_tokens: int = 16
  batch_size: int = 25


class Answers(Evaluator):
  """Greedy answers to the first question of every row.

  Writes `answers.jsonl` and overlays of the first images. Programs are compiled once per run.
  """

  Options = AnswersOptions

  def prepare(self, run: Any, *, layout: Any, workdir: pathlib.Path) -> None:
    """See `Evaluator.prepare`.

    Raises:
      UserError: no data, data that cannot be read, an unknown metric.
    """
    o = self.options
    if (path := o.data or run.data.eval) is None:
      raise UserError(f'training.evaluators: {o.label} has no data; set its data, or data.eval')
    self.config, self.layout, self.workdir = run, layout, workdir
    self.metric = load_callable(o.metric, 'metric') if ':' in o.metric else METRICS.get(o.metric)
    self.source = open_source(path, images=o.images or run.data.images)
    self.count = len(self.source) if o.rows is None else min(o.rows, len(self.source))
    self._answerer: Answerer | None = None

  def run(self, params: Any, step: int) -> dict[str, float]:
    """<label>_accuracy: mean score of the answers; <label>_seconds."""
    clock, o = time.perf_counter(), self.options
    answerer = self._with(params)
    rows = [self._question(i) for i in range(self.count)]
    longest = max(len(answerer.text.tokenizer.encode(row['expected'])) for row in rows)
    texts = answer_over_mesh(
      answerer, self.count, lambda i: (self._images(i), rows[i]['question']),
      batch_size=o.batch_size, layout=self.layout,
      max_new_tokens=min(o.max_new_tokens, 2 + longest))
    for row, text in zip(rows, texts, strict=True):
      row['answer'], row['score'] = text, float(self.metric(text, row['expected']))
    self._write(self.folder(self.workdir, step), answerer, rows)
    return self.values(rows) | {f'{o.label}_seconds': time.perf_counter() - clock}

  def values(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The metrics of scored rows (id, question, expected, answer, score, extra)."""
    return {f'{self.options.label}_accuracy': float(np.mean([row['score'] for row in rows]))}

  def _write(self, folder: pathlib.Path, answerer: Answerer, rows: list[dict[str, Any]]) -> None:
    main = distributed.is_main()
    if main:
      folder.mkdir(parents=True, exist_ok=True)
    for number, row in enumerate(rows[:self.options.overlays]):
      if not (images := self._images(number)):
        continue
      picture = answerer.overlay(images[0], row['question'])
      if main:
        picture.save(folder / f'{number}.png')
    if main:
      keys = ('id', 'question', 'expected', 'answer')
      (folder / 'answers.jsonl').write_text(''.join(
        json.dumps({key: row[key] for key in keys} | _verdict(row['score'])) + '\n'
        for row in rows))

  def _with(self, params: Any) -> Answerer:
    if self._answerer is None:
      self._answerer = Answerer(self.config.model, params, tokenizer_of(self.config.data.tokenizer),
                                ex=Execution(mesh=self.layout.mesh), **self.config.data.reading)
    else:
      self._answerer.generator.params = vlm.unroll(self.config.model, params)
    return self._answerer

  def _images(self, index: int) -> list[Any]:
    return open_images(self.source[index], **self.config.data.reading)

  def _question(self, index: int) -> dict[str, Any]:
    row = self.source[index]
    turns = [message for message in row.messages if message.role in ('user', 'assistant')]
    if len(turns) < 2 or turns[0].role != 'user' or turns[1].role != 'assistant':
      raise UserError(f'{row.where}: expected a question and its answer')
    return {'id': row.id or str(index), 'question': turns[0].text.replace(IMAGE, '').strip(),
            'expected': turns[1].text.strip(), 'extra': row.extra}


def _verdict(score: float) -> dict[str, Any]:
  """Right or wrong, and the score where it is neither."""
  return {'correct': score == 1} | ({} if score in (0, 1) else {'score': score})
