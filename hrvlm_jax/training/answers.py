"""The evaluator `answers`: answers to held-out questions, kept with pictures of where it looked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
import pathlib
import time
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np
from PIL import Image

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.execution import Execution
from hrvlm_jax.core.registry import Registry, load_callable
from hrvlm_jax.data.order import dataset
from hrvlm_jax.data.rows import BadRow, Fields, image_sizes, open_images
from hrvlm_jax.data.sources import open_source
from hrvlm_jax.language.chat import IMAGE
from hrvlm_jax.language.prompt import tokenizer_of
from hrvlm_jax.parallel import distributed
from hrvlm_jax.training.evaluators import Evaluator, EvaluatorOptions
from hrvlm_jax.vlm import model as vlm
from hrvlm_jax.vlm.answer import Answerer
from hrvlm_jax.vlm.answer_mesh import answer_over_mesh

_STAND_IN = (64, 64)  # pixels of the picture that takes the place of one that cannot be used

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
    split, fields: of a table; None: `data.eval_split`, `data.eval_fields`.
    rows: how many of its rows are used; None: all.
    metric: a name in `METRICS`, or `module:function` of (answer, reference) -> 0 to 1.
    overlays: pictures kept per evaluation of where the model looked.
    max_new_tokens: of an answer; where all references are shorter, two more than the longest.
    batch_size: questions at a time.
  """

  name: str = 'answers'
  data: str | None = None
  images: str | None = None
  split: str | None = None
  fields: Fields | None = None
  rows: int | None = None
  metric: str = 'plain'
  overlays: int = 2
  max_new_tokens: int = 16
  batch_size: int = 25


class Answers(Evaluator):
  """Greedy answers to the first question of every row.

  Writes `answers.jsonl` and overlays of the first images. Programs are compiled once per run. A row
  that cannot be used is counted and left out, as in training (`data.bad_rows`): one that its text
  or the header of an image shows to be bad before the first step, another at its first evaluation.
  Images are decoded as their turn comes.
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
    self.source = dataset(open_source(
      path, images=o.images or run.data.images, split=o.split or run.data.eval_split,
      fields=o.fields or run.data.eval_fields))
    count = len(self.source) if o.rows is None else min(o.rows, len(self.source))
    self.bad: Counter[str] = Counter()
    self.rows = [row for index in range(count) if (row := self._question(index)) is not None]
    self._need_rows()
    if self.bad:
      kinds = ', '.join(f'{number} {kind}' for kind, number in sorted(self.bad.items()))
      self.notes = (f'{o.label}: {sum(self.bad.values())} of {count} rows cannot be used ({kinds}) '
                    f'and are left out; the last: {self.last_fault}',)
    self._seen = False
    self._answerer: Answerer | None = None

  def _need_rows(self, last: str = '') -> None:
    if not self.rows:
      raise UserError(f'training.evaluators: none of the rows of {self.options.label} can be used '
                      f'({dict(self.bad)}{last}); hrvlm data check lists them')

  def _left_out(self, error: UserError) -> None:
    """Counts a row that cannot be used.

    Raises:
      UserError: with `data.bad_rows='fatal'`.
    """
    if self.config.data.bad_rows == 'fatal':
      raise error
    self.bad[error.kind if isinstance(error, BadRow) else 'example'] += 1
    self.last_fault = str(error)

  def run(self, params: Any, step: int) -> dict[str, float]:
    """<label>_accuracy: mean score of the answers; <label>_seconds; <label>_bad_rows, if any."""
    clock, o = time.perf_counter(), self.options
    answerer = self._with(params)
    longest = max(len(answerer.text.tokenizer.encode(row['expected'])) for row in self.rows)
    rows = [dict(row) for row in self.rows]
    bad: dict[int, UserError] = {}

    def item(number: int) -> tuple[list[Any], str]:
      self.beat()
      try:
        images = self._images(rows[number]['index'])
        if not self._seen:  # what only the system can judge: too many crops, an odd shape
          answerer.system.views(images, self.config.model.encoder)
      except UserError as error:
        bad[number] = error
        images = [Image.new('RGB', _STAND_IN)]
      return images, answerer.text.asked(rows[number]['question'], len(images),
                                         rows[number]['system'])

    texts = answer_over_mesh(
      answerer, len(rows), item, batch_size=o.batch_size, layout=self.layout,
      max_new_tokens=min(o.max_new_tokens, 2 + longest))
    for row, text in zip(rows, texts, strict=True):
      row['answer'], row['score'] = text, float(self.metric(text, row['expected']))
    rows = self._without(rows, bad)
    self._write(self.folder(self.workdir, step), answerer, rows)
    values = self.values(rows) | {f'{o.label}_seconds': time.perf_counter() - clock}
    return values | ({f'{o.label}_bad_rows': sum(self.bad.values())} if self.bad else {})

  def _without(self, rows: list[dict[str, Any]], bad: Mapping[int, UserError]
               ) -> list[dict[str, Any]]:
    """The rows that every process could open; the others are counted and not asked again."""
    self._seen = True
    flags = np.zeros(len(rows), np.int32)
    flags[list(bad)] = 1
    if jax.process_count() > 1:
      flags = np.asarray(multihost_utils.process_allgather(flags)).max(axis=0)
    for number in np.flatnonzero(flags).tolist():
      self._left_out(bad.get(number, UserError(f'{rows[number]["where"]}: cannot be used')))
    good = np.flatnonzero(flags == 0).tolist()
    self.rows = [self.rows[number] for number in good]
    self._need_rows(f'; the last: {self.last_fault}' if flags.any() else '')
    return [rows[number] for number in good]

  def values(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The metrics of scored rows (id, question, expected, answer, score, extra)."""
    return {f'{self.options.label}_accuracy': float(np.mean([row['score'] for row in rows]))}

  def _write(self, folder: pathlib.Path, answerer: Answerer, rows: list[dict[str, Any]]) -> None:
    main = distributed.is_main()
    if main:
      folder.mkdir(parents=True, exist_ok=True)
    for number, row in enumerate(rows[:self.options.overlays]):
      if not (images := self._images(row['index'])):
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

  def _question(self, index: int) -> dict[str, Any] | None:
    """The question of a row, or None where the row cannot be used."""
    try:
      row = self.source[index]
      image_sizes(row, max_pixels=self.config.data.max_pixels)
      turns = [message for message in row.messages if message.role in ('user', 'assistant')]
      if len(turns) < 2 or turns[0].role != 'user' or turns[1].role != 'assistant':
        raise BadRow('conversation', row.where, 'expected a question and its answer')
    except UserError as error:
      self._left_out(error)
      return None
    return {'id': row.id or str(index), 'question': turns[0].text.replace(IMAGE, '').strip(),
            'expected': turns[1].text.strip(), 'system': row.system, 'extra': row.extra,
            'index': index, 'where': row.where}


def _verdict(score: float) -> dict[str, Any]:
  """Right or wrong, and the score where it is neither."""
  return {'correct': score == 1} | ({} if score in (0, 1) else {'score': score})
