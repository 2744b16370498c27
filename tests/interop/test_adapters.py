"""LoRA sets: merged on export, as an adapter folder of peft, and read from one."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from hrvlm_jax.checkpoint import hf, store
from hrvlm_jax.cli.main import main
from hrvlm_jax.core import lora
from hrvlm_jax.core.config import to_dict
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.layers import LoRA
from hrvlm_jax.interop.certificate import certify
from hrvlm_jax.interop.convert import convert
from hrvlm_jax.interop.export import export
from hrvlm_jax.language.prompt import tokenizer_of
from hrvlm_jax.systems import registry
from hrvlm_jax.vlm import model as vlm
from hrvlm_jax.vlm.answer import model_config
from tests.interop.releases import random_params

SPEC = LoRA(rank=3, alpha=12.0, dropout=0.05)
PLAIN = registry.get('single_view').tiny()
CONFIG = dataclasses.replace(PLAIN, text=dataclasses.replace(PLAIN.text, lora=(SPEC,)))


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """(params, checkpoint) of a model whose LoRA set does something."""
  folder = tmp_path_factory.mktemp('lora') / 'checkpoint'
  params = random_params(CONFIG)
  files = {f'tokenizer/{n}': data for n, data in tokenizer_of('byte').files.items()}
  store.save_params(folder, params, {'model': to_dict(CONFIG)}, extra_files=files)
  return params, folder


def language_logits(config, params, ids):
  module = vlm.build(config).bind(params)
  return module.logits(module.language(module.language.embed(ids), jnp.ones(ids.shape, bool)))


def test_merged_and_loose_exports_are_one_model(trained, tmp_path, capsys):
  params, checkpoint = trained
  assert main(['export', '--checkpoint', str(checkpoint), '--to', str(tmp_path / 'merged'),
               '--merge-lora']) == 0
  assert main(['export', '--checkpoint', str(checkpoint), '--to', str(tmp_path / 'loose')]) == 0
  merged, loose = (hf.TensorFolder(tmp_path / name) for name in ('merged', 'loose'))
  assert not (tmp_path / 'merged' / 'adapter').exists()
  assert set(merged) == set(loose)
  adapter = hf.TensorFolder(tmp_path / 'loose' / 'adapter')
  settings = json.loads((tmp_path / 'loose' / 'adapter' / 'adapter_config.json').read_text())
  assert (settings['r'], settings['lora_alpha'], settings['peft_type']) == (3, 12.0, 'LORA')
  for module in settings['target_modules']:  # as peft merges: W + alpha / r * B @ A
    low, high = (adapter[f'base_model.model.{module}.lora_{x}.weight'] for x in 'AB')
    assert low.shape[0] == high.shape[1] == 3
    expected = loose[f'{module}.weight'] + 4.0 * (high @ low)
    np.testing.assert_allclose(merged[f'{module}.weight'], expected, atol=1e-6)
  changed = {name for name in loose if not np.array_equal(loose[name], merged[name])}
  assert changed == {f'{module}.weight' for module in settings['target_modules']}
  facts = json.loads((tmp_path / 'merged' / 'manifest.json').read_text())
  assert facts['merged_lora'] == {'language/': {'rank': 3, 'alpha': 12.0}}
  # Both read back: one as a plain model, one with its set, and both compute the same.
  assert convert(tmp_path / 'merged', tmp_path / 'plain') == PLAIN
  again = convert(tmp_path / 'loose', tmp_path / 'with_set')
  assert again.text.lora == (SPEC,)
  checked = certify(tmp_path / 'with_set', tmp_path / 'loose')
  assert checked.passed, checked.lines()
  assert 'transformers.PhiForCausalLM' in {c.against for c in checked.compared}
  ids = jax.random.randint(jax.random.key(1), (2, 9), 0, CONFIG.text.vocab_size)
  outs = [language_logits(config, store.load_params(folder, vlm.build(config).abstract), ids)
          for config, folder in ((PLAIN, tmp_path / 'plain'), (again, tmp_path / 'with_set'))]
  np.testing.assert_allclose(outs[0], outs[1], atol=1e-4)
  np.testing.assert_allclose(outs[0], language_logits(PLAIN, lora.strip(lora.merge(params, SPEC)),
                                                      ids), atol=1e-4)
  assert float(jnp.abs(outs[0] - language_logits(PLAIN, lora.strip(params), ids)).max()) > 0.01
  back = store.flatten(store.load_params(tmp_path / 'with_set', shardings='host'))
  for path, value in store.flatten(params).items():
    np.testing.assert_array_equal(back[path], value, err_msg=path)


def test_an_adapter_of_some_modules_on_a_base(trained, tmp_path):
  """peft's usual adapter (q and v only) beside a plain base; the other modules start fresh."""
  _, checkpoint = trained
  export(checkpoint, tmp_path / 'merged', merge_lora=True)
  names = [f'base_model.model.model.layers.{i}.self_attn.{m}_proj.lora_{x}.weight'
           for i in range(PLAIN.text.depth) for m in 'qv' for x in 'AB']
  width = PLAIN.text.width
  rng = np.random.default_rng(0)
  tensors = {n: rng.normal(size=(2, width) if 'lora_A' in n else (width, 2)).astype(np.float32)
             for n in names}
  (tmp_path / 'adapter').mkdir()
  torch.save({n: torch.tensor(x) for n, x in tensors.items()},
             tmp_path / 'adapter' / 'adapter_model.bin')
  (tmp_path / 'adapter' / 'adapter_config.json').write_text(json.dumps(
    {'peft_type': 'LORA', 'r': 2, 'lora_alpha': 4, 'bias': 'none', 'rank_pattern': {}}))
  said = []
  config = convert(tmp_path / 'merged', tmp_path / 'out', adapter=tmp_path / 'adapter',
                   say=said.append)
  assert config.text.lora == (LoRA(rank=2, alpha=4.0),) == model_config(tmp_path / 'out').text.lora
  fresh = next(line for line in said if 'start fresh' in line)
  assert 'language/blocks/attn/k/lora_a' in fresh
  files = json.loads((tmp_path / 'out' / 'source.json').read_text())['files']
  assert set(files) == {'config.json', 'model.safetensors', 'adapter/adapter_config.json',
                        'adapter/adapter_model.bin'}
  out = store.flatten(store.load_params(tmp_path / 'out', shardings='host'))
  np.testing.assert_array_equal(out['language/blocks/attn/q/lora_a'][1], tensors[names[4]].T)
  assert not out['language/blocks/attn/k/lora_b'].any()
  assert out['language/blocks/attn/k/lora_a'].any()
  del tensors[names[0]]  # one layer of a set is not a set
  torch.save({n: torch.tensor(x) for n, x in tensors.items()},
             tmp_path / 'adapter' / 'adapter_model.bin')
  with pytest.raises(UserError, match='layers.0.self_attn.q_proj: has lora_B alone'):
    convert(tmp_path / 'merged', tmp_path / 'out2', adapter=tmp_path / 'adapter')


def test_adapters_that_are_no_plain_lora_are_refused(trained, tmp_path):
  _, checkpoint = trained
  export(checkpoint, tmp_path / 'loose')
  path = tmp_path / 'loose' / 'adapter' / 'adapter_config.json'
  path.write_text(json.dumps({'peft_type': 'IA3', 'use_dora': True, 'r': 0,
                              'modules_to_save': ['lm_head']}))
  with pytest.raises(UserError) as caught:
    convert(tmp_path / 'loose', tmp_path / 'out')
  for text in ("peft_type is 'IA3'", 'use_dora is true', 'r is 0', 'modules_to_save',
               'lora_alpha is None'):
    assert text in str(caught.value)


def test_what_cannot_be_merged(tmp_path, capsys):
  for name, text in (('pheye', 'first, second act on different views'),
                     ('single_view', 'has no LoRA sets')):
    config = registry.get(name).tiny()
    store.save_params(tmp_path / name, random_params(config), {'model': to_dict(config)})
    argv = ['export', '--checkpoint', str(tmp_path / name), '--to', str(tmp_path / 'out')]
    assert main([*argv, '--merge-lora']) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()
