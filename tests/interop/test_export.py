"""What an exported folder holds beside its weights, and dtypes."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import transformers

from hrvlm_jax.checkpoint import hf, leaves, store
from hrvlm_jax.core import paths
from hrvlm_jax.core.config import to_dict
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.interop import card
from hrvlm_jax.interop.convert import convert
from hrvlm_jax.interop.export import export
from hrvlm_jax.language.prompt import tokenizer_of
from hrvlm_jax.systems import registry
from tests import levels
from tests.interop.releases import random_params

FILES = {f'tokenizer/{n}': data for n, data in tokenizer_of('byte').files.items()}


def saved(folder, name, change=lambda path, x: x):
  config = registry.get(name).tiny()
  flat = {path: change(path, x) for path, x in paths.flatten(random_params(config)).items()}
  store.save_params(folder, paths.unflatten(flat), {'model': to_dict(config)}, extra_files=FILES)
  return config


@pytest.mark.parametrize('name', levels.rows(
  'interop', ['mc_llava', 'pheye', 'llava_hr', 'vila_hd', 'ps3', 's2'],
  first=['mc_llava', 'vila_hd', 'ps3']))
def test_all_files_are_there_and_known_to_transformers(name, tmp_path):
  config = saved(tmp_path / 'c', name)
  export(tmp_path / 'c', tmp_path / 'out')
  names = {path.relative_to(tmp_path / 'out').as_posix() for path in (tmp_path / 'out').rglob('*')}
  processor = next(n for n in sorted(names) if n.endswith('preprocessor_config.json'))
  assert {'config.json', 'README.md', 'manifest.json', 'processor_config.json'} <= names
  values = json.loads((tmp_path / 'out' / processor).read_text())
  if values['image_processor_type'] in ('CLIPImageProcessor', 'SiglipImageProcessor'):
    loaded = getattr(transformers, values['image_processor_type']).from_pretrained(
      tmp_path / 'out')
    assert list(loaded.image_mean) == values['image_mean']
  if config.text is not None:
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / 'out')
    assert generation.eos_token_id is not None or name == 'mc_llava'
    place = 'llm/' if name == 'vila_hd' else ''
    assert f'{place}tokenizer.json' in names
  facts = json.loads((tmp_path / 'out' / 'manifest.json').read_text())
  assert facts['table'] == registry.get(name).table(config).fingerprint()
  assert len(facts['source']['sha256']) == 64 and facts['source']['kind'] == 'params'
  assert sum(facts['dtype'].values()) == sum(
    len(hf.TensorFolder(path.parent)) for path in (tmp_path / 'out').rglob('model.safetensors'))
  assert set(facts['files']) == names - {'manifest.json', *registry.get(name).folders}
  assert bool(facts['tied']) == (name == 'pheye') and bool(facts['unused']) == (
    name in ('mc_llava', 'pheye', 'llava_hr', 's2'))
  hf.check_manifest(tmp_path / 'out')
  text = (tmp_path / 'out' / 'README.md').read_text()
  assert text.startswith('---\nlibrary_name: hrvlm_jax') and '## Licences' in text


def test_the_card_names_the_licences_of_released_sizes():
  config = registry.get('llava_hr').released['llava_hr_x_13b']
  text = card.model_card(config, registry.get('llava_hr').table(config))
  for licence in ('llama2', 'mit', 'apache-2.0'):
    assert f'| {licence} |' in text
  assert 'license: other' in text and '- lmsys/vicuna-13b-v1.5' in text
  found = {name: [b.licence for b in card.bases(c)] for name in ('vila_hd', 'mc_llava', 'pheye')
           for c in list(registry.get(name).released.values())[:1]}
  assert found['vila_hd'][0] == 'cc-by-nc-sa-4.0' and 'apache-2.0' in found['vila_hd']
  assert found['mc_llava'] == ['mit', 'apache-2.0'] and found['pheye'] == ['mit', 'apple-amlr']


def test_export_says_where_a_converted_checkpoint_came_from(tmp_path):
  saved(tmp_path / 'c', 'single_view')
  export(tmp_path / 'c', tmp_path / 'first')
  convert(tmp_path / 'first', tmp_path / 'again')
  export(tmp_path / 'again', tmp_path / 'second')
  origin = json.loads((tmp_path / 'second' / 'manifest.json').read_text())['source']['origin']
  listed = json.loads((tmp_path / 'first' / 'manifest.json').read_text())['files']
  assert origin['origin'] == {'name': 'first', 'revision': None}
  assert origin['files']['model.safetensors'] == listed['model.safetensors']
  assert '`first`' in (tmp_path / 'second' / 'README.md').read_text()


def test_another_dtype_and_one_that_cannot_hold_the_values(tmp_path):
  large = lambda path, x: x * 0 + 1e5 if path == 'language/norm/bias' else x
  saved(tmp_path / 'c', 'single_view', large)
  export(tmp_path / 'c', tmp_path / 'half', dtype=jnp.bfloat16)
  assert set(hf.TensorFolder(tmp_path / 'half').dtypes.values()) == {np.dtype(ml_dtypes.bfloat16)}
  with pytest.raises(UserError, match='final_layernorm.bias: holds values up to 1e.05, beyond the '
                                      'range of float16'):
    export(tmp_path / 'c', tmp_path / 'out', dtype=jnp.float16)
  assert not (tmp_path / 'out').exists()
  export(tmp_path / 'c', tmp_path / 'wide')
  with pytest.raises(UserError, match='final_layernorm.bias: holds values beyond the range of'):
    convert(tmp_path / 'wide', tmp_path / 'out', dtype=jnp.float16)
  assert not (tmp_path / 'out').exists()


def test_a_checkpoint_that_is_another_model_is_refused(tmp_path):
  config = registry.get('single_view').tiny()
  store.save_params(tmp_path / 'c', {'projector': {'x': np.ones(2)}}, {'model': to_dict(config)})
  with pytest.raises(UserError, match='not in the model: projector/x'):
    export(tmp_path / 'c', tmp_path / 'out')


def test_leaves_are_read_layer_by_layer(tmp_path, monkeypatch):
  """A stacked leaf that is stored in layers is never read whole; one stored whole is read once."""
  from hrvlm_jax.checkpoint import streaming

  monkeypatch.setattr(streaming, 'CHUNK_BYTES', 1 << 16)
  monkeypatch.setattr(leaves, '_SMALL', 1 << 10)
  values = np.arange(8 * 100 * 100, dtype=np.float32).reshape(8, 100, 100)
  store.save_params(tmp_path / 'c', {'blocks': {'kernel': values}, 'b': np.ones(3)}, {})
  read = leaves.StoredParams(tmp_path / 'c')
  for layer in (0, 5):
    np.testing.assert_array_equal(read('blocks/kernel', layer), values[layer])
  assert not read._whole
  np.testing.assert_array_equal(read('blocks/kernel'), values)
  with store.TrainStore(tmp_path / 'run') as training:
    training.save(1, {'params': {'blocks': {'kernel': jnp.asarray(values)}}})
  read = leaves.StoredParams(tmp_path / 'run')
  np.testing.assert_array_equal(read('blocks/kernel', 3), values[3])
  assert list(read._whole) == ['blocks/kernel']
