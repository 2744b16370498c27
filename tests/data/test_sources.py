import json
import os
import pickle

import grain
from PIL import Image
import pytest

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.data.rows import (
  BadRow,
  ImageRef,
  Row,
  Source,
  decode_record,
  encode_record,
  open_images,
)
from hrvlm_jax.data.sources import ImageFolder, InMemory, LlavaJson, llava_row, open_source
from hrvlm_jax.language.chat import ASSISTANT, USER, Message


def turns(question='What?', answer='This.'):
  return [{'from': 'human', 'value': question}, {'from': 'gpt', 'value': answer}]


def rows():
  return [
    {'id': 1, 'image': 'a/one.png', 'conversations': turns('<image>\nWhat? é漢'), 'box': [1, 2]},
    {'id': 'two', 'conversations': turns()},
    {'image': ['a/one.png', 'a/one.png'], 'conversations': turns('<image><image>')},
  ]


@pytest.fixture
def folder(tmp_path):
  (tmp_path / 'a').mkdir()
  Image.new('RGB', (3, 2), 'red').save(tmp_path / 'a' / 'one.png')
  return tmp_path


def write(folder, name, content):
  path = folder / name
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return path


@pytest.mark.parametrize('form', ['array', 'indented', 'lines', 'bom'])
def test_llava_json(folder, form):
  text = {
    'array': json.dumps(rows()),
    'indented': ' ' + json.dumps(rows(), indent=2, ensure_ascii=False) + '\n',
    'lines': '\n\n'.join(json.dumps(row, ensure_ascii=False) for row in rows()) + '\n',
    'bom': '\ufeff' + json.dumps(rows(), ensure_ascii=False),
  }[form]
  source = pickle.loads(pickle.dumps(LlavaJson(write(folder, 'data.json', text))))
  assert isinstance(source, Source)
  assert len(source) == 3
  first, text_only, several = (source[i] for i in range(3))
  assert first.id == '1'
  assert first.messages == (Message(USER, '<image>\nWhat? é漢'), Message(ASSISTANT, 'This.'))
  assert first.extra == {'box': [1, 2]}
  assert [image.size for image in open_images(first)] == [(3, 2)]
  assert text_only.images == ()
  assert len(several.images) == 2
  line = {'array': 1, 'indented': 20, 'lines': 3, 'bom': 1}[form]
  assert text_only.where == f'{source.path}, row 1 (line {line})'
  pickle.dumps(source)


@pytest.mark.parametrize('row, kind, words', [
  (b'{"conversations": [', 'json', 'not valid JSON'),
  (b'7', 'form', 'is int, expected an object'),
  (b'{"id": 1}', 'form', "no 'conversations'"),
  (b'{"conversations": []}', 'form', "no 'conversations'"),
  (b'{"conversations": [{"from": "bot", "value": ""}]}', 'form', "comes from 'bot'"),
  (b'{"image": 5, "conversations": [{"from": "gpt", "value": ""}]}', 'form', 'neither a path'),
  (b'{"conversations": [{"from": "gpt", "value": "\xff"}]}', 'encoding', 'not UTF-8'),
  (b'{"image": "/etc/x", "conversations": [{"from": "gpt", "value": ""}]}', 'path', 'absolute'),
  (b'{"image": "../x", "conversations": [{"from": "gpt", "value": ""}]}', 'path', 'leads out'),
  (b'{"image": "a/../../x", "conversations": [{"from": "gpt", "value": ""}]}', 'path',
   'leads out'),
  (b'{"image": "out/x", "conversations": [{"from": "gpt", "value": ""}]}', 'path', 'leads out'),
  (b'{"image": "\\u0000", "conversations": [{"from": "gpt", "value": ""}]}', 'path',
   'no file name'),
])
def test_bad_rows_name_their_line(folder, tmp_path_factory, row, kind, words):
  os.symlink(tmp_path_factory.mktemp('other'), folder / 'out')
  good = json.dumps(rows()[1]).encode()
  source = LlavaJson(write(folder, 'data.jsonl', good + b'\n' + row + b'\n' + good))
  assert source[0].id == source[2].id == 'two'
  with pytest.raises(BadRow, match=words) as caught:
    source[1]
  assert caught.value.kind == kind
  assert 'data.jsonl, row 1 (line 2): ' in str(caught.value)
  again = pickle.loads(pickle.dumps(caught.value))
  assert (str(again), again.kind) == (str(caught.value), kind)


@pytest.mark.parametrize('content, words', [
  ('', 'is empty'),
  ('\n  ', 'is empty'),
  ('[]', 'no rows'),
  ('[{"a": 1},\n {"b": }]', r'line 2 column 8: not valid JSON .* \(after 1 rows\)'),
  ('[{"a": 1}\n {"b": 2}]', "line 2 column 2: .*expected ','"),
  ('[{"a": 1}] x', 'more text after the end'),
  ('[{"a": 1}', "expected ','"),
  ('é'.encode('utf-16'), 'UTF-16'),
])
def test_files_that_break_between_rows(folder, content, words):
  with pytest.raises(UserError, match=words) as caught:
    LlavaJson(write(folder, 'data.json', content))
  assert 'data.json' in str(caught.value)


def test_missing_files(folder):
  with pytest.raises(UserError, match='none.json: no such file'):
    LlavaJson(folder / 'none.json')
  with pytest.raises(UserError, match='no such image folder'):
    LlavaJson(write(folder, 'data.json', json.dumps(rows())), folder / 'none')
  with pytest.raises(UserError, match='no such folder'):
    ImageFolder(folder / 'none')


def test_bad_images_have_kinds(folder):
  write(folder, 'html.jpg', '<html>')
  write(folder, 'empty.jpg', '')
  for name, kind in (('html.jpg', 'not an image'), ('empty.jpg', 'empty'), ('none.jpg', 'missing')):
    ref = ImageRef(name, folder=str(folder), path=name)
    with pytest.raises(BadRow) as caught:
      open_images(Row('', (ref,), (), 'row 7'))
    assert caught.value.kind == kind
    assert str(caught.value).startswith(f'row 7: {name}: ')
  with pytest.raises(BadRow) as caught:
    open_images(Row('', (ImageRef('x', folder=str(folder), path='../x'),), (), 'row 7'))
  assert caught.value.kind == 'path'
  with pytest.raises(BadRow, match='the limit is 5') as caught:
    open_images(LlavaJson(write(folder, 'd.json', json.dumps(rows())))[0], max_pixels=5)
  assert caught.value.kind == 'too large'


def test_image_folder(folder, tmp_path_factory):
  other = tmp_path_factory.mktemp('other')
  Image.new('RGB', (1, 1)).save(other / 'x.png')
  os.symlink(other / 'x.png', folder / 'b.png')
  Image.new('RGB', (1, 1)).save(folder / 'c.JPG', 'JPEG')
  write(folder, 'c.txt', 'A dot.\n')
  source = ImageFolder(folder, prompt='Describe.')
  assert [source[i].id for i in range(len(source))] == ['a/one.png', 'c.JPG']
  assert source[0].messages == (Message(USER, 'Describe.'),)
  assert source[1].messages == (Message(USER, 'Describe.'), Message(ASSISTANT, 'A dot.'))
  plain = ImageFolder(folder)  # a captioned image can be trained on as it is
  assert plain[1].messages == (Message(USER, '<image>'), Message(ASSISTANT, 'A dot.'))
  assert plain[0].messages == ()
  with pytest.raises(UserError, match='has no images'):
    ImageFolder(tmp_path_factory.mktemp('void'))


def test_records(folder):
  row = LlavaJson(write(folder, 'data.json', json.dumps(rows())))[0]
  data = encode_record(row)
  again = decode_record(data, 'shard 0, record 1')
  assert (again.id, again.messages, dict(again.extra)) == (row.id, row.messages, {'box': [1, 2]})
  assert again.images[0].read() == row.images[0].read()
  for broken, kind in ((data[:-1], 'checksum'), (data[:20] + b'?' + data[21:], 'checksum'),
                       (b'x' + data, 'form'), (b'', 'form')):
    with pytest.raises(BadRow) as caught:
      decode_record(broken, 'shard 0, record 1')
    assert caught.value.kind == kind


def test_in_memory():
  source = InMemory([Row('a', (), ())])
  assert (len(source), source[0].id) == (1, 'a')


def test_open_source(folder, tmp_path_factory):
  path = write(folder, 'data.json', json.dumps(rows()))
  assert isinstance(open_source(path), LlavaJson)
  assert isinstance(open_source(folder), LlavaJson)
  assert isinstance(open_source(folder / 'a'), ImageFolder)
  write(folder, 'other.jsonl', json.dumps(rows()[0]))
  with pytest.raises(UserError, match='several record files'):
    open_source(folder)
  with pytest.raises(UserError, match='no such file or folder'):
    open_source(folder / 'none')
  with pytest.raises(UserError, match='of no known kind'):
    open_source(write(folder, 'data.bin', 'x'))


def test_mixture_files(folder):
  write(folder, 'data.json', json.dumps(rows()))
  file = {'parts': [{'path': 'data.json', 'amount': 5, 'format': {'suffix': ' Short.'}},
                    {'path': 'a'}], 'seed': 1}
  mix = open_source(write(folder, 'x.mixture.json', json.dumps(file)))
  assert isinstance(mix, grain.MapDataset)
  assert len(mix) == 6
  assert mix[0].messages[0].text.endswith(' Short.')
  file['parts'][0]['format'] = {'sufix': ''}
  with pytest.raises(UserError, match=r'parts.*sufix.*suffix'):
    open_source(write(folder, 'x.mixture.json', json.dumps(file)))
  published = {'published': 'llava_1_5', 'parts': [
    {'name': 'llava_v1_5_mix665k', 'path': 'data.json'}]}
  assert len(open_source(write(folder, 'y.mixture.json', json.dumps(published)))) == 3
  with pytest.raises(UserError, match='not valid JSON'):
    open_source(write(folder, 'z.mixture.json', '{'))


def test_messages_of_other_programs_and_plain_questions(tmp_path):
  """OpenAI's and Hugging Face's `messages`, question and answer, and data sets that were saved."""
  import base64

  from hrvlm_jax.data.sources import open_source

  Image.new('RGB', (8, 6)).save(tmp_path / 'a.png')
  url = f'data:image/png;base64,{base64.b64encode((tmp_path / "a.png").read_bytes()).decode()}'
  ask = lambda *parts: {'role': 'user', 'content': [*parts, {'type': 'text', 'text': 'What?'}]}
  answer = {'role': 'assistant', 'content': [{'type': 'text', 'text': 'STOP'}]}
  system = {'role': 'system', 'content': 'Be short.'}
  path = {'type': 'image', 'image': 'a.png'}
  rows = [
    {'messages': [ask(path), answer]},
    {'messages': [ask({'type': 'image_url', 'image_url': {'url': url}}), answer]},
    {'messages': [ask({'type': 'image'}), answer], 'images': ['a.png']},
    {'messages': [system, ask(path), answer]},
    {'messages': [ask(), answer, ask(path), answer]},
    {'image': 'a.png', 'question': 'What?', 'answer': 'STOP'},
    {'image': 'a.png', 'question': 'What?', 'answers': ['STOP', 'stop']},
    {'messages': [ask({'type': 'image'}), answer]},
    {'messages': [ask({'type': 'image', 'image': '../b.png'}), answer]},
  ]
  file = tmp_path / 'own.jsonl'
  file.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  source = open_source(file)
  told = lambda index: [(m.role, m.text) for m in source[index].messages]
  for index in (0, 1, 2, 5, 6):
    assert told(index) == [('user', 'What?'), ('assistant', 'STOP')], index
    assert source[index].images[0].open().size == (8, 6)
  assert told(3) == told(0) and source[3].system == 'Be short.' and source[0].system is None
  assert told(4)[0] == ('user', 'What?') and told(4)[2] == ('user', '<image>\nWhat?')
  assert source[6].extra == {'answers': ['STOP', 'stop']}
  with pytest.raises(BadRow, match='1 image parts have no image of their own, but the row names 0'):
    source[7]
  with pytest.raises(BadRow, match='leads out of the image folder'):
    source[8]


def test_system_texts_empty_images_and_other_media(folder):
  """What mixed data sets hold; nothing of it is passed over without a word."""
  video = lambda **more: {'conversations': turns('<video>\nWhat?')} | more
  asked = {'from': 'system', 'value': 'Short.'}
  good = [
    {'system': 'Be kind.', 'conversations': turns()},
    {'system': 'Be kind.', 'conversations': [asked, *turns()]},
    {'system_prompt': 'Be kind.', 'system': '', 'question': 'What?', 'answer': 'This.'},
    {'system': None, 'conversations': turns(), 'image': ''},
    {'conversations': turns(), 'image': None, 'images': []},
    {'conversations': turns(), 'image': ['', ' '], 'video': '', 'videos': []},
    {'conversations': turns('<image>\nWhat?'), 'image': '', 'images': ['a/one.png']},
    {'conversations': turns('Close <video>\n<video>\n</video>?')},
    {'conversations': [], 'messages': [{'role': 'user', 'content': 'What?'},
                                       {'role': 'assistant', 'content': 'This.'}]},
  ]
  bad = [
    (video(), 'video', 'the placeholder <video>'),
    (video(image='a/one.png'), 'video', 'the placeholder <video>'),
    ({'video': 'a.mp4', 'conversations': turns()}, 'video', "has a 'video'"),
    ({'videos': ['a.mp4'], 'conversations': turns(), 'image': 'a/one.png'}, 'video', "'videos'"),
    ({'audio': {'path': 'a.wav'}, 'conversations': turns()}, 'audio', "has a 'audio'"),
    ({'messages': [{'role': 'user', 'content': [{'type': 'video', 'video': 'a.mp4'}]}]}, 'form',
     'is of type video; only images and text are read'),
    ({'image': '', 'conversations': turns('<image>\nWhat?')}, 'form', "an empty 'image'"),
    ({'image': 'https://example.org/a.png', 'conversations': turns()}, 'path', 'download it first'),
    ({'system': 5, 'conversations': turns()}, 'form', 'a system text of int'),
    ({'system': 'cut \ud83d', 'conversations': turns()}, 'encoding', 'half a character'),
  ]
  lines = [json.dumps(row) for row in [*good, *(row for row, _, _ in bad)]]
  source = LlavaJson(write(folder, 'mixed.jsonl', '\n'.join(lines)))
  rows = [source[index] for index in range(len(good))]
  kind = ['Be kind.', 'Be kind.\nShort.', 'Be kind.']
  assert [row.system for row in rows] == kind + [None] * 6
  assert all([m.text for m in row.messages] == ['What?', 'This.'] for row in rows[:6] + rows[8:])
  assert [len(row.images) for row in rows] == [0] * 6 + [1, 0, 0]
  assert not {'system', 'system_prompt'} & set().union(*(row.extra for row in rows))
  again = [decode_record(encode_record(row), 'x').system for row in (rows[1], rows[4])]
  assert again == [rows[1].system, None]
  for number, (_, kind, words) in enumerate(bad, len(good)):
    with pytest.raises(BadRow, match=words) as caught:
      source[number]
    assert caught.value.kind == kind, words


def test_folders_that_datasets_saved(tmp_path):
  """Arrow files as `save_to_disk` writes them, one or several splits; clones with parquet."""
  import pyarrow as pa
  import pyarrow.parquet as pq

  from hrvlm_jax.data.sources import open_source

  Image.new('RGB', (8, 6)).save(tmp_path / 'a.png')
  image = {'bytes': (tmp_path / 'a.png').read_bytes(), 'path': None}
  messages = [{'role': 'user', 'content': [{'type': 'image', 'text': None},
                                           {'type': 'text', 'text': f'What{n}?'}]}
              for n in range(3)]
  answer = {'role': 'assistant', 'content': [{'type': 'text', 'text': 'STOP'}]}
  table = pa.Table.from_pylist([{'images': [image], 'messages': [asked, answer]}
                                for asked in messages])

  def saved(folder):
    folder.mkdir(parents=True)
    for number in range(2):
      part = table.slice(2 * number, 2)
      with pa.OSFile(str(folder / f'data-0000{number}-of-00002.arrow'), 'wb') as out, \
          pa.ipc.new_stream(out, part.schema) as writer:
        writer.write_table(part)
    (folder / 'state.json').write_text('{}')
    (folder / 'dataset_info.json').write_text('{}')

  saved(tmp_path / 'one')
  saved(tmp_path / 'many/train')
  (tmp_path / 'many/dataset_dict.json').write_text('{"splits": ["train"]}')
  (tmp_path / 'clone/data').mkdir(parents=True)
  pq.write_table(table, tmp_path / 'clone/data/train-00000-of-00001.parquet')
  for name in ('one', 'many', 'clone'):
    source = open_source(tmp_path / name)
    assert len(source) == 3
    assert [row.messages[0].text for row in map(source.__getitem__, range(3))] == [
      'What0?', 'What1?', 'What2?']
    assert source[2].messages[1].text == 'STOP' and source[2].images[0].open().size == (8, 6)
  (tmp_path / 'many/train').rename(tmp_path / 'many/validation')
  with pytest.raises(UserError, match="no split 'train', but validation; name one"):
    open_source(tmp_path / 'many')
  assert len(open_source(tmp_path / 'many', split='validation')) == 3
  assert len(open_source(tmp_path / 'clone', split='train')) == 3
  with pytest.raises(UserError, match="no files of the split 'test'"):
    open_source(tmp_path / 'clone', split='test')
  (tmp_path / 'one/data-00000-of-00002.arrow').write_bytes(b'nothing')
  with pytest.raises(UserError, match='is not an Arrow file'):
    open_source(tmp_path / 'one')


@pytest.mark.parametrize('role', [['user'], {'a': 1}, 3, None])
@pytest.mark.parametrize('content', ['q', [{'type': 'text', 'text': 'q'}]])
def test_a_role_that_is_no_text_is_a_bad_row(role, content):
  for key, value in (('from', 'value'), ('role', 'content')):
    row = {'id': '1', 'conversations': [{key: role, value: content}]}
    with pytest.raises(BadRow, match='message 0 comes from'):
      llava_row(json.dumps(row).encode(), 'a.json, row 0', '.')
