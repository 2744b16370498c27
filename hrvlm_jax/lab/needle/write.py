"""A task on disk: a folder with images and one LLaVA JSON.

    <folder>/task.json       config, seed, start: what the folder holds
    <folder>/images/*.png    one image per example, named after its index
    <folder>/needle.json     list of records (generate.record), written last

Every file is written under another name and then moved into place, so that a file that exists is
whole. A run that was stopped goes on where it was; one that is done is recognised.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
import dataclasses
import io
import json
import os
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hrvlm_jax.checkpoint.files import whole_file
from hrvlm_jax.core import json_text
from hrvlm_jax.core.config import to_dict
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.lab.needle import backgrounds
from hrvlm_jax.lab.needle.config import NeedleConfig
from hrvlm_jax.lab.needle.generate import Plan, paint, plan, record

RECORDS, TASK, IMAGES = 'needle.json', 'task.json', 'images'
FORMATS = ('png', 'jpg')


def write(
  config: NeedleConfig,
  folder: str | os.PathLike,
  n: int,
  *,
  seed: int,
  start: int = 0,
  image_format: str = 'png',
  workers: int = 1,
  progress: bool = True,
) -> Path:
  """Writes examples start .. start + n - 1 of a task; returns the path of the JSON.

  A folder that already holds more examples of the same task is cut down to n in the JSON only;
  one that holds fewer is extended.

  Args:
    config: the task.
    folder: made if absent.
    n: number of examples, at least 1.
    seed: of the task; use another one, or another `start`, for the evaluation set.
    start: first index.
    image_format: 'png' (exact) or 'jpg' (quality 95, smaller).
    workers: threads that paint and compress.
    progress: whether to show a progress bar on standard error.

  Raises:
    UserError: n below 1, an unknown format, a folder that holds another task or cannot be written,
      photographs or documents that cannot be used.
  """
  if n < 1:
    raise UserError(f'needle: found n = {n}, expected at least 1 example')
  if image_format not in FORMATS:
    raise UserError(f'needle: found image format {image_format!r}, expected one of {FORMATS}')
  # What cannot be used leaves no folder behind, which would be taken for another task's.
  if config.documents:
    plan(config, seed, start)
  elif config.photographs:
    backgrounds.files(config.photographs)
  folder = Path(folder)
  task = {'version': 1, 'seed': seed, 'start': start, 'image_format': image_format,
          'config': to_dict(config)}
  try:
    (folder / IMAGES).mkdir(parents=True, exist_ok=True)
    _claim(folder, task)
    return _write(config, folder, range(start, start + n), seed, image_format, workers, progress)
  except OSError as error:
    raise UserError(f'needle: cannot write to {folder} ({error.strerror or error})') from error


def read_records(folder: str | os.PathLike) -> list[dict]:
  """The records of a written folder.

  Raises:
    UserError: the folder holds no finished task.
  """
  path = Path(folder) / RECORDS
  if not path.is_file():
    raise UserError(f'needle: {path} is missing, expected a folder that `write` has finished')
  return json_text.loads(path.read_text())


def _claim(folder, task):
  """Notes what the folder holds, or checks that it is the same."""
  path = folder / TASK
  if not path.exists():
    _replace(path, json.dumps(task, indent=2).encode())
    return
  try:
    found = json_text.loads(path.read_text())
  except ValueError as error:
    raise UserError(f'{path}: is not JSON ({error}); remove it and write again') from error
  keys = [key for key in task if key != 'config' and found.get(key) != task[key]]
  keys += [f'config.{key}' for key in differing(found.get('config', {}), task['config'])]
  if keys:
    raise UserError(f'{folder}: holds another needle task (it differs in {", ".join(keys)}); '
                    f'choose another folder or remove this one')


def differing(found: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
  """Keys of a config in which one that was noted differs.

  What it was noted without has its default value: a folder keeps its meaning when the config gets a
  new field.
  """
  before = {f.name: f.default for f in dataclasses.fields(NeedleConfig)} | dict(found)
  plain = json.loads(json.dumps(before))
  return [key for key, value in json.loads(json.dumps(dict(config))).items()
          if plain.get(key) != value]


def _write(config, folder, indices, seed, image_format, workers, progress):
  plans = [plan(config, seed, index) for index in indices]
  names = [f'{IMAGES}/{index:06d}.{image_format}' for index in indices]
  records = json.dumps([record(p, name) for p, name in zip(plans, names)])
  missing = [(p, name) for p, name in zip(plans, names) if not (folder / name).exists()]

  def one(item: tuple[Plan, str]) -> None:
    planned, name = item
    buffer = io.BytesIO()
    if image_format == 'png':
      paint(config, planned).save(buffer, 'PNG', compress_level=3)
    else:
      paint(config, planned).save(buffer, 'JPEG', quality=95, subsampling=0)
    _replace(folder / name, buffer.getvalue())

  bar = tqdm(total=len(plans), initial=len(plans) - len(missing), desc=f'needle {folder.name}',
             unit='image', disable=not progress)
  with bar, ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
    try:
      for _ in pool.map(one, missing):
        bar.update()
    except BaseException:
      pool.shutdown(wait=True, cancel_futures=True)
      raise
  path = folder / RECORDS
  if not path.exists() or path.read_text() != records:
    _replace(path, records.encode())
  return path


def _replace(path, data):
  """Writes a file so that it is either absent, old or complete."""
  with whole_file(path) as part:
    part.write_bytes(data)
