"""`convert --check`: what is compared, what is named as not checked, and what is found wrong."""

import dataclasses
import functools
import json
import shutil
import sys

import numpy as np
import pytest

from hrvlm_jax.checkpoint import hf, store
from hrvlm_jax.checkpoint.rows import export_tensors
from hrvlm_jax.cli.main import main
from hrvlm_jax.core import paths
from hrvlm_jax.core.config import to_dict
from hrvlm_jax.interop import certificate
from hrvlm_jax.interop.convert import convert
from hrvlm_jax.interop.export import export
from hrvlm_jax.interop.reference import AGAINST
from hrvlm_jax.language.prompt import tokenizer_of
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.contract import System
from tests import levels
from tests.interop.releases import random_params, write_release
from tests.interop.tiny_models import MODELS


def small_release(folder, name):
  """A release whose values keep a deep model calm, but let its attention look somewhere."""
  config = registry.get(name).tiny()
  flat = paths.flatten(random_params(config))
  flat = {path: x * 3 if '/attn/' in path else x for path, x in flat.items()}
  table = registry.get(name).table(config)
  return write_release(folder, config, dict(export_tensors(paths.unflatten(flat), table)))


PARTS = [
  ('mc_llava', {'language': 'transformers.PhiForCausalLM', 'projector': AGAINST,
                'vision/tower': 'transformers.SiglipVisionModel', 'vision': AGAINST,
                'prompts': 'transformers tokenizer'}),
  ('pheye', {'language': 'transformers.PhiForCausalLM', 'prompts': 'transformers tokenizer',
             'vision/tower': 'transformers.CLIPVisionModel', 'vision': AGAINST,
             'fusion': AGAINST}),
  ('llava_hr', {'language': 'transformers.LlamaForCausalLM', 'projector': AGAINST,
                'vision/fast': 'transformers.CLIPVisionModel', 'prompts': 'transformers tokenizer',
                'vision/slow': 'transformers.ConvNextModel', 'vision': AGAINST}),
  ('vila_hd', {'language': 'transformers.Qwen2ForCausalLM', 'vision/projector': AGAINST,
               'prompts': 'transformers tokenizer', 'vision/ps3': AGAINST,
               'vision/prompt_head': AGAINST}),
  ('ps3', {'vision': AGAINST, 'text': AGAINST})]


@pytest.mark.parametrize('name, parts', levels.rows(
  'interop', PARTS, first=[row for row in PARTS if row[0] in ('mc_llava', 'ps3')]))
def test_what_is_compared(name, parts, tmp_path, capsys):
  source = small_release(tmp_path / 'original', name)
  argv = ['convert', '--from', str(source), '--to', str(tmp_path / 'c'), '--check']
  assert main(argv) == 0
  out = capsys.readouterr().out
  assert 'parity check passed' in out
  found = json.loads((tmp_path / 'c' / 'parity.json').read_text())
  assert found['passed'] and found['system'] == name
  against = {c['name']: c['against'] for c in found['compared']}
  tensors = {n: n.removesuffix(' (tensors)') for n in against if n.endswith(' (tensors)')}
  assert {n: a for n, a in against.items() if n not in tensors} == parts | {'config': 'config.json'}
  assert all(c['passed'] for c in found['compared'])
  for compared in found['compared']:
    for numbers in compared['outputs'].values():
      assert 0 <= numbers['difference'] <= numbers['limit']
  # Every tensor of the release is held against its leaf, and every part has its forward pass.
  counted = sum(c['outputs']['tensors']['count'] for c in found['compared'] if c['name'] in tensors)
  assert counted == sum(len(hf.TensorFolder(source / f))
                        for f in registry.get(name).folders or ('',))
  assert found['not_checked'] == {} and 'NOT CHECKED' not in out
  assert found['versions']['torch'] and found['versions']['transformers']
  assert len(found['checkpoint_sha256']) == len(found['source']['sha256']) == 64
  store.resolve(tmp_path / 'c')  # the certificate does not disturb the checkpoint


@pytest.mark.parametrize('name', levels.rows(
  'systems', registry.names(), first=['pheye', 'ps3', 'reduced', 'vila_hd']))
def test_without_torch_the_replay_runs_and_the_rest_is_named(name, tmp_path, capsys, monkeypatch):
  source = small_release(tmp_path / 'original', name)
  for module in ('torch', 'transformers'):
    monkeypatch.setitem(sys.modules, module, None)
  argv = ['convert', '--from', str(source), '--to', str(tmp_path / 'c'), '--check']
  assert main(argv) == 0
  config = registry.get(name).tiny()
  found = json.loads((tmp_path / 'c' / 'parity.json').read_text())
  counted = sum(c['outputs']['tensors']['count'] for c in found['compared']
                if c['name'].endswith(' (tensors)'))
  assert counted == sum(len(hf.TensorFolder(source / f))
                        for f in registry.get(name).folders or ('',))
  if config.text is not None:
    out = capsys.readouterr().out
    wanted = [('language', 'torch'), ('prompts', 'transformers')]
    wanted += [('projector', 'torch')] if config.projector else []
    wanted += [('vision/ps3' if name == 'vila_hd' else 'vision', 'torch')]
    for part, library in wanted:
      assert found['not_checked'][part].startswith(f'{library} is not installed')
      assert f'NOT CHECKED  {part}: {library} is not installed' in out


@pytest.fixture(scope='module')
def converted(tmp_path_factory):
  """(release, checkpoint) of a tiny MC-LLaVA."""
  folder = tmp_path_factory.mktemp('certificate')
  source = small_release(folder / 'original', 'mc_llava')
  convert(source, folder / 'c')
  return source, folder / 'c'


def damaged(converted, target, *, config=None, **changes):
  """A copy of the checkpoint, some leaves replaced by fn(all leaves by path)."""
  source, checkpoint = converted
  params = paths.flatten(store.load_params(checkpoint, shardings='host'))
  params |= {path.replace('__', '/'): fn(params) for path, fn in changes.items()}
  shutil.copytree(checkpoint, target)
  values = store.load_config(checkpoint)
  if config is not None:
    values['model']['text'] |= config
  files = {f'tokenizer/{p.name}': p.read_bytes() for p in (checkpoint / 'tokenizer').iterdir()}
  files['source.json'] = (checkpoint / 'source.json').read_bytes()
  store.save_params(target, paths.unflatten(params), values, overwrite=True, extra_files=files)
  return certificate.certify(target, source)


def failed(result):
  assert not result.passed and result.facts['passed'] is False
  assert all(line.startswith('FAILED') for line, c in zip(
    result.lines(), result.compared, strict=False) if not c.passed)
  return {c.name for c in result.compared if not c.passed}


def test_a_checkpoint_of_zeros_fails_everything(converted, tmp_path):
  flat = store.describe(converted[1])
  zeros = {path: lambda params, path=path: np.zeros_like(params[path]) for path in flat}
  result = damaged(converted, tmp_path / 'c', **zeros)
  assert failed(result) == {c.name for c in result.compared} - {'config', 'prompts'}


def test_swapped_queries_and_keys_fail(converted, tmp_path):
  q, k = (f'language/blocks/attn/{name}/kernel' for name in 'qk')
  result = damaged(converted, tmp_path / 'c', **{
    q: lambda params: params[k].copy(), k: functools.partial(lambda q, _: q, store.load_leaf(
      converted[1], q))})
  assert failed(result) == {'language', 'language (tensors)'}
  assert 'first in language_model.model.layers.0.self_attn.q_proj.weight' in '\n'.join(
    result.lines())


def test_a_wrong_rotary_base_fails(converted, tmp_path):
  """The tensors are right; the release's own config.json says another base."""
  result = damaged(converted, tmp_path / 'c', config={'rope_theta': 1e6})
  assert failed(result) == {'language', 'config'}
  assert 'text/rope_theta' in result.lines()[0]


def test_a_damaged_projector_fails(converted, tmp_path):
  result = damaged(converted, tmp_path / 'c', projector__fc2__kernel=lambda params: (
    params['projector/fc2/kernel'] + 1e-3))
  assert failed(result) == {'projector', 'projector (tensors)'}
  result = damaged(converted, tmp_path / 'd', vision__coord_embed__fc1__bias=lambda params: (
    params['vision/coord_embed/fc1/bias'][::-1]))
  assert failed(result) == {'vision', 'vision/coord_embed (tensors)'}
  outputs = {c.name: c.outputs for c in result.compared}['vision/coord_embed (tensors)']
  assert outputs['sums']['status'] == 'ok' and outputs['values']['status'] == 'different'


@pytest.mark.full('interop')
def test_another_copy_of_the_release_and_names_that_nothing_reads(converted, tmp_path, capsys):
  """--check FOLDER: pickled by PyTorch in bfloat16; then with a tensor too many."""
  import torch

  source, _ = converted
  shutil.copytree(source, tmp_path / 'pickled')
  state = {name: torch.tensor(np.array(x)).bfloat16()
           for name, x in hf.TensorFolder(source).items()}
  (tmp_path / 'pickled' / 'model.safetensors').unlink()
  torch.save(state, tmp_path / 'pickled' / 'pytorch_model.bin')
  argv = ['convert', '--from', str(source), '--to', str(tmp_path / 'c'), '--dtype', 'bfloat16',
          '--check', str(tmp_path / 'pickled')]
  assert main(argv) == 0, capsys.readouterr().out
  torch.save(state | {'surprise': torch.zeros(2)}, tmp_path / 'pickled' / 'pytorch_model.bin')
  argv[4] = str(tmp_path / 'd')
  assert main(argv) == 1
  out = capsys.readouterr().out
  assert 'FAILED  files (tensors)' in out and 'first in surprise' in out
  assert 'parity check FAILED' in out


def test_nothing_compared_is_no_pass(converted, tmp_path, capsys, monkeypatch):
  def nothing(config, checkpoint, release, adapter, not_checked):
    not_checked['everything'] = 'there is no reference for it'
    return []

  monkeypatch.setattr(certificate, '_compare', nothing)
  argv = ['convert', '--from', str(converted[0]), '--to', str(tmp_path / 'c'), '--check']
  assert main(argv) == 1
  out = capsys.readouterr().out
  assert 'NOT CHECKED  everything: there is no reference' in out
  assert 'parity NOT CHECKED: nothing was compared' in out
  assert not (tmp_path / 'c' / 'parity.json').exists()


def test_the_layout_of_the_house_is_compared_too(tmp_path, monkeypatch):
  """A system without an original's layout: tensors under their own paths, no class of anybody."""
  monkeypatch.setattr(registry, '_MODULES', dict(registry._MODULES))
  plain = registry.get('single_view')
  registry.register('own', System(config=plain.config, encoder=plain.encoder, count=plain.count,
                                  views=plain.views))
  config = dataclasses.replace(plain.tiny(), system='own')
  source = write_release(tmp_path / 'original', config, dict(
    export_tensors(random_params(config), registry.get('own').table(config))))
  convert(source, tmp_path / 'c')
  result = certificate.certify(tmp_path / 'c', source)
  assert result.passed, result.lines()
  assert {c.name for c in result.compared} == {
    'config', 'language', 'projector', 'prompts', *(
      f'{part} (tensors)' for part in ('language', 'projector', 'vision/tower'))}
  assert set(result.not_checked) == {'vision'}
  result = damaged((source, tmp_path / 'c'), tmp_path / 'd', projector__fc1__bias=lambda params: (
    params['projector/fc1/bias'] + 1))
  assert failed(result) == {'projector', 'projector (tensors)'}


@pytest.mark.parametrize('name, layout', levels.rows('interop', [
  ('llava_hr', 'transformers'), ('mc_llava', 'transformers'), ('vila_hd', 'transformers'),
  ('pheye', 'transformers'), ('single_view/siglip', 'transformers'), ('anyres', 'transformers'),
  ('mc_llava/qwen2', 'original')], first=[('mc_llava', 'transformers')]))
def test_our_own_layouts_have_certificates(name, layout, tmp_path, capsys):
  """Folders that transformers opens, and the layout hrvlm-1: every part has a reference."""
  config = MODELS[name]
  files = {f'tokenizer/{n}': data for n, data in tokenizer_of('byte').files.items()}
  store.save_params(tmp_path / 'a', random_params(config), {'model': to_dict(config)},
                    extra_files=files)
  export(tmp_path / 'a', tmp_path / 'f', layout=layout)
  argv = ['convert', '--from', str(tmp_path / 'f'), '--to', str(tmp_path / 'c'), '--check']
  assert main(argv) == 0, capsys.readouterr().out
  out = capsys.readouterr().out
  assert 'parity check passed' in out and 'NOT CHECKED' not in out
