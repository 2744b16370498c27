"""The built-in tasks as region records: a box and a caption per sign, a caption of all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import io
import os
import pathlib
from typing import Any

import numpy as np

from hrvlm_jax.data.build import build_records
from hrvlm_jax.data.rows import ImageRef, Row
from hrvlm_jax.lab.needle.config import WORD, NeedleConfig
from hrvlm_jax.lab.needle.generate import Plan, paint, plan
from hrvlm_jax.lab.needle.signs import Sign
from hrvlm_jax.lab.needle.tasks import TaskPlan
from hrvlm_jax.systems.ps3.config import PS3Config
from hrvlm_jax.systems.ps3.data import target_map
from hrvlm_jax.systems.ps3.records import RegionCheck, Regions, region_row
from hrvlm_jax.systems.ps3.views import squash


def describe(sign: Sign, text: str | None = None) -> str:
  """The caption of a sign, 'red sign K', or of a word on a page, 'word K'.

  Args:
    text: another reading of the same sign; '' leaves it out.
  """
  what = 'word' if sign.shape == WORD else f'{sign.colour} sign'
  return f'{what} {sign.text if text is None else text}'.strip()


def regions(planned: Plan) -> Regions:
  """The annotations of an example: its signs or words, and its things."""
  captions, boxes = tuple(map(describe, planned.signs)), planned.boxes
  if isinstance(planned, TaskPlan):
    boxes += tuple(thing.box for thing in planned.things)
    captions += tuple(' '.join(filter(None, (thing.name, thing.note))) for thing in planned.things)
  kind = planned.task if isinstance(planned, TaskPlan) else 'needle'
  return Regions(boxes=boxes, captions=captions, kind=kind,
                 global_caption=' '.join(sorted(captions)))


class NeedleRegions:
  """Region records of examples start .. start + n - 1 of a task, painted when they are read.

  Args:
    config: the task; its questions are not used.
  """

  def __init__(self, config: NeedleConfig, n: int, *, seed: int, start: int = 0):
    self.config, self.n, self.seed, self.start = config, n, seed, start

  def __len__(self):
    return self.n

  def __getitem__(self, index: int) -> Row:
    if not 0 <= index < self.n:
      raise IndexError(index)
    planned = plan(self.config, self.seed, self.start + index)
    buffer = io.BytesIO()
    paint(self.config, planned).save(buffer, 'PNG', compress_level=3)
    name = f'{self.config.task}-{self.seed}-{planned.index}'
    return region_row(name, ImageRef(f'{name}.png', data=buffer.getvalue()), regions(planned),
                      name)


def probes(
  config: NeedleConfig, encoder: PS3Config, tokenize: Callable[[Sequence[str]], np.ndarray], *,
  seed: int, images: int, batch_size: int = 20,
) -> Iterator[dict[str, np.ndarray]]:
  """Batches of regions for `systems.ps3.recall`: one sign of every image, in full view.

  Yields:
    pixels uint8 [b S S 3], target uint8 [b S S], prompt int32 [b t] (the sign without its text),
    candidates int32 [b k t] (the sign with every text of the alphabet), answer int32 [b].
  """
  side = encoder.scales[-1]
  rows: list[dict[str, Any]] = []
  for index in range(images):
    planned = plan(config, seed, index)
    sign = planned.target
    scale = np.array([side / config.width, side / config.height] * 2)
    texts = [describe(sign, letter) for letter in config.alphabet]
    rows.append({
      'pixels': squash(paint(config, planned), side),
      'target': target_map([np.asarray(sign.box) * scale], side, side).astype(np.uint8),
      'prompt': tokenize([describe(sign, '')])[0], 'candidates': tokenize(texts),
      'answer': np.int32(config.alphabet.index(sign.text))})
    if len(rows) == batch_size:
      yield {key: np.stack([row[key] for row in rows]) for key in rows[0]}
      rows = []


def write_regions(config: NeedleConfig, folder: str | os.PathLike, n: int, *, seed: int,
                  progress: bool = True) -> pathlib.Path:
  """Writes n examples as ArrayRecord; returns the manifest. A finished folder is left as it is."""
  return build_records(NeedleRegions(config, n, seed=seed), folder, name='regions',
                       check=RegionCheck(), progress=progress)
