"""Names on the hub: pinned, from the cache, and one sentence for everything else. No network."""

import json
import sys

import numpy as np
import pytest

from hrvlm_jax.checkpoint import hf
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.interop import hub

COMMIT = '0123456789abcdef0123456789abcdef01234567'
NAME = 'someone/model-1.5'


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """A local hub cache that holds one commit, with code beside the weights."""
  from huggingface_hub import constants

  monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  repo = tmp_path / 'hub' / 'models--someone--model-1.5'
  snapshot = repo / 'snapshots' / COMMIT
  snapshot.mkdir(parents=True)
  (repo / 'refs').mkdir()
  (repo / 'refs' / 'main').write_text(COMMIT)
  hf.write_weights(snapshot, [('a', np.ones(3, np.float32))])
  (snapshot / 'config.json').write_text(json.dumps({'model_type': 'x'}))
  (snapshot / 'modeling_x.py').write_text('raise SystemExit("executed")')
  return snapshot


@pytest.mark.parametrize('source, revision', [(f'{NAME}@{COMMIT}', None), (NAME, COMMIT),
                                              (f'{NAME}@{COMMIT}', COMMIT)])
def test_a_pinned_name_is_its_snapshot(cache, source, revision):
  folder, origin = hub.resolve(source, revision=revision)
  assert folder == cache
  assert origin == {'name': NAME, 'revision': COMMIT}
  assert list(hf.TensorFolder(folder)) == ['a']


def test_a_branch_is_what_the_cache_knows_of_it_while_the_hub_cannot_be_reached(cache):
  for source in (NAME, f'{NAME}@main'):
    folder, origin = hub.resolve(source)
    assert folder == cache
    assert origin == {'name': NAME, 'revision': COMMIT, 'asked': 'main'}


def test_pickled_weights_are_found_where_there_are_no_others(cache):
  (cache / 'model.safetensors').unlink()
  (cache / 'pytorch_model.bin').write_bytes(b'')
  assert hub.resolve(NAME, revision=COMMIT)[0] == cache


@pytest.mark.parametrize('source, revision, message', [
  (NAME, 'v1.0', 'v1.0 is not in the local cache, and HF_HUB_OFFLINE is set; unset it, or give a'),
  (NAME, '../../etc/passwd', "revision '../../etc/passwd' is neither a commit"),
  (NAME, 'a/../b', "revision 'a/../b' is neither a commit"),
  ('nobody/nothing', None, 'no such folder, and as a name .* main is not in the local cache'),
  (f'{NAME}@{COMMIT}', 'f' * 40, 'names another revision than ffff'),
  (NAME, 'f' * 40, 'not .or not wholly. in the local cache, and HF_HUB_OFFLINE is set'),
  ('/no/such/folder', None, 'no such folder; expected one, or a name on the Hugging Face hub'),
  ('three/part/name', None, 'no such folder'),
])
def test_everything_else_is_a_sentence(cache, source, revision, message):
  with pytest.raises(UserError, match=message):
    hub.resolve(source, revision=revision)


def test_a_local_folder_wins_and_has_no_revision(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'someone' / 'model').mkdir(parents=True)
  folder, origin = hub.resolve('someone/model')
  assert folder.is_dir() and origin == {'name': 'model', 'revision': None}
  with pytest.raises(UserError, match='a revision belongs to a name on the hub'):
    hub.resolve('someone/model', revision=COMMIT)


def test_a_snapshot_that_was_not_downloaded_wholly(cache):
  """The index names a shard that is not there: the folder's own check says so."""
  (cache / 'model.safetensors').unlink()
  hf.write_weights(cache, [('a', np.ones(4)), ('b', np.ones(4))], max_shard_bytes=32)
  (cache / 'model-00002-of-00002.safetensors').unlink()
  folder, _ = hub.resolve(NAME, revision=COMMIT)
  with pytest.raises(UserError, match='model-00002-of-00002.safetensors is missing'):
    hf.TensorFolder(folder)


def test_without_huggingface_hub(cache, monkeypatch):
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  with pytest.raises(UserError, match='needs huggingface_hub; install it'):
    hub.resolve(NAME, revision=COMMIT)


def test_online_only_weights_and_their_settings_are_asked_for(cache, monkeypatch):
  """What is not in the cache is fetched: safetensors first, pickles only without them, no code."""
  import huggingface_hub
  from huggingface_hub.errors import LocalEntryNotFoundError

  asked = []

  def download(name, *, revision, local_files_only, allow_patterns):
    if local_files_only:
      raise LocalEntryNotFoundError('not there')
    asked.append(allow_patterns)
    return str(cache)

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
  assert hub.resolve(NAME, revision='f' * 40)[0] == cache
  assert len(asked) == 1 and '*.safetensors' in asked[0]
  assert not any(pattern.endswith('.py') or pattern == '*' for pattern in asked[0])
  (cache / 'model.safetensors').unlink()
  with pytest.raises(UserError, match='holds no weights'):
    hub.resolve(NAME, revision='f' * 40)
  assert '*.bin' in asked[-1]
