"""`own`: one's own questions, in any form that training reads, scored by a metric by name.

The easiest form is JSON lines, {"image": "a.png", "question": "What?", "answer": "STOP"}; `answers`
may list several right ones, `choices` the options of a question whose answer is a letter, and
`category` a group of its own in the result.
"""

from collections.abc import Callable, Sequence
import dataclasses
from pathlib import Path
from typing import Any

from hrvlm_jax.core.errors import UserError, raise_all, unknown
from hrvlm_jax.core.registry import load_callable
from hrvlm_jax.data.rows import BadRow, ImageRef, inside
from hrvlm_jax.data.sources import open_source
from hrvlm_jax.evaluation.benchmarks.base import (
  MAX_LISTED,
  Benchmark,
  Collector,
  ImageSource,
  Sample,
  Samples,
  Scores,
)
from hrvlm_jax.evaluation.benchmarks.scoring import by_category, percent
from hrvlm_jax.evaluation.metrics import vqa
from hrvlm_jax.evaluation.metrics.letter import letters, mcq_letter
from hrvlm_jax.language.chat import IMAGE
from hrvlm_jax.training.answers import METRICS

NAME, DEFAULT_METRIC = 'own', 'plain'
# Metrics of all references, or of the options, beside those of (answer, one reference).
_WHOLE: dict[str, Callable[[str, Sample], float]] = {
  'vqa': lambda text, sample: vqa.accuracy_official(text, sample.answers),
  'letter': lambda text, sample: float(
    mcq_letter(text, sample.choices) == sample.answers[0].strip().rstrip('.)').lstrip('(').upper()),
}


def metrics() -> list[str]:
  """Names of the metrics."""
  return sorted({*METRICS.names(), *_WHOLE})


def own(metric: str | None = None, *, images: str | Path | None = None) -> Benchmark:
  """The benchmark of one's own questions.

  Args:
    metric: a name of `metrics`; None: equal but for case and the space around it.
    images: folder that image paths are relative to; None: that of the file.

  Raises:
    UserError: unknown metric.
  """
  name = metric or DEFAULT_METRIC
  if name in _WHOLE:
    one = _WHOLE[name]
  elif name in METRICS.names() or ':' in name:
    single = load_callable(name, 'metric') if ':' in name else METRICS.get(name)
    one = lambda text, sample: max(float(single(text, answer)) for answer in sample.answers)
  else:
    raise UserError(f'{unknown(name, metrics(), what="metric")}; all: {", ".join(metrics())}; '
                    'yours: module:function')

  def score(samples: Sequence[Sample], texts: Sequence[str]) -> Scores:
    points = [float(one(text, sample)) for text, sample in zip(texts, samples)]
    return Scores(name, {name: percent(points)}, per_sample=points, units=points,
                  by_category=by_category(samples, points))

  return Own(NAME, 'your own questions', 'a file of questions and answers', {'all': None},
             lambda path, split: read(path, images, choices=name == 'letter'), score,
             max_new_tokens=64)


@dataclasses.dataclass(frozen=True)
class Own(Benchmark):
  """A benchmark whose data is a file, or a folder that is a data set."""

  def load(self, folder: str | Path, split: str | None = None) -> Samples:
    """See `Benchmark.load`."""
    if split not in (None, 'all'):
      raise UserError(f'{self.name}: unknown split {split!r}; it has all')
    return self.read(Path(folder), 'all')


def read(path: Path, images: str | Path | None, *, choices: bool) -> Samples:
  """Every question with its answer; each question of a conversation is asked alone.

  Raises:
    UserError: a data set that cannot be opened; all rows that cannot be used.
  """
  source = open_source(path, images=images)
  c = Collector(NAME, Path(path))
  samples, problems, seen = [], c.problems, set()
  for index in range(len(source)):
    try:
      row = source[index]
    except BadRow as error:
      problems.append(str(error))
      continue
    pairs = list(zip(row.messages[::2], row.messages[1::2]))
    if not pairs or [m.role for m in row.messages] != ['user', 'assistant'] * len(pairs):
      problems.append(f'{row.where}: expected questions and their answers')
      continue
    for turn, (asked, told) in enumerate(pairs):
      number = (row.id or str(index)) + (f'#{turn}' if turn else '')
      if number in seen:
        problems.append(f'{row.where}: the id {number} is there twice')
      seen.add(number)
      question, answers = asked.text.replace(IMAGE, '').strip(), (told.text,)
      several = row.extra.get('answers')
      if isinstance(several, list) and several and len(pairs) == 1:
        answers = tuple(map(str, several))
      if not question or not any(answer.strip() for answer in answers):
        problems.append(f'{row.where}: the question or its answer is empty')
      options = row.extra.get('choices', row.extra.get('options')) or ()
      if len(options):
        options = c.options(options, row.where) or ()
      elif choices:
        problems.append(f"{row.where}: has no 'choices', which the metric letter reads")
      samples.append(Sample(
        number, tuple(map(_source, row.images)), question, answers, tuple(options),
        category=str(row.extra.get('category') or ''),
        prompt=_prompt(question, options, row.system)))
  raise_all(f'{NAME}: {path}', problems, most=MAX_LISTED)
  if not samples:
    raise UserError(f'{NAME}: {path} has no questions')
  return Samples(samples, [Path(path)] if Path(path).is_file() else [])


def _prompt(question: str, options: Sequence[Any], system: str | None = None) -> str | None:
  if system:  # a benchmark asks by text alone
    return f'{system}\n{_prompt(question, options) or question}'
  if not options:
    return None
  lines = [f'{letter}. {option}' for letter, option in zip(letters(len(options)), options)
           if option]
  return '\n'.join([question, *lines,
                    "Answer with the option's letter from the given choices directly."])


def _source(ref: ImageRef) -> ImageSource:
  path = Path(inside(ref.folder, ref.path)) if ref.data is None else None
  return ImageSource(ref.name, ref.read, path)
