"""Batches: order, resume, faults, hosts, workers. Transforms are at module level: they travel."""

import functools
import json

import numpy as np
import pytest

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.data import faults, pipeline
from hrvlm_jax.data.mixture import PromptFormat, Share, mix
from hrvlm_jax.data.rows import BadRow, Row
from hrvlm_jax.data.sources import InMemory
from hrvlm_jax.language.chat import ASSISTANT, USER, Message

SIZE = 23


def rows(size=SIZE):
  return InMemory([Row(str(i), (), (Message(USER, 'q'), Message(ASSISTANT, 'a')) * 3, f'row {i}')
                   for i in range(size)])


def to_example(row, rng):
  """The row's number, a draw, and labels; every tenth row from 5 on is bad."""
  number = int(row.id)
  if number % 10 == 5:
    raise BadRow('damaged', row.where, 'is damaged')
  if number == 7:
    raise UserError('has no answer')
  return {'number': np.int64(number), 'draw': rng.integers(1 << 40),
          'labels': np.array([1, 2]), 'turns': len(row.messages)}


def good_example(row, rng):
  return {'number': np.int64(row.id), 'draw': rng.integers(1 << 40), 'labels': np.array([1, 2])}


def stack(examples):
  return {key: np.stack([example[key] for example in examples]) for key in examples[0]}


def build(transform=good_example, **options):
  options = {'batch_size': 4, 'seed': 3} | options
  if hosts := options.pop('hosts', None):
    options['own'] = functools.partial(
      pipeline.neighbours, host=options.pop('host', 0), hosts=hosts)
  return pipeline.build(options.pop('source', rows()), transform,
                        pipeline.Options(**options), collate=stack)


def take(batches, count):
  return [next(batches) for _ in range(count)]


def same(a, b):
  assert len(a) == len(b)
  for one, two in zip(a, b):
    assert one.keys() == two.keys()
    for key in one:
      np.testing.assert_array_equal(one[key], two[key])


def test_epochs_are_permutations():
  numbers = np.concatenate([b['number'] for b in take(build(), SIZE)])  # 4 epochs
  assert sorted(numbers[:SIZE]) == list(range(SIZE))
  assert sorted(numbers) == sorted(list(range(SIZE)) * 4)
  assert list(numbers[:SIZE]) != list(numbers[SIZE:2 * SIZE])
  plain = np.concatenate([b['number'] for b in build(shuffle=False, epochs=1)])
  assert plain.tolist() == list(range(20))


@pytest.mark.parametrize('workers', [0, 1])
def test_resume_is_exact(workers):
  mixed = mix([Share(name='a', amount=9, format=PromptFormat(turns=2)),
               Share(name='b', weight=None)], {'a': rows(30), 'b': rows(5)})
  reference = build(to_example, source=mixed)
  whole = take(reference, 12)
  batches = build(to_example, source=mixed)
  same(take(batches, 7), whole[:7])
  state = json.loads(json.dumps(batches.get_state()))
  again = build(to_example, source=mixed, workers=workers)  # the number of workers may change
  again.set_state(state)
  same(take(again, 5), whole[7:])
  assert again.counts == reference.counts
  again.close()
  batches.set_state(state)  # back again
  same(take(batches, 1), whole[7:8])


def test_hosts_share_the_same_global_batches():
  whole = take(build(to_example, batch_size=8), 5)
  for hosts in (2, 4):
    parts = [take(build(to_example, batch_size=8, host=host, hosts=hosts), 5)
             for host in range(hosts)]
    for step in range(5):
      joined = {key: np.concatenate([part[step][key] for part in parts]) for key in whole[0]}
      good = (whole[step]['labels'] != -100).any(axis=1)
      for key in joined:  # places of bad rows hold copies of each host's own examples
        np.testing.assert_array_equal(joined[key][good], whole[step][key][good])
      np.testing.assert_array_equal((joined['labels'] != -100).any(axis=1), good)


def test_resume_with_another_number_of_hosts():
  batches = build(batch_size=8)
  take(batches, 3)
  state = batches.get_state()
  rest = take(batches, 2)
  halves = []
  for host in range(2):
    half = build(batch_size=8, host=host, hosts=2)
    half.set_state(state)
    halves.append(take(half, 2))
  same([{key: np.concatenate([a[key], b[key]]) for key in a} for a, b in zip(*halves)], rest)


def test_bad_rows_are_counted_and_not_trained():
  heard = []
  batches = build(to_example, epochs=4)
  batches.on_fault = lambda kind, text: heard.append((kind, text))
  seen = list(batches)
  assert len(seen) == 23
  assert dict(batches.counts) == {'damaged': 8, 'example': 4}
  assert ('example', 'row 7: has no answer') in heard
  trained = np.concatenate([b['number'][(b['labels'] != -100).any(axis=1)] for b in seen])
  usable = [i for i in range(SIZE) if i % 10 != 5 and i != 7]
  assert sorted(trained) == sorted(usable * 4)


def test_bad_rows_can_be_fatal():
  batches = build(to_example, shuffle=False, bad_rows='fatal')
  next(batches)
  with pytest.raises(UserError, match='row 5: is damaged'):
    next(batches)


def test_a_batch_of_bad_rows_borrows():
  batches = build(to_example, batch_size=1, shuffle=False)
  seen = take(batches, 8)
  assert seen[5]['number'].tolist() == [6]
  assert (seen[5]['labels'] == -100).all()
  assert (seen[7]['labels'] == -100).all()
  only_bad = InMemory([Row('5', (), (), 'row 0')])
  with pytest.raises(UserError, match='none of its rows can be used'):
    next(build(to_example, source=only_bad, batch_size=1))


def test_states_of_another_order_are_refused():
  state = build().get_state()
  with pytest.raises(UserError) as caught:
    build(seed=4, batch_size=8).set_state(state)
  assert 'seed was 3, is 4' in str(caught.value)
  assert 'batch_size was 4, is 8' in str(caught.value)


def test_nonsense_is_refused():
  with pytest.raises(UserError, match='no rows'):
    build(source=InMemory([]))
  with pytest.raises(UserError, match='less than one batch'):
    build(batch_size=64, epochs=1)
  with pytest.raises(UserError, match='hosts'):
    build(batch_size=4, hosts=3)
  with pytest.raises(ValueError, match='bad_rows'):
    build(bad_rows='hide')
  with pytest.raises(ValueError, match='labels'):
    faults.untrained({})
