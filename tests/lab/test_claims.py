"""`lab.claims`: numbers, spread and order from answers; table and plot."""

import numpy as np
import pytest

from hrvlm_jax.lab import claims
from hrvlm_jax.lab.compare_config import CompareConfig
from hrvlm_jax.training import run_config


def rows(*right):
  """Twelve answers, four per size; `right` of each size are correct."""
  return [{'area': 0.01 * (1 + size) + 0.001 * i, 'correct': i < n}
          for size, n in enumerate(right) for i in range(4)]


def claim(order='rises', minus=None, **points):
  made = [claims.Point(label=name, system=name, **options) for name, options in points.items()]
  return claims.Claim(says='it helps', source='a paper', points=tuple(made), order=order,
                      minus=minus)


def test_an_order_holds_or_does_not_and_may_be_unclear():
  answers = {'a': rows(0, 0, 0), 'b': rows(1, 1, 2), 'c': rows(4, 4, 4)}
  found = claims.judge(claim(a={'paper': 1.0}, b={}, c={'paper': 3.0}), answers)
  assert found['values'] == [0.0, pytest.approx(4 / 12), 1.0]
  assert found['errors'][1] == pytest.approx(np.sqrt(4 / 12 * 8 / 12 / 12))
  assert found['holds'] and found['clear'] and found['paper'] == [1.0, None, 3.0]
  assert not claims.judge(claim(a={}, b={}, c={}, order='falls'), answers)['holds']
  close = claims.judge(claim(b={}, d={}), answers | {'d': rows(1, 2, 2)})
  assert close['holds'] and not close['clear']
  equal = claims.judge(claim(b={}, d={}), answers | {'d': answers['b']})
  assert not equal['holds']


def test_gains_by_size_subtract_the_same_questions():
  answers = {'a': rows(4, 4, 4), 'base': rows(0, 2, 4)}
  points = {name: {'size': name} for name in ('small', 'medium', 'large')}
  made = claim(order='falls', minus='base', **points)
  points = tuple(claims.Point(label=p.label, system='a', size=p.size) for p in made.points)
  found = claims.judge(claims.Claim(says='s', source='p', points=points, order='falls',
                                    minus='base'), answers)
  assert found['values'] == [1.0, 0.5, 0.0] and found['holds']


def test_one_point_or_an_unknown_size_is_refused():
  with pytest.raises(ValueError, match='expected two points or more'):
    claim(a={})
  with pytest.raises(ValueError, match='huge'):
    claim(a={'size': 'huge'}, b={})


def test_points_of_a_claim_are_one_measure_and_its_own_words_are_known():
  with pytest.raises(ValueError, match='found accuracy, tokens'):
    claim(a={'measure': 'tokens'}, b={})
  with pytest.raises(ValueError, match='a cost is that of all questions'):
    claim(a={'measure': 'tokens'}, b={'measure': 'tokens', 'methods': {'fastv': {}}})
  with pytest.raises(ValueError, match='accuracies can be subtracted, found recall'):
    claim(a={'measure': 'recall'}, b={'measure': 'recall'}, minus='c')
  with pytest.raises(ValueError, match='(?s)found .LLaVA..*task: expected one of needle'):
    claims.Claim(says='s', source='p', order='rises', paper='LLaVA', task='read',
                 points=(claims.Point(label='a', system='a'), claims.Point(label='b', system='b')))


def test_the_key_of_answers_names_what_is_set_at_test_time():
  point = claims.Point(label='a', system='vila_hd', encoder={'tokens': 6},
                       methods={'prune': {}, 'fastv': {'keep': 0.5, 'after': 1}})
  assert point.key == 'vila_hd[tokens=6,fastv.after=1,fastv.keep=0.5,prune]'


def test_table_and_plot_stand_beside_the_papers_numbers(tmp_path):
  answers = {'a': rows(0, 0, 0), 'b': rows(4, 4, 4)}
  found = {'one': claims.judge(claim(a={'paper': 49.9}, b={'paper': 56.2}), answers),
           'two': claims.judge(claim(b={}, a={}), answers)}
  text = claims.markdown(found)
  assert 'a 49.9, b 56.2' in text and 'no numbers printed' in text
  assert '| as claimed |' in text and '| not as claimed |' in text
  claims.plot(found, tmp_path / 'claims.png')
  assert (tmp_path / 'claims.png').stat().st_size > 1000


def test_every_claim_of_the_miniature_has_its_systems():
  made = run_config.load(CompareConfig, 'configs/compare/claims_tiny.py:smoke', [])
  assert set(made.claims) == {'more_crops', 'gain_by_size', 'two_paths', 'constant_tokens',
                              'more_tokens', 'more_tokens_at_test', 'low_context'}
  budgets = {name: made.systems[name].encoder.high_tokens for name in ('vila_hd_80', 'vila_hd')}
  assert budgets == {'vila_hd_80': 24, 'vila_hd': 24}  # "constant tokens" says what it does
