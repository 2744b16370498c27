"""`lab.rates`: which models are searched, what is chosen and kept, what a config reads."""

import dataclasses
import functools
import json

import pytest

from hrvlm_jax.lab import rates
from hrvlm_jax.lab.compare_config import CompareConfig
from hrvlm_jax.training import run_config

FILE = 'configs/compare/needle_tiny.py:smoke'


@functools.cache
def config(**changes):
  base = run_config.load(CompareConfig, FILE)
  return dataclasses.replace(base, seeds=(0, 1), everywhere=('single_view', 'pheye'), train_steps=4,
                             **changes)


class Fake(rates.RateSearch):
  """Trains nothing; a model is right as often as its rate and length deserve."""

  write_data = tokenizer = pretrain = pretrain_language = write_validation = lambda *_: None
  adapt = lambda self, name: None

  def search(self, name, rate, steps):
    right = {0.001: 1, 0.002: 3, 0.004: 3}[rate] if steps == 4 else {0.004: 2}.get(rate, 1)
    self.write(f'search_{name} {rate:g} {steps}.json', [{'correct': i < right} for i in range(4)])


def test_systems_and_one_baseline_of_every_other_kind_are_searched():
  made = config()
  assert rates.searched(made) == ['single_view', 'pheye', 'anyres', 'llava_hr', 'mc_llava', 's2',
                                  'vila_hd']
  twin = dataclasses.replace(made, systems={**made.systems, 'z': made.systems['pheye']})
  assert rates.searched(twin) == rates.searched(made)
  assert rates.searched(made, ['s2']) == ['s2']


def test_the_best_rate_at_full_length_is_kept_and_read_by_the_config(tmp_path, monkeypatch):
  monkeypatch.setattr(rates, 'RateSearch', Fake)
  search = rates.study_of({'needle': config()}, tmp_path, tasks=['needle'], only=['pheye'],
                          progress=False)
  parts = search.parts()
  assert [part.title for part in parts] == [
    'needle-0 data', 'needle-0 encoder', 'needle-0 language', 'needle-0 pheye']
  assert [step.split()[2:] for step in parts[-1].steps] == [
    ['0.001', '2'], ['0.001', '4'], ['0.002', '2'], ['0.002', '4'], ['0.004', '2'], ['0.004', '4']]
  assert search.run(parts) == {}
  place = rates.place_of(f'{tmp_path}/claims.py:smoke')
  rates.keep(search, place)
  # 0.002 and 0.004 are equal at the full length; 0.004 was better at the half.
  assert rates.chosen_rates(f'{tmp_path}/claims.py', 'needle') == {'pheye': 0.004}
  assert rates.chosen_rates(f'{tmp_path}/claims.py', 'page') == {}
  assert rates.chosen_rates(f'{tmp_path}/other.py', 'needle') == {}
  table = rates.markdown(rates.read(place))
  assert table[0].startswith('| needle | 0.001, 2 steps |') and '| 0.004 |' in table[2]


def test_a_search_borrows_equal_pre_training_and_no_other(tmp_path, monkeypatch):
  monkeypatch.setattr(rates, 'RateSearch', Fake)
  around = Fake(dataclasses.replace(config(), seeds=(), everywhere=()), tmp_path / 'needle-0')
  for name in ('encoder', 'language'):
    (around.folder / name).mkdir()
    around.note(name, 100.0, 90.0)
  study = rates.study_of({'needle': config()}, tmp_path, tasks=['needle'], progress=False)
  rates.borrow(study, tmp_path, study.parts())
  times = json.loads((tmp_path / 'search/needle-0/times.json').read_text())
  assert times == {'encoder': 100.0, 'language': 100.0}
  (tmp_path / 'needle-0/config.json').write_text('{}')
  other = rates.study_of({'needle': config()}, tmp_path / 'b', tasks=['needle'], progress=False)
  rates.borrow(other, tmp_path, other.parts())
  assert not (tmp_path / 'b/search/needle-0/times.json').exists()


def test_models_train_with_their_own_rate(tmp_path, monkeypatch):
  made = dataclasses.replace(config(), seeds=(), everywhere=(), rates={'pheye': 0.5})
  search = Fake(made, tmp_path, progress=False)
  monkeypatch.setattr(Fake, 'start', lambda self, name: (tmp_path, ['a'], ['a']))
  assert search.run_config('pheye').training.optimizer.learning_rate == 0.5
  assert search.run_config('s2').training.optimizer.learning_rate == pytest.approx(2e-3)
