from collections import Counter
import json
import pathlib
import shutil

import numpy as np
import pyarrow
from pyarrow import parquet
import pytest

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.data.mixture import (
  MIXTURES,
  PromptFormat,
  RowsPerEpoch,
  Share,
  apportion,
  mix,
  published_mixture,
)
from hrvlm_jax.data.rows import BadRow, Row
from hrvlm_jax.data.sources import InMemory, open_source
from hrvlm_jax.language.chat import ASSISTANT, USER, Message

CONFIGS = pathlib.Path(__file__).parents[2] / 'configs' / 'mixtures'


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
  mixed = mix(shares, {'a': source('a', 10), 'b': source('b', 2), 'c': source('c', 3)})
  assert len(mixed) == 12
  epochs = [[mixed[12 * e + i].id for i in range(12)] for e in range(5)]
  for epoch in epochs:
    assert [name[0] for name in epoch] == list('aaaabbbbbccc')
  every = Counter(name for epoch in epochs for name in epoch)
  assert {every[f'a{i}'] for i in range(10)} == {2}  # 20 draws over 10 rows
  assert sorted(every[f'b{i}'] for i in range(2)) == [12, 13]
  assert {every[f'c{i}'] for i in range(3)} == {5}
  assert mixed[0].id == mixed[0].id
  assert [RowsPerEpoch([4, 5, 3])[i] for i in (0, 3, 4, 11, 12, 16)] == [
    (0, 0), (0, 3), (1, 0), (2, 2), (0, 4), (1, 5)]


def test_draws_belong_to_the_row_of_an_epoch():
  """The same row of the same epoch is asked the same, others are not."""
  shares = [Share(name='a', format=PromptFormat(turns=1))]
  mixed, again = (mix(shares, {'a': source('a', 40)}, seed=3) for _ in range(2))
  asked = [texts(mixed[i]) for i in range(80)]
  assert asked == [texts(again[i]) for i in range(80)]
  assert len({tuple(text) for text in asked[:40]}) == 3
  other = mix(shares, {'a': source('a', 40)}, seed=4)
  assert asked != [texts(other[i]) for i in range(80)]


def test_weights():
  sets = {'a': source('a', 10), 'b': source('b', 2)}
  assert apportion([1, 2], 10) == [3, 7]
  mixed = mix([Share(name='a', weight=1), Share(name='b', weight=2)], sets, size=10)
  assert Counter(mixed[i].id[0] for i in range(10)) == {'a': 3, 'b': 7}
  assert len(mixed) == 10


def test_problems_are_all_named():
  with pytest.raises(UserError) as caught:
    mix([Share(name='a', weight=1), Share(name='b'), Share(name='c')],
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
    mixed = published_mixture(name, sets)
    for index in (0, len(mixed) - 1):
      assert mixed[len(mixed) + index].messages
  assert sum(share.amount for share in MIXTURES['pheye_stage_3']) == 677_000
  with pytest.raises(UserError, match='nearest known: pheye_stage_3'):
    published_mixture('pheye_stage3', {})
  with pytest.raises(UserError, match="'gqa' is missing"):
    published_mixture('pheye_stage_3', {})


@pytest.mark.parametrize('path', sorted(CONFIGS.glob('*.mixture.json')), ids=lambda p: p.stem)
def test_mixture_files_open(path, tmp_path):
  """The files of configs/mixtures, with small data sets of the names they ask for."""
  (tmp_path / 'images').mkdir()
  talk = [{'from': 'human', 'value': 'q'}, {'from': 'gpt', 'value': 'a'}]
  for part in json.loads(path.read_text())['parts']:
    rows = [{'id': f'{part["name"]} {i}', 'conversations': talk * 3} for i in range(2)]
    name = tmp_path / part['path']
    if name.suffix == '.parquet':
      parquet.write_table(pyarrow.Table.from_pylist(rows), name)
    else:
      name.write_text(json.dumps(rows))
  shutil.copy(path, tmp_path)
  mixed = open_source(tmp_path / path.name)
  assert len(mixed) == {
    'pheye_stage_1': 2, 'pheye_stage_2': 8, 'pheye_stage_3': 677_000, 'mc_llava': 185_008,
    'llava_1_5_parts': 664_000, 'vila_1_5_sft': 54, 'own': 100_000}[path.name.split('.')[0]]
  asked = {}
  for index in (*np.linspace(0, len(mixed) - 1, 300).astype(int), *range(-8, 8)):
    row = mixed[int(index) % len(mixed)]
    asked.setdefault(row.id.split()[0], row.messages)
  assert len(asked) >= len(mixed.parents) - 1
  if path.name.startswith('pheye'):  # its template has one question
    assert {len(messages) for messages in asked.values()} == {2}
  if path.name.startswith('pheye_stage_3'):
    assert [m.text for m in asked['vqav2']] == [
      'q\nAnswer the question using a single word or phrase', 'a']
  if path.name.startswith('llava'):
    assert asked['aokvqa'][0].text.endswith("option's letter from the given choices directly.")
    assert asked['textcaps'][0].text == 'Provide a one-sentence caption for the provided image.'


def test_each_drawn_pair_is_an_example():
  """VQAv2 and GQA in Pheye's stage III: two different questions of every image, each on its own."""
  talks = [[(f'{row}.{turn}', 'a') for turn in range(1 + row)] for row in range(4)]
  rows = InMemory([Row(str(row), (), tuple(
    m for q, a in talk for m in (Message('user', q), Message('assistant', a))))
    for row, talk in enumerate(talks)])
  mixed = mix([Share(name='a', format=PromptFormat(turns=2, each=True, suffix='!'))], {'a': rows})
  assert len(mixed) == 8
  epochs = [[mixed[epoch * 8 + i].messages for i in range(8)] for epoch in range(20)]
  for epoch in epochs:
    assert all(len(messages) == 2 for messages in epoch)
    asked = sorted(messages[0].text for messages in epoch)
    assert [text.split('.')[0] for text in asked] == list('00112233')  # every row twice
    assert len(set(asked)) == 7  # only the row of one question gives it again
  assert {messages[0].text for epoch in epochs for messages in epoch} == {
    f'{q}!' for talk in talks for q, _ in talk}  # in time all are asked
  assert epochs[0] == [mixed[i].messages for i in range(8)]
  bad = InMemory([Row('', (), (Message('user', 'q'),), 'row 0')])
  with pytest.raises(BadRow, match='no sequence of question-answer pairs'):
    mix([Share(name='a', format=PromptFormat(turns=2, each=True))], {'a': bad})[0]
  with pytest.raises(ValueError, match='each: needs'):
    PromptFormat(each=True)


# Section 3.1 and appendix A of the paper, typed off: data set -> what follows its questions.
PHRASE = '\nAnswer the question using a single word or phrase'
STAGE_3 = {
  'llava': '', 'llavar': '', 'vqav2': PHRASE, 'gqa': PHRASE, 'okvqa': PHRASE, 'ocrvqa': PHRASE,
  'textvqa': PHRASE, 'stvqa': PHRASE,
  'aokvqa': "\nAnswer with the option's letter from the given choices directly."}


def test_prompts_of_pheye_stage_3():
  rng = np.random.default_rng(0)
  asked = {share.name: share.format.apply(row('x', turns=1), rng).messages[0].text
           for share in MIXTURES['pheye_stage_3']}
  assert asked.pop('textcaps') == (
    'Generate a one-sentence caption for the provided image, incorporating textual elements '
    'visible in the image.')
  assert asked == {name: f'q0{suffix}' for name, suffix in STAGE_3.items()}
  captions = {share.format.apply(row('x', turns=1), rng).messages[0].text
              for share in MIXTURES['pheye_stage_1'] for _ in range(200)}
  assert len(captions) == 10  # one of ten instructions
