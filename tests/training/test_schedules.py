"""Learning rates at the steps where they are easy to get wrong."""

import pytest

from hrvlm_jax.training.optimizer import learning_rate, warmup_steps


def test_hugging_face_cosine():
  rate = learning_rate('cosine', peak=1e-3, total_steps=2181, warmup_steps=66)
  for step, expected in ((0, 0.0), (1, 1.5151515e-05), (66, 1e-3), (1090, 5.2486996e-4),
                         (2181, 0.0)):
    assert float(rate(step)) == pytest.approx(expected, abs=1e-9)


def test_open_clip_warm_up_starts_at_one():
  rate = learning_rate('cosine', peak=5e-6, total_steps=3000, warmup_steps=1500, warmup_from=1)
  assert float(rate(0)) == pytest.approx(5e-6 / 1500, rel=1e-5)
  assert float(rate(1499)) == pytest.approx(5e-6, rel=1e-5)


def test_linear_and_constant():
  linear = learning_rate('linear', peak=1.0, total_steps=10, warmup_steps=2)
  assert [float(linear(s)) for s in (0, 1, 2, 6, 10, 12)] == [0, 0.5, 1, 0.5, 0, 0]
  constant = learning_rate('constant', peak=1.0, total_steps=10)
  assert {float(constant(s)) for s in (0, 5, 10)} == {1.0}


def test_ratios_round_up():
  assert warmup_steps(2181, 0.03) == 66 and warmup_steps(5198, 0.03) == 156


@pytest.mark.parametrize('options, message', [
  ({'kind': 'cosin'}, 'schedule must be one of'),
  ({'kind': 'cosine', 'warmup_steps': 11}, r'warmup_steps must lie in 0..10')])
def test_mistakes(options, message):
  with pytest.raises(ValueError, match=message):
    learning_rate(options.pop('kind'), peak=1, total_steps=10, **options)
