"""Original weights to a checkpoint without holding them in memory; non-finite values refused."""

import subprocess
import sys
import textwrap

import jax
import ml_dtypes
import numpy as np
import pytest

from hrvlm_jax.checkpoint import files
from hrvlm_jax.checkpoint.rows import Row, Table, import_tensors, transpose
from hrvlm_jax.core.errors import UserError

TABLE = Table((Row('layers/kernel', 'layers.{i}.weight', transpose), Row('norm', 'norm.weight')))
ABSTRACT = {'layers': {'kernel': jax.ShapeDtypeStruct((2, 3, 4), np.float32)},
            'norm': jax.ShapeDtypeStruct((3,), np.float32)}


def tensors():
  values = {f'layers.{i}.weight': np.arange(12).reshape(4, 3) + i for i in range(2)}
  values['norm.weight'] = np.ones(3)
  return {name: value.astype(ml_dtypes.bfloat16) for name, value in values.items()}


def test_scratch_arrays_hold_the_same_values(tmp_path):
  expected = import_tensors(tensors(), TABLE, ABSTRACT)
  with files.scratch_arrays(tmp_path / 'new') as allocate:
    loaded = import_tensors(tensors(), TABLE, ABSTRACT, allocate=allocate)
    assert isinstance(loaded['layers']['kernel'], np.memmap)
    for path in (('layers', 'kernel'), ('norm',)):
      a, b = loaded, expected
      for name in path:
        a, b = a[name], b[name]
      assert a.dtype == b.dtype == ml_dtypes.bfloat16
      np.testing.assert_array_equal(a, b)
    assert len(list((tmp_path / 'new').iterdir())) == 1
    assert allocate((0, 3), np.float32).shape == (0, 3)
  assert list((tmp_path / 'new').iterdir()) == []


def test_non_finite_tensors_are_all_named():
  bad = tensors()
  bad['norm.weight'][1] = np.nan
  bad['layers.1.weight'][0, 0] = np.inf
  with pytest.raises(UserError) as caught:
    import_tensors(bad, TABLE, ABSTRACT, finite=True)
  assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [
      'layers.1.weight: holds infinities or NaN', 'norm.weight: holds infinities or NaN']
  import_tensors(bad, TABLE, ABSTRACT)


def test_sixteen_layers_pass_through_little_memory(tmp_path):
  """134 MB in bfloat16 from a safetensors file to a checkpoint and back to a file."""
  program = textwrap.dedent("""
      import sys, threading, numpy as np, jax, ml_dtypes
      from hrvlm_jax.checkpoint import files, hf, store, streaming
      from tests.checkpoint.writing import write_folder
      from hrvlm_jax.checkpoint.rows import Row, Table, import_tensors, transpose
      folder = sys.argv[1]
      def anonymous():
        for line in open('/proc/self/status'):
          if line.startswith('RssAnon'): return int(line.split()[1]) * 1024
      streaming.CHUNK_BYTES, streaming._FILE_BYTES = 8 << 20, 16 << 20
      rng = np.random.default_rng(0)
      def source():
        for i in range(16):
          bits = rng.integers(0, 0x7f00, (2048, 2048), dtype=np.uint16)
          yield f'layers.{i}.weight', bits.view(ml_dtypes.bfloat16)
      write_folder(folder + '/original', source())
      table = Table((Row('layers/kernel', 'layers.{i}.weight', transpose),))
      abstract = {'layers': {'kernel': jax.ShapeDtypeStruct((16, 2048, 2048), np.float32)}}
      jax.devices()
      before, peak, done = anonymous(), [0], threading.Event()
      def watch():
        while not done.wait(0.005): peak[0] = max(peak[0], anonymous() - before)
      watcher = threading.Thread(target=watch); watcher.start()
      with files.scratch_arrays(folder) as allocate:
        original = hf.TensorFolder(folder + '/original')
        params = import_tensors(original, table, abstract, allocate=allocate, finite=True)
        store.save_params(folder + '/checkpoint', params, {})
      done.set(); watcher.join()
      print(peak[0])
      kernel = store.load_leaf(folder + '/checkpoint', 'layers/kernel')
      for i in range(16):
        same = kernel[i].T.view(np.uint16) == original[f'layers.{i}.weight'].view(np.uint16)
        assert same.all()
  """)
  run = subprocess.run([sys.executable, '-c', program, str(tmp_path)], capture_output=True,
                       text=True)
  assert run.returncode == 0, run.stderr
  assert int(run.stdout) < 90_000_000
  assert sorted(p.name for p in tmp_path.iterdir()) == ['checkpoint', 'original']
