"""The files of a run: predictions, and what evaluation servers and judges ask for.

The predictions file has one JSON object a line, appended batch by batch, safe against a kill.

A batch is written with one `write` and forced to disk before the next one begins, so a process
that is killed loses at most the batch in work. A last line that was torn is cut off when the file
is opened again; anything else that is damaged is an error, never skipped.
"""

from collections.abc import Iterable, Mapping, Sequence
import csv
import io
import json
import os
from pathlib import Path
from typing import Any

from hrvlm_jax.core import json_text
from hrvlm_jax.core.errors import UserError, raise_all
from hrvlm_jax.core.text import whole
from hrvlm_jax.evaluation.benchmarks.base import Benchmark, Sample

SHARDS = 'predictions-{index:05d}-of-{count:05d}.jsonl'
MERGED = 'predictions.jsonl'


class PredictionsFile:
  """Append-only file of prediction records.

  Args:
    path: made if absent; what it holds already is in `done` (sample id -> record).

  Raises:
    UserError: the file has damaged lines before the last, or an id twice.
  """

  def __init__(self, path: str | Path):
    self.path = Path(path)
    self.path.parent.mkdir(parents=True, exist_ok=True)
    self.done: dict[str, dict] = {}
    if self.path.exists():
      _cut_torn_line(self.path)
      self.done = read(self.path)
    self._file = self.path.open('ab')

  def append(self, records: Iterable[Mapping[str, Any]]) -> None:
    """Writes a batch and waits until it is on disk."""
    records = [dict(record) for record in records]
    lines = whole(''.join(json.dumps(record, ensure_ascii=False) + '\n' for record in records))
    self._file.write(lines.encode())
    self._file.flush()
    os.fsync(self._file.fileno())
    self.done.update({record['sample_id']: record for record in records})

  def close(self) -> None:
    self._file.close()

  def __enter__(self) -> 'PredictionsFile':
    return self

  def __exit__(self, *_) -> None:
    self.close()


def read(path: str | Path) -> dict[str, dict]:
  """Records of a predictions file by sample id, in file order.

  LLaVA's answers files say `question_id` (a number or a text) for `sample_id`.

  Raises:
    UserError: missing, a malformed line, a record without `sample_id` or `text`, an id twice.
  """
  path = Path(path)
  if not path.is_file():
    raise UserError(f'{path}: no such predictions file')
  records: dict[str, dict] = {}
  problems = []
  for number, line in enumerate(path.read_bytes().split(b'\n'), 1):
    if not line.strip():
      continue
    try:
      record = json_text.loads(line)
    except ValueError:
      problems.append(f'line {number}: is not a JSON object')
      continue
    if isinstance(record, dict) and 'sample_id' not in record:
      question = record.get('question_id')
      if isinstance(question, (str, int)) and not isinstance(question, bool):
        record['sample_id'] = str(question)
    if not isinstance(record, dict) or not isinstance(record.get('sample_id'), str) \
        or not isinstance(record.get('text'), str):
      problems.append(f"line {number}: expected an object with the texts 'sample_id' and 'text'")
    elif (record := record | {'text': whole(record['text'])})['sample_id'] in records:
      problems.append(f'line {number}: sample_id {record["sample_id"]} is a duplicate')
    else:
      records[record['sample_id']] = record
  raise_all(str(path), problems)
  return records


def merge(folder: str | Path) -> dict[str, dict]:
  """Records of all shard files of a result folder (of however many processes), by sample id.

  The same id in two shards (a run that went on with another number of processes) is fine as long
  as both have the same text.

  Raises:
    UserError: no shard, damaged lines, or two different answers to one sample.
  """
  folder = Path(folder)
  records: dict[str, dict] = {}
  problems = []
  shards = sorted(folder.glob('predictions-*-of-*.jsonl'))
  if not shards:
    raise UserError(f'{folder}: has no predictions-*.jsonl')
  for shard in shards:
    for number, record in read(shard).items():
      if number in records and records[number]['text'] != record['text']:
        problems.append(f'{shard.name}: sample {number} has another answer than in an earlier file')
      records.setdefault(number, record)
  raise_all(str(folder), problems)
  return records


def write_whole(path: str | Path, text: str) -> None:
  """Writes a file so that it is either absent, old or complete."""
  path = Path(path)
  part = path.with_name(f'.{path.name}.{os.getpid()}.part')
  try:
    with part.open('w', encoding='utf-8') as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    os.replace(part, path)
  finally:
    part.unlink(missing_ok=True)


def write_submission(benchmark: Benchmark, samples: Sequence[Sample], texts: Sequence[str],
                     folder: str | Path) -> Path:
  """Writes the benchmark's submission into a folder; returns its path.

  `*.json`: JSON; `*.tsv`: rows as a tab separated table; without an ending: a folder of text files.

  Raises:
    UserError: the benchmark has no submission.
  """
  if benchmark.submission is None:
    raise UserError(f'{benchmark.name} has no submission file')
  if len(samples) != len(texts):
    raise ValueError(f'{len(texts)} answers for {len(samples)} samples')
  path = Path(folder) / benchmark.submission.filename
  value = benchmark.submission.write(samples, texts)
  if path.suffix == '.json':
    write_whole(path, json.dumps(value, ensure_ascii=False) + '\n')
  elif path.suffix == '.tsv':
    write_whole(path, _table(value))
  else:
    path.mkdir(parents=True, exist_ok=True)
    for name, text in value.items():
      write_whole(path / name, text)
  return path


def _table(rows: Sequence[dict]) -> str:
  keys = list(dict.fromkeys(key for row in rows for key in row))
  text = io.StringIO(newline='')
  writer = csv.DictWriter(text, keys, delimiter='\t', restval='', lineterminator='\n')
  writer.writeheader()
  writer.writerows(rows)
  return text.getvalue()


def _cut_torn_line(path: Path) -> None:
  """Drops what follows the last line break, and a last line that is not JSON."""
  data = path.read_bytes()
  end = data.rfind(b'\n') + 1
  last = data[data.rfind(b'\n', 0, max(end - 1, 0)) + 1:end]
  try:
    if last.strip():
      json_text.loads(last)
  except ValueError:
    end -= len(last)
  if end != len(data):
    with path.open('r+b') as file:
      file.truncate(end)
      os.fsync(file.fileno())
