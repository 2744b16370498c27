"""Parts that are done are not repeated; the seconds of interrupted lives count."""

import time

import pytest

from hrvlm_jax.lab.experiment import Experiment


def test_done_parts_are_not_repeated(tmp_path, capsys):
  calls = []
  Experiment(tmp_path).part('a', lambda: calls.append(1))
  again = Experiment(tmp_path)
  again.part('a', lambda: calls.append(2))
  assert calls == [1] and 'done before' in capsys.readouterr().out
  assert set(again.times) == set(again.cpu_times) == {'a'}


def test_seconds_of_an_interrupted_life_count(tmp_path, monkeypatch):
  clock = [0.0]
  monkeypatch.setattr(time, 'perf_counter', lambda: clock[0])

  def stopped():
    clock[0] += 30
    raise KeyboardInterrupt

  for _ in range(2):
    with pytest.raises(KeyboardInterrupt):
      Experiment(tmp_path).part('a', stopped)
  assert Experiment(tmp_path).times == {}

  def ends():
    clock[0] += 5

  Experiment(tmp_path).part('a', ends)
  assert Experiment(tmp_path).times == {'a': 65.0}


def test_two_processes_share_a_folder(tmp_path):
  one, two = Experiment(tmp_path), Experiment(tmp_path)
  one.part('a', lambda: two.part('b', lambda: None))
  assert set(Experiment(tmp_path).times) == set(one.times) == {'a', 'b'}
  assert set(Experiment(tmp_path).cpu_times) == {'a', 'b'}


def test_a_part_whose_result_was_lost_is_done_again(tmp_path):
  calls = []
  for there in (True, True, False):
    Experiment(tmp_path).part('a', calls.append, there, done=lambda there=there: there)
  assert calls == [True, False]
