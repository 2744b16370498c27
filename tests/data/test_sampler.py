import numpy as np
import pytest

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.data.sampler import Lanes, even_chunks, modality_grouped_order, shuffled_index


def test_lanes_give_the_same_global_batches_for_every_host_count():
  def batch(step, hosts):
    parts = [Lanes(lanes=4, batch_size=8, host=host, hosts=hosts) for host in range(hosts)]
    assert all(len(part.positions(step)) == part.local_batch_size for part in parts)
    return [position for part in parts for position in part.positions(step)]

  for step in range(3):
    assert batch(step, 1) == batch(step, 2) == batch(step, 4)
  assert sum((batch(step, 2) for step in range(5)), []) == list(range(40))


def test_lanes_refuse_what_does_not_divide():
  with pytest.raises(UserError, match='batch_size=6 is no multiple of lanes=4'):
    Lanes(lanes=4, batch_size=6)
  with pytest.raises(UserError, match='lanes=4 is no multiple of the 3 hosts'):
    Lanes(lanes=4, batch_size=8, hosts=3)
  with pytest.raises(UserError, match='host=2 of 2'):
    Lanes(lanes=4, batch_size=8, host=2, hosts=2)


@pytest.mark.parametrize('size', [1, 2, 3, 17, 100])
def test_every_epoch_is_a_permutation(size):
  epochs = [[shuffled_index(e * size + i, size, seed=3) for i in range(size)] for e in range(3)]
  for number, epoch in enumerate(epochs):
    assert {e for e, _ in epoch} == {number}
    assert sorted(i for _, i in epoch) == list(range(size))
  if size > 10:
    assert [i for _, i in epochs[0]] != [i for _, i in epochs[1]]
    assert [i for _, i in epochs[0]] != [shuffled_index(i, size, seed=4)[1] for i in range(size)]
  assert [shuffled_index(i, size, 3, shuffle=False)[1] for i in range(size)] == list(range(size))


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
