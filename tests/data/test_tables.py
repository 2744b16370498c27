import io
import json
import pickle

import numpy as np
from PIL import Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.data.rows import BadRow, Fields, ImageRef, Row, encode_record, open_images
from hrvlm_jax.data.tables import (
  ArrayRecords,
  Parquet,
  Tfds,
  guess_fields,
  table_row,
  write_records,
)
from hrvlm_jax.language.chat import ASSISTANT, USER, Message


def png(level):
  buffer = io.BytesIO()
  Image.new('RGB', (4, 3), (level, 0, 0)).save(buffer, 'PNG')
  return buffer.getvalue()


def level(row):
  return [np.asarray(image)[0, 0, 0] for image in open_images(row)]


@pytest.mark.parametrize('values, fields, messages', [
  ({'q': 'Q', 'a': ['x', 'y']}, Fields(image=None, question='q', answer='a'), ['Q', 'x']),
  ({'q': ['Q', 'R'], 'a': ['x', 'y']}, Fields(image=None, question='q', answer='a'),
   ['Q', 'x', 'R', 'y']),
  ({'a': b'caption'}, Fields(image=None, answer='a', prompt='Describe.'), ['Describe.', 'caption']),
  ({'q': 'Q'}, Fields(image=None, question='q'), ['Q']),
  ({'c': [{'role': 'user', 'content': 'Q'}, {'from': 'gpt', 'value': 'x'}]},
   Fields(image=None, conversations='c'), ['Q', 'x']),
])
def test_table_rows(values, fields, messages):
  row = table_row(values | {'more': 7}, fields, None, 'row 0')
  assert [m.text for m in row.messages] == messages
  assert [m.role for m in row.messages] == ([USER, ASSISTANT] * 2)[:len(messages)]
  assert row.extra == {'more': 7}


def test_system_texts_and_empty_images_of_a_table():
  fields = guess_fields(['image', 'video', 'system', 'question', 'answer'])
  values = {'video': None, 'system': 'Short.', 'question': 'Q', 'answer': 'x'}
  for image in (None, '', [], {'bytes': None, 'path': None}, [{'bytes': None, 'path': ''}]):
    row = table_row(values | {'image': image}, fields, None, 'row 0')
    assert row.images == () and row.system == 'Short.' and row.extra == {'video': None}
  messages = [{'role': 'system', 'content': 'Long.'}, {'role': 'user', 'content': 'Q'}]
  row = table_row({'messages': messages, 'system': None}, guess_fields(['messages', 'system']),
                  None, 'row 0')
  assert row.system == 'Long.' and [m.text for m in row.messages] == ['Q']


@pytest.mark.parametrize('values, kind, words', [
  ({'q': ['Q', 'R'], 'a': ['x']}, 'form', '2 questions and 1 answers'),
  ({'q': 'Q', 'a': [3]}, 'form', 'not a text'),
  ({'q': b'\xff', 'a': 'x'}, 'encoding', 'not UTF-8'),
  ({'image': 5, 'q': 'Q', 'a': 'x'}, 'form', 'image 0 is int'),
  ({'image': 'a.png', 'q': 'Q', 'a': 'x'}, 'form', 'no image folder'),
  ({'video': b'x', 'q': 'Q', 'a': 'x'}, 'video', "has a 'video'"),
  ({'image': {'bytes': None, 'path': None}, 'q': '<image>Q', 'a': 'x'}, 'form', 'an empty'),
])
def test_bad_table_rows(values, kind, words):
  with pytest.raises(BadRow, match=words) as caught:
    table_row(values, Fields(question='q', answer='a'), None, 'row 0')
  assert caught.value.kind == kind


def test_parquet(tmp_path):
  for number, start in enumerate((0, 5)):
    table = pa.table({
      'image': [{'bytes': png(start + i), 'path': None} for i in range(5)],
      'question': [f'q{start + i}' for i in range(5)], 'answer': ['yes'] * 5})
    pq.write_table(table, tmp_path / f'part-{number}.parquet', row_group_size=2)
  source = Parquet(tmp_path, Fields(question='question', answer='answer'))
  source = pickle.loads(pickle.dumps(source))
  assert len(source) == 10
  for index in (9, 0, 4, 5, 3, 8):
    assert level(source[index]) == [index]
    assert source[index].messages == (Message(USER, f'q{index}'), Message(ASSISTANT, 'yes'))
  assert source[6].where.endswith('part-1.parquet, row 1')
  assert Parquet(tmp_path)[7].messages == source[7].messages  # the usual names are known
  with pytest.raises(UserError, match=r"has no columns \['caption'\]; found \['image'"):
    Parquet(tmp_path, Fields(answer='caption'))
  (tmp_path / 'part-2.parquet').write_text('no')
  with pytest.raises(UserError, match=r'part-2.parquet: is not a parquet file'):
    Parquet(tmp_path, Fields())
  with pytest.raises(UserError, match='no .parquet file'):
    Parquet(tmp_path / '*.txt')


def test_array_records(tmp_path):
  rows = [Row(str(i), (ImageRef(f'{i}.png', data=png(i)),) * (i % 3),
              (Message(USER, 'q'), Message(ASSISTANT, 'é'))) for i in range(7)]
  records = [encode_record(row) for row in rows]
  records[5] = records[5][:-1] + b'?'
  write_records(tmp_path / 'd-00000-of-00002.array_record', records[:4])
  write_records(tmp_path / 'd-00001-of-00002.array_record', records[4:])
  source = pickle.loads(pickle.dumps(ArrayRecords(tmp_path)))
  assert len(source) == 7
  for index in (6, 0, 2, 4):
    assert source[index].id == str(index)
    assert level(source[index]) == [index] * (index % 3)
    assert source[index].messages == rows[index].messages
  with pytest.raises(BadRow, match='record 5: the checksum') as caught:
    source[5]
  assert caught.value.kind == 'checksum'
  (tmp_path / 'broken').mkdir()
  (tmp_path / 'broken' / 'x.array_record').write_bytes(b'nonsense' * 100)
  with pytest.raises(UserError, match='not ArrayRecord'):
    ArrayRecords(tmp_path / 'broken')


def make_tfds(folder):
  from array_record.python.array_record_module import ArrayRecordWriter
  import tensorflow_datasets as tfds
  from tensorflow_datasets.proto import (
    tf_example_generated_pb2 as examples,
    tf_feature_generated_pb2 as features,
  )

  folder.mkdir()
  tfds.features.FeaturesDict({
    'image': tfds.features.Image(shape=(None, None, 3), encoding_format='png'),
    'question': tfds.features.Text(), 'answer': tfds.features.Text(),
  }).save_config(folder)
  writer = ArrayRecordWriter(str(folder / 'toy-train.array_record-00000-of-00001'), 'group_size:1')
  for index in range(3):
    values = {'image': png(index), 'question': f'q{index}'.encode(), 'answer': b'yes'}
    writer.write(examples.Example(features=features.Features(feature={
      key: features.Feature(bytes_list=features.BytesList(value=[value]))
      for key, value in values.items()})).SerializeToString())
  writer.close()
  (folder / 'dataset_info.json').write_text(json.dumps({
    'fileFormat': 'array_record', 'name': 'toy', 'version': '1.0.0',
    'splits': [{'name': 'train', 'numBytes': '1', 'shardLengths': ['3'],
                'filepathTemplate': '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}'}]}))


def test_tfds_without_tensorflow(tmp_path):
  folder = tmp_path / '1.0.0'
  make_tfds(folder)
  fields = Fields(question='question', answer='answer')
  source = pickle.loads(pickle.dumps(Tfds(folder, fields)))
  assert len(source) == 3
  assert level(source[2]) == [2]
  assert source[1].messages == (Message(USER, 'q1'), Message(ASSISTANT, 'yes'))
  assert len(Tfds(folder, fields, split='train[:2]')) == 2
  assert Tfds(folder)[1].messages == source[1].messages
  with pytest.raises(UserError, match=r"no features \['caption'\]; found \['answer'"):
    Tfds(folder, Fields(answer='caption'))
  with pytest.raises(UserError, match="split 'test'"):
    Tfds(folder, fields, split='test')
  with pytest.raises(UserError, match='cannot be read as a TFDS data set'):
    Tfds(tmp_path, fields)
