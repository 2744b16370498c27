"""Any image size from 1 to 5000 per side, for every system: `count`, `views` and `batch` agree.

Pictures without pixels stand in for images: they have a size, can be cut, resized and pasted, read
as zeros, and remember the largest picture that was ever made of them. So every size costs
milliseconds; a few real images follow.
"""

import dataclasses
import re

from hypothesis import example, given, settings, strategies as st
import numpy as np
from PIL import Image
import pytest

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.systems import registry

SIDES = st.one_of(st.integers(1, 5000), st.sampled_from([1, 2, 3, 335, 336, 337, 384, 385, 576, 577,
                                                         1024, 4999, 5000]))
# The documented refusals: too elongated, more views than tokens or a cap.
REFUSALS = re.compile(r'too elongated|below the number of views|more than crop_cap')
CASES = {
  'mc_llava': None, 'mc_llava/capped': dict(crop_cap=40), 'mc_llava/whole': dict(max_crops=0),
  'llava_hr': None, 'llava_hr/square': dict(aspect='square'), 'pheye': None, 'ps3': None,
  'vila_hd': None, 'single_view': None, 'single_view/squash': dict(fit='squash'), 'anyres': None,
  'tiling': None, 's2': None, 's2/crop': dict(fit='crop'), 's2_dynamic': None, 'reduced': None,
}


def encoder_of(case):
  name = case.split('/')[0]
  system = registry.get(name)
  model = next(iter(system.released.values())) if system.released else system.tiny()
  options = CASES[case]
  return system, dataclasses.replace(model.encoder, **options) if options else model.encoder


class Paper:
  """A picture without pixels."""

  mode, format = 'RGB', None
  largest = 0

  def __init__(self, width, height):
    assert width >= 1 and height >= 1
    self.size, self.width, self.height = (width, height), width, height
    Paper.largest = max(Paper.largest, width * height)

  def crop(self, box):
    x0, y0, x1, y1 = box
    assert 0 <= x0 < x1 <= self.width and 0 <= y0 < y1 <= self.height, (box, self.size)
    return Paper(x1 - x0, y1 - y0)

  def resize(self, size, *_, **__):
    return Paper(*size)

  def copy(self):
    return Paper(*self.size)

  def convert(self, mode):
    return self

  def paste(self, image, box=None):
    if isinstance(image, Paper) and box is not None:
      assert box[0] >= 0 and box[1] >= 0, box
      assert box[0] + image.width <= self.width and box[1] + image.height <= self.height

  def __array__(self, dtype=None, copy=None):
    return np.broadcast_to(np.zeros((), dtype or np.uint8), (self.height, self.width, 3))


def places_of(views, batch):
  """Visual places of the batch's row: per token, or per image where the device cuts the image."""
  return int(batch['valid'].sum()) if 'valid' in batch else None


@pytest.fixture(scope='module', autouse=True)
def papers():
  with pytest.MonkeyPatch.context() as patch:
    real = Image.new
    patch.setattr(Image, 'new', lambda mode, size, *rest: (
      Paper(*size) if Paper.on else real(mode, size, *rest)))
    Paper.on = False
    yield


@pytest.mark.parametrize('case', CASES)
def test_any_size(case):
  system, encoder = encoder_of(case)

  @given(width=SIDES, height=SIDES)
  @example(1, 1)
  @example(1, 5000)
  @example(5000, 1)
  @example(5000, 5000)
  @settings(max_examples=40, deadline=None, derandomize=True)
  def check(width, height):
    agrees(system, encoder, width, height)

  check()


def agrees(system, encoder, width, height):
  image = Paper(width, height)
  Paper.largest, Paper.on = 0, True
  try:
    try:
      count = system.count(width, height, encoder)
    except UserError as error:
      assert REFUSALS.search(str(error)), str(error)
      with pytest.raises(UserError, match=REFUSALS.pattern):
        system.views([image], encoder)
      assert Paper.largest <= width * height  # refused before anything large was made
      return
    views = system.views([image], encoder)
    largest = Paper.largest
    try:
      batch = system.batch([views], encoder)
    except UserError as error:
      assert REFUSALS.search(str(error)), str(error)
      return
  finally:
    Paper.on = False
  pixels = batch['pixels']
  bucket = int(np.prod(pixels.shape[:-1]))
  # Between the image and the bucket stands at most one picture with a side of each, or one strip.
  side = max(int(np.prod(pixels.shape[-3:-1]) ** 0.5), getattr(encoder, 'side', 0) or 0)
  assert largest <= max(bucket, width * height, side * max(width, height), 1 << 23)
  if 'tokens' in views:
    assert views['tokens'].tolist() == [count.tokens]
  own = views.get('0/pixels', views.get('pixels'))
  assert count.slots == int(np.prod(own.shape[:-3])) <= int(np.prod(pixels.shape[:-3]))
  assert pixels.dtype == np.uint8
  if 'valid' in batch and batch['valid'].shape == batch['index'].shape:
    used = batch['index'][batch['valid']]
    assert (used >= 0).all()
    if batch['valid'].sum() == count.tokens:  # a place per token
      used = used[used > 0]  # where there is a newline token, it is 0 and comes often
      assert len(np.unique(used)) == len(used)
    else:  # a place per image: the device makes the same number of tokens of each
      assert batch['valid'].sum() == 1 and used.tolist() == [0]
  if 'coords' in batch:
    assert ((batch['coords'] > 0) & (batch['coords'] < 1)).all()
  if 'gather' in views and views['gather'].ndim == 2:  # MC-LLaVA: (view, patch)
    view, patch = views['gather'].T
    assert sorted(set(view)) == list(range(count.views))
    assert patch.min() >= 0 and patch.max() < encoder.vision.grid**2
    assert len(set(zip(view, patch))) == len(view)


def test_fakes_are_cut_as_real_images_are():
  """Real pixels of a few shapes give arrays of the same names, shapes and types."""
  for case in CASES:
    system = registry.get(case.split('/')[0])
    encoder = system.tiny().encoder
    for size in ((1, 1), (7, 300), (301, 40), (150, 211)):
      real = system.views([Image.effect_noise(size, 60).convert('RGB')], encoder)
      Paper.on = True
      fake = system.views([Paper(*size)], encoder)
      Paper.on = False
      assert {k: (v.shape, v.dtype) for k, v in real.items()} == {
        k: (v.shape, v.dtype) for k, v in fake.items()}
      count = system.count(*size, encoder)
      if 'tokens' in real:
        assert real['tokens'].tolist() == [count.tokens]
      for key in real.keys() - {'pixels', '0/pixels'}:
        np.testing.assert_array_equal(real[key], fake[key])
