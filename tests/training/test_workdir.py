"""Work directories in buckets, with a folder that plays the bucket."""

from etils.epath import backend, gpath
import pytest

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.training.workdir import Workdir


class Bucket(backend._OsPathBackend):
  """gs:// addresses as files below a folder; appending is as impossible as in a bucket."""

  def __init__(self, root):
    self._root = root

  def _file(self, path):
    text = str(path)
    return self._root / text.removeprefix('gs://') if text.startswith('gs://') else path

  def __getattribute__(self, name):
    found = super().__getattribute__(name)
    if name.startswith('_') or not callable(found):
      return found

    def call(path, *args, **kwargs):
      assert not (name == 'open' and 'a' in str(args[:1])), 'buckets cannot append'
      place = self._file(path)
      if name == 'glob':  # texts in, texts out
        return [file.replace(f'{self._root}/', 'gs://') if place is not path else file
                for file in found(str(place), *args, **kwargs)]
      return found(place, *args, **kwargs)

    return call


@pytest.fixture
def bucket(tmp_path, monkeypatch):
  root = tmp_path / 'bucket'
  root.mkdir()
  monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, 'gs', Bucket(root))
  monkeypatch.setattr(gpath, '_is_tf_installed', lambda: False)
  return root


def test_a_folder_is_itself(tmp_path):
  with Workdir(tmp_path / 'run') as place:
    assert place.local == tmp_path / 'run' and not place.shared
    place.local.mkdir()
    (place.local / 'PREEMPTED').touch()
    place.remove('PREEMPTED')
    place.copy()
  assert list((tmp_path / 'run').iterdir()) == []


def test_a_run_in_a_bucket_goes_on_where_it_was(bucket):
  address = 'gs://b/runs/1'
  with Workdir(address, every=0.02) as place:
    assert place.shared and place.address == address
    (place.local / 'metrics.jsonl').write_text('1\n')
    (place.local / 'tokenizer').mkdir()
    (place.local / 'tokenizer' / 'x.json').write_text('{}')
    while not (bucket / 'b/runs/1/tokenizer/x.json').exists():  # in the background
      pass
    with (place.local / 'metrics.jsonl').open('a') as file:
      file.write('2\n')
    (place.local / 'PREEMPTED').touch()
  assert not place.local.exists()
  assert (bucket / 'b/runs/1/metrics.jsonl').read_text() == '1\n2\n'
  assert (bucket / 'b/runs/1/PREEMPTED').exists()
  with Workdir(address) as again:
    assert (again.local / 'metrics.jsonl').read_text() == '1\n2\n'
    again.remove('PREEMPTED')
    assert not (bucket / 'b/runs/1/PREEMPTED').exists()
  assert not (bucket / 'b/runs/1/PREEMPTED').exists()


def test_other_processes_copy_nothing(bucket):
  with Workdir('gs://b/r', main=False) as place:
    (place.local / 'config.json').write_text('{}')
  assert not (bucket / 'b').exists()


def test_a_bucket_that_cannot_be_written_is_a_sentence(bucket, monkeypatch):
  with pytest.raises(UserError, match='gs://b/r: cannot write there: .*may this machine use it'):
    with Workdir('gs://b/r') as place:
      (place.local / 'config.json').write_text('{}')
      (bucket / 'b').write_text('a file where the bucket should be')


def test_the_missing_package_is_named(monkeypatch):
  monkeypatch.setitem(__import__('sys').modules, 'gcsfs', None)
  monkeypatch.setattr(gpath, '_is_tf_installed', lambda: False)
  with pytest.raises(UserError, match=r"need the package gcsfs .*pip install -e '\.\[tpu\]'"):
    Workdir('gs://b/r')
