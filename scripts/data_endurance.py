"""Bad rows and memory over long runs, with made-up data.

    python scripts/data_endurance.py [--folder DIR] [--workers 1]

1. `hrvlm data check` reads 100,000 rows of which 1 % are bad, and must find exactly those.
2. One training epoch of a tiny MC-LLaVA over 5,000 rows, 1 % bad, packed: the counts by kind of the
   run must be exactly those of the file.
3. The pipeline alone over 20 epochs of the 5,000: resident memory of all its processes per epoch.

Prints one line per result; ends with status 1 when a count is wrong or memory grows by more than
5 % after the second epoch.
"""

import argparse
from collections import Counter
import dataclasses
import json
import os
import pathlib
import sys
import time

import numpy as np
from PIL import Image
import psutil

from hrvlm_jax.data.checks import RowCheck, check_source
from hrvlm_jax.data.packing import Packing
from hrvlm_jax.data.sources import open_source
from hrvlm_jax.systems.mc_llava.encoder import tiny
from hrvlm_jax.training import loop
from hrvlm_jax.training.batches import make_batches
from hrvlm_jax.training.config import DataConfig, OptimizerConfig, RunConfig, TrainingConfig

GOOD = [{'from': 'human', 'value': '<image>\nWhat?'}, {'from': 'gpt', 'value': 'This.'}]
BAD = ('damaged', 'not an image', 'empty', 'missing', 'path', 'json', 'encoding', 'form')
GROWTH = 1.05


def write(folder: pathlib.Path, rows: int, share: float, *, images: int) -> dict[int, str]:
  """`data.jsonl` with so many rows; returns the kind of every bad one."""
  rng = np.random.default_rng(rows)
  folder.mkdir(parents=True, exist_ok=True)
  for i in range(images):
    size = rng.integers(20, 160, 2)
    noise = rng.integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(noise).save(folder / f'{i}.jpg')
  whole = (folder / '0.jpg').read_bytes()
  (folder / 'cut.jpg').write_bytes(whole[:len(whole) // 2])
  (folder / 'html.jpg').write_text('<html>not found</html>')
  (folder / 'zero.jpg').write_bytes(b'')
  bad = dict.fromkeys(rng.choice(rows, round(rows * share), replace=False).tolist())
  bad = {index: BAD[i % len(BAD)] for i, index in enumerate(sorted(bad))}
  with (folder / 'data.jsonl').open('wb') as file:
    for index in range(rows):
      row = {'id': str(index), 'image': f'{index % images}.jpg', 'conversations': GOOD}
      kind = bad.get(index)
      name = {'damaged': 'cut.jpg', 'not an image': 'html.jpg', 'empty': 'zero.jpg',
              'missing': 'none.jpg', 'path': '../0.jpg'}.get(kind)
      line = json.dumps(row | ({'image': name} if name else {})).encode()
      line = {'json': line[:-5], 'encoding': b'{"id": "\xff\xfe"}', 'form': b'{"id": "x"}'}.get(
        kind, line)
      file.write(line + b'\n')
  return bad


def resident() -> float:
  """Megabytes of this process and its children (proportional set size where Linux has it)."""
  processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
  total = 0
  for process in processes:
    info = process.memory_full_info()
    total += getattr(info, 'pss', info.rss)
  return total / 2**20


def run_config(folder: pathlib.Path, steps: int, workers: int, *, crops: int) -> RunConfig:
  """A tiny MC-LLaVA over the rows, four examples to a row."""
  return RunConfig(
    model=tiny(max_crops=crops, num_tokens=16),
    data=DataConfig(train=str(folder / 'data.jsonl'), lengths=(288, 384, 512), workers=workers,
                    shards=1, packing=Packing(rows=10, window=5)),
    training=TrainingConfig(steps=steps, batch_size=40, log_every=25, checkpoint_every=1000,
                            optimizer=OptimizerConfig(learning_rate=1e-3)))


def main() -> int:
  """Runs the three parts."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--folder', type=pathlib.Path, default=pathlib.Path('runs/endurance'))
  parser.add_argument('--workers', type=int, default=1)
  parser.add_argument('--parts', default='123')
  arguments = parser.parse_args()
  failed = False

  def report(text: str, ok: bool) -> None:
    nonlocal failed
    failed |= not ok
    print(f'{"ok    " if ok else "FAILED"}  {text}', flush=True)

  if '1' in arguments.parts:
    bad = write(arguments.folder / 'check', 100_000, 0.01, images=200)
    start = time.perf_counter()
    source = open_source(arguments.folder / 'check' / 'data.jsonl')
    found = check_source(source, RowCheck(image='decode'), workers=2, progress=False)
    report(f'check: {found.summary()}; {time.perf_counter() - start:.0f} s',
           {fault.position: fault.kind for fault in found.faults} == bad)
  bad = write(arguments.folder / 'train', 5000, 0.01, images=300)
  if '2' in arguments.parts:
    work = arguments.folder / f'work-{os.getpid()}'
    config = run_config(arguments.folder / 'train', 125, 0, crops=0)
    result = loop.train(config, work, progress=False)
    report(f'training: {result.step} steps of 40 are one epoch; counted {result.bad_rows}',
           result.bad_rows == dict(Counter(bad.values())))
  if '3' in arguments.parts:
    config = run_config(arguments.folder / 'train', 1, arguments.workers, crops=4)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, shards=1))
    batches, sizes = make_batches(config), []
    for epoch in range(1, 21):
      start = time.perf_counter()
      for _ in range(125):
        next(batches)
      sizes.append(resident())
      rate = 5000 / (time.perf_counter() - start)
      print(f'        epoch {epoch}: {sizes[-1]:.0f} MB, {rate:.0f} examples/s', flush=True)
    expected = {kind: 20 * count for kind, count in Counter(bad.values()).items()}
    report(f'pipeline: 20 epochs of 5,000; {sizes[1]:.0f} MB after the second epoch, at most '
           f'{max(sizes[2:]):.0f} MB later; counts exact: {dict(batches.counts) == expected}',
           max(sizes[2:]) <= GROWTH * sizes[1] and dict(batches.counts) == expected)
    batches.close()
  return int(failed)


if __name__ == '__main__':
  sys.exit(main())
