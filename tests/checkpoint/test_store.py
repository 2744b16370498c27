"""The checkpoint store: round trips, atomicity, keeping, and every refusal in one sentence."""

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import textwrap

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from hrvlm_jax.checkpoint import layout, store
from hrvlm_jax.core import paths
from hrvlm_jax.core.errors import UserError

PARAMS = {
    'vision': {'blocks': {'0': {'kernel': np.arange(12, dtype=np.float32).reshape(3, 4)}}},
    'language': {'embedding': np.arange(6).astype(ml_dtypes.bfloat16).reshape(3, 2)},
    'scale': np.float32(2.5).reshape(()),
    'table': np.arange(3, dtype=np.int32),
}


def abstract(params):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)


def assert_same(a, b):
  a, b = store.flatten(a), store.flatten(b)
  assert a.keys() == b.keys()
  for path in a:
    assert a[path].dtype == b[path].dtype, path
    np.testing.assert_array_equal(np.asarray(a[path]), np.asarray(b[path]), err_msg=path)


@pytest.fixture
def saved(tmp_path):
  store.save_params(tmp_path / 'c', PARAMS, {'model': {'width': 4}},
                    extra_files={'tokenizer/tokenizer.json': '{}', 'note.bin': b'\x00'})
  return tmp_path / 'c'


def test_params_round_trip(saved):
  loaded = store.load_params(saved, abstract(PARAMS))
  assert_same(loaded, PARAMS)
  assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded))
  assert_same(store.load_params(saved, shardings='host'), PARAMS)
  assert store.load_config(saved) == {'model': {'width': 4}}
  marker = store.load_marker(saved)
  assert (marker['format'], marker['version'], marker['kind']) == ('hrvlm_jax', 2, 'params')
  assert (saved / 'tokenizer' / 'tokenizer.json').read_text() == '{}'
  assert store.describe(saved)['language/embedding'].dtype == ml_dtypes.bfloat16


def test_another_dtype(saved):
  half = store.load_params(saved, abstract(PARAMS), dtype=jnp.float16)
  assert half['scale'].dtype == half['language']['embedding'].dtype == jnp.float16
  assert half['table'].dtype == jnp.int32  # counts are no numbers to round
  wide = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), PARAMS)
  assert store.load_params(saved, wide)['language']['embedding'].dtype == jnp.float32
  as_stored = store.load_params(saved, wide, dtype='stored')
  assert as_stored['language']['embedding'].dtype == jnp.bfloat16


def test_one_leaf_alone(saved):
  leaf = store.load_leaf(saved, 'language/embedding')
  assert isinstance(leaf, np.ndarray)
  np.testing.assert_array_equal(leaf, PARAMS['language']['embedding'])
  with pytest.raises(UserError, match='has no parameter lang/embed .nearest: language/embedding'):
    store.load_leaf(saved, 'lang/embed')


def test_leaves_one_after_the_other(saved, monkeypatch):
  """In the order asked for, several at a time; the folder is described once for all of them."""
  flat, described, loads = paths.flatten(PARAMS), [], []
  metadata, load = store.ocp.checkpointables_metadata, store.ocp.load
  monkeypatch.setattr(store.ocp, 'checkpointables_metadata',
                      lambda *a, **k: described.append(1) or metadata(*a, **k))
  monkeypatch.setattr(store.ocp, 'load', lambda *a, **k: loads.append(1) or load(*a, **k))
  for names, at_once, times in ((None, 1 << 20, 1), (sorted(flat, reverse=True), 1, len(flat))):
    described.clear()
    loads.clear()
    found = list(store.load_leaves(saved, names, at_once=at_once))
    assert [path for path, _ in found] == (list(store.describe(saved)) if names is None else names)
    for path, leaf in found:
      assert isinstance(leaf, np.ndarray) and leaf.dtype == flat[path].dtype
      np.testing.assert_array_equal(leaf, flat[path])
    assert len(loads) == times and len(described) == (2 if names is None else 1)
  with pytest.raises(UserError, match='has no parameter lang/embed'):
    next(store.load_leaves(saved, ['scale', 'lang/embed']))


def test_all_mismatches_in_one_message(saved):
  other = abstract(PARAMS)
  other['vision']['blocks']['0']['kernel'] = jax.ShapeDtypeStruct((4, 4), jnp.float32)
  other['projector'] = {'bias': jax.ShapeDtypeStruct((2,), jnp.float32)}
  del other['table']
  with pytest.raises(UserError) as caught:
    store.load_params(saved, other)
  assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [
      'missing in the checkpoint: projector/bias (2,)',
      'not in the model: table (3,)',
      'shape: vision/blocks/0/kernel is (4, 4) in the model, (3, 4) in the checkpoint',
  ]


def test_overwriting_is_asked_for(saved):
  with pytest.raises(UserError, match='holds a checkpoint already'):
    store.save_params(saved, PARAMS, {})
  store.save_params(saved, {'a': np.ones(2)}, {'new': 1}, overwrite=True)
  assert store.load_config(saved) == {'new': 1}
  assert list(store.describe(saved)) == ['a']
  assert sorted(p.name for p in saved.parent.iterdir()) == ['c']


def test_other_files_are_never_overwritten(tmp_path):
  (tmp_path / 'thesis.txt').write_text('years of work')
  with pytest.raises(UserError, match='holds other files'):
    store.save_params(tmp_path, PARAMS, {})
  assert (tmp_path / 'thesis.txt').read_text() == 'years of work'


@pytest.mark.parametrize('change, message', [
    (lambda d: (d / 'checkpoint.json').unlink(), 'holds no checkpoint'),
    (lambda d: (d / 'arrays' / layout.COMMIT).unlink(), 'not whole, writing it was interrupted'),
    (lambda d: (d / 'checkpoint.json').write_text('{'), 'cannot be read as JSON'),
    (lambda d: (d / 'checkpoint.json').write_text('{"format": "x"}'), "format 'x'"),
    (lambda d: (d / 'checkpoint.json').write_text(
        '{"format": "hrvlm_jax", "version": 9, "hrvlm_jax": "3.0"}'), 'version 9'),
])
def test_damaged_checkpoints_are_refused(saved, change, message):
  change(saved)
  with pytest.raises(UserError, match=message):
    store.load_params(saved)
  with pytest.raises(UserError, match='no such folder'):
    store.load_params(saved / 'nowhere')


def make_state():
  params = {'a': {'kernel': jnp.arange(6.0).reshape(2, 3)}, 'b': jnp.ones(3, jnp.bfloat16)}
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
  return {'params': params, 'opt_state': optimizer.init(params), 'step': jnp.asarray(7),
          'key': jax.random.key(3), 'count': 5}


def test_training_state_round_trip(tmp_path):
  state = make_state()
  with store.TrainStore(tmp_path, config={'seed': 1}) as checkpoints:
    assert checkpoints.latest() is None
    checkpoints.save(7, state, {'position': [1, 2]})
  again = store.TrainStore(tmp_path)
  assert again.latest() == 7
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
                      if isinstance(x, jax.Array) else x, make_state())
  step, restored, data = again.restore(like)
  assert (step, data) == (7, {'position': [1, 2]})
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  key, restored_key = state.pop('key'), restored.pop('key')
  np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(restored_key))
  assert int(restored.pop('count')) == state.pop('count')
  assert_same(restored, state)
  # Everything that reads parameters reads them from the work directory as well.
  assert_same(store.load_params(tmp_path, abstract(state['params'])), state['params'])
  assert store.load_config(tmp_path) == {'seed': 1}


def test_a_training_checkpoint_of_version_1_is_read(tmp_path):
  """Marker, config and data states lay beside `arrays/` there."""
  state = make_state()
  with store.TrainStore(tmp_path, config={'seed': 1}) as checkpoints:
    checkpoints.save(7, state, {'position': 1})
  folder = tmp_path / 'checkpoints' / '7'
  (folder / 'arrays').mkdir()
  for entry in list((folder / 'run').iterdir()):
    entry.rename(folder / entry.name)
  for name in ('params', 'state', '_CHECKPOINT_METADATA', layout.COMMIT):
    (folder / name).rename(folder / 'arrays' / name)
  (folder / 'manifest.json').unlink()  # there were no checksums yet
  marker = json.loads((folder / 'checkpoint.json').read_text()) | {'version': 1}
  del marker['manifest']
  (folder / 'checkpoint.json').write_text(json.dumps(marker))
  step, restored, data = store.TrainStore(tmp_path).restore(make_state())
  assert (step, data) == (7, {'position': 1})
  assert_same(restored['params'], state['params'])
  assert_same(store.load_params(tmp_path), state['params'])
  assert store.load_config(tmp_path) == {'seed': 1} and store.load_marker(tmp_path)['step'] == 7


def test_data_states_are_opaque(tmp_path):
  checkpoints = store.TrainStore(tmp_path)
  checkpoints.save(1, make_state(), b'\x00\xff')
  checkpoints.save(2, make_state())
  checkpoints.wait()
  assert checkpoints.restore(make_state(), step=1).data_state == b'\x00\xff'
  assert checkpoints.restore(make_state()).data_state is None
  assert checkpoints.data_states(1) == [b'\x00\xff']


def test_keep_newest_and_every_nth(tmp_path):
  checkpoints = store.TrainStore(tmp_path, keep=2, keep_every=4)
  for step in range(1, 8):
    checkpoints.save(step, {'params': {'a': jnp.full(2, step)}})
  checkpoints.close()
  assert checkpoints.steps() == [4, 6, 7]
  assert sorted(p.name for p in (tmp_path / 'checkpoints').iterdir()) == ['4', '6', '7']
  with pytest.raises(UserError, match=r'no checkpoint of step 5; there are: \[4, 6, 7\]'):
    checkpoints.restore({'params': {'a': jnp.zeros(2, int)}}, step=5)


def test_state_mismatch_lists_parameters_and_optimizer(tmp_path):
  checkpoints = store.TrainStore(tmp_path)
  checkpoints.save(1, {'params': {'a': jnp.ones(2)}, 'mu': {'a': jnp.ones(2)}})
  with pytest.raises(UserError) as caught:
    checkpoints.restore({'params': {'b': jnp.ones(2)}, 'mu': {'a': jnp.ones(3)}})
  assert '3 problems' in str(caught.value)
  with pytest.raises(UserError, match='holds no whole checkpoint'):
    store.TrainStore(tmp_path / 'empty').restore({})


def test_saving_does_not_see_later_steps(tmp_path):
  """The next step may reuse the buffers of the state while it is being written."""
  step = jax.jit(lambda x: jax.tree.map(lambda a: a + 1, x), donate_argnums=0)
  state = {'params': {'a': jnp.zeros((512, 1024)), 'b': jnp.zeros(16)}}
  host = {'params': {'n': np.zeros(1000)}}
  first, second = store.TrainStore(tmp_path / '1'), store.TrainStore(tmp_path / '2')
  first.save(1, state)
  second.save(1, host)
  host['params']['n'] += 1
  for _ in range(3):
    state = step(state)
  jax.block_until_ready(state)
  first.wait()
  second.wait()
  for directory in ('1', '2'):
    loaded = store.load_params(tmp_path / directory)
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(loaded)), directory


def test_an_interrupted_save_is_never_taken_for_whole(tmp_path):
  """Kills a process that saves without end, at moments spread over its saves."""
  program = textwrap.dedent("""
      import sys, numpy as np
      from hrvlm_jax.checkpoint import store
      checkpoints = store.TrainStore(sys.argv[1], keep=2)
      step = checkpoints.latest() or 0
      while True:
        step += 1
        params = {str(i): np.full((64, 64), step + i, np.float32) for i in range(8)}
        checkpoints.save(step, {'params': params, 'step': np.asarray(step)}, {'step': step})
        if step % 3 == 0: print(step, flush=True)
  """)
  like = {'params': {str(i): np.zeros((64, 64), np.float32) for i in range(8)},
          'step': np.asarray(0)}
  delays = (0.0, 0.004, 0.011)
  for delay in delays:
    process = subprocess.Popen([sys.executable, '-c', program, str(tmp_path)],
                               stdout=subprocess.PIPE)
    process.stdout.readline()
    with contextlib.suppress(subprocess.TimeoutExpired):
      process.wait(delay)
    process.kill()
    process.communicate()
    checkpoints = store.TrainStore(tmp_path)
    for step in checkpoints.steps():
      restored = checkpoints.restore(like, step=step)
      assert int(restored.state['step']) == restored.data_state['step'] == step
      for i in range(8):
        assert (np.asarray(restored.state['params'][str(i)]) == step + i).all()
  checkpoints.save(10_000, like)
  checkpoints.close()
  left = {p.name for p in (tmp_path / 'checkpoints').iterdir()}
  assert left == {str(step) for step in checkpoints.steps()}


def test_a_full_disk_is_a_sentence_and_loses_nothing(tmp_path):
  """A limit on the size of files stands in for a full disk: the same error, later by a name."""
  program = textwrap.dedent("""
      import resource, signal, sys, numpy as np
      from hrvlm_jax.checkpoint import store
      from hrvlm_jax.core.errors import UserError
      rng = np.random.default_rng(0)
      checkpoints = store.TrainStore(sys.argv[1])
      checkpoints.save(1, {'params': {'a': np.ones(3)}}); checkpoints.wait()
      signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
      resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
      for save in (lambda: (checkpoints.save(2, {'params': {'a': rng.random(1 << 16)}}),
                            checkpoints.wait()),
                   lambda: store.save_params(sys.argv[1] + '/p', {'a': rng.random(1 << 16)}, {})):
        try: save()
        except UserError as error: print(error)
  """)
  run = subprocess.run([sys.executable, '-c', program, str(tmp_path)], capture_output=True,
                       text=True)
  lines = run.stdout.splitlines()
  assert len(lines) == 2, run.stderr
  assert 'Traceback' not in run.stderr
  for line in lines:
    assert line.startswith('cannot write the checkpoint') and 'choose another place' in line
  assert store.steps(tmp_path) == [1]
  assert not store.is_whole(tmp_path / 'p')
  np.testing.assert_array_equal(store.load_params(tmp_path)['a'], np.ones(3))


def test_a_full_disk_leaves_the_checkpoint_that_was_to_be_replaced(tmp_path):
  program = textwrap.dedent("""
      import resource, signal, sys, numpy as np
      from hrvlm_jax.checkpoint import store
      from hrvlm_jax.core.errors import UserError
      store.save_params(sys.argv[1] + '/p', {'a': np.ones(3)}, {'n': 1})
      signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
      resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
      values = np.random.default_rng(0).random(1 << 16)
      try: store.save_params(sys.argv[1] + '/p', {'a': values}, {}, overwrite=True)
      except UserError as error: print(error)
      try: store.save_params(sys.argv[1] + '/q', {'a': values}, {})
      except UserError as error: print(error)
  """)
  run = subprocess.run([sys.executable, '-c', program, str(tmp_path)], capture_output=True,
                       text=True)
  assert run.stdout.count('cannot write the checkpoint') == 2, run.stderr
  assert [p.name for p in tmp_path.iterdir()] == ['p']  # nothing half-written stays behind
  assert store.load_config(tmp_path / 'p') == {'n': 1}
  np.testing.assert_array_equal(store.load_leaf(tmp_path / 'p', 'a'), np.ones(3))


def test_missing_permission_is_a_sentence_and_loses_nothing():
  """As a user without rights in the folder, also where the suite itself runs as root."""
  program = textwrap.dedent("""
      import os, sys, numpy as np
      from hrvlm_jax.checkpoint import hf, store
      from tests.checkpoint.writing import write_folder
      from hrvlm_jax.core.errors import UserError
      root = sys.argv[1]
      store.save_params(root + '/p', {'a': np.ones(3)}, {'n': 1})
      checkpoints = store.TrainStore(root + '/run')
      checkpoints.save(1, {'params': {'a': np.ones(3)}}); checkpoints.wait()
      for folder in (root, root + '/run/checkpoints'): os.chmod(folder, 0o555)
      if os.geteuid() == 0:
        os.setgroups([]); os.setgid(65534); os.setuid(65534)
      for save in (lambda: store.save_params(root + '/p', {'a': np.zeros(3)}, {}, overwrite=True),
                   lambda: store.save_params(root + '/q', {'a': np.zeros(3)}, {}),
                   lambda: (checkpoints.save(2, {'params': {'a': np.zeros(3)}}),
                            checkpoints.wait()),
                   lambda: write_folder(root + '/out', [('a', np.ones(1))])):
        try: save()
        except UserError as error: print(error)
  """)
  with tempfile.TemporaryDirectory() as folder:
    pathlib.Path(folder).chmod(0o755)
    run = subprocess.run([sys.executable, '-c', program, folder], capture_output=True, text=True)
    pathlib.Path(folder).chmod(0o755)
    lines = run.stdout.splitlines()
    assert len(lines) == 4, (run.stdout, run.stderr[-2000:])
    for line in lines:
      assert line.startswith('cannot write') and 'permission denied; choose a folder' in line
    assert store.load_config(f'{folder}/p') == {'n': 1} and store.steps(f'{folder}/run') == [1]
    assert sorted(p.name for p in pathlib.Path(folder).iterdir()) == ['p', 'run']


def test_training_state_in_another_dtype(tmp_path):
  """Masters saved in float32, read as bfloat16 and back: what the abstract state asks for."""
  values = jnp.linspace(-3, 3, 12).reshape(3, 4)
  with store.TrainStore(tmp_path) as checkpoints:
    checkpoints.save(1, {'params': {'a': values}, 'mu': {'a': values}})
  like = {'params': {'a': jax.ShapeDtypeStruct((3, 4), jnp.bfloat16)},
          'mu': {'a': jax.ShapeDtypeStruct((3, 4), jnp.float32)}}
  state = store.TrainStore(tmp_path).restore(like).state
  assert state['params']['a'].dtype == jnp.bfloat16 and state['mu']['a'].dtype == jnp.float32
  np.testing.assert_array_equal(state['params']['a'], values.astype(jnp.bfloat16))


def test_a_file_in_the_way_is_a_sentence(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='a part of the path is a file, not a folder'):
    store.save_params(tmp_path / 'file' / 'c', PARAMS, {})
  with pytest.raises(UserError, match='a part of the path is a file, not a folder'):
    store.TrainStore(tmp_path / 'file').save(1, {'params': PARAMS})


def test_eight_devices_four_one(tmp_path):
  """Saved on a mesh of eight, read on four and on one: the same numbers, the asked-for places."""
  program = textwrap.dedent("""
      import sys, jax, jax.numpy as jnp, numpy as np
      from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
      from hrvlm_jax.checkpoint import store
      def on(n):
        mesh = jax.make_mesh((n,), ('fsdp',), axis_types=(AxisType.Auto,),
                             devices=jax.devices()[:n])
        return {'w': NamedSharding(mesh, P('fsdp')), 'b': NamedSharding(mesh, P())}
      values = {'w': np.arange(32.0, dtype=np.float32).reshape(16, 2), 'b': np.ones(3, np.float32)}
      put = lambda n: jax.tree.map(jax.device_put, values, on(n))
      with store.TrainStore(sys.argv[1]) as checkpoints:
        checkpoints.save(1, {'params': put(8), 'mu': put(8)}, {'n': 1})
      for n in (8, 4, 1):
        like = jax.tree.map(lambda v, s: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=s),
                            values, on(n))
        state = store.TrainStore(sys.argv[1]).restore({'params': like, 'mu': like}).state
        loaded = store.load_params(sys.argv[1], values, shardings=on(n), dtype=jnp.bfloat16)
        for name in values:
          for tree in (state['params'], state['mu']):
            assert tree[name].sharding == on(n)[name]
            np.testing.assert_array_equal(tree[name], values[name])
          assert loaded[name].dtype == jnp.bfloat16 and loaded[name].sharding == on(n)[name]
      print('done')
  """)
  environment = {**os.environ, 'XLA_FLAGS': '--xla_force_host_platform_device_count=8'}
  run = subprocess.run([sys.executable, '-c', program, str(tmp_path)], capture_output=True,
                       text=True, env=environment)
  assert run.stdout.strip() == 'done', run.stderr
  assert json.loads((tmp_path / 'checkpoints/1/run/checkpoint.json').read_text())['step'] == 1


def test_two_processes_then_one(tmp_path):
  """Two processes hold half of the state each and their own data state; one process reads all."""
  program = textwrap.dedent("""
      import sys, jax, jax.numpy as jnp, numpy as np
      workdir, port, process = sys.argv[1], sys.argv[2], int(sys.argv[3])
      jax.distributed.initialize(f'127.0.0.1:{port}', 2, process)
      from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
      from hrvlm_jax.checkpoint import store
      mesh = jax.make_mesh((2,), ('fsdp',), axis_types=(AxisType.Auto,))
      values = np.arange(32.0, dtype=np.float32).reshape(16, 2)
      put = lambda scale: jax.make_array_from_callback(
          (16, 2), NamedSharding(mesh, P('fsdp')), lambda index: scale * values[index])
      with store.TrainStore(workdir, keep=1, config={'a': 1}) as checkpoints:
        for step in (1, 2):
          state = {'params': {'w': put(step)}, 'mu': put(10 * step), 'step': np.asarray(step)}
          checkpoints.save(step, state, {'process': process, 'step': step})
        checkpoints.wait()
        restored = checkpoints.restore(state)
        assert restored.data_state == {'process': process, 'step': 2}
        mine = restored.state['mu'].addressable_shards[0]
        np.testing.assert_array_equal(mine.data, 20 * values[mine.index])
      store.save_params(workdir + '/params', {'w': put(3)}, {})
  """)
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port = str(probe.getsockname()[1])
  runs = [subprocess.Popen([sys.executable, '-c', program, str(tmp_path), port, str(process)],
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
          for process in range(2)]
  outputs = [run.communicate(timeout=120)[0] for run in runs]
  assert [run.returncode for run in runs] == [0, 0], outputs
  values = np.arange(32.0, dtype=np.float32).reshape(16, 2)
  checkpoints = store.TrainStore(tmp_path)
  assert checkpoints.steps() == [2]
  state = checkpoints.restore(
      {'params': {'w': values}, 'mu': values, 'step': np.asarray(0)}).state
  np.testing.assert_array_equal(state['params']['w'], 2 * values)
  np.testing.assert_array_equal(state['mu'], 20 * values)
  states = checkpoints.data_states(2)
  assert states == [{'process': 0, 'step': 2}, {'process': 1, 'step': 2}]
  np.testing.assert_array_equal(store.load_params(tmp_path / 'params')['w'], 3 * values)
