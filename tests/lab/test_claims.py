"""`lab.claims`: what a claim may ask for, and how its answers are called."""

import pytest

from hrvlm_jax.lab import claims


def claim(order='rises', minus=None, **points):
  made = [claims.Point(label=name, system=name, **options) for name, options in points.items()]
  return claims.Claim(says='it helps', source='a paper', points=tuple(made), order=order,
                      minus=minus)


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
