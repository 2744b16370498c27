import json

from PIL import Image
import pytest

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.data.build import build_records, verify_records
from hrvlm_jax.data.rows import ImageRef, Row
from hrvlm_jax.data.sources import InMemory, open_source
from hrvlm_jax.language.chat import ASSISTANT, USER, Message


class Counting(InMemory):
  """Counts the rows that are read; stops after `limit` of them."""

  def __init__(self, rows, limit=None):
    super().__init__(rows)
    self.read, self.limit = 0, limit

  def __getitem__(self, index):
    if self.read == self.limit:
      raise KeyboardInterrupt
    self.read += 1
    return super().__getitem__(index)


@pytest.fixture
def rows(tmp_path):
  Image.new('RGB', (3, 2)).save(tmp_path / 'a.png')
  image = ImageRef('a.png', folder=str(tmp_path), path='a.png')
  bad = ImageRef('b.png', folder=str(tmp_path), path='b.png')
  talk = (Message(USER, 'q'), Message(ASSISTANT, 'a'))
  return [Row(str(i), (bad if i == 4 else image,), talk, f'row {i}') for i in range(7)]


def test_build_goes_on_after_a_stop(rows, tmp_path):
  out = tmp_path / 'out'
  with pytest.raises(KeyboardInterrupt):
    build_records(Counting(rows, limit=5), out, shard_rows=3, progress=False)
  source = Counting(rows)
  manifest = build_records(source, out, shard_rows=3, progress=False)
  assert source.read == 4  # the first shard was there
  content = json.loads(manifest.read_text())
  assert [shard['rows'] for shard in content['shards']] == [3, 2, 1]
  assert [(bad['row'], bad['kind']) for s in content['shards'] for bad in s['bad']] == [
    (4, 'missing')]
  built = open_source(out)
  assert [built[i].id for i in range(len(built))] == ['0', '1', '2', '3', '5', '6']
  assert built[0].images[0].open().size == (3, 2)
  verify_records(manifest)
  source = Counting(rows)
  build_records(source, out, shard_rows=3, progress=False)
  assert source.read == 0
  with pytest.raises(UserError, match='shard_rows was 3, is 2'):
    build_records(source, out, shard_rows=2, progress=False)


def test_damage_is_found(rows, tmp_path):
  manifest = build_records(InMemory(rows[:3]), tmp_path / 'out', shard_rows=1, progress=False)
  first, second = sorted((tmp_path / 'out').glob('*.array_record'))[:2]
  first.write_bytes(first.read_bytes()[:-1] + b'?')
  second.unlink()
  with pytest.raises(UserError) as caught:
    verify_records(manifest)
  assert f'{first.name}: is damaged' in str(caught.value)
  assert f'{second.name}: is missing' in str(caught.value)
  with pytest.raises(UserError, match='no such file'):
    verify_records(tmp_path / 'none.json')


def test_bad_rows_can_stop_the_build(rows, tmp_path):
  with pytest.raises(UserError, match='b.png: no such file'):
    build_records(InMemory(rows), tmp_path / 'out', bad_rows='fatal', progress=False)
