"""How fast PyTorch multiplies here, and what MKL says of its kernels; a process of its own.

    MKL_VERBOSE=1 python -m benchmarks.peers.products

Prints MKL's own lines and, last, JSON: GFLOP/s in float32 by shape.
"""

import json
import time

import torch

# Rows of a ViT, of a batch, of a square that any library likes.
SHAPES = ((729, 1152, 1152), (729, 1152, 4304), (2304, 1152, 1152), (2048, 2048, 2048))
_SECONDS = 0.3


def rate(m: int, k: int, n: int) -> float:
  """Best GFLOP/s of several products."""
  a, b = torch.full((m, k), 0.5), torch.full((k, n), 0.5)
  a @ b
  best, end = float('inf'), time.perf_counter() + _SECONDS
  while time.perf_counter() < end:
    start = time.perf_counter()
    a @ b
    best = min(best, time.perf_counter() - start)
  return round(2 * m * k * n / best / 1e9, 1)


if __name__ == '__main__':
  print(json.dumps({'x'.join(map(str, shape)): rate(*shape) for shape in SHAPES}))
