"""How much a process reads and holds while a large checkpoint is laid over its devices.

    python -m tests.vlm.laying make FOLDER LAYERS
    python -m tests.vlm.laying orbax|tensors FOLDER [--processes HOST:PORT,N,I]

LAYERS of 201 MB each. Prints one JSON object: bytes of the parameters, bytes that this process
read, bytes that came from the disk for it (nothing of the folder is in memory before), bytes that
its arrays take, and the most anonymous memory beyond what it had before and those arrays. The
export has the original's layout, matrices transposed.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
import threading
import time

import numpy as np


def config_of(layers: int):
  from hrvlm_jax.systems import registry

  tiny = registry.get('mc_llava').tiny()
  text = dataclasses.replace(tiny.text, width=2048, depth=layers, heads=16, kv_heads=16,
                             head_dim=128, mlp_width=8192)
  return dataclasses.replace(
    tiny, text=text, projector=dataclasses.replace(tiny.projector, n_out=2048))


def make(folder: pathlib.Path, layers: int) -> None:
  """The checkpoint, and its export in the original's layout."""
  import jax

  from hrvlm_jax.checkpoint import store
  from hrvlm_jax.core.config import to_dict
  from hrvlm_jax.interop.export import export
  from hrvlm_jax.language.prompt import tokenizer_of
  from hrvlm_jax.vlm import model as vlm

  config = config_of(layers)
  rng = np.random.default_rng(0)
  # Random bits with small exponents: finite, and nothing that could be compressed away.
  fill = lambda leaf: (rng.integers(0, 1 << 30, leaf.shape, np.uint32)).view(np.float32)
  values = jax.tree.map(fill, vlm.build(config).abstract)
  store.save_params(folder, values, {'model': to_dict(config)})
  (folder / 'tokenizer').mkdir()
  tokenizer_of('byte').save(folder / 'tokenizer')
  export(folder, f'{folder}_export')


def anonymous() -> int:
  """Bytes of anonymous memory of this process."""
  for line in pathlib.Path('/proc/self/status').read_text().splitlines():
    if line.startswith('RssAnon'):
      return int(line.split()[1]) << 10
  raise RuntimeError('no RssAnon')


def from_disk() -> int:
  """Bytes that the system fetched from the disk for this process."""
  for line in pathlib.Path('/proc/self/io').read_text().splitlines():
    if line.startswith('read_bytes'):
      return int(line.split()[1])
  raise RuntimeError('no read_bytes')


def forget(folder: pathlib.Path) -> None:
  """Leaves nothing of a folder in memory."""
  for path in folder.rglob('*'):
    if path.is_file():
      with path.open('rb') as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(kind: str, folder: pathlib.Path) -> dict[str, int]:
  import jax
  import tensorstore

  from hrvlm_jax.interop.convert import Release
  from hrvlm_jax.parallel.layout import Layout
  from hrvlm_jax.vlm import laid
  from hrvlm_jax.vlm.answer import model_config

  layout = Layout({'data': 1, 'fsdp': 8})
  placed = read = 0
  make_array, is_finite = jax.make_array_from_callback, laid.is_finite

  def counted(*arguments):
    nonlocal placed
    array = make_array(*arguments)
    placed += sum(shard.data.nbytes for shard in array.addressable_shards)
    return array

  def looked(array):
    nonlocal read
    read += array.nbytes
    return is_finite(array)

  jax.make_array_from_callback, laid.is_finite = counted, looked
  forget(folder if kind == 'orbax' else pathlib.Path(f'{folder}_export'))
  before, worst, done, disk = anonymous(), 0, threading.Event(), from_disk()

  def watch():
    nonlocal worst
    while not done.is_set():
      worst = max(worst, anonymous() - before - placed)
      time.sleep(0.005)

  watching = threading.Thread(target=watch)
  watching.start()
  if kind == 'orbax':
    params = laid.load(folder, model_config(folder), layout)
    metrics = tensorstore.experimental_collect_matching_metrics(
      '/tensorstore/kvstore/file/bytes_read')
    read = sum(value['value'] for metric in metrics for value in metric['values'])
  else:
    release = Release(f'{folder}_export')
    params = laid.load_tensors(release.tensors, release.table, release.config, layout)
  done.set()
  watching.join()
  return {'bytes': sum(leaf.nbytes for leaf in jax.tree.leaves(params)), 'read': read,
          'placed': placed, 'beyond': worst, 'disk': from_disk() - disk}


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('what', choices=('make', 'orbax', 'tensors'))
  parser.add_argument('folder', type=pathlib.Path)
  parser.add_argument('layers', type=int, nargs='?', default=4)
  parser.add_argument('--processes')
  arguments = parser.parse_args()
  if arguments.what == 'make':
    make(arguments.folder, arguments.layers)
    return 0
  if arguments.processes:
    from hrvlm_jax.parallel import distributed

    address, number, own = arguments.processes.split(',')
    distributed.initialize(coordinator=address, num_processes=int(number), process_id=int(own))
  print(json.dumps(measure(arguments.what, arguments.folder)), flush=True)
  if arguments.processes:
    import jax

    jax.distributed.shutdown()
  return 0


if __name__ == '__main__':
  sys.exit(main())
