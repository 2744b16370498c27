"""`lab.verdicts`: differences, errors and the rule, against numbers worked out by hand."""

import math

import pytest

from hrvlm_jax.lab import verdicts
from hrvlm_jax.lab.claims import Claim, Point
from hrvlm_jax.lab.verdicts import FAILS, HOLDS, UNTOLD, Number, Observed, Verdict

AREAS = [0.01, 0.02, 0.03, 0.04, 0.05, 0.06]  # two questions of each size


def claim(order, *systems, minus=None, measure='accuracy', sizes=None):
  sizes = sizes or ['all'] * len(systems)
  return Claim(says='it helps', source='a paper', order=order, minus=minus, points=tuple(
    Point(label=f'{s} {size}', system=s, size=size, measure=measure)
    for s, size in zip(systems, sizes, strict=True)))


def seen(costs=(), measure='accuracy', **answers):
  return Observed(AREAS, {measure: answers}, dict(costs))


def test_one_seed_has_the_paired_error_of_its_questions():
  # b - a is 1 1 1 0 0 -1: mean 1/3, variance (3 * 4/9 + 2 * 1/9 + 16/9) / 5 = 2/3.
  found = verdicts.judge(claim('rises', 'a', 'b'), {
    0: seen(a=[0, 0, 0, 1, 0, 1], b=[1, 1, 1, 1, 0, 0])})
  assert found.difference.value == pytest.approx(1 / 3)
  assert found.difference.error == pytest.approx(math.sqrt(2 / 3 / 6))
  assert found.seeds == (0,) and found.verdict == UNTOLD
  assert found.points[0] == Number(pytest.approx(1 / 3), pytest.approx(math.sqrt(4 / 15 / 6)))


def test_seeds_and_questions_both_count():
  # Differences of the seeds 1/3 and 1; their variance 2/9, over two seeds 1/9. The questions of
  # the first bring 2/3 / 6, those of the second nothing: 1/9 over 2^2.
  found = verdicts.judge(claim('rises', 'a', 'b'), {
    0: seen(a=[0, 0, 0, 1, 0, 1], b=[1, 1, 1, 1, 0, 0]), 2: seen(a=[0] * 6, b=[1] * 6)})
  assert found.difference.value == pytest.approx(2 / 3) and found.seeds == (0, 2)
  assert found.difference.error == pytest.approx(math.sqrt(1 / 9 + 1 / 36))
  assert found.verdict == UNTOLD  # 0.667 is below 2 * 0.373


def test_a_claim_holds_or_does_not_in_its_direction():
  answers = {0: seen(a=[0] * 6, b=[1, 0, 1, 1, 0, 0], c=[1] * 6)}
  assert verdicts.judge(claim('rises', 'a', 'b', 'c'), answers).verdict == HOLDS
  assert verdicts.judge(claim('falls', 'a', 'b', 'c'), answers).verdict == FAILS
  assert verdicts.judge(claim('falls', 'c', 'a'), answers).difference.value == 1
  # The whole way rises, but a step goes down: 1 -> 0 has no error at all.
  assert verdicts.judge(claim('rises', 'b', 'a', 'c'), {
    0: seen(a=[0] * 6, b=[1, 0, 0, 1, 1, 1], c=[1] * 6)}).verdict == FAILS
  assert verdicts.judge(claim('rises', 'a', 'missing'), answers) is None


def test_the_first_has_to_be_better_than_each_other_one():
  answers = {0: seen(a=[1] * 6, b=[0] * 6, c=[1, 1, 1, 1, 1, 0], d=[1] * 6)}
  assert verdicts.judge(claim('first', 'a', 'b'), answers).verdict == HOLDS
  least = verdicts.judge(claim('first', 'a', 'b', 'c'), answers)
  assert least.verdict == UNTOLD and least.difference.value == pytest.approx(1 / 6)
  assert verdicts.judge(claim('first', 'b', 'a', 'c'), answers).verdict == FAILS
  assert verdicts.judge(claim('first', 'a', 'd'), answers).verdict == UNTOLD  # equal


def test_gains_of_two_sizes_are_not_paired():
  made = claim('falls', 'a', 'a', minus='b', sizes=['small', 'large'])
  found = verdicts.judge(made, {0: seen(a=[1, 1, 1, 1, 1, 0], b=[0, 1, 1, 1, 0, 0])})
  # Gains: small (1, 0), large (1, 0); each mean has the variance 1/2 / 2.
  assert [p.value for p in found.points] == [0.5, 0.5]
  assert found.difference == Number(0.0, pytest.approx(math.sqrt(0.25 + 0.25)))


def test_costs_are_constant_within_a_tenth_of_the_first():
  costs = {name: {'tokens': tokens} for name, tokens in (('a', 100), ('b', 109), ('c', 111))}
  made = lambda *names: claim('constant', *names, measure='tokens')
  within = verdicts.judge(made('a', 'b'), {0: seen(costs), 1: seen(costs)})
  assert within.verdict == HOLDS and within.difference == Number(pytest.approx(0.09), 0.0)
  assert verdicts.judge(made('a', 'b', 'c'), {0: seen(costs)}).verdict == FAILS
  assert verdicts.judge(claim('rises', 'a', 'c', measure='tokens'), {0: seen(costs)}
                        ).verdict == HOLDS


def test_analyses_are_numbers_per_question():
  answers = {0: seen(measure='recall', a=[0.5] * 6, b=[0.9, 0.7] * 3)}
  found = verdicts.judge(claim('rises', 'a', 'b', measure='recall'), answers)
  assert found.difference.value == pytest.approx(0.3)
  assert found.difference.error == pytest.approx(math.sqrt(0.06 / 5 / 6))


def row(value, error):
  return Verdict((0,), (), Number(value, error), (), HOLDS)


def test_two_machines_agree_when_nine_of_ten_rows_are_near_and_none_is_far():
  ours = {str(i): row(0.5, 0.03) for i in range(10)}
  near = ours | {'0': row(0.5 + 0.05 * 2.5, 0.04)}  # joint error 0.05: 2.5 apart
  found = verdicts.compare(ours, near)
  assert found['apart']['0'] == pytest.approx(2.5) and found['near'] == 9 and found['agree']
  assert not verdicts.compare(ours, near | {'1': row(0.5 - 0.125, 0.04)})['agree']
  assert not verdicts.compare(ours, ours | {'0': row(0.5 + 0.16, 0.04)})['agree']
  assert not verdicts.compare(ours, {})['agree']
  exact = {'a': row(24.0, 0.0)}
  assert verdicts.compare(exact, exact)['agree']
  assert not verdicts.compare(exact, {'a': row(25.0, 0.0)})['agree']
