"""Damage on a disk: every file of a checkpoint, one byte each; the reader says so."""

import json
import os
import pathlib
import shutil

from etils import epath
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from hrvlm_jax.checkpoint import chunks, layout, leaves, manifest, store
from hrvlm_jax.core.errors import UserError

RNG = np.random.default_rng(0)
PARAMS = {'a': {'kernel': RNG.random((64, 80), dtype=np.float32)},
          'b': RNG.random((30, 40, 5), dtype=np.float32),
          'half': RNG.random(1000).astype(ml_dtypes.bfloat16), 'small': np.arange(3)}


def files_of(folder):
  return sorted(p for p in pathlib.Path(folder).rglob('*') if p.is_file())


def flip(path, where=None):
  content = bytearray(path.read_bytes())
  content[len(content) // 2 if where is None else where] ^= 0x40
  stat = path.stat()
  path.write_bytes(content)
  os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))


def same(loaded):
  found, wanted = store.flatten(loaded), store.flatten(PARAMS)
  return found.keys() == wanted.keys() and all(
    np.array_equal(np.asarray(found[k]), np.asarray(wanted[k])) for k in wanted)


@pytest.fixture(scope='module')
def params(tmp_path_factory):
  folder = tmp_path_factory.mktemp('params') / 'c'
  store.save_params(folder, PARAMS, {'model': {'width': 4}},
                    extra_files={'tokenizer/tokenizer.json': '{"merges": []}'})
  return folder


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('run')
  state = {'params': jax.tree.map(jnp.asarray, PARAMS), 'step': jnp.asarray(1),
           'opt': {'m': jnp.asarray(PARAMS['b'])}}
  with store.TrainStore(workdir, config={'seed': 1}) as checkpoints:
    for step in (2, 4):
      checkpoints.save(step, state | {'step': jnp.asarray(step)}, {'step': step})
  return workdir, state


def test_the_manifest_names_every_file_but_itself_and_the_commit(params, run):
  for folder in (params, run[0] / 'checkpoints' / '4'):
    found = manifest.Manifest(epath.Path(folder)).files
    names = {p.relative_to(folder).as_posix() for p in files_of(folder)}
    beside = 'run/' if (folder / 'run').exists() else ''
    commit = 'commit_success.txt' if beside else 'arrays/commit_success.txt'
    assert set(found) == names - {f'{beside}manifest.json', commit}
    assert not manifest.damaged(folder)


@pytest.mark.parametrize('how', ['flip', 'cut', 'remove'])
def test_no_damage_of_parameters_loads_in_silence(params, tmp_path, how):
  refused = 0
  for number, file in enumerate(files_of(params)):
    name = file.relative_to(params).as_posix()
    copy = tmp_path / str(number)
    shutil.copytree(params, copy)
    if how == 'flip':
      flip(copy / name)
    elif how == 'cut':
      (copy / name).write_bytes(file.read_bytes()[:-1])
    else:
      (copy / name).unlink()
    if name == 'arrays/commit_success.txt':  # its being there is all it says
      continue
    try:
      store.load_config(copy)
      assert same(store.load_params(copy, shardings='host')), name
    except UserError as error:
      refused += 1
      assert str(copy) in str(error) and file.name in str(error), (name, error)
    else:
      # Only what no reader looks at: Orbax leaves the databases of single processes behind.
      assert 'ocdbt.process_0' in name or name.endswith('params/commit_success.txt'), name
    try:
      assert any(file.name in text for text in manifest.damaged(copy)), name
    except UserError as error:
      assert name == 'checkpoint.json' and 'no checkpoint' in str(error) or 'read' in str(error)
  assert refused >= 8


def test_no_damage_of_a_training_checkpoint_is_resumed_from(run, tmp_path):
  workdir, state = run
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
  newest = workdir / 'checkpoints' / '4'
  refused = 0
  for number, file in enumerate(files_of(newest)):
    name = file.relative_to(newest).as_posix()
    copy = tmp_path / str(number)
    shutil.copytree(workdir, copy)
    flip(copy / 'checkpoints' / '4' / name)
    try:
      restored = store.TrainStore(copy).restore(like)
      assert same(restored.state['params']) and restored.data_state == {'step': 4}
    except UserError as error:
      refused += 1
      assert '/checkpoints/4' in str(error), error
      if name != 'run/checkpoint.json':
        assert 'whole one is that of step 2' in str(error) and '--resume-from 2' in str(error)
        assert file.name in str(error)
    else:
      assert 'commit_success' in name or 'ocdbt.process_0' in name, name
    assert store.TrainStore(copy).restore(like, step=2).step == 2
  assert refused >= 10


def test_a_partial_read_checks_what_it_reads(params, tmp_path, monkeypatch):
  """Damage in the chunk of one leaf: that leaf is refused, its neighbour is read."""
  shutil.copytree(params, tmp_path / 'c')
  folder, where = epath.Path(tmp_path / 'c'), {}
  for leaf in ('a/kernel', 'b'):
    where[leaf] = set()
    with monkeypatch.context() as patch:
      patch.setattr(manifest, 'check', lambda folder, names=None, leaf=leaf:
                    where[leaf].update(names or ()))
      chunks.check(folder, 'params', {leaf: (PARAMS['b'].shape, None)})
  (only_b,) = where['b'] - where['a/kernel']
  flip(tmp_path / 'c' / only_b)
  assert np.array_equal(store.load_leaf(folder, 'a/kernel'), PARAMS['a']['kernel'])
  stored = leaves.StoredParams(folder)
  assert np.array_equal(stored('a/kernel'), PARAMS['a']['kernel'])
  for read in (lambda: store.load_leaf(folder, 'b'), lambda: stored('b')):
    with pytest.raises(UserError, match='is damaged: .*checksum of its bytes'):
      read()


class _OfOneHost:
  """A sharding of two hosts along the first axis, as one of them sees it."""

  is_fully_addressable = False

  def addressable_devices_indices_map(self, shape):
    half = slice(0, 32), slice(None)
    return {0: half, 1: half}


def test_a_sharded_read_checks_its_chunks():
  wanted = chunks._wanted((64, 80), _OfOneHost(), lambda: [16, 40])
  assert [wanted((i, 1)) for i in range(4)] == [True, True, False, False]
  assert chunks._wanted((), _OfOneHost(), lambda: [])(())


def test_without_checking_and_without_a_manifest(params, tmp_path, monkeypatch, caplog):
  shutil.copytree(params, tmp_path / 'c')
  data = max(files_of(tmp_path / 'c'), key=lambda p: p.stat().st_size)
  with pytest.raises(UserError, match='missing, though the checkpoint was written with it'):
    old = tmp_path / 'gone'
    shutil.copytree(params, old)
    (old / 'manifest.json').unlink()
    store.load_params(old)
  # As written by an earlier release.
  marker = json.loads((old / 'checkpoint.json').read_text())
  del marker['manifest']
  (old / 'checkpoint.json').write_text(json.dumps(marker))
  for _ in range(2):
    assert same(store.load_params(old))
  assert [r.message for r in caplog.records if 'not checked' in r.message] == [
    f'{old} has no manifest.json (it was written by an earlier release): its files are not checked']
  # A byte in the middle of numbers: read as it is when asked to, and only then.
  flip(data, data.stat().st_size // 3)
  with pytest.raises(UserError, match='is damaged'):
    store.load_params(tmp_path / 'c')
  monkeypatch.setenv('HRVLM_VERIFY', '0')
  try:
    store.load_params(tmp_path / 'c')
  except UserError as error:  # the flipped byte may be one of the compression's
    assert 'cannot be read' in str(error)


def test_cut_files_that_are_not_checked_are_a_sentence(params, tmp_path, monkeypatch):
  from hrvlm_jax.checkpoint.leaves import StoredParams

  shutil.copytree(params, tmp_path / 'c')
  data = max(files_of(tmp_path / 'c'), key=lambda p: p.stat().st_size)
  data.write_bytes(data.read_bytes()[:data.stat().st_size // 2])
  monkeypatch.setenv('HRVLM_VERIFY', '0')
  with pytest.raises(UserError, match='a file of the checkpoint is damaged'):
    leaves = StoredParams(tmp_path / 'c')
    for path in leaves.flat:
      leaves(path)


def test_a_file_that_is_no_longer_what_it_was_is_read_again(params, tmp_path):
  shutil.copytree(params, tmp_path / 'c')
  assert same(store.load_params(tmp_path / 'c'))
  flip(max(files_of(tmp_path / 'c'), key=lambda p: p.stat().st_size))
  with pytest.raises(UserError, match='is damaged'):
    store.load_params(tmp_path / 'c')
  with pytest.raises(UserError, match='no checkpoint of step 9'):
    layout.steps(tmp_path)
    store.TrainStore(tmp_path / 'c').restore({}, step=9)
