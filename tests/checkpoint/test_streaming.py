"""How parameters are written: in chunks, one after the other, from files that are mapped."""

import subprocess
import sys
import textwrap

import numpy as np

from hrvlm_jax.checkpoint import leaves, store, streaming


def test_memory_mapped_parameters_are_not_held_in_memory(tmp_path):
  """128 MB of random numbers from a mapped file: at most a few chunks are in memory at a time."""
  program = textwrap.dedent("""
      import sys, threading, numpy as np, jax
      from hrvlm_jax.checkpoint import store, streaming
      def anonymous():
        for line in open('/proc/self/status'):
          if line.startswith('RssAnon'): return int(line.split()[1]) * 1024
      streaming.CHUNK_BYTES, streaming._FILE_BYTES = 8 << 20, 16 << 20
      jax.devices()
      shape, rng = (16, 1024, 2048), np.random.default_rng(0)
      mapped = np.memmap(sys.argv[1] + '/leaf', np.float32, 'w+', shape=shape)
      for layer in mapped: layer.view(np.uint32)[...] = rng.integers(0, 1 << 30, layer.shape)
      before, peak, done = anonymous(), [0], threading.Event()
      def watch():
        while not done.wait(0.005): peak[0] = max(peak[0], anonymous() - before)
      watcher = threading.Thread(target=watch); watcher.start()
      store.save_params(sys.argv[1] + '/c', {'a': {'stacked': mapped}}, {})
      done.set(); watcher.join()
      print(peak[0])
      assert np.array_equal(store.load_leaf(sys.argv[1] + '/c', 'a/stacked'), mapped)
  """)
  run = subprocess.run([sys.executable, '-c', program, str(tmp_path)], capture_output=True,
                       text=True)
  assert run.returncode == 0, run.stderr
  assert int(run.stdout) < 90_000_000


def test_chunks_of_published_shapes():
  bf16, mb = 2, 1 << 20
  assert streaming.chunking((), 4) == ()
  assert streaming.chunking((4096, 4096), bf16) == (4096, 4096)
  assert streaming.chunking((36, 4096, 12288), bf16) == (1, 1024, 3072)
  assert streaming.chunking((151936, 4096), bf16) == (8192, 1024)
  assert streaming.chunking((151651, 3584), bf16) == (9362, 896)  # a prime number of rows
  assert streaming.chunking((3584, 151651), bf16) == (221, 37913)
  assert streaming.chunking((1, 4096, 16384), bf16) == (1, 1024, 4096)
  # Too small for quarters: halves of both axes, not quarters of one, that rows would be read whole.
  assert streaming.chunking((36, 2048, 2048), 4) == (1, 1024, 1024)
  assert streaming.chunking((36, 1024, 1024), bf16) == (1, 1024, 1024)
  assert 64 * mb == streaming.CHUNK_BYTES


def test_a_prime_number_of_rows_is_few_chunks(tmp_path, monkeypatch):
  """Ragged chunks are read whole, in parts, and straight into shards."""
  monkeypatch.setattr(streaming, 'CHUNK_BYTES', 1 << 12)
  values = np.arange(1009 * 8, dtype=np.float32).reshape(1009, 8)
  store.save_params(tmp_path / 'c', {'embed': values}, {})
  array = leaves.StoredParams(tmp_path / 'c')._array('embed')
  assert array.chunk_layout.read_chunk.shape == (128, 8)
  np.testing.assert_array_equal(store.load_leaf(tmp_path / 'c', 'embed'), values)
  np.testing.assert_array_equal(store.load_params(tmp_path / 'c')['embed'], values)
  np.testing.assert_array_equal(array[500:].read().result(), values[500:])


def test_pieces_cover_an_array_once():
  seen = np.zeros((5, 4, 3), int)
  for piece in streaming.pieces(seen.shape, (2, 4, 2)):
    seen[piece] += 1
  assert (seen == 1).all()
  assert streaming.pieces((), ()) == [()]
