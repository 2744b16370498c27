import json

import numpy as np
from PIL import Image
import pytest

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.data.checks import CheckReport, RowCheck, check_source
from hrvlm_jax.data.rows import ImageRef, Row
from hrvlm_jax.data.sources import InMemory, LlavaJson
from hrvlm_jax.language.chat import ASSISTANT, USER, Message, get_template

GOOD = [{'from': 'human', 'value': '<image>\nWhat?'}, {'from': 'gpt', 'value': 'This.'}]


def write(folder, rows):
  path = folder / 'data.jsonl'
  path.write_bytes(b'\n'.join(row if isinstance(row, bytes) else json.dumps(row).encode()
                              for row in rows))
  return LlavaJson(path)


@pytest.fixture
def folder(tmp_path):
  noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
  Image.fromarray(noise).save(tmp_path / 'good.jpg')
  data = (tmp_path / 'good.jpg').read_bytes()
  (tmp_path / 'cut.jpg').write_bytes(data[:-200])
  (tmp_path / 'html.jpg').write_text('<html>not found</html>')
  (tmp_path / 'empty.jpg').write_bytes(b'')
  return tmp_path


def test_every_bad_row_is_found(folder):
  good = {'image': 'good.jpg', 'conversations': GOOD}
  bad = {
    'damaged': good | {'image': 'cut.jpg'},
    'not an image': good | {'image': 'html.jpg'},
    'empty': good | {'image': 'empty.jpg'},
    'missing': good | {'image': 'none.jpg'},
    'path': good | {'image': '../x.jpg'},
    'form': {'image': 'good.jpg'},
    'json': b'{"image": ',
    'encoding': b'{"id": "\xff"}',
    'conversation': good | {'conversations': [GOOD[0], GOOD[0]]},
  }
  rows = [row for pair in zip([good] * len(bad), bad.values()) for row in pair]
  report = check_source(write(folder, rows), workers=0, progress=False)
  assert [(fault.position, fault.kind) for fault in report.faults] == [
    (2 * i + 1, kind) for i, kind in enumerate(bad)]
  assert all(f'row {fault.position} (line {fault.position + 1})' in fault.message
             for fault in report.faults)
  assert report.counts == dict.fromkeys(bad, 1)
  assert report.summary() == f'18 rows, 9 bad: {", ".join(f"1 {kind}" for kind in bad)}'
  header = check_source(write(folder, rows), RowCheck(image='header'), progress=False)
  assert 'damaged' not in header.counts
  assert len(header.faults) == 8
  assert check_source(InMemory([]), progress=False) == CheckReport(0, ())


def test_conversations():
  image = ImageRef('x', data=b'')
  talk = (Message(USER, '<image> <image>\nWhat?'), Message(ASSISTANT, 'This.'))
  check = RowCheck(image='none')
  check(Row('', (image, image), talk, 'row 0'))
  check(Row('', (), talk, 'row 0'))
  with pytest.raises(UserError, match='2 image placeholders for 1 images'):
    check(Row('', (image,), talk, 'row 0'))
  RowCheck(image='none', template=get_template('vicuna_v1'))(Row('', (image,), talk, 'row 0'))
  with pytest.raises(UserError, match='empty'):
    check(Row('', (image,), (), 'row 0'))
  asks = RowCheck(image='none', answers=False)
  asks(Row('', (image,), (), 'row 0'))
  asks(Row('', (image,), (Message(USER, 'What?'),), 'row 0'))


def test_hundred_thousand_rows(tmp_path):
  """1 % bad rows of several kinds among 100,000: all are found, and nothing else."""
  rng = np.random.default_rng(0)
  good = json.dumps({'conversations': GOOD}).encode()
  kinds = {'json': b'{"conversations": [', 'form': b'{"conversations": 5}',
           'path': b'{"image": "/x", "conversations": [{"from": "human", "value": ""}]}',
           'encoding': b'{"a": "\xfe"}'}
  where = np.sort(rng.choice(100_000, 1000, replace=False)).tolist()
  chosen = {index: list(kinds)[int(rng.integers(len(kinds)))] for index in where}
  rows = [kinds[chosen[index]] if index in chosen else good for index in range(100_000)]
  report = check_source(write(tmp_path, rows), workers=2, progress=False)
  assert {fault.position: fault.kind for fault in report.faults} == chosen
