"""Hugging Face folders: lazy reading, shards, every kind of damage, all-or-nothing writing."""

import json
import os
import struct
import subprocess
import sys
import textwrap

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch

from hrvlm_jax.checkpoint import files, hf
from hrvlm_jax.core.errors import UserError
from tests.checkpoint.writing import write_folder

TENSORS = {
    'b.mask': np.array([True, False, True]),
    'a.weight': np.arange(12, dtype=np.float32).reshape(3, 4),
    'c.half': np.arange(6).astype(ml_dtypes.bfloat16).reshape(2, 3),
    'd.scalar': np.float16(1.5).reshape(()),
    'e.empty': np.zeros((0, 4), np.int64),
    'f.transposed': np.arange(6, dtype=np.float64).reshape(2, 3).T,
}


def assert_same(loaded, expected=TENSORS):
  assert set(loaded) == set(expected)
  for name, array in expected.items():
    assert loaded[name].dtype == array.dtype and loaded[name].shape == array.shape, name
    np.testing.assert_array_equal(loaded[name], array, err_msg=name)


def test_round_trip_in_one_file(tmp_path):
  write_folder(tmp_path / 'out', TENSORS.items(), config={'width': 4},
                  extra_files={'README.md': '# hello\n', 'sub/blob': b'\x00', 'g.json': [1]},
                  metadata={'origin': 'test'}, manifest={'table': 3})
  folder = hf.TensorFolder(tmp_path / 'out')
  assert_same(folder)
  assert folder.shapes['a.weight'] == (3, 4) and folder.dtypes['c.half'] == ml_dtypes.bfloat16
  assert folder.metadata == {'format': 'pt', 'origin': 'test'}
  assert not folder['a.weight'].flags.writeable and folder['a.weight'].base is not None
  assert hf.read_json(tmp_path / 'out' / 'config.json') == {'width': 4}
  manifest = hf.read_json(tmp_path / 'out' / 'manifest.json')
  assert manifest['table'] == 3
  assert set(manifest['files']) == {'model.safetensors', 'config.json', 'README.md', 'sub/blob',
                                    'g.json'}
  hf.check_manifest(tmp_path / 'out')
  # The reference implementation reads the same (it knows no bfloat16 in NumPy).
  reference = safetensors.numpy.load_file(tmp_path / 'out' / 'model.safetensors')
  assert_same({k: v.view(ml_dtypes.bfloat16) if k == 'c.half' and v.dtype.itemsize == 2 else v
               for k, v in reference.items()})


def test_files_of_the_reference_implementation_are_read(tmp_path):
  plain = {k: np.ascontiguousarray(v).reshape(v.shape) for k, v in TENSORS.items()}
  safetensors.numpy.save_file(plain, tmp_path / 'model.safetensors')
  assert_same(hf.TensorFolder(tmp_path))
  assert_same(hf.TensorFolder(tmp_path / 'model.safetensors'))


def test_shards_and_index(tmp_path):
  written = {f't{i}': np.full(100, i, np.float32) for i in range(5)} | {'big': np.ones(1000)}
  write_folder(tmp_path / 'out', iter(written.items()), max_shard_bytes=900)
  names = sorted(p.name for p in (tmp_path / 'out').iterdir())
  assert names == ['manifest.json', *(f'model-0000{i}-of-00004.safetensors' for i in range(1, 5)),
                   'model.safetensors.index.json']
  index = hf.read_json(tmp_path / 'out' / 'model.safetensors.index.json')
  assert index['metadata']['total_size'] == 5 * 400 + 8000
  assert_same(hf.TensorFolder(tmp_path / 'out'), written)
  assert len(hf.TensorFolder(tmp_path / 'out').files) == 4


@pytest.mark.parametrize('field, value, said', [
  ('dtype', ['F32'], 'unknown dtype'), ('dtype', None, 'unknown dtype'),
  ('shape', 'x', 'bad shape'), ('shape', [True], 'bad shape'),
  ('data_offsets', [0, None], 'bad data_offsets')])
def test_a_header_of_other_kinds(tmp_path, field, value, said):
  safetensors.numpy.save_file({'a': np.ones(4, np.float32)}, tmp_path / 'model.safetensors')
  data = (tmp_path / 'model.safetensors').read_bytes()
  size = int.from_bytes(data[:8], 'little')
  header = json.loads(data[8:8 + size])
  header['a'][field] = value
  text = json.dumps(header).encode()
  (tmp_path / 'model.safetensors').write_bytes(
    len(text).to_bytes(8, 'little') + text + data[8 + size:])
  with pytest.raises(UserError, match=said):
    hf.TensorFolder(tmp_path)


def sharded(folder):
  hf.write_weights(folder, {'a': np.ones(4), 'b': np.zeros(4)}.items(), max_shard_bytes=32)
  return folder / 'model.safetensors.index.json'


def change_index(path, change):
  index = json.loads(path.read_text())
  change(index['weight_map'])
  path.write_text(json.dumps(index))


@pytest.mark.parametrize('file', ['../x.safetensors', '/etc/passwd', 'a/b.safetensors', '..',
                                  'a\\b.safetensors', 'config.json'])
def test_index_must_not_leave_its_folder(tmp_path, file):
  path = sharded(tmp_path)
  change_index(path, lambda table: table.update(a=file))
  with pytest.raises(UserError, match='no plain weight file name; refused'):
    hf.TensorFolder(tmp_path)


def test_index_and_shards_that_disagree(tmp_path):
  path = sharded(tmp_path)
  change_index(path, lambda table: (table.update(c=table['b']), table.pop('a')))
  (tmp_path / 'model-00001-of-00002.safetensors').rename(tmp_path / 'x.safetensors')
  change_index(path, lambda table: table.update(z='x.safetensors', q='x.safetensors'))
  with pytest.raises(UserError) as caught:
    hf.TensorFolder(tmp_path)
  text = str(caught.value)
  assert '4 problems' in text
  assert 'a: in x.safetensors, but the index has it nowhere' in text
  for name in 'czq':
    assert f'{name}: named by the index, not in' in text
  change_index(path, lambda table: table.update(y='gone.safetensors'))
  with pytest.raises(UserError, match='gone.safetensors is missing'):
    hf.TensorFolder(tmp_path)


def header(entries, data=b'', length=None):
  text = json.dumps(entries).encode() if not isinstance(entries, bytes) else entries
  return struct.pack('<Q', len(text) if length is None else length) + text + data


F32 = {'dtype': 'F32', 'shape': [1], 'data_offsets': [0, 4]}


@pytest.mark.parametrize('content, message', [
    (b'', 'not a safetensors file'),
    (b'abc', 'not a safetensors file'),
    (header({}, length=2**63), 'claims a header of 9223372036854775808 bytes, at most'),
    (header({}, length=5000), 'but has 10 bytes in all; the file is truncated'),
    (header(b'{"a": }'), 'no valid JSON'),
    (header(b'[1, 2]'), 'no mapping of tensor names'),
    (header(b'[' * 200_000), 'no valid JSON'),
    (header(b'{"a": {}, "a": {}}'), 'the name a occurs twice'),
    (header({'a': 3}), 'a: no description'),
    (header({'a': F32 | {'dtype': 'F99'}}, bytes(4)), "a: unknown dtype 'F99'"),
    (header({'a': F32 | {'shape': [-1]}}, bytes(4)), 'a: bad shape'),
    (header({'a': F32 | {'shape': [2**40, 2**40]}}, bytes(4)), 'a: shape .* needs'),
    (header({'a': F32 | {'data_offsets': [4, 0]}}, bytes(4)), 'a: bad data_offsets'),
    (header({'a': F32 | {'data_offsets': [0, 2**62]}}, bytes(4)), 'the file is truncated'),
    (header({'a': F32, 'b': F32}, bytes(4)), 'gap or overlap'),
    (header({'a': F32 | {'data_offsets': [4, 8]}}, bytes(8)), 'gap or overlap'),
    (header({'a': F32}, bytes(9)), '5 bytes after the last tensor'),
])
def test_damaged_files_are_refused(tmp_path, content, message):
  (tmp_path / 'model.safetensors').write_bytes(content)
  with pytest.raises(UserError, match=message):
    hf.TensorFolder(tmp_path)


def test_truncation_names_every_tensor_that_is_cut(tmp_path):
  path = tmp_path / 'model.safetensors'
  safetensors.numpy.save_file({'a': np.ones(4), 'b': np.ones(4), 'c': np.ones(4)}, path)
  path.write_bytes(path.read_bytes()[:-40])
  with pytest.raises(UserError) as caught:
    hf.TensorFolder(tmp_path)
  assert 'b: ends at' in str(caught.value) and 'c: ends at' in str(caught.value)


def test_misaligned_tensors_are_still_arrays(tmp_path):
  entries = {'m': {'dtype': 'U8', 'shape': [3], 'data_offsets': [0, 3]},
             'x': {'dtype': 'F32', 'shape': [2], 'data_offsets': [3, 11]}}
  values = np.array([1.5, -2.0], np.float32)
  (tmp_path / 'model.safetensors').write_bytes(header(entries, b'abc' + values.tobytes()))
  x = hf.TensorFolder(tmp_path)['x']
  np.testing.assert_array_equal(x, values)
  assert x.flags.aligned


def test_choosing_a_file(tmp_path):
  with pytest.raises(UserError, match='no such file or folder'):
    hf.TensorFolder(tmp_path / 'none')
  with pytest.raises(UserError, match='no weights'):
    hf.TensorFolder(tmp_path)
  for name in ('x.safetensors', 'y.safetensors'):
    safetensors.numpy.save_file({name[0]: np.ones(1)}, tmp_path / name)
  with pytest.raises(UserError, match='several weight files without an index .x.safetensors, y'):
    hf.TensorFolder(tmp_path)
  safetensors.numpy.save_file({'m': np.ones(1)}, tmp_path / 'model.safetensors')
  (tmp_path / 'pytorch_model.bin').write_bytes(b'never looked at')
  assert list(hf.TensorFolder(tmp_path)) == ['m']


def test_pickled_files(tmp_path):
  tensors = {'a': torch.arange(6.0).reshape(2, 3).T, 'b': torch.ones(2, dtype=torch.bfloat16)}
  torch.save(tensors, tmp_path / 'pytorch_model.bin')
  folder = hf.TensorFolder(tmp_path)
  assert_same(folder, {'a': tensors['a'].numpy(), 'b': np.ones(2, ml_dtypes.bfloat16)})
  torch.save({'epoch': 3, 'state_dict': tensors}, tmp_path / 'open_clip.pt')
  assert_same(hf.TensorFolder(tmp_path / 'open_clip.pt'), dict(folder))
  torch.save(tensors, tmp_path / 'old.pth', _use_new_zipfile_serialization=False)
  assert_same(hf.TensorFolder(tmp_path / 'old.pth'), dict(folder))


class Evil:
  def __reduce__(self):
    return os.mkdir, ('executed',)


def test_pickles_are_never_executed(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  torch.save({'a': Evil()}, 'pytorch_model.bin')
  with pytest.raises(UserError, match='only plain weights are loaded'):
    hf.TensorFolder('pytorch_model.bin')
  assert not (tmp_path / 'executed').exists()
  torch.save({'a': torch.ones(1), 'b': 3}, 'pytorch_model.bin')
  with pytest.raises(UserError, match='b: int, expected a tensor'):
    hf.TensorFolder('pytorch_model.bin')
  (tmp_path / 'pytorch_model.bin').write_bytes(b'PK\x03\x04garbage')
  with pytest.raises(UserError, match='pytorch_model.bin'):
    hf.TensorFolder('pytorch_model.bin')


def test_pickles_without_torch(tmp_path, monkeypatch):
  (tmp_path / 'a.bin').write_bytes(b'')
  monkeypatch.setitem(sys.modules, 'torch', None)
  with pytest.raises(UserError, match='needs PyTorch; install it with'):
    hf.TensorFolder(tmp_path / 'a.bin')


def test_writing_is_all_or_nothing(tmp_path):
  def failing():
    yield 'a', np.ones(3)
    raise RuntimeError('the source broke')

  with pytest.raises(RuntimeError, match='the source broke'):
    write_folder(tmp_path / 'out', failing())
  assert list(tmp_path.iterdir()) == []
  write_folder(tmp_path / 'out', {'a': np.ones(3)}.items())
  with pytest.raises(UserError, match='the folder is not empty'):
    write_folder(tmp_path / 'out', {'a': np.zeros(3)}.items())
  with pytest.raises(RuntimeError):
    write_folder(tmp_path / 'out', failing(), overwrite=True)
  np.testing.assert_array_equal(hf.TensorFolder(tmp_path / 'out')['a'], np.ones(3))
  write_folder(tmp_path / 'out', {'a': np.zeros(3)}.items(), overwrite=True)
  np.testing.assert_array_equal(hf.TensorFolder(tmp_path / 'out')['a'], np.zeros(3))
  assert [p.name for p in tmp_path.iterdir()] == ['out']


@pytest.mark.parametrize('tensors, message', [
    ([('a', np.ones(1)), ('a', np.ones(1))], 'tensor a: written twice'),
    ([('a', np.ones(1, np.complex64))], 'dtype complex64 cannot be written'),
    ([], 'no tensor to write'),
])
def test_what_cannot_be_written(tmp_path, tensors, message):
  with pytest.raises(UserError, match=message):
    write_folder(tmp_path / 'out', tensors)
  assert list(tmp_path.iterdir()) == []
  with pytest.raises(UserError, match='leaves the folder'):
    write_folder(tmp_path / 'out', [('a', np.ones(1))], extra_files={'../x': 'y'})


def test_metadata_holds_strings(tmp_path):
  with pytest.raises(TypeError, match=r"strings only; others at \['a'\]"):
    write_folder(tmp_path / 'out', [('a', np.ones(1))], metadata={'a': {}})


def test_manifest_notices_every_change(tmp_path):
  write_folder(tmp_path / 'o', [('a', np.ones(1))], extra_files={'x': '1', 'y': '2'})
  (tmp_path / 'o' / 'x').write_text('3')
  (tmp_path / 'o' / 'y').unlink()
  (tmp_path / 'o' / 'z').write_text('4')
  with pytest.raises(UserError) as caught:
    hf.check_manifest(tmp_path / 'o')
  assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [
      'y: missing', 'z: not in the manifest', 'x: sha256 differs from the manifest']


def test_non_finite_values_are_found():
  assert hf.is_finite(np.ones((3, 4), ml_dtypes.bfloat16)) and hf.is_finite(np.ones(3, int))
  assert not hf.is_finite(np.array([1.0, np.nan]))
  assert not hf.is_finite(np.array([[1.0, np.inf]]).astype(ml_dtypes.bfloat16).T)


def test_a_full_disk_is_a_sentence(tmp_path):
  program = textwrap.dedent("""
      import resource, signal, sys, numpy as np
      from hrvlm_jax.checkpoint import hf
      from tests.checkpoint.writing import write_folder
      from hrvlm_jax.core.errors import UserError
      signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
      resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
      try: write_folder(sys.argv[1] + '/out', [('a', np.ones(1 << 16))])
      except UserError as error: print(error)
  """)
  run = subprocess.run([sys.executable, '-c', program, str(tmp_path)], capture_output=True,
                       text=True)
  assert run.stdout.startswith(f'cannot write {tmp_path}/out: the file would be larger'), run.stderr
  assert list(tmp_path.iterdir()) == []


def test_operating_system_errors_have_a_cause():
  assert files.cause(OSError(28, os.strerror(28))).startswith('the disk is full')
  assert files.cause(RuntimeError('RESOURCE: No space left on device [x]')).startswith('the disk')
  assert files.cause(PermissionError(13, 'x')).startswith('permission denied')
  assert files.cause(ValueError('something else')) is None


def test_large_tensors_cost_no_anonymous_memory(tmp_path):
  """Reading 100 MB through the map and copying it to another folder allocates next to nothing."""
  program = textwrap.dedent("""
      import sys, numpy as np
      from hrvlm_jax.checkpoint import hf
      from tests.checkpoint.writing import write_folder
      def anonymous():
        for line in open('/proc/self/status'):
          if line.startswith('RssAnon'): return int(line.split()[1]) * 1024
      names = [f't{i}' for i in range(4)]
      zeros = lambda: np.zeros((6, 1 << 20), np.float32)
      write_folder(sys.argv[1] + '/a', ((name, zeros()) for name in names))
      before, peak = anonymous(), 0
      folder = hf.TensorFolder(sys.argv[1] + '/a')
      def tensors():
        global peak
        for name in folder:
          array = folder[name]
          assert array.sum() == 0
          yield name, array
          peak = max(peak, anonymous() - before)
      write_folder(sys.argv[1] + '/b', tensors())
      print(peak)
  """)
  run = subprocess.run([sys.executable, '-c', program, str(tmp_path)], capture_output=True,
                       text=True)
  assert int(run.stdout) < 8_000_000, (run.stdout, run.stderr)
