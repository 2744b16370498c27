"""Orders of a run: LLaVA's grouping through the pipeline, resumed, over epochs and workers."""

import json

import numpy as np
import pytest

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.data import pipeline
from hrvlm_jax.data.mixture import Mixture, PromptFormat, Share
from hrvlm_jax.data.order import GroupedOrder, UniformOrder, make_order, row_lengths
from hrvlm_jax.data.rows import BadRow, ImageRef, Row
from hrvlm_jax.data.sampler import modality_grouped_order
from hrvlm_jax.data.sources import InMemory
from hrvlm_jax.language.chat import ASSISTANT, USER, Message

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
  assert row_lengths(source).tolist() == [5, -4, 1, 1]


def test_every_epoch_is_grouped():
  source, size = rows(), 8
  order = make_order('grouped', source, batch_size=size, seed=5, group=(2, 4))
  assert order.epoch_size == 56
  lengths = row_lengths(source)
  epochs = []
  for epoch in range(2):
    places = [order.place(epoch * 56 + i) for i in range(56)]
    assert {e for e, _ in places} == {epoch}
    own = [index for _, index in places]
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
  mix = Mixture([Share(name='a', amount=8, format=PromptFormat(turns=1)), Share(name='b')],
                {'a': rows(20), 'b': InMemory([row(i, 7, False) for i in range(8)])})
  order = GroupedOrder(mix, batch_size=4, batch=2, world=2, seed=0)
  for epoch in range(3):
    own = [order.place(epoch * 16 + i)[1] for i in range(16)]
    assert sorted(own) == list(range(16))
    images = [bool(mix.fetch(i, epoch, np.random.default_rng(0)).images) for i in own]
    assert all(len(set(images[k:k + 4])) == 1 for k in range(4, 12, 4))


def example(row, rng):
  return {'number': np.int64(row.id), 'draw': rng.integers(1 << 40), 'labels': np.array([1])}


def stack(examples):
  return {key: np.stack([e[key] for e in examples]) for key in examples[0]}


@pytest.mark.parametrize('workers', [0, 1])
def test_the_pipeline_resumes_in_a_grouped_order(workers):
  make = lambda **options: pipeline.build(
    rows(), example, batch_size=8, collate=stack, seed=2, order='grouped', group=(2, 4), **options)
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
  halves = [make(host=host, hosts=2) for host in range(2)]
  for want in whole[:3]:
    np.testing.assert_array_equal(np.concatenate([next(h)['number'] for h in halves]),
                                  want['number'])
  assert len(make(epochs=2)) == 14
  uniform = pipeline.build(rows(), example, batch_size=8, collate=stack, seed=2)
  with pytest.raises(UserError, match='order was grouped 2 x 4, is uniform'):
    uniform.set_state(batches.get_state())
  old = uniform.get_state()
  del old['order']['order']  # saved before there was a choice
  uniform.set_state(old)


def test_nonsense_is_refused():
  with pytest.raises(UserError, match='no multiple of the groups of 3 examples x 2 devices'):
    make_order('grouped', rows(), batch_size=8, seed=0, group=(3, 2))
  with pytest.raises(UserError, match="order='grouped' shuffles"):
    make_order('grouped', rows(), batch_size=8, seed=0, shuffle=False)
  with pytest.raises(UserError, match="expected 'uniform' or 'grouped'"):
    make_order('length', rows(), batch_size=8, seed=0)
  with pytest.raises(UserError, match='no meaning'):
    make_order('uniform', rows(), batch_size=8, seed=0, group=(1, 1))
  assert isinstance(make_order('uniform', rows(), batch_size=8, seed=0), UniformOrder)
