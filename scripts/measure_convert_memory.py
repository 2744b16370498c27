"""Measures how much memory `hrvlm convert` needs for a model of released size.

Builds the release's folder with zero-filled sparse shards (no download, next to no disk), runs
`hrvlm convert` on it in a process of its own, samples that process's anonymous memory
(`RssAnon` in /proc/<pid>/status; Linux only), checks that the storage dtype was kept, and with
`--export` does the same for `hrvlm export`. The scratch copy of the stacked leaves needs the size
of the model on the disk of `--folder` (16 GB for VILA-HD-8B), an export twice that. Everything is
removed at the end.

  python scripts/measure_convert_memory.py --folder /scratch/measure [--model vila_hd_8b_4k_siglip]
"""

import argparse
import json
import math
import os
import pathlib
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time

from hrvlm_jax.checkpoint import hf, safetensors, store
from hrvlm_jax.checkpoint.rows import entries
from hrvlm_jax.language.prompt import tokenizer_of
from hrvlm_jax.systems import registry
from hrvlm_jax.vlm import model as vlm


def released(name):
  """(system, config) of a release by its name."""
  for system in map(registry.get, registry.names()):
    if name in system.released:
      return system, system.released[name]
  known = [n for s in registry.names() for n in registry.get(s).released]
  raise SystemExit(f'--model {name}: unknown; known: {", ".join(known)}')


def write_sparse(path, shapes, dtype):
  """A safetensors file whose data is one hole."""
  itemsize, header, end = safetensors.DTYPES[dtype].itemsize, {}, 0
  for name, shape in shapes.items():
    size = math.prod(shape) * itemsize
    header[name] = {'dtype': dtype, 'shape': list(shape), 'data_offsets': [end, end + size]}
    end += size
  text = json.dumps(header).encode()
  text += b' ' * (-len(text) % 8)
  with open(path, 'wb') as file:
    file.write(struct.pack('<Q', len(text)) + text)
    file.truncate(8 + len(text) + end)
  return end


def write_release(folder, system, config, dtype):
  """The folder of the release; returns (bytes of all tensors, bytes of the largest)."""
  itemsize = safetensors.DTYPES[dtype].itemsize
  shapes = {name: entry.shape for entry in entries(system.table(config), vlm.build(config).abstract)
            for name in entry.names}
  total = 0
  for part in system.folders or ('',):
    prefix = f'{part}/' if part else ''
    own = {n.removeprefix(prefix): s for n, s in shapes.items() if n.startswith(prefix)}
    (folder / part).mkdir(parents=True, exist_ok=True)
    shards, size = [{}], 0
    for name, shape in own.items():
      nbytes = math.prod(shape) * itemsize
      if size + nbytes > hf.MAX_SHARD_BYTES:
        shards.append({})
        size = 0
      shards[-1][name] = shape
      size += nbytes
    names = ['model.safetensors'] if len(shards) == 1 else [
      f'model-{i:05d}-of-{len(shards):05d}.safetensors' for i in range(1, len(shards) + 1)]
    for file, shard in zip(names, shards, strict=True):
      total += write_sparse(folder / part / file, shard, dtype)
    if len(shards) > 1:
      index = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
      (folder / part / 'model.safetensors.index.json').write_text(
        json.dumps({'metadata': {'total_size': total}, 'weight_map': index}))
  place = f'{system.folders[0]}/' if 'llm' in system.folders else ''
  hf.write_extra(folder, system.to_release(config) | {
    f'{place}{name}': data for name, data in tokenizer_of('byte').files.items()})
  return total, max(math.prod(shape) for shape in shapes.values()) * itemsize


def anonymous(pid):
  """RssAnon of a process in bytes; 0 after its end."""
  try:
    with open(f'/proc/{pid}/status', encoding='ascii') as file:
      return next((int(line.split()[1]) * 1024 for line in file if line.startswith('RssAnon')), 0)
  except (FileNotFoundError, ProcessLookupError):
    return 0


def watched(argv):
  """Runs a command; returns (peak RssAnon in bytes, seconds)."""
  start, peak = time.perf_counter(), 0
  process = subprocess.Popen([sys.executable, '-m', 'hrvlm_jax.cli', *argv])
  try:
    while process.poll() is None:
      peak = max(peak, anonymous(process.pid))
      time.sleep(0.02)
  finally:
    process.kill()  # nothing happens after its end
    process.wait()
  if process.returncode:
    raise SystemExit(f'hrvlm {argv[0]} ended with status {process.returncode}')
  return peak, time.perf_counter() - start


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--folder', required=True, help='on a disk with room for the model')
  parser.add_argument('--model', default='vila_hd_8b_4k_siglip')
  parser.add_argument('--dtype', default='BF16', choices=('BF16', 'F16', 'F32'))
  parser.add_argument('--export', action='store_true', help='also measure hrvlm export')
  arguments = parser.parse_args()
  signal.signal(signal.SIGTERM, lambda *_: sys.exit('terminated'))  # cleans up
  os.makedirs(arguments.folder, exist_ok=True)
  work = pathlib.Path(tempfile.mkdtemp(dir=arguments.folder, prefix='convert-'))
  try:
    system, config = released(arguments.model)
    total, largest = write_release(work / 'original', system, config, arguments.dtype)
    gb = lambda size: f'{size / 1e9:.2f} GB'
    print(f'{arguments.model}: {gb(total)} of {arguments.dtype} tensors, largest {gb(largest)}',
          flush=True)
    peak, seconds = watched(['convert', '--from', str(work / 'original'), '--to',
                             str(work / 'checkpoint')])
    print(f'convert: peak RssAnon {gb(peak)} ({peak / largest:.2f} x the largest tensor), '
          f'{seconds:.0f} s', flush=True)
    kinds = {str(leaf.dtype) for leaf in store.describe(work / 'checkpoint').values()}
    print(f'stored as {sorted(kinds)}', flush=True)
    if arguments.export:
      peak, seconds = watched(['export', '--checkpoint', str(work / 'checkpoint'), '--to',
                               str(work / 'exported')])
      print(f'export: peak RssAnon {gb(peak)}, {seconds:.0f} s', flush=True)
      files = hf.read_json(work / 'exported' / hf.MANIFEST)['files']
      print(f'largest file {gb(max(f["bytes"] for f in files.values()))}', flush=True)
  finally:
    shutil.rmtree(work, ignore_errors=True)


if __name__ == '__main__':
  main()
