"""Accuracy against crops, tokens, looks or resolution (MC-LLaVA's grid search, PS3's Figure 9).

A sweep runs one benchmark at several settings of a system's knobs; each has its own result folder,
so a sweep that was stopped goes on. The curve is kept as CSV and drawn as a picture.
"""

from collections.abc import Callable, Mapping, Sequence
import csv
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.evaluation import records
from hrvlm_jax.evaluation.benchmarks.base import Benchmark
from hrvlm_jax.evaluation.runner import AnswerFn, Setup, evaluate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
  """One setting of a curve.

  Attributes:
    series: name of the line. x: value on the axis.
    value, low, high: headline and its 95 % interval.
    image_tokens, seconds: means over the answers; None: not known.
  """

  series: str
  x: float
  value: float
  low: float
  high: float
  image_tokens: float | None = None
  seconds: float | None = None


def sweep(
    benchmark: str | Benchmark,
    make_answer_fn: Callable[[Mapping[str, Any]], AnswerFn],
    settings: Sequence[Mapping[str, Any]],
    *,
    x: str,
    out: str | Path,
    setup: Setup,
    **options,
) -> list[Point]:
  """Runs a benchmark at each setting; writes `curve.csv` and `curve.png` into `out`.

  Args:
    make_answer_fn: knobs -> answer function, such as {'max_crops': 8, 'num_tokens': 728}.
    settings: the knobs of each run. All of them go into the run's `preprocessing`.
    x: the knob on the axis; the other knobs name the line.
    options: further arguments of `runner.evaluate` (data, split, limit, batch_size, ...).

  Raises:
    UserError: no setting, a setting without the knob `x`, two equal settings, a benchmark without
      a score.
  """
  if not settings or any(x not in knobs for knobs in settings):
    raise UserError(f'sweep: expected at least one setting, each with the knob {x!r}; got '
                    f'{[dict(knobs) for knobs in settings]}')
  names = [_name(knobs) for knobs in settings]
  if len(set(names)) != len(names):
    raise UserError(f'sweep: the same setting comes twice: {", ".join(names)}')
  out = Path(out)
  points = []
  for name, knobs in zip(names, settings):
    made = dataclasses.replace(setup, preprocessing={**setup.preprocessing, **knobs})
    result = evaluate(benchmark, make_answer_fn(knobs), out=out / name, setup=made, **options)
    if result is None:
      continue
    if result.value is None:
      raise UserError(f'sweep: {result.identity["task"]} {result.identity["split"]} has no score')
    low, high = result.ci95 or (result.value, result.value)
    answers = records.merge(out / name).values()
    series = ', '.join(f'{k} {v}' for k, v in knobs.items() if k != x) or setup.model
    points.append(Point(series=series, x=float(knobs[x]), value=result.value, low=low, high=high,
                        image_tokens=_mean(answers, 'num_image_tokens'),
                        seconds=_mean(answers, 'seconds')))
  if points:
    write_csv(points, out / 'curve.csv', x=x)
    plot(points, out / 'curve.png', xlabel=x.replace('_', ' '), ylabel=result.metric)
  return points


def write_csv(points: Sequence[Point], path: str | Path, *, x: str = 'x') -> None:
  """The points as a table; the column of the axis bears the knob's name."""
  text = io.StringIO(newline='')
  writer = csv.writer(text, lineterminator='\n')
  writer.writerow(['series', x, 'value', 'low', 'high', 'image_tokens', 'seconds'])
  for p in points:
    writer.writerow([p.series, p.x, p.value, p.low, p.high, p.image_tokens, p.seconds])
  records.write_whole(path, text.getvalue())


def plot(points: Sequence[Point], path: str | Path, *, xlabel: str, ylabel: str) -> None:
  """Draws one line for each series with its intervals; a dot's area grows with the image tokens."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure
  if not points:
    raise ValueError('plot needs at least one point')
  figure = Figure(figsize=(6, 4), layout='constrained')
  FigureCanvasAgg(figure)
  axes = figure.add_subplot()
  most = max((p.image_tokens or 0 for p in points), default=0)
  for series in dict.fromkeys(p.series for p in points):
    line = sorted((p for p in points if p.series == series), key=lambda p: p.x)
    xs, ys = [p.x for p in line], [p.value for p in line]
    drawn, = axes.plot(xs, ys, label=series)
    axes.fill_between(xs, [p.low for p in line], [p.high for p in line], alpha=0.15)
    area = [20 + 80 * (p.image_tokens or 0) / most if most else 30 for p in line]
    axes.scatter(xs, ys, s=area, color=drawn.get_color())
  axes.set_xlabel(xlabel)
  axes.set_ylabel(ylabel)
  if len({p.series for p in points}) > 1:
    axes.legend(fontsize='small')
  Path(path).parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=120)


def _name(knobs: Mapping[str, Any]) -> str:
  words = (f'{key}={value if isinstance(value, (int, float, str)) else json.dumps(value)}'
           for key, value in knobs.items())
  return '_'.join(words).replace('/', '-')


def _mean(answers, key: str) -> float | None:
  values = [answer[key] for answer in answers if answer.get(key) is not None]
  return sum(values) / len(values) if values else None
