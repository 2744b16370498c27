"""Normalisation on the device against the originals' order of operations on the host."""

import numpy as np
import pytest

from hrvlm_jax.core.resample import normalise, normalise_host

ALL = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@pytest.mark.parametrize('mean, std', [((0.5,) * 3, (0.5,) * 3), CLIP])
@pytest.mark.parametrize('rescale', ['product', 'quotient'])
def test_device_differs_by_the_last_bit_at_most(mean, std, rescale):
  host = normalise_host(ALL, mean, std, rescale=rescale)
  assert np.abs(np.asarray(normalise(ALL, mean, std)) - host).max() <= 5e-7


def test_values_of_the_specifications():
  half = normalise_host(ALL, (0.5,) * 3, (0.5,) * 3)
  assert half[0, 0] == -1 and half[255, 0] == 1
  np.testing.assert_allclose(half[128], 0.0039216, atol=1e-6)
  clip = normalise_host(ALL, *CLIP, rescale='quotient')
  np.testing.assert_allclose(clip[128], [0.0763, 0.1689, 0.3399], atol=1e-4)
