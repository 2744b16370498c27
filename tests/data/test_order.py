"""Orders of a run: LLaVA's grouping through the pipeline, resumed, over epochs and workers."""

import functools
import json

import grain
import numpy as np
import pytest

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.data import pipeline
from hrvlm_jax.data.mixture import PromptFormat, Share, mix
from hrvlm_jax.data.order import (
  GroupedShuffle,
  Shuffle,
  dataset,
  even_chunks,
  in_order,
  modality_grouped_order,
  row_lengths,
)
from hrvlm_jax.data.rows import BadRow, ImageRef, Row
from hrvlm_jax.data.sources import InMemory
from hrvlm_jax.language.chat import ASSISTANT, USER, Message
from tests import levels

IMAGE = (ImageRef('x.png', data=b''),)


def row(index, words, image):
  return Row(str(index), IMAGE if image else (), (
    Message(USER, 'q'), Message(ASSISTANT, ' '.join(['a'] * (words - 1)))), f'row {index}')


def rows(size=50, seed=0):
  rng = np.random.default_rng(seed)
  return InMemory([row(i, int(rng.integers(2, 90)), rng.random() < 0.7) for i in range(size)])


class WithBadRow(InMemory):

  def __getitem__(self, index):
    if index == 3:
      raise BadRow('json', 'row 3', 'is broken')
    return super().__getitem__(index)


def test_lengths():
  source = WithBadRow([row(0, 5, True), row(1, 4, False), Row('', (), ()), row(3, 9, True)])
  assert row_lengths(dataset(source)).tolist() == [5, -4, 1, 1]


def test_every_epoch_is_grouped():
  source, size = dataset(rows()), 8
  order = in_order(source, 'grouped', batch_size=size, seed=5, group=(2, 4))
  assert len(order) == 56
  lengths = row_lengths(source)
  epochs = []
  for epoch in range(2):
    own = [order.row(epoch, i) for i in range(56)]
    assert [order[epoch * 56 + i].id for i in range(56)] == [str(i) for i in own]
    assert sorted(own[:50]) == list(range(50))
    assert own[50:] == own[:6]  # the last batch is filled from the beginning
    kinds = [len({lengths[i] > 0 for i in own[k:k + size]}) for k in range(0, 48, size)]
    assert kinds[1:] == [1] * 5
    epochs.append(own)
  assert epochs[0] != epochs[1]
  rng = np.random.default_rng(np.random.SeedSequence([5, 3, 0]))
  assert epochs[0][:50] == modality_grouped_order(
    lengths.tolist(), batch=2, world=4, permute=lambda n: rng.permutation(n).tolist())
  # Similar lengths come together: devices of one step differ less than devices at random.
  spread = lambda own: np.mean([np.ptp(np.abs(lengths[own[k:k + size]]).reshape(4, 2).sum(1))
                                for k in range(8, 48, size)])
  assert spread(epochs[0]) < 0.7 * spread(np.random.default_rng(0).permutation(50))


def test_mixtures_are_grouped_epoch_by_epoch():
  mixed = mix([Share(name='a', amount=8, format=PromptFormat(turns=1)), Share(name='b')],
              {'a': rows(20), 'b': InMemory([row(i, 7, False) for i in range(8)])})
  order = GroupedShuffle(mixed, batch_size=4, group=(2, 2), seed=0)
  for epoch in range(3):
    assert sorted(order.row(epoch, i) for i in range(16)) == list(range(16))
    images = [bool(order[epoch * 16 + i].images) for i in range(16)]
    assert all(len(set(images[k:k + 4])) == 1 for k in range(4, 12, 4))


def example(row, rng):
  return {'number': np.int64(row.id), 'draw': rng.integers(1 << 40), 'labels': np.array([1])}


def stack(examples):
  return {key: np.stack([e[key] for e in examples]) for key in examples[0]}


@pytest.mark.parametrize('workers', levels.rows('training', [0, 1], first=[1]))
def test_the_pipeline_resumes_in_a_grouped_order(workers):
  build = lambda **options: pipeline.build(
    rows(), example, pipeline.Options(batch_size=8, seed=2, **options), collate=stack)
  make = lambda **options: build(order='grouped', group=(2, 4), **options)
  reference = make()
  whole = [next(reference) for _ in range(10)]  # beyond the first epoch
  batches = make()
  for want in whole[:5]:
    np.testing.assert_array_equal(next(batches)['number'], want['number'])
  again = make(workers=workers)
  again.set_state(json.loads(json.dumps(batches.get_state())))
  for want in whole[5:]:
    got = next(again)
    for key in want:
      np.testing.assert_array_equal(got[key], want[key])
  again.close()
  halves = [make(own=functools.partial(pipeline.neighbours, host=host, hosts=2))
            for host in range(2)]
  for want in whole[:3]:
    np.testing.assert_array_equal(np.concatenate([next(h)['number'] for h in halves]),
                                  want['number'])
  assert len(make(epochs=2)) == 14
  uniform = build()
  with pytest.raises(UserError, match='order was grouped 2 x 4, is uniform'):
    uniform.set_state(batches.get_state())
  old = uniform.get_state()
  del old['order']['order']  # saved before there was a choice
  uniform.set_state(old)


def test_nonsense_is_refused():
  some = dataset(rows())
  with pytest.raises(UserError, match='no multiple of the groups of 3 examples x 2 devices'):
    in_order(some, 'grouped', batch_size=8, seed=0, group=(3, 2))
  with pytest.raises(UserError, match="order='grouped' shuffles"):
    in_order(some, 'grouped', batch_size=8, seed=0, shuffle=False)
  with pytest.raises(UserError, match="expected 'uniform' or 'grouped'"):
    in_order(some, 'length', batch_size=8, seed=0)
  with pytest.raises(UserError, match='no meaning'):
    in_order(some, 'uniform', batch_size=8, seed=0, group=(1, 1))
  assert isinstance(in_order(some, 'uniform', batch_size=8, seed=0), Shuffle)


@pytest.mark.parametrize('size', [1, 2, 3, 17, 100])
def test_every_epoch_is_a_permutation(size):
  numbers = grain.MapDataset.range(size)
  order = Shuffle(numbers, seed=3)
  epochs = [[order[e * size + i] % size for i in range(size)] for e in range(3)]
  assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
  if size > 10:
    assert epochs[0] != epochs[1]
    # Seeds that follow each other have nothing in common, which Grain's own shuffle has.
    assert epochs[1] != [Shuffle(numbers, seed=4)[i] for i in range(size)]
    grains = [numbers.shuffle(seed)[i] % size for seed, i in ((3, size), (4, 0))]
    assert grains[0] == grains[1]


def test_the_order_of_saved_positions_stays():
  """What stood there in version 0.1; runs that saved a position go on with it."""
  assert [Shuffle(grain.MapDataset.range(10), seed=3).row(e, i) for e in (0, 1) for i in range(10)
          ] == [0, 3, 1, 2, 4, 5, 6, 7, 9, 8, 4, 6, 9, 7, 5, 3, 1, 8, 2, 0]


def test_even_chunks():
  assert even_chunks([0, 1, 2, 3], [9, 1, 1, 8], 2) == [[0, 3], [1, 2]]
  assert even_chunks([4, 5, 6], [0] * 7, 2) == [[4, 6], [5]]


@pytest.mark.parametrize('seed', range(5))
def test_grouped_order(seed):
  rng = np.random.default_rng(seed)
  lengths = (rng.integers(1, 90, 53) * rng.choice([1, 1, -1], 53)).tolist()
  order = modality_grouped_order(lengths, batch=2, world=3, permute=lambda n: rng.permutation(n))
  assert sorted(order) == list(range(53))
  batches = [order[i:i + 6] for i in range(0, 53, 6)]
  mixed = [len({lengths[i] > 0 for i in batch}) > 1 for batch in batches]
  assert not any(mixed[1:-1])
  text = [-abs(length) for length in lengths]
  assert sorted(modality_grouped_order(text, batch=2, world=3, permute=range)) == list(range(53))
  with pytest.raises(UserError, match=r'examples \[1\] have no words'):
    modality_grouped_order([3, 0], batch=1, world=1, permute=range)
