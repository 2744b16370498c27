"""Writes a data set as ArrayRecord shards: self-contained, checksummed, resumable.

    <folder>/<name>-00000-of-00004.array_record     rows of `rows.encode_record`
    <folder>/<name>.manifest.json                   shards with rows and checksums, written last

A shard appears under its name only when it is complete, with its checksum beside it until the
manifest is written; a run that was stopped writes the shards that are missing. Rows that cannot be
used are left out and listed in the manifest, or stop the build.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from typing import Literal

from tqdm import tqdm

from hrvlm_jax.checkpoint.files import whole_file
from hrvlm_jax.core import json_text
from hrvlm_jax.core.errors import UserError, raise_all
from hrvlm_jax.data.checks import RowCheck
from hrvlm_jax.data.rows import BadRow, Source, encode_record
from hrvlm_jax.data.tables import write_records

VERSION = 1


def build_records(
  source: Source,
  folder: str | os.PathLike,
  *,
  name: str = 'data',
  shard_rows: int = 1000,
  bad_rows: Literal['skip', 'fatal'] = 'skip',
  check: RowCheck | None = None,
  progress: bool = True,
) -> pathlib.Path:
  """Writes all rows of a source; returns the path of the manifest.

  Args:
    shard_rows: rows of the source per shard (bad ones included).
    bad_rows: leave bad rows out and list them, or stop at the first.
    check: what makes a row bad; default: its images cannot be decoded, its turns do not alternate.

  Raises:
    UserError: another data set is in the folder under this name, or a bad row under 'fatal'.
  """
  folder, check = pathlib.Path(folder), check or RowCheck()
  folder.mkdir(parents=True, exist_ok=True)
  shards = -(-len(source) // shard_rows)
  plan = {'version': VERSION, 'rows': len(source), 'shard_rows': shard_rows}
  _claim(folder / f'{name}.plan.json', plan)
  manifest = folder / f'{name}.manifest.json'
  if manifest.exists():
    return manifest
  entries = []
  with tqdm(total=len(source), desc=f'build {name}', unit='row', disable=not progress) as bar:
    for shard in range(shards):
      path = folder / f'{name}-{shard:05d}-of-{shards:05d}.array_record'
      span = range(shard * shard_rows, min((shard + 1) * shard_rows, len(source)))
      note = path.with_name(path.name + '.json')
      if not (path.exists() and note.exists()):
        _write_shard(source, span, path, note, check, bad_rows)
      entries.append(json_text.loads(note.read_text()))
      bar.update(len(span))
  _replace(manifest, plan | {'shards': entries})
  for shard in entries:
    (folder / f'{shard["file"]}.json').unlink()
  return manifest


def verify_records(manifest: str | os.PathLike) -> None:
  """Compares every shard with the checksum in the manifest.

  Raises:
    UserError: shards that are missing or damaged; all of them are named.
  """
  manifest = pathlib.Path(manifest)
  if not manifest.is_file():
    raise UserError(f'{manifest}: no such file; expected the manifest of a finished build')
  problems = []
  for shard in json_text.loads(manifest.read_text())['shards']:
    path = manifest.parent / shard['file']
    if not path.is_file():
      problems.append(f'{shard["file"]}: is missing')
    elif _checksum(path) != shard['sha256']:
      problems.append(f'{shard["file"]}: is damaged (its checksum differs)')
  raise_all(str(manifest), problems)


def _write_shard(source, span, path, note, check, bad_rows):
  records, faults = [], []
  for index in span:
    try:
      row = source[index]
      check(row)
      records.append(encode_record(row))
    except UserError as error:
      if bad_rows == 'fatal':
        raise
      kind = error.kind if isinstance(error, BadRow) else 'example'
      faults.append({'row': index, 'kind': kind, 'message': str(error)})
  write_records(path, records)
  _replace(note, {'file': path.name, 'rows': len(records), 'sha256': _checksum(path),
                  'bad': faults})


def _claim(path: pathlib.Path, plan: dict) -> None:
  """Notes what is being built, or checks that it is the same."""
  if not path.exists():
    _replace(path, plan)
    return
  found = json_text.loads(path.read_text())
  raise_all(f'{path}: another data set is being built here under this name', [
    f'{key} was {found.get(key)}, is {value}' for key, value in plan.items()
    if found.get(key) != value])


def _replace(path: pathlib.Path, values: dict) -> None:
  with whole_file(path) as part:
    part.write_text(json.dumps(values, indent=2, ensure_ascii=False))


def _checksum(path: pathlib.Path) -> str:
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()
