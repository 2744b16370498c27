"""Data files that are written anew while a run reads them, and that threads read together."""

from concurrent.futures import ThreadPoolExecutor
import json
import os
import pickle
import threading

import pytest

from hrvlm_jax.data.pipeline import Options, build
from hrvlm_jax.data.rows import encode_record
from hrvlm_jax.data.sources import open_source
from hrvlm_jax.data.tables import write_records
from hrvlm_jax.data.unchanged import DataChanged


def rows(count, answer='yes'):
  return [{'id': str(i), 'conversations': [{'from': 'human', 'value': 'q'},
                                           {'from': 'gpt', 'value': answer}]} for i in range(count)]


def write_json(path, content):
  path.write_text(json.dumps(content))


def write_parquet(path, content):
  import pyarrow as pa
  import pyarrow.parquet as pq

  pq.write_table(pa.table({'id': [row['id'] for row in content],
                           'conversations': [row['conversations'] for row in content]}), path,
                 row_group_size=2)


def write_saved(folder):
  """As `datasets` saves: three files of tables."""
  import pyarrow as pa

  folder.mkdir()
  names = [f'data-{n:05}-of-00003.arrow' for n in range(3)]
  for name, part in zip(names, (rows(8)[:3], rows(8)[3:6], rows(8)[6:])):
    table = pa.table({'id': [row['id'] for row in part],
                      'conversations': [row['conversations'] for row in part]})
    with pa.OSFile(str(folder / name), 'wb') as file, pa.ipc.new_stream(file, table.schema) as out:
      out.write_table(table)
  (folder / 'state.json').write_text(json.dumps(
    {'_data_files': [{'filename': name} for name in names]}))
  (folder / 'dataset_info.json').write_text('{}')


@pytest.mark.parametrize('name, write', [
  ('a.json', write_json), ('a.jsonl', lambda path, content: path.write_text(
    ''.join(json.dumps(row) + '\n' for row in content))), ('a.parquet', write_parquet)])
@pytest.mark.parametrize('after', [rows(2), rows(8, 'a longer answer'), None])
def test_a_file_written_anew_is_named(tmp_path, name, write, after):
  path = tmp_path / name
  write(path, rows(8))
  source = open_source(path)
  assert source[0].id == '0'
  sent = pickle.loads(pickle.dumps(source))  # as a worker that starts later gets it
  if after is None:
    path.write_bytes(b'')  # cut: a bus error where it is mapped
  else:
    write(path, after)
  os.utime(path, ns=(1, 1))
  for reader in (source, sent):
    with pytest.raises(DataChanged, match=f'{name}: was changed while the run reads it'):
      reader[7]


def test_a_file_replaced_under_its_name_is_read_on(tmp_path):
  path = tmp_path / 'a.json'
  write_json(path, rows(4))
  source = open_source(path)
  assert source[0].id == '0'
  write_json(tmp_path / 'b', rows(1))
  os.replace(tmp_path / 'b', path)
  assert source[3].id == '3'
  with pytest.raises(DataChanged):
    pickle.loads(pickle.dumps(source))[3]
  path.unlink()
  with pytest.raises(DataChanged, match='is gone'):
    pickle.loads(pickle.dumps(source))[3]


def test_array_records(tmp_path):
  path = tmp_path / 'a.array_record'
  plain = open_source_rows(tmp_path)
  write_records(path, [encode_record(row) for row in plain])
  source = open_source(path)
  sent = pickle.loads(pickle.dumps(source))
  write_records(path, [encode_record(plain[0])])
  with pytest.raises(DataChanged, match='a.array_record'):
    sent[3]


def open_source_rows(tmp_path):
  write_json(tmp_path / 'rows.json', rows(4))
  source = open_source(tmp_path / 'rows.json')
  return [source[i] for i in range(4)]


def test_mapped_arrow_files(tmp_path):
  import pyarrow as pa

  from hrvlm_jax.data.arrow import Arrow

  table = pa.table({'id': ['0', '1'], 'conversations': [row['conversations'] for row in rows(2)]})
  path = tmp_path / 'data.arrow'
  with pa.OSFile(str(path), 'wb') as file, pa.ipc.new_stream(file, table.schema) as writer:
    writer.write_table(table)
  source = Arrow(tmp_path)
  assert source[1].id == '1'
  path.write_bytes(b'')
  with pytest.raises(DataChanged, match='data.arrow: was changed'):
    source[0]


def test_it_is_no_row_to_be_skipped(tmp_path):
  """Under `bad_rows='skip'` the run ends all the same."""
  path = tmp_path / 'a.json'
  write_json(path, rows(8))
  batches = build(open_source(path), lambda row, rng: {'n': int(row.id)},
                  Options(batch_size=2, shuffle=False), collate=lambda examples: {'n': examples},
                  blank=lambda example: example)
  next(batches)
  path.write_bytes(path.read_bytes()[:40])
  with pytest.raises(DataChanged, match='a.json: was changed'):
    for _ in range(10):
      next(batches)


@pytest.mark.parametrize('kind', ['a.json', 'saved'])
def test_threads_that_come_together_read_what_one_reads(tmp_path, kind):
  """The first read opens the file; no thread may close it or find it half open for another."""
  path = tmp_path / kind
  if kind == 'saved':
    write_saved(path)
  else:
    write_json(path, rows(8))
  expected = [open_source(path)[index].id for index in range(8)]
  for _ in range(40):
    source, together = open_source(path), threading.Barrier(8)

    def read(index, source=source, together=together):
      together.wait()
      return source[index].id

    with ThreadPoolExecutor(8) as pool:
      assert list(pool.map(read, range(8))) == expected
