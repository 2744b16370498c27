"""Accuracy against crops, tokens, looks or resolution (MC-LLaVA's grid search, PS3's Figure 9).

A sweep runs one benchmark at several settings of a system's knobs; each has its own result folder,
so a sweep that was stopped goes on. The curve is kept as CSV and drawn as a picture.
The knob `image_side` shrinks the images before the model sees them.
"""

import ast
from collections.abc import Callable, Mapping, Sequence
import csv
import dataclasses
import io
import itertools
import json
from pathlib import Path
from typing import Any

from PIL import Image

from hrvlm_jax.core import images
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.evaluation import benchmarks, records
from hrvlm_jax.evaluation.benchmarks.base import Benchmark
from hrvlm_jax.evaluation.model import EvaluatedModel
from hrvlm_jax.evaluation.runner import Model, Options, evaluate
from hrvlm_jax.vlm.answer import METHODS, Answerer

IMAGE_SIDE = 'image_side'


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
  benchmark: str | Benchmark, make_model: Callable[[Mapping[str, Any]], Model],
  settings: Sequence[Mapping[str, Any]], *, x: str, data: str | Path, out: str | Path,
  options: Options,
) -> list[Point]:
  """Runs a benchmark at each setting; writes `curve.csv` and `curve.png` into `out`.

  Args:
    make_model: knobs -> model, such as {'max_crops': 8, 'num_tokens': 728}.
    settings: the knobs of each run. All of them go into the run's `preprocessing`.
    x: the knob on the axis; the other knobs name the line.

  Raises:
    UserError: no setting, a setting without the knob `x`, two equal settings, a benchmark without
      a score.
  """
  if not settings or any(x not in knobs for knobs in settings):
    raise UserError(f'sweep: expected at least one setting, each with the knob {x!r}; got '
                    f'{[dict(knobs) for knobs in settings]}')
  names = [folder_name(knobs) for knobs in settings]
  if len(set(names)) != len(names):
    raise UserError(f'sweep: the same setting comes twice: {", ".join(names)}')
  out = Path(out)
  points = []
  for name, knobs in zip(names, settings):
    model = make_model(knobs)
    setup = dataclasses.replace(model.setup,
                                preprocessing={**model.setup.preprocessing, **knobs})
    result = evaluate(benchmark, dataclasses.replace(model, setup=setup), data=data,
                      out=out / name, options=options)
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


def folder_name(knobs: Mapping[str, Any]) -> str:
  """Of the results of one setting."""
  words = (f'{key}={value if isinstance(value, (int, float, str)) else json.dumps(value)}'
           for key, value in knobs.items())
  return '_'.join(words).replace('/', '-')


def _mean(answers, key: str) -> float | None:
  values = [answer[key] for answer in answers if answer.get(key) is not None]
  return sum(values) / len(values) if values else None


def shrink(image: Image.Image, side: int) -> Image.Image:
  """The image with its longer side at most `side` pixels, bicubic; never enlarged."""
  if side < 1:
    raise ValueError(f'side: expected at least 1 pixel, got {side}')
  longest = max(image.size)
  if longest <= side:
    return image
  size = tuple(max(1, round(length * side / longest)) for length in image.size)
  return images.resize_exact(images.to_rgb(image), size)


def at_side(answer_fn, side: int):
  """An answer function that sees every image shrunk to `side`."""
  def shrunk(picture):
    if picture is None:
      return None
    if isinstance(picture, tuple):
      return tuple(shrink(image, side) for image in picture)
    return shrink(picture, side)
  return lambda pairs: answer_fn([(shrunk(picture), question) for picture, question in pairs])


def _grid(knobs: Sequence[str]) -> list[dict[str, Any]]:
  """Every combination of `KEY=VALUE,VALUE,...`."""
  axes: dict[str, list[Any]] = {}
  for knob in knobs:
    key, equals, values = knob.partition('=')
    if not key or not equals or not values:
      raise UserError(f'knob {knob!r}: expected KEY=VALUE,VALUE,...')
    try:
      axes[key] = list(ast.literal_eval(f'({values},)'))
    except (ValueError, SyntaxError):
      axes[key] = values.split(',')
  return [dict(zip(axes, values)) for values in itertools.product(*axes.values())]


def _model(checkpoint: str, knobs: Mapping[str, Any], max_new_tokens: int) -> Model:
  """A checkpoint at one setting: knobs of its encoder, of a method, of the images."""
  encoder: dict[str, Any] = {}
  methods: dict[str, dict[str, Any]] = {}
  for key, value in knobs.items():
    name, _, field = key.partition('.')
    if name in METHODS:
      methods.setdefault(name, {})[field] = value
    elif key != IMAGE_SIDE:
      encoder[key] = value
  answerer = Answerer.load(checkpoint, exif='ignore', encoder_options=encoder, methods=methods)
  model = EvaluatedModel(answerer, max_new_tokens=max_new_tokens).described(
    name=Path(checkpoint).name, checkpoint=checkpoint)
  if IMAGE_SIDE not in knobs:
    return model
  return dataclasses.replace(model, answer=at_side(model.answer, knobs[IMAGE_SIDE]), queue=None)


def run(
  *, checkpoint: str, data: str, out: str, benchmark: str, x: str, knobs: Sequence[str],
  split: str | None = None, limit: int | None = None, batch_size: int = 8,
  max_new_tokens: int | None = None,
) -> list[str]:
  """One benchmark at several settings: a table and a curve.

  Args:
    checkpoint: checkpoint or work directory of a run.
    data: folder with the benchmark's official files. out: folder of the results.
    x: the knob on the axis.
    knobs: KEY=VALUE,VALUE,...: of the encoder (max_crops=4,8), of a method (fastv.ratio=0,0.5) or
      image_side; every combination is run.

  Raises:
    UserError: as `sweep`.
  """
  new = max_new_tokens or benchmarks.get(benchmark).max_new_tokens
  points = sweep(benchmark, lambda knobs: _model(checkpoint, knobs, new), _grid(knobs), x=x,
                 data=data, out=out,
                 options=Options(split=split, limit=limit, batch_size=batch_size))
  return [f'{p.series}, {x} {p.x:g}: {p.value:.2f} ({p.low:.2f} to {p.high:.2f})' for p in points]
