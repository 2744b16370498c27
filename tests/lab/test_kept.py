"""Kept results say what they were made from."""

import json
import pathlib
import re

from hrvlm_jax.evaluation import provenance

CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'


def missing(made) -> list[str]:
  """What of the account of a result is not there, or is no such thing."""
  rules = {'commit': r'[0-9a-f]{40}(\+changes)?', 'config_hash': r'[0-9a-f]{64}',
           'date': r'\d{4}-\d\d-\d\d', 'command': r'hrvlm .+'}
  found = [key for key, rule in rules.items()
           if not re.fullmatch(rule, str((made or {}).get(key, '')))]
  versions = (made or {}).get('versions') or {}
  return found + [f'versions.{name}' for name in ('jax', 'jaxlib', 'numpy')
                  if not versions.get(name)]


def test_every_kept_result_says_what_it_was_made_from():
  kept = sorted([*CONFIGS.glob('*/results/*.json'), *CONFIGS.glob('*/results/claims/*-?.json')])
  assert len(kept) >= 7
  assert {str(path): missing(json.loads(path.read_text()).get('made')) for path in kept} == {
    str(path): [] for path in kept}


def test_what_is_kept_from_now_on_is_whole():
  made = provenance.made({'a': 1}, ['hrvlm', 'tiny', '--config', 'x.py'])
  assert missing(made) == [] and made['config_hash'] != provenance.made({'a': 2})['config_hash']
  assert missing({**made, 'commit': ''}) == ['commit'] and 'versions.jax' in missing({})
