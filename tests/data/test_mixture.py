from collections import Counter

import numpy as np
import pytest

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.data.mixture import MIXTURES, Mixture, PromptFormat, Share, published_mixture
from hrvlm_jax.data.rows import BadRow, Row
from hrvlm_jax.data.sources import InMemory
from hrvlm_jax.language.chat import ASSISTANT, USER, Message


def row(name, turns=3):
  return Row(name, (), tuple(
    message for i in range(turns) for message in (
      Message(USER, ('<image>\n' if i == 0 else '') + f'q{i}'), Message(ASSISTANT, f'a{i}'))))


def source(letter, size):
  return InMemory([row(f'{letter}{i}') for i in range(size)])


def texts(row):
  return [message.text for message in row.messages]


def test_prompt_format():
  rng = np.random.default_rng(0)
  assert PromptFormat().apply(row('x'), rng) == row('x')
  assert texts(PromptFormat(suffix='!').apply(row('x', 1), rng)) == ['<image>\nq0!', 'a0']
  drawn = Counter(tuple(texts(PromptFormat(turns=2).apply(row('x'), rng))) for _ in range(60))
  assert set(drawn) == {('q0', 'a0', 'q1', 'a1'), ('q0', 'a0', 'q2', 'a2'),
                        ('q1', 'a1', 'q2', 'a2')}
  assert texts(PromptFormat(turns=5).apply(row('x', 1), rng)) == ['q0', 'a0']
  caption = PromptFormat(prompts=('Describe.', 'Caption.'))
  assert {texts(caption.apply(row('x', 1), rng))[0] for _ in range(30)} == {'Describe.', 'Caption.'}
  with pytest.raises(BadRow, match='no sequence of question-answer pairs'):
    PromptFormat(turns=1).apply(Row('x', (), (Message(USER, 'q'),)), rng)
  with pytest.raises(ValueError, match='turns'):
    PromptFormat(turns=0)


def test_amounts_and_rotation():
  shares = [Share(name='a', amount=4), Share(name='b', amount=5), Share(name='c')]
  mix = Mixture(shares, {'a': source('a', 10), 'b': source('b', 2), 'c': source('c', 3)})
  assert len(mix) == 12
  rng = np.random.default_rng(0)
  epochs = [[mix.fetch(i, e, rng).id for i in range(12)] for e in range(5)]
  for epoch in epochs:
    assert [name[0] for name in epoch] == list('aaaabbbbbccc')
  every = Counter(name for epoch in epochs for name in epoch)
  assert {every[f'a{i}'] for i in range(10)} == {2}  # 20 draws over 10 rows
  assert sorted(every[f'b{i}'] for i in range(2)) == [12, 13]
  assert {every[f'c{i}'] for i in range(3)} == {5}
  assert mix[0].id == mix[0].id
  with pytest.raises(IndexError):
    mix[12]


def test_weights():
  sets = {'a': source('a', 10), 'b': source('b', 2)}
  mix = Mixture([Share(name='a', weight=1), Share(name='b', weight=2)], sets, size=10)
  assert mix.amounts == [3, 7]
  assert len(mix) == 10


def test_problems_are_all_named():
  with pytest.raises(UserError) as caught:
    Mixture([Share(name='a', weight=1), Share(name='b'), Share(name='c')],
            {'a': source('a', 1), 'c': InMemory([])})
  for words in ("'b' is missing", "'c' has no rows", 'some have none'):
    assert words in str(caught.value)
  with pytest.raises(ValueError, match='one of them'):
    Share(name='a', amount=1, weight=1)
  with pytest.raises(ValueError, match='positive'):
    Share(name='a', amount=0)


def test_published_mixtures():
  for name, shares in MIXTURES.items():
    sets = {share.name: source(share.name, 3) for share in shares}
    mix = published_mixture(name, sets)
    for index in (0, len(mix) - 1):
      assert mix.fetch(index, 1, np.random.default_rng(0)).messages
  assert sum(share.amount for share in MIXTURES['pheye_stage_3']) == 677_000
  with pytest.raises(UserError, match='nearest known: pheye_stage_3'):
    published_mixture('pheye_stage3', {})
  with pytest.raises(UserError, match="'gqa' is missing"):
    published_mixture('pheye_stage_3', {})
