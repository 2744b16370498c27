"""What a run does with its time, its batches and its memory: the numbers beside the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import functools
import resource
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hrvlm_jax.core import paths
from hrvlm_jax.parallel.flops import count_flops
from hrvlm_jax.parallel.topology import peak_flops


class Meter:
  """Counts over the steps since the last report.

  Args:
    step: the plain train step, traced to count the operations the model needs; None: no MFU.
    state: its first argument, shapes are enough.
    devices: over which the work is spread.
  """

  def __init__(self, step: Callable | None, state: Any, devices: int):
    self._step, self._state, self._devices = step, state, devices
    self._flops: dict[Any, float] = {}
    self._shapes: set[Any] = set()
    self._clear()

  def _clear(self) -> None:
    self._clock, self.waited = time.perf_counter(), 0.0
    self._steps = self._tokens = self._places = self._images = 0
    self._work = 0.0

  def pause(self, seconds: float) -> None:
    """Leaves a stretch (evaluation) out of the time."""
    self._clock += seconds

  def count(self, batch: Mapping[str, Any], whole: Mapping[str, Any] | None = None) -> None:
    """Counts a batch of host arrays that was trained on.

    Args:
      whole: shapes of the batch of all hosts, when `batch` is this host's part; the others' parts
        are taken to be like it.
    """
    whole = batch if whole is None else whole
    hosts = np.size(whole['tokens']) / np.size(batch['tokens']) if 'tokens' in batch else 1
    self._steps += 1
    tokens, places = token_places(batch)
    self._tokens += round(tokens * hosts)
    self._places += round(places * hosts)
    self._images += round(images(batch) * hosts)
    key = tuple((path, leaf.shape) for path, leaf in paths.flatten(whole).items())
    self._shapes.add(key)
    if self._step is not None:
      if key not in self._flops:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), whole)
        self._flops[key] = count_flops(self._step, self._state, shapes)
      self._work += self._flops[key]

  def values(self, batch: Mapping[str, Any], compilations: int) -> dict[str, Any]:
    """The numbers since the last call; `batch` is the one whose crop slots are looked at.

    tokens_per_second: places that hold text or visual tokens. token_waste: share of the places
    that are padding. crop_waste: share of the crop slots of this batch that hold no picture (are
    all zero). mfu: operations the model needs over what the devices could do; on a CPU, over its
    measured rate of a large float32 product. recompilations: programs beyond one per batch shape.
    """
    seconds = max(time.perf_counter() - self._clock, 1e-9)
    out: dict[str, Any] = {
      'steps_per_second': self._steps / seconds, 'tokens_per_second': self._tokens / seconds,
      'images_per_second': self._images / seconds,
      'input_wait_share': min(self.waited / seconds, 1.0),
      'token_waste': 1 - self._tokens / max(self._places, 1), 'crop_waste': crop_waste(batch),
      'compilations': compilations, 'recompilations': max(compilations - len(self._shapes), 0),
      **memory()}
    peak = device_peak() if self._step is not None else None
    if peak is not None:
      out['mfu'] = self._work / seconds / (peak * self._devices)
    self._clear()
    return out


def token_places(batch: Mapping[str, Any]) -> tuple[int, int]:
  """(places that hold a token, places) of a batch."""
  if 'valid' in batch:
    return int(np.sum(batch['valid'])), int(np.size(batch['valid']))
  size = int(np.size(batch['tokens'])) if 'tokens' in batch else 0
  return size, size


def images(batch: Mapping[str, Any]) -> int:
  """Rows of a batch that see an image."""
  index = batch.get('visual_index')
  if index is None:
    return 0 if 'tokens' not in batch else int(np.prod(np.shape(batch['tokens'])[:-1]))
  seen = (np.asarray(index) >= 0).any(axis=-1)
  # Without a single place for visual tokens the images are read by cross-attention, one per row.
  return int(seen.sum()) if seen.any() else int(seen.size)


def crop_waste(batch: Mapping[str, Any]) -> float:
  """Share of the crop slots that hold no picture."""
  pixels = batch.get('views', batch).get('pixels')
  if pixels is None or not np.size(pixels):
    return 0.0
  crops = np.asarray(pixels).reshape(-1, int(np.prod(np.shape(pixels)[-3:])))
  return float(1 - crops.any(axis=1).mean())


def memory() -> dict[str, float]:
  """Peak memory in GiB: of the fullest local device, or of the process if devices do not tell."""
  found = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
  peaks = [stats['peak_bytes_in_use'] for stats in found if 'peak_bytes_in_use' in stats]
  if peaks:
    return {'device_memory_gib': max(peaks) / 2**30}
  unit = 1 if sys.platform == 'darwin' else 1024
  used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
  return {'process_memory_gib': used / 2**30}


def device_peak() -> float | None:
  """Operations per second of one device: of its data sheet, or measured on a CPU; else None."""
  device = jax.devices()[0]
  if device.platform == 'cpu':
    return _cpu_ceiling() / jax.local_device_count()
  return peak_flops(device.device_kind)


@functools.cache
def _cpu_ceiling(side: int = 1024) -> float:
  """Best rate of a float32 product of side x side matrices on the whole CPU."""
  product = jax.jit(jnp.matmul)
  x = jnp.ones((side, side), jnp.float32)
  best = float('inf')
  for _ in range(4):
    clock = time.perf_counter()
    product(x, x).block_until_ready()
    best = min(best, time.perf_counter() - clock)
  return 2 * side**3 / best
