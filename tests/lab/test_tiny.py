"""The tiny configs: their headers say what their kept runs reached, and the runs learned."""

import json
import pathlib
import runpy

import pytest

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.lab import tiny

FOLDER = pathlib.Path(__file__).parents[2] / 'configs' / 'tiny'
NAMES = ('llava_hr', 'mc_llava', 'pheye', 'ps3', 'vila_hd')  # fixed


KEPT = sorted(path.stem for path in (FOLDER / 'results').glob('*.json'))


def test_the_names():
  assert sorted(path.stem for path in FOLDER.glob('*.py')) == list(NAMES)
  assert {'mc_llava', 'pheye', 'ps3'} <= set(KEPT) <= set(NAMES)


@pytest.mark.parametrize('name', NAMES)
def test_header(name):
  text = runpy.run_path(str(FOLDER / f'{name}.py'))['__doc__']
  assert all(word in text for word in ('Command:', 'Hardware:', f'configs/tiny/{name}.py'))


def test_headers_and_kept_results_agree():
  assert tiny.headers(FOLDER / f'{name}.py' for name in NAMES) == []


def test_headers_that_differ_are_found(tmp_path):
  config = tmp_path / 'x.py'
  config.write_text('"""X.\n\nResult:   not run yet.\n"""\n')
  assert 'missing' in tiny.headers([config])[0]
  values = {'loss': 0.12345, 'accuracy': 0.876, 'chance': 0.043, 'steps': 10}
  tiny.keep(values, config)
  assert tiny.headers([config]) == [] and 'loss 0.123, accuracy 87.6%' in config.read_text()
  kept = tmp_path / 'results' / 'x.json'
  kept.write_text(kept.read_text().replace('0.876', '0.976'))
  assert '97.6%' in tiny.headers([config])[0]


@pytest.mark.parametrize('name', [name for name in KEPT if name != 'ps3'])
def test_the_run_learned(name):
  kept = json.loads((FOLDER / 'results' / f'{name}.json').read_text())
  # A third is what a guess among the letters in the picture would get.
  assert kept['accuracy'] > max(0.4, 5 * kept['chance'])


def test_ps3_finds_what_the_prompt_names():
  scores = json.loads((FOLDER / 'results' / 'ps3.json').read_text())['scores']
  at = {(s['way'], s['share']): s for s in scores}
  recall = [at[way, 0.44]['recall'] for way in ('top_down', 'bottom_up', 'random')]
  assert recall == sorted(recall, reverse=True)
  for way in ('random', 'bottom_up', 'top_down'):  # budgets rise
    read = [s['accuracy'] for s in scores if s['way'] == way]
    assert read == sorted(read) and read[-1] > 3 * read[0], way


def test_what_cannot_be_kept_or_prepared_is_refused(tmp_path):
  with pytest.raises(UserError, match='--keep: a kept result is that of the config as it is'):
    tiny.run(str(FOLDER / 'pheye.py'), [('seed', '1')], keep_result=True, machine='m')
  config = tmp_path / 'plain.py'
  config.write_text((FOLDER / 'pheye.py').read_text().replace('def preparation', 'def other'))
  with pytest.raises(UserError, match='has no function preparation'):
    tiny.run(str(config), machine='m')
