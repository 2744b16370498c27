"""From the bytes of a JPEG to the views of a system, beside the originals' image processors.

Both sides decode the same bytes with the same libjpeg and must give the same pixels. They differ in
what they do around it: the originals make float tensors of everything, whole canvases, and resize
overlapping crops one by one; ours ends with uint8, which is normalised on the device.
"""

from __future__ import annotations

from collections.abc import Mapping
import contextlib
import io
import json
import pathlib
import statistics
import subprocess
import tempfile
import time
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.harness.case import Options
from benchmarks.harness.runner import ROOT, peer_python
from hrvlm_jax.core.images import open_image
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.baselines.tiles import choose_resolution, content_box
from hrvlm_jax.systems.mc_llava.encoder import crop_boxes

TARGETS = {'ps3': 1.5, 'vila_hd': 1.5, 'llava_hr': 1.5, 'mc_llava': 1.2, 'pheye': 1.0,
           'anyres': 1.0}
RELEASES = {'ps3': 'ps3_4k_siglip', 'vila_hd': 'vila_hd_8b_4k_siglip', 'llava_hr': 'llava_hr_7b',
            'mc_llava': 'mc_llava_3b', 'pheye': 'pheye_x4_672'}


def photograph(width: int, height: int, quality: int = 92) -> bytes:
  """A JPEG with the detail of a photograph: noise of many scales, 4:2:0."""
  rng = np.random.default_rng(0)
  picture = np.zeros((height, width, 3), np.float32)
  for cells in (3, 12, 50, 200, 800):
    small = rng.standard_normal((cells * height // width + 1, cells, 3)).astype(np.float32)
    for channel in range(3):
      picture[..., channel] += 30 * np.asarray(Image.fromarray(small[..., channel]).resize(
        (width, height), Image.Resampling.BILINEAR))
  out = io.BytesIO()
  Image.fromarray(np.clip(picture + 128, 0, 255).astype(np.uint8)).save(out, 'JPEG',
                                                                        quality=quality)
  return out.getvalue()


def peer_settings(name: str, encoder: Any, size: tuple[int, int]) -> dict[str, Any]:
  """What the original's processor is told about an image of that size."""
  if name == 'mc_llava':
    return {'size': encoder.vision.image_size, 'boxes': crop_boxes(*size, encoder)}
  if name == 'anyres':
    canvas = choose_resolution(*size, encoder.pinpoints)
    return {'size': encoder.vision.image_size, 'canvas': canvas,
            'content': content_box(*size, canvas)}
  if name == 'pheye':
    return {'size': encoder.vision.image_size, 'level': encoder.level}
  side = {'ps3': lambda: encoder.scales[-1], 'vila_hd': lambda: encoder.side,
          'llava_hr': lambda: encoder.image_size}
  return {'size': side[name]()}


def encoder_of(name: str) -> Any:
  """The released encoder."""
  released = registry.get(name).released
  return released[RELEASES[name]].encoder if name in RELEASES else (
    next(iter(released.values())).encoder)


def timed(run) -> tuple[dict[str, float], Any]:
  """Processor and wall seconds of one call, and its result."""
  cpu, wall = time.process_time(), time.perf_counter()
  out = run()
  return {'cpu': time.process_time() - cpu, 'wall': time.perf_counter() - wall}, out


@contextlib.contextmanager
def peer(python: str):
  """The other side as a process: `ask(command) -> answer`."""
  process = subprocess.Popen([python, '-m', 'benchmarks.peers.data'], cwd=ROOT, text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)

  def ask(**command):
    process.stdin.write(json.dumps(command) + '\n')
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
      raise RuntimeError('the peer ended; its error is above')
    return json.loads(line)

  try:
    yield ask
  finally:
    process.stdin.close()
    process.wait()


def measure(settings: Mapping[str, Any], options: Options) -> dict[str, Any]:
  """Rows of the table: one per system; calls alternate, ours first.

  Args:
    settings: size (width, height) of the JPEG, rounds, systems; python: the peers' interpreter.
  """
  del options
  data, rows = photograph(*settings['size']), []
  with tempfile.TemporaryDirectory() as folder, peer(
      settings.get('python') or peer_python()) as ask:
    path = pathlib.Path(folder) / 'image.jpg'
    path.write_bytes(data)
    ask(image=str(path))
    for name in settings['systems']:
      rows.append(_compare(name, data, tuple(settings['size']), settings['rounds'], ask, folder))
  return {'rows': rows, 'note': f'one JPEG of {len(data) / 1e6:.1f} MB; processor seconds of one '
          'core, decoding included; pairs alternate in one run'}


def _compare(name, data, size, rounds, ask, folder) -> dict[str, Any]:
  system, encoder = registry.get(name), encoder_of(name)
  run = lambda **more: system.views([open_image(data, exif='ignore', **more)], encoder)
  views = run()
  ask(kind=name, settings=peer_settings(name, encoder, size))
  pairs = []
  for _ in range(rounds):
    own, views = timed(run)
    pairs.append((own, ask(run=True)))
  ask(save=f'{folder}/{name}.npy')
  theirs = np.load(f'{folder}/{name}.npy')
  same = views['pixels'].shape == theirs.shape and bool(np.array_equal(views['pixels'], theirs))
  side = peer_settings(name, encoder, size).get('canvas', views['pixels'].shape[-3:-1])
  side = max(side) * (encoder.level if name == 'pheye' else 1)
  # MC-LLaVA's crops depend on the size of the image: a smaller one has fewer.
  scaled = [] if name == 'mc_llava' else [
    timed(lambda: run(inexact=side))[0]['cpu'] for _ in range(rounds)]
  median = lambda who, what: statistics.median(pair[who][what] for pair in pairs)
  ratio = statistics.median(b['cpu'] / a['cpu'] for a, b in pairs)
  return {
    'system': name, 'views': len(views['pixels']), 'same_bytes': same,
    'peer_ms': round(1e3 * median(1, 'cpu'), 1), 'ours_ms': round(1e3 * median(0, 'cpu'), 1),
    'images_per_second': round(1 / median(0, 'cpu'), 2), 'ratio': round(ratio, 2),
    'spread': [round(f(b['cpu'] / a['cpu'] for a, b in pairs), 2) for f in (min, max)],
    'wall_ratio': round(statistics.median(b['wall'] / a['wall'] for a, b in pairs), 2),
    'target': TARGETS[name], 'met': same and ratio >= TARGETS[name],
    'inexact_ms': round(1e3 * statistics.median(scaled), 1) if scaled else None}
