"""Captions with boxes -> questions with boxes: what VILA-HD learns to look with.

The paper turns the local captions of the pre-training data into questions with LLaMA-3.1 and keeps
the boxes (2503.19903, figure 8). An asker does it here: `module:function` with (caption, box, size,
kind) -> (question, answer); the built-in one takes templates that say where on the picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import json
import os
import pathlib

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.data.rows import BadRow, Row, Source, open_images
from hrvlm_jax.systems.ps3.curate import NINTHS
from hrvlm_jax.systems.ps3.records import regions_of

Asker = Callable[[str, Sequence[float], tuple[int, int], str | None], tuple[str, str]]
TEMPLATES = {
  'document': ('Which text stands {place} of the page?', 'What is written {place} of the page?',
               'Read the line {place} of the page.'),
  None: ('What can be seen {place} of the picture?', 'Describe what is {place} of the picture.',
         'Look {place} of the picture. What is there?'),
}


def template_question(caption: str, box: Sequence[float], size: tuple[int, int],
                      kind: str | None) -> tuple[str, str]:
  """(question, answer) without a model: where the middle of the box lies; the caption answers."""
  x, y = (box[0] + box[2]) / 2 / size[0], (box[1] + box[3]) / 2 / size[1]
  column, row = (min(2, max(0, int(3 * v))) for v in (x, y))
  known = TEMPLATES['document' if kind == 'document' else None]
  text = known[sum(caption.encode()) % len(known)]
  return text.format(place=NINTHS[3 * row + column]), caption


def write_questions(source: Source, folder: str | os.PathLike, *, ask: Asker = template_question
                    ) -> tuple[int, list[BadRow]]:
  """Writes `train.json`, rows with `box`, and the images beside it; returns (rows, bad records).

  `train.json` is written last, so a folder that has one is complete.

  Raises:
    UserError: an asker that returns something else than two texts, no record that can be used, or
      a folder that has questions already.
  """
  folder = pathlib.Path(folder)
  target = folder / 'train.json'
  if target.exists():
    raise UserError(f'{target}: is there already; choose another folder')
  (folder / 'images').mkdir(parents=True, exist_ok=True)
  rows, bad = [], []
  for index in range(len(source)):
    try:
      row = source[index]
      rows += _of_record(row, index, folder, ask)
    except BadRow as fault:
      bad.append(fault)
  if not rows:
    raise UserError(f'{folder}: none of the {len(bad)} records has a box that can be asked about'
                    + (f' (the first: {bad[0]})' if bad else ''))
  part = folder / '.train.json.part'
  part.write_text(json.dumps(rows, ensure_ascii=False, indent=1) + '\n', 'utf-8')
  part.replace(target)
  return len(rows), bad


def _of_record(row: Row, index: int, folder: pathlib.Path, ask: Asker) -> list[dict]:
  found = regions_of(row)
  if not found.boxes:
    return []
  image = open_images(row, exif='ignore')[0]  # boxes count the pixels as they are stored
  name = f'images/{index:08d}.png'
  made = []
  for number, (box, caption) in enumerate(zip(found.boxes, found.captions, strict=True)):
    pair = ask(caption, box, image.size, found.kind)
    if not (isinstance(pair, tuple) and len(pair) == 2 and all(
        isinstance(text, str) and text.strip() for text in pair)):
      raise UserError(f'--asker: returned {pair!r:.80} for a caption, expected two texts, '
                      '(question, answer)')
    question, answer = (text.strip() for text in pair)
    made.append({'id': f'{row.id or index}-{number}', 'image': name,
                 'box': [float(v) for v in box],
                 'conversations': [{'from': 'human', 'value': f'<image>\n{question}'},
                                   {'from': 'gpt', 'value': answer}]})
  image.convert('RGB').save(folder / name, compress_level=3)
  return made
