"""Files for evaluation servers and judges."""

from collections.abc import Sequence
import csv
import io
import json
from pathlib import Path

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.evaluation import records
from hrvlm_jax.evaluation.benchmarks.base import Benchmark, Sample


def write(benchmark: Benchmark, samples: Sequence[Sample], texts: Sequence[str],
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
    records.write_whole(path, json.dumps(value, ensure_ascii=False) + '\n')
  elif path.suffix == '.tsv':
    records.write_whole(path, _table(value))
  else:
    path.mkdir(parents=True, exist_ok=True)
    for name, text in value.items():
      records.write_whole(path / name, text)
  return path


def _table(rows: Sequence[dict]) -> str:
  keys = list(dict.fromkeys(key for row in rows for key in row))
  text = io.StringIO(newline='')
  writer = csv.DictWriter(text, keys, delimiter='\t', restval='', lineterminator='\n')
  writer.writeheader()
  writer.writerows(rows)
  return text.getvalue()
