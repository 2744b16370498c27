"""uint8 pixels -> normalised floats, on the device and, exactly as the originals, on the host."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8
import numpy as np

# Of CLIP's processors.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

def normalise(
  pixels: UInt8[Array, '... 3'], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, '... 3']:
  """(x / 255 - mean) / std in float32, inside the compiled step.

  Pixels travel to the device as bytes, a quarter of the traffic. XLA may replace a division by a
  constant with a product: the last bit can differ from `normalise_host`, nothing more
  (tests/core/test_pixels.py).
  """
  x = pixels.astype(jnp.float32) / 255.0
  return (x - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


def normalise_host(
  pixels: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...], *, rescale: str = 'product'
) -> np.ndarray:
  """The same in the operation order of the originals' processors, bit for bit.

  Args:
    rescale: 'product' multiplies by 1/255 in float64 and casts (Hugging Face processors),
      'quotient' divides by 255 in float32 (torchvision's ToTensor).
  """
  if rescale == 'product':
    x = (pixels.astype(np.float64) * 0.00392156862745098).astype(np.float32)
  else:
    x = pixels.astype(np.float32) / np.float32(255)
  return (x - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
