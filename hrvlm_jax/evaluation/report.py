"""An HTML page of examples: picture, question, answer, references; right and wrong ones.

One file, pictures inside, no script from elsewhere. Boxes that a benchmark knows (the target of a
V*Bench or needle question) are drawn in; with an overlay function also where the model looked.
"""

import base64
from collections.abc import Callable, Mapping, Sequence
import html
import io
from pathlib import Path

from PIL import Image, ImageDraw

from hrvlm_jax.core import images
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.evaluation import records
from hrvlm_jax.evaluation.benchmarks.base import Sample
from hrvlm_jax.evaluation.result import Result

_SIDE = 640

_FACTS = ('split', 'model', 'checkpoint', 'checkpoint_hash', 'prompt_template', 'dataset',
          'generation', 'preprocessing', 'n', 'n_missing', 'n_empty', 'n_truncated', 'n_unparsed',
          'n_bad_images', 'git')

_STYLE = """
body { font-family: sans-serif; margin: 2em auto; max-width: 72em; color: #222 }
table { border-collapse: collapse } td, th { padding: .2em .8em; text-align: left }
td.number { text-align: right; font-variant-numeric: tabular-nums }
.example { border-left: .4em solid #bbb; margin: 1.5em 0; padding: .2em 1em }
.right { border-color: #2a8 } .wrong { border-color: #c43 }
img { max-width: 100%; margin-right: .5em } pre { white-space: pre-wrap; background: #f4f4f4 }
"""


def write(
    path: str | Path,
    result: Result,
    samples: Sequence[Sample],
    found: Mapping[str, Mapping],
    *,
    questions: Mapping[str, str],
    overlay_fn: Callable | None = None,
    count: int = 12,
    reading: Mapping | None = None,
) -> None:
  """Writes the page.

  Args:
    found: prediction records by sample id. questions: rendered prompts by sample id.
    overlay_fn: (image, question) -> picture, called for the examples shown.
    reading: how images are opened, see `core.images.open_image`.
    count: at most so many right and so many wrong examples, spread evenly over the benchmark.
  """
  chosen = choose(result.per_sample, len(samples), count)
  blocks = [_example(samples[i], found.get(samples[i].id), questions.get(samples[i].id, ''),
                     result.per_sample[i] if result.per_sample else None, overlay_fn, reading or {})
            for i in chosen]
  title = html.escape(f'{result.identity["task"]}: {result.identity.get("model", "")}')
  page = (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
          f'<style>{_STYLE}</style></head><body><h1>{title}</h1>{_tables(result)}'
          f'<h2>{len(blocks)} of {len(samples)} examples</h2>{"".join(blocks)}</body></html>\n')
  records.write_whole(path, page)


def choose(scores: Sequence[float], total: int, count: int) -> list[int]:
  """Positions of examples: wrong ones (score below 0.5) first, then right ones, evenly spaced."""
  if not scores:
    return _spread(list(range(total)), 2 * count)
  wrong = [i for i, score in enumerate(scores) if score < 0.5]
  right = [i for i, score in enumerate(scores) if score >= 0.5]
  return _spread(wrong, count) + _spread(right, count)


def _spread(values: list[int], count: int) -> list[int]:
  if len(values) <= count:
    return values
  return [values[i * len(values) // count] for i in range(count)]


def thumbnail(image: Image.Image, boxes: Sequence[Sequence[float]] = (), *,
              side: int = _SIDE) -> Image.Image:
  """The image in RGB, at most `side` pixels a side, with boxes (x0, y0, x1, y1) drawn in red."""
  rgb = images.to_rgb(image)
  factor = min(1.0, side / max(rgb.size))
  size = max(1, round(rgb.width * factor)), max(1, round(rgb.height * factor))
  small = rgb.resize(size, Image.Resampling.BICUBIC) if factor < 1 else rgb.copy()
  draw = ImageDraw.Draw(small)
  for box in boxes:
    x0, y0, x1, y1 = (value * factor for value in box)
    x0, x1, y0, y1 = min(x0, x1), max(x0, x1), min(y0, y1), max(y0, y1)
    draw.rectangle((x0 - 2, y0 - 2, x1 + 2, y1 + 2), outline=(230, 30, 30), width=2)
  return small


def _picture(image: Image.Image) -> str:
  buffer = io.BytesIO()
  image.save(buffer, 'JPEG', quality=85)
  return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _example(sample: Sample, record: Mapping | None, question: str, score: float | None,
             overlay_fn: Callable | None, reading: Mapping) -> str:
  bad = '' if record is None else record.get('bad_image', '')
  opened: list[Image.Image] = []
  if not bad:
    try:
      opened = [image.open(**reading) for image in sample.images]
    except UserError as error:  # answers that exist were scored without looking at it
      bad = str(error)
  boxes = sample.meta.get('boxes') or []
  shown = [_picture(thumbnail(image, boxes)) for image in opened]
  if overlay_fn is not None and opened:
    picture = opened[0] if len(opened) == 1 else tuple(opened)
    shown.append(_picture(thumbnail(overlay_fn(picture, question))))
  kind = '' if score is None else ' right' if score >= 0.5 else ' wrong'
  given = '(none)' if record is None else record['text']
  references = '(hidden)' if sample.answers is None else ' | '.join(dict.fromkeys(sample.answers))
  rows = [('id', sample.id), ('not asked', bad), ('category', sample.category), ('answer', given),
          ('references', references), ('score', '' if score is None else f'{score:.3f}')]
  cells = ''.join(f'<tr><th>{name}</th><td>{html.escape(str(value))}</td></tr>'
                  for name, value in rows if value != '')
  return (f'<div class="example{kind}">{"".join(shown)}<pre>{html.escape(question)}</pre>'
          f'<table>{cells}</table></div>')


def _tables(result: Result) -> str:
  values = ''.join(f'<tr><td>{html.escape(name)}</td><td class="number">{value:.2f}</td></tr>'
                   for name, value in {**result.values, **result.by_category}.items())
  head = 'no score' if result.value is None else f'{result.metric} = {result.value:.2f}'
  if result.ci95:
    head += f' (95 % interval {result.ci95[0]:.2f} to {result.ci95[1]:.2f})'
  notes = ''.join(f'<li>{html.escape(note)}</li>' for note in result.notes)
  facts = {key: value for key, value in result.to_dict().items() if key in _FACTS}
  rows = ''.join(f'<tr><th>{key}</th><td>{html.escape(str(value))}</td></tr>'
                 for key, value in facts.items())
  return f'<p><b>{html.escape(head)}</b></p><ul>{notes}</ul><table>{values}</table>' \
         f'<h2>What it was made from</h2><table>{rows}</table>'
