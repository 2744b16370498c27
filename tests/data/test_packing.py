"""Packing alone: sizes in, rows and slots out. Nothing is decoded."""

import numpy as np
import pytest

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.data.packing import Packing, RowPacker, Size
from hrvlm_jax.systems import registry


def empty_share(steps, sizes, *, window):
  """Share of crop slots that hold nothing, over steps of consecutive windows.

  Args:
    sizes: of every window.
  """
  slots = used = 0
  for number, step in enumerate(steps):
    own = sizes[number // window]
    slots += step.slots * len(step.bins)
    used += sum(own[i].views for b in step.bins for row in b for i in row)
  return 1 - used / slots if slots else 0.0


def mixed_sizes(count, rng):
  """(width, height) of a mixed set: small photographs of two shapes, and 40 % from 0.2 to 12
  megapixels of any aspect ratio up to 4."""
  for _ in range(count):
    kind = rng.random()
    if kind < 0.6:
      yield (640, 480) if kind < 0.45 else (480, 640)
    else:
      aspect = np.exp(rng.uniform(-1, 1) * np.log(4) / 2)
      area = np.exp(rng.uniform(np.log(2e5), np.log(12e6)))
      yield int((area * aspect) ** 0.5), int((area / aspect) ** 0.5)


def measured(system, count, rng):
  """Sizes of examples: one image (6 % have none), 40 to 300 tokens of text."""
  encoder = next(iter(system.released.values())).encoder if system.released else (
    system.tiny().encoder)
  for size in mixed_sizes(count, rng):
    cost = system.count(*size, encoder)
    text = int(rng.integers(40, 300))
    yield Size(text, 0, 0) if rng.random() < 0.06 else Size(text + cost.tokens, cost.views, 1)


def packed(packer, sizes, seed=0):
  size = packer.window_size
  windows = [sizes[i:i + size] for i in range(0, len(sizes), size)]
  return windows, [step for number, window in enumerate(windows)
                   for step in packer.pack(window, np.random.default_rng([seed, number]))]


@pytest.mark.parametrize('name', ['mc_llava', 'anyres', 'tiling', 'llava_hr', 's2_dynamic'])
def test_few_crop_slots_are_empty(name):
  """Below 5 % on a mixed-size set, over 64 steps of 32 examples, with few sizes to compile."""
  system, rng = registry.get(name), np.random.default_rng(0)
  sizes = list(measured(system, 32 * 64, rng))
  lengths = tuple(range(512, 32_768, 512))
  packer = RowPacker(batch_size=32, packing=Packing(window=16), lengths=lengths)
  windows, steps = packed(packer, sizes)
  assert empty_share(steps, windows, window=16) < 0.05
  assert len({step.slots for step in steps}) <= 3
  assert not any(step.lost for step in steps)
  members = [i for step in steps for i in step.members]
  assert sorted(members) == sorted(list(range(512)) * 4)
  if name == 'mc_llava':  # a slot for every crop that an example could have: most stay empty
    assert np.mean([size.views for size in sizes]) < 0.5 * max(size.views for size in sizes)


def test_rows_are_filled_evenly():
  rng = np.random.default_rng(1)
  sizes = [Size(int(n), 1, 1) for n in rng.integers(50, 400, 64)]
  packer = RowPacker(batch_size=32, packing=Packing(rows=8, window=2), parts=2, shards=2,
                    lengths=(256, 512, 1024, 2048))
  steps = packer.pack(sizes, rng)
  assert [len(step.bins) for step in steps] == [4, 4]
  for step in steps:
    assert all(len(b) == 2 for b in step.bins)
    assert step.length == 1024  # 4 examples of 225 positions on average
    assert step.slots == 8
  assert sorted(i for s in steps for b in s.bins for row in b for i in row) == list(range(64))
  alone = RowPacker(batch_size=64, packing=Packing(slots=(64, 128)), lengths=(512,))
  step, = alone.pack(sizes, rng)
  assert step.bins == (tuple((i,) for i in range(64)),)  # the order itself
  assert (step.slots, step.length, step.images) == (64, 512, 1)


def test_what_finds_no_room_is_named():
  sizes = [Size(100, 6, 1), Size(90, 6, 1), Size(20, 0), None]
  crops = RowPacker(batch_size=4, packing=Packing(slots=(4, 8)), lengths=(128,))
  step, = crops.pack(sizes, np.random.default_rng(0))
  assert [(i, 'no room for its 6 crops beside 6 others in 8 slots' in text)
          for i, text in step.lost] == [(1, True)]
  assert step.bins == (((0,), (2,), (), ()),)
  assert step.members == (0, 1, 2, 3)
  rows = RowPacker(batch_size=4, packing=Packing(rows=1), lengths=(128,))
  step, = rows.pack(sizes, np.random.default_rng(0))
  assert step.bins == (((0, 2),),)
  assert 'no room for its 90 tokens in 1 rows of 128' in step.lost[0][1]
  empty, = rows.pack([None] * 4, np.random.default_rng(0))
  assert (empty.bins, empty.length) == (((((),),)), 128)


def test_nonsense_is_refused():
  with pytest.raises(UserError) as caught:
    RowPacker(batch_size=6, packing=Packing(rows=3, slots=(5,)), lengths=(), parts=2, shards=2)
  for words in ('batch_size=6', 'packing.rows=3', 'slots: 5', 'lengths is empty'):
    assert words in str(caught.value)
  with pytest.raises(ValueError, match='slots must be ascending'):
    Packing(slots=(8, 4))
  with pytest.raises(ValueError, match='3 sizes'):
    RowPacker(batch_size=4, packing=Packing(), lengths=(8,)).pack([None] * 3, None)
