"""`convert --check`: recorded cases, side by side with transformers, and a wrong checkpoint."""

import json
import pathlib
import sys

import pytest

from hrvlm_jax.checkpoint import store
from hrvlm_jax.checkpoint.rows import export_tensors
from hrvlm_jax.cli.main import main
from hrvlm_jax.core import paths
from hrvlm_jax.systems import registry
from tests.interop.releases import random_params, write_release

TESTS = pathlib.Path(__file__).parents[1]


def small_release(folder, name):
  """A release whose values keep a deep model calm."""
  config = registry.get(name).tiny()
  table = registry.get(name).table(config)
  return write_release(folder, config, dict(export_tensors(random_params(config), table)))


@pytest.mark.parametrize('name, parts', [
  ('mc_llava', {'language': 'PhiForCausalLM', 'vision/tower': 'SiglipVisionModel'}),
  ('llava_hr', {'language': 'LlamaForCausalLM', 'vision/fast': 'CLIPVisionModel'}),
  ('vila_hd', {'language': 'Qwen2ForCausalLM'})])
def test_side_by_side_with_a_folder_of_weights(name, parts, tmp_path, capsys):
  source = small_release(tmp_path / 'original', name)
  argv = ['convert', '--from', str(source), '--to', str(tmp_path / 'c'), '--check', str(source)]
  assert main(argv) == 0
  assert 'parity check passed' in capsys.readouterr().out
  found = json.loads((tmp_path / 'c' / 'parity.json').read_text())
  assert found['passed'] and found['system'] == name
  assert {c['name']: c['against'].rpartition('.')[2] for c in found['compared']} == parts
  for compared in found['compared']:
    for out in compared['outputs'].values():
      assert 0 <= out['difference'] <= out['limit']
  assert found['versions']['torch'] and found['versions']['transformers']
  assert len(found['checkpoint_sha256']) == len(found['source']['sha256']) == 64
  assert found['not_compared']
  store.resolve(tmp_path / 'c')  # the certificate does not disturb the checkpoint


def test_a_changed_checkpoint_fails_and_recorded_cases_count(tmp_path, capsys, monkeypatch):
  from hrvlm_jax.interop.certificate import certify

  source = small_release(tmp_path / 'original', 'single_view')
  assert main(['convert', '--from', str(source), '--to', str(tmp_path / 'c')]) == 0
  params = paths.flatten(store.load_params(tmp_path / 'c', shardings='host'))
  params['language/blocks/attn/q/kernel'] = params['language/blocks/attn/k/kernel']
  store.save_params(tmp_path / 'c', paths.unflatten(params), store.load_config(tmp_path / 'c'),
                    overwrite=True)
  monkeypatch.setenv('HRVLM_GOLDENS', str(TESTS / 'goldens' / 's2'))  # none of this system
  result = certify(tmp_path / 'c', source=source)
  assert {c.name: c.passed for c in result.compared} == {'language': False, 'vision/tower': True}
  assert not result.passed and result.lines()[0].startswith('FAILED  language')
  cases = TESTS / 'goldens' / 'anyres' / 'grid'
  result = certify(tmp_path / 'c', against=cases)
  assert [c.name for c in result.compared] == ['anyres/grid'] and result.passed
  assert len(result.compared[0].sha256) == 64
  monkeypatch.setitem(sys.modules, 'torch', None)
  argv = ['convert', '--from', str(source), '--to', str(tmp_path / 'd'), '--check']
  assert main(argv) == 2
  assert 'nothing to compare with' in capsys.readouterr().err


def test_the_recorded_cases_of_a_system_are_found(monkeypatch):
  from hrvlm_jax.interop import certificate

  monkeypatch.setenv('HRVLM_GOLDENS', str(TESTS / 'goldens'))
  found = certificate._cases(registry.get('mc_llava').tiny(), None)
  assert {case.parent.name for case in found} == {'mc_llava', 'language_models'}
  assert {case.name for case in found if case.parent.name == 'language_models'} == {'phi', 'phi_2'}
