"""Resampling against PyTorch itself and the test vectors of the PS3 specification."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hrvlm_jax.core import resample

SIZES = [(7, 3), (3, 7), (27, 54), (54, 27), (16, 16), (24, 17), (100, 13), (1, 4), (5, 1)]
RNG = np.random.default_rng(0)


def grid(n, m=9):
  return RNG.normal(size=(1, n, m, 2)).astype(np.float32)


def torch_resize(x, size, mode, **options):
  y = F.interpolate(torch.tensor(x).permute(0, 3, 1, 2), size=size, mode=mode, **options)
  return y.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize('n, m', SIZES)
@pytest.mark.parametrize('mode, matrix, options', [
  ('bicubic', resample.bicubic_matrix, {'align_corners': False}),
  ('bicubic', resample.bicubic_antialias_matrix, {'align_corners': False, 'antialias': True}),
  ('bilinear', resample.bilinear_corners_matrix, {'align_corners': True}),
  ('area', resample.area_matrix, {})])
def test_matrices_equal_torch(n, m, mode, matrix, options):
  x = grid(n)
  got = resample.resize(jnp.asarray(x), matrix(n, m), matrix(9, 5))
  np.testing.assert_allclose(got, torch_resize(x, (m, 5), mode, **options), atol=1e-5)


@pytest.mark.parametrize('n, m', SIZES + [(24, 74), (27, 270)])
def test_nearest_equals_torch(n, m):
  x = np.arange(n, dtype=np.float32)
  expected = F.interpolate(torch.tensor(x)[None, None], size=m, mode='nearest')[0, 0].numpy()
  np.testing.assert_array_equal(x[resample.nearest_index(n, m)], expected)


@pytest.mark.parametrize('n, m', [(54, 27), (54, 24), (5, 3), (4, 9)])
def test_adaptive_max_equals_torch(n, m):
  x = RNG.normal(size=(2, n, 6)).astype(np.float32)
  expected = F.adaptive_max_pool2d(torch.tensor(x), (m, 4)).numpy()
  np.testing.assert_array_equal(resample.adaptive_max(jnp.asarray(x), m, 4), expected)


def test_vectors_of_the_specification():
  x = np.array([0, 1, 4, 9, 16, 25], np.float32)
  np.testing.assert_allclose(resample.bicubic_matrix(6, 3) @ x, [0.21875, 6.125, 21.15625],
                             atol=1e-5)
  np.testing.assert_allclose(resample.bicubic_antialias_matrix(6, 3) @ x,
                             [0.41004, 6.53053, 19.97071], atol=1e-4)
  y = np.array([1, 2, 4, 8, 16], np.float32)
  np.testing.assert_allclose(resample.area_matrix(5, 3) @ y, [1.5, 4.66667, 12], atol=1e-4)
  np.testing.assert_array_equal(y[resample.nearest_index(5, 8)], [1, 1, 2, 2, 4, 8, 8, 16])


def test_position_table_keeps_extra_rows_and_crops():
  table = RNG.normal(size=(1 + 49, 4)).astype(np.float32)
  assert resample.position_table(jnp.asarray(table), (7, 7), extra=1) is not None
  out = np.asarray(resample.position_table(jnp.asarray(table), (5, 5), extra=1))
  square = torch_resize(table[1:].reshape(1, 7, 7, 4), (5, 5), 'bicubic', align_corners=False,
                        antialias=True).reshape(25, 4)
  np.testing.assert_array_equal(out[0], table[0])
  np.testing.assert_allclose(out[1:], square, atol=1e-5)
  cropped = resample.position_table(jnp.asarray(table[1:]), (3, 7))
  np.testing.assert_array_equal(cropped, table[1:].reshape(7, 7, 4)[:3].reshape(21, 4))
