"""Shares by size, and tables, as all experiments write them."""

import pytest

from hrvlm_jax.lab import report


def rows(areas, correct):
  return [{'area': area, 'correct': right} for area, right in zip(areas, correct, strict=True)]


def test_accuracy_by_size_is_of_thirds_by_rank():
  assert report.accuracy_by_size(rows([1, 2, 3, 4, 5, 6], [0, 1, 1, 1, 0, 0])) == {
    'small': 0.5, 'medium': 1.0, 'large': 0.0}
  assert report.accuracy_by_size(rows([0.3, 0.1, 0.2], [1, 0, 0])) == {
    'small': 0.0, 'medium': 0.0, 'large': 1.0}
  # Equal areas are told apart by their order: thirds of seven hold three, two and two.
  assert report.accuracy_by_size(rows([1.0] * 7, [1, 1, 1, 0, 0, 1, 0])) == {
    'small': 1.0, 'medium': 0.0, 'large': 0.5}
  assert report.accuracy_by_size(rows([1.0], [True])) == {'small': 1.0}
  assert report.accuracy(rows([1, 2, 3, 4], [True, False, False, False])) == 0.25


def test_columns_of_a_table_end_together():
  text = report.text_table(['run', 'loss'], [['a', '0.5'], ['longer', '12.25']])
  assert text == 'run       loss\na          0.5\nlonger   12.25\n'
  assert report.markdown_table(['a', 'b'], [['1', '2']]) == ['| a | b |', '| --- | ---: |',
                                                            '| 1 | 2 |']


@pytest.mark.parametrize('count', [1, 3])
def test_a_picture_has_bars_for_every_name(tmp_path, count):
  series = {f'model_{i}': {'small': 0.5, 'all': i / 4} for i in range(count)}
  with report.figure(tmp_path / 'x.png', 1, 2) as (axes, other):
    colours = report.bars(axes, series, chance=0.04)
    assert len(axes.patches) == 2 * count and len(set(colours.values())) == count
    assert [label.get_text() for label in axes.get_xticklabels()] == ['small', 'all']
  assert (tmp_path / 'x.png').stat().st_size > 1000 and not other.axison
