"""Scorers against the vectors of their reference codes, written as tables."""

import math
import random

from hypothesis import given, settings, strategies as st
import pytest

from hrvlm_jax.evaluation.metrics import choice, cider, match, mathvista, vqa, yesno
from hrvlm_jax.evaluation.metrics.bootstrap import interval

# input, official, m4c (None: unchanged)
NORMALISED = [
  ('the 1,000', '1000', '1000'),
  ('t-shirt', 't shirt', 't shirt'),
  ('stop / go', 'stop go', 'stop go'),
  ("Men's room", "men's room", "men 's room"),
  ('$3.50', '$3.50', '$3.50'),
  ('12.5', '12.5', '12.5'),
  ('a.b', 'ab', 'ab'),
  ('U.S.A.', 'usa', 'usa'),
  ('half-price, 50%', 'half price 50%', 'half price 50%'),
  ('A man, a plan', 'man plan', 'man plan'),
  ('none', '0', '0'),
  ('dont', "don't", "don't"),
  ("couldn'tve", "couldn't've", "couldn't've"),
  ('oclock', "o'clock", "o'clock"),
  ('couldntve', 'couldntve', 'couldntve'),
]


@pytest.mark.parametrize('text,official,m4c', NORMALISED)
def test_normalised(text, official, m4c):
  assert vqa.vqa_normalize(text, variant='official') == official
  assert vqa.vqa_normalize(text, variant='m4c') == m4c


def test_at_most_32_periods_are_deleted():
  assert vqa.vqa_normalize('x' + '.' * 40 + 'y', variant='official') == 'x' + '.' * 8 + 'y'


def test_unknown_variant():
  with pytest.raises(ValueError, match="'official' or 'm4c', got 'evalai'"):
    vqa.vqa_normalize('x', variant='evalai')


@given(st.text(alphabet="abt '.,?!-/1230$%s\n", max_size=24))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_m4c_is_idempotent_but_for_words_in_s(text):
  once = vqa.vqa_normalize(text, variant='m4c')
  if not any("'s" in word[1:] for word in once.split()):
    assert vqa.vqa_normalize(once, variant='m4c') == once


@pytest.mark.parametrize('matches,expected', [(0, 0), (1, .3), (2, .6), (3, .9), (4, 1), (10, 1)])
def test_soft_accuracy(matches, expected):
  references = ['cat'] * matches + [f'other {i}x' for i in range(10 - matches)]
  assert vqa.accuracy_m4c('Cat.', references) == pytest.approx(expected)
  if matches < 10:
    assert vqa.accuracy_official('Cat.', references) == pytest.approx(expected)
    assert vqa.accuracy_llava_hr_okvqa('Cat.', references) == pytest.approx(expected)


def test_variants_differ_where_published_codes_do():
  same = ['yes'] * 10
  assert vqa.accuracy_official('Yes', same) == 0
  assert vqa.accuracy_m4c('Yes', same) == vqa.accuracy_llava_hr_okvqa('Yes', same) == 1
  mixed = ['The Park'] * 9 + ['x']
  assert vqa.accuracy_official('the park', mixed) == 1
  assert vqa.accuracy_llava_hr_okvqa('the park', mixed) == 0  # references keep case and articles
  assert vqa.accuracy_min3('c', ['b'] * 7 + ['c'] * 3) == 1
  assert vqa.accuracy_m4c('c', ['b'] * 7 + ['c'] * 3) == pytest.approx(.9)


@given(st.lists(st.sampled_from(['cat', 'Dog', 'two', '2', 'a cat']), min_size=1, max_size=12),
       st.sampled_from(['cat', 'dog', '2', 'bird']))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_accuracies_are_fractions(references, prediction):
  for score in (vqa.accuracy_m4c, vqa.accuracy_official, vqa.accuracy_llava_hr_okvqa):
    assert 0 <= score(prediction, references) <= 1


@pytest.mark.parametrize('prediction,target,expected', [
  ('10.4', '10', 1), ('10.6', '10', 0), ('5%', '0.05', 1), ('0', '0', 1), ('0.0', '0', 0),
  ('Yes', 'yes', 1), ('1,000', '1000', 0), ('10.5', '10', 1), (' yes', 'yes', 0),
])
def test_relaxed(prediction, target, expected):
  assert match.em_relaxed(prediction, target) == expected


def test_relaxed_strict_and_other_matches():
  assert match.em_relaxed_strict('$1,000.', '1000') == 1
  assert match.em_gqa('Yes.', 'yes') == 1 and match.em_gqa('Blue. ', 'blue') == 0
  assert match.em_ocrvqa(' Harry Potter', ['x', 'harry potter']) == 1
  assert match.em_realworldqa('Left. ', 'left') == 1


@pytest.mark.parametrize('prediction,reference,lmms,strict', [
  ('invoice 12', 'invoice 13', .9, .9),
  ('$1,200', '$ 1,200', .857143, .857143),
  ('abxy', 'abcd', .5, 0),
  ('abxyz', 'abc', 0, 0),
  ('x', '', 0, 0),
  ('', '', 1, 1),
])
def test_anls(prediction, reference, lmms, strict):
  assert match.anls_lmms(prediction, [reference]) == pytest.approx(lmms, abs=1e-6)
  assert match.anls_strict(prediction, [reference]) == pytest.approx(strict, abs=1e-6)
  assert match.anls_lmms(prediction, ['zzzzzzzzzz', reference]) == pytest.approx(lmms, abs=1e-6)


@given(st.text(max_size=8), st.text(max_size=8))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_edit_distance_bounds(a, b):
  distance = match.edit_distance(a, b)
  assert distance == match.edit_distance(b, a)
  assert abs(len(a) - len(b)) <= distance <= max(len(a), len(b))
  assert (distance == 0) == (a == b)


def test_cider_vectors():
  references = [['a cat sits on a mat', 'the cat is on the mat'],
                ['a dog runs in the park', 'dog running outside'],
                ['two birds on a wire', 'a pair of birds sitting on a wire']]
  captions = ['a cat on a mat', 'a dog runs in a park', 'a bird']
  scores = cider.cider_d([c.split() for c in captions], [[r.split() for r in row]
                                                        for row in references])
  assert scores == pytest.approx([3.0435549, 3.3393556, 0.0], abs=1e-7)
  assert sum(scores) / 3 == pytest.approx(2.1276368, abs=1e-7)
  assert cider.cider_d([['a', 'cat']], [[['a', 'cat']]]) == [0.0]  # N = 1
  with pytest.raises(ValueError, match='without a reference'):
    cider.cider_d([['a']], [[]])


def test_simple_tokens():
  assert cider.simple_tokens("I don't like the cat's (big) mat, 12.5% - well...") == [
    'i', 'do', "n't", 'like', 'the', 'cat', "'s", 'big', 'mat', '12.5', '%', 'well']


@pytest.mark.parametrize('text,expected', [
  ('Yes', 'yes'), ('no', 'no'), ('No.', 'no'), ('y', 'yes'), ('N', 'no'), ('Yes, it is', 'yes'),
  ('Nope', 'no'), ('x', 'other'), ('There is none', 'other'), ('', 'other'), ('The answer is yes',
                                                                             'other'),
])
def test_mme_answer(text, expected):
  assert yesno.mme_answer(text) == expected


def test_mme_subtask():
  assert yesno.mme_subtask({'a': [True, True], 'b': [True, False]}) == (75, 50)


def test_pope_parsers_and_rates():
  assert yesno.pope_llava('Not really') == 'yes' and yesno.pope_exact('Not really') == 'other'
  assert yesno.pope_llava('There is a cat, not a dog. Yes') == 'no'
  counts = yesno.binary(['yes', 'other', 'no', 'yes'], ['yes', 'yes', 'no', 'no'])
  assert (counts.tp, counts.fp, counts.tn, counts.fn, counts.other_yes) == (1, 1, 1, 0, 1)
  assert counts.accuracy == .5 and counts.recall == .5 and counts.yes_ratio == .5
  assert yesno.binary([], []).f1 == 0


CHOICES = ('a red car', 'blue', 'green')


@pytest.mark.parametrize('text,expected', [
  ('B', 'B'), ('C.', 'C'), (' B) blue', 'B'), ('B: x', 'B'), ('B, I think', 'B'),
  ('either (A) or (C)', None), ('The answer is B', 'B'), ('Answer: C because A', 'C'),
  ('my choice: B!', 'B'), ('surely B', 'B'), ('A man in C', 'C'),
  ('it is green', 'C'), ('it is blue or green', None), ('', None), ('D', None), ('Because', None),
])
def test_mcq_letter(text, expected):
  assert choice.mcq_letter(text, CHOICES) == expected


@pytest.mark.parametrize('text,expected', [
  ('A', 'A'), ('B. because', 'B'), ('The answer is C.', 'C'), ('c', None), ('B.', None),
  ('The answer is F.', 'F'), ('The answer is A. The answer is B.', None), ('', None),
])
def test_sqa_llava(text, expected):
  assert choice.sqa_llava(text) == expected


def test_sqa_index_beyond_choices():
  assert choice.sqa_index('E', 2) == -1 and choice.sqa_index('F', 5) == -1
  assert choice.sqa_index('B', 2) == 1 and choice.sqa_index(None, 2) == -1


@pytest.mark.parametrize('text,expected', [
  ('(A) or (B)', 'B'), ('B', 'B'), ('the answer is C', 'C'), ('A. red', 'A'), ('I think A and B so',
                                                                              'B'),
  ('in my view it has to be blue', 'B'), ('blue', None), ('my DNA says', 'A'),
])
def test_mmmu(text, expected):
  assert choice.mmmu(text, CHOICES) == expected


@pytest.mark.parametrize('text,expected', [
  ('B', 'B'), ('A nice day it is', None), ('(B).', 'B'), ('answer:C', None),
  ('It is :C', 'C'), ('A B', None), ('the blue one', 'B'), ('E', 'E'),
])
def test_mmbench_prefetch(text, expected):
  assert choice.mmbench_prefetch(text, CHOICES) == expected


def test_other_choice_rules():
  assert choice.seed_first_char(' B. x') == 'B' and choice.seed_exact('B.') == 'B.'
  assert choice.likelihood_choice([2.0, 1.0, 1.0]) == 1
  assert choice.circular_groups([3, 1000003, 4, 2000003]) == {3: [0, 1, 3], 4: [2]}
  assert choice.mean_of_means([1, 0, 1], ['a', 'a', 'b']) == .75
  assert choice.random_letter('B', 3, random.Random(0)) == 'B'
  assert choice.random_letter(None, 3, random.Random(0)) in 'ABC'


def test_ocrbench_points():
  assert match.ocrbench_point('It says HELLO\nworld', ['hello world'], source='IIIT5K') == 1
  assert match.ocrbench_point('hello', ['hello world', 'HELL'], source='IIIT5K') == 1
  assert match.ocrbench_point('x ^ 2 + Y', ['x^2+Y'], source='HME100k') == 1
  assert match.ocrbench_point('x ^ 2 + y', ['x^2+Y'], source='HME100k') == 0
  assert match.ocrbench_point('ＡＢ', ['ab'], source='x') == 0
  assert match.ocrbench_point('ＡＢ', ['ab'], source='x', fold=True) == 1


def test_mathvista():
  multi = dict(question_type='multi_choice', answer_type='text', choices=('12', 'a red car'))
  assert mathvista.extract_direct('a red car', **multi) == 'a red car'
  assert mathvista.normalize('(b)', **multi) == 'a red car'
  assert mathvista.normalize('B', **multi) == 'a red car'
  assert mathvista.normalize('red car', **multi) == 'a red car'  # nearest by edit distance
  assert mathvista.extract_regex('so it must be (B)', **multi) == 'B'
  free = dict(question_type='free_form')
  assert mathvista.normalize('3.7', answer_type='integer', **free) == '3'
  assert mathvista.normalize('3.14159', answer_type='float', precision=2.0, **free) == '3.14'
  assert mathvista.normalize('x', answer_type='float', precision=2.0, **free) is None
  assert mathvista.extract_regex('in all 1,234 units', answer_type='integer', **free) == '1234'
  assert mathvista.extract_regex('so [1, 2] it is', answer_type='list', **free) == '[1, 2]'
  assert mathvista.equal(' 3', '3') and not mathvista.equal(None, 'None')


def test_bootstrap_interval():
  import numpy as np
  values = np.array([0.0, 1.0] * 50)
  low, high = interval(values)
  assert low < .5 < high and high - low < .25
  assert interval(values) == (low, high)
  assert interval(values, statistic=lambda chosen: float(len(chosen))) == (100, 100)
  assert all(math.isnan(v) for v in interval(np.array([])))
