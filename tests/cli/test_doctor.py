"""`hrvlm doctor` and the quickstart say how fast this machine is, and what it means in minutes."""

import re

import pytest

from hrvlm_jax.cli import doctor, quickstart
from hrvlm_jax.core import machine
from hrvlm_jax.lab import speed


@pytest.fixture
def brief(monkeypatch):
  """Measurements of a moment."""
  monkeypatch.setattr(speed, 'SECONDS', 0.02)


def test_both_rates_are_measured(brief):
  found = speed.measure()
  assert 0.1 < found.gflops < 1e5 and 0.1 < found.bandwidth < 1e4


def test_the_estimate_meets_the_runs_it_is_made_of():
  for gflops, seconds in speed.RUNS:
    assert speed.quickstart_seconds(gflops) == pytest.approx(seconds)
  slow, middle, fast = (speed.quickstart_seconds(rate) for rate in (40.0, 140.0, 2000.0))
  assert slow > 1740 > middle > 540 > fast > 0
  assert speed.words(speed.RUNS[-1][0]) == 'about 29 minutes'
  assert speed.words(speed.RUNS[0][0]) == 'about 9 minutes'


def test_doctor_prints_them(brief, monkeypatch):
  monkeypatch.setattr(speed, 'measure', lambda: speed.Speed(71.8, 12.34))
  lines = {finding.name: finding for finding in (*doctor.machine(), *doctor.speed())}
  assert lines['cpu'].found == machine.here().title
  assert lines['products'].found == '72 GFLOP/s in float32 (729 x 1152 x 1152)'
  assert lines['bandwidth'].found == '12.3 GB/s of memory read and written'
  assert lines['quickstart'].found.startswith('takes about 29 minutes here')


def test_a_cpu_that_jax_may_not_use_is_no_problem(monkeypatch):
  def refused():
    raise RuntimeError('Unknown backend cpu')

  monkeypatch.setattr(speed, 'measure', refused)
  finding, = doctor.speed()
  assert finding.status == 'none' and 'Unknown backend cpu' in finding.found


def test_quickstart_says_its_time(brief):
  text = quickstart.estimate()
  assert re.match(r'about \d+ minutes on this machine', text)
  assert f'({machine.here().title}; products at ' in text
