"""Exports load in PyTorch and compute the same; convert reads them back bit for bit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import torch

from hrvlm_jax.checkpoint import hf, store
from hrvlm_jax.core.config import to_dict
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.resample import normalise_host
from hrvlm_jax.interop.convert import convert
from hrvlm_jax.interop.export import export
from hrvlm_jax.language.prompt import tokenizer_of
from hrvlm_jax.systems.mc_llava import encoder as host
from hrvlm_jax.systems.mc_llava.encoder import tiny
from hrvlm_jax.vlm import model as vlm
from tests.checkpoint.writing import write_folder

CONFIG = tiny(max_crops=6, num_tokens=20)


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
  """(params, folder of the exported model): random weights, biases and norms included."""
  folder = tmp_path_factory.mktemp('export')
  fn = vlm.build(CONFIG)
  params = jax.jit(fn.init)(jax.random.key(0))
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  noise = [x + 0.05 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
  params = jax.tree.unflatten(tree, noise)
  files = {f'tokenizer/{n}': data for n, data in tokenizer_of('byte').files.items()}
  store.save_params(folder / 'checkpoint', params, {'model': to_dict(CONFIG)}, extra_files=files)
  export(folder / 'checkpoint', folder / 'export')
  return params, folder / 'export'


def part(folder, prefix):
  tensors = hf.TensorFolder(folder)
  return {name.removeprefix(prefix): torch.tensor(np.array(tensors[name]))
          for name in tensors if name.startswith(prefix)}


def test_vision_tower_in_transformers(exported):
  from transformers import SiglipVisionConfig, SiglipVisionModel

  params, folder = exported
  settings = json.loads((folder / 'config.json').read_text())['vision_config']
  reference = SiglipVisionModel(SiglipVisionConfig(**settings)).eval()
  # transformers 5 drops one level of names inside the class (its from_pretrained renames).
  nested = any(name.startswith('vision_model.') for name in reference.state_dict())
  prefix = 'vision_model.vision_tower.' + ('' if nested else 'vision_model.')
  reference.load_state_dict(part(folder, prefix), strict=True)
  picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 200, 3), np.uint8))
  example = host.views([picture], CONFIG.encoder)
  pixels = normalise_host(example['pixels'], CONFIG.encoder.mean, CONFIG.encoder.std)
  with torch.no_grad():
    out = reference(torch.tensor(pixels.transpose(0, 3, 1, 2)), output_hidden_states=True)
  module = vlm.build(CONFIG).bind(params)
  x = module.vision.tower(jnp.asarray(pixels))
  normed = module.vision.tower.post_norm(x)
  scale = lambda t: 1e-4 * max(1.0, float(t.abs().max()))
  np.testing.assert_allclose(normed, out.last_hidden_state, atol=scale(out.last_hidden_state))
  np.testing.assert_allclose(module.vision.tower.pool(normed), out.pooler_output,
                             atol=scale(out.pooler_output))


def test_language_model_in_transformers(exported):
  from transformers import PhiConfig, PhiForCausalLM

  params, folder = exported
  settings = json.loads((folder / 'config.json').read_text())['text_config']
  reference = PhiForCausalLM(PhiConfig(**settings)).eval()
  reference.load_state_dict(part(folder, 'language_model.'), strict=True)
  ids = np.random.default_rng(1).integers(0, CONFIG.text.vocab_size, (2, 11))
  with torch.no_grad():
    expected = reference(torch.tensor(ids)).logits.numpy()
  module = vlm.build(CONFIG).bind(params)
  hidden = module.language(module.language.embed(jnp.asarray(ids)), jnp.ones(ids.shape, bool))
  np.testing.assert_allclose(module.logits(hidden), expected,
                             atol=1e-4 * max(1.0, np.abs(expected).max()))


def test_the_exported_tokenizer_loads_in_transformers(exported):
  from transformers import AutoTokenizer

  theirs = AutoTokenizer.from_pretrained(str(exported[1]))
  text = '<|im_start|>user\nWhat is written?<|im_end|>'
  assert theirs(text)['input_ids'] == tokenizer_of('byte').encode(text)


def test_convert_reads_an_export_back_bit_for_bit(exported, tmp_path):
  params, folder = exported
  assert convert(folder, tmp_path / 'again') == CONFIG
  again = store.load_params(tmp_path / 'again', vlm.build(CONFIG).abstract)
  jax.tree.map(np.testing.assert_array_equal, again, params)


def test_a_damaged_folder_is_refused_whole(exported, tmp_path):
  """Missing and extra tensors are listed together; nothing is written."""
  _, folder = exported
  tensors = {name: np.array(value) for name, value in hf.TensorFolder(folder).items()}
  del tensors['vision_model.coord_embed.0.bias'], tensors['language_model.lm_head.bias']
  tensors['surprise'] = np.zeros(2, np.float32)
  settings = json.loads((folder / 'config.json').read_text())
  write_folder(tmp_path / 'damaged', tensors.items(), config=settings, extra_files={})
  with pytest.raises(UserError) as error:
    convert(tmp_path / 'damaged', tmp_path / 'out')
  for text in ('missing tensor vision_model.coord_embed.0.bias',
               'missing tensor language_model.lm_head.bias', 'unexpected tensor surprise'):
    assert text in str(error.value)
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('content, message', [
  (None, 'no config.json'), ('{', 'no valid JSON'),
  ('{"model_type": "bert"}', "model_type 'bert'")])
def test_unknown_layouts_are_refused(tmp_path, content, message):
  if content is not None:
    (tmp_path / 'config.json').write_text(content)
  with pytest.raises(UserError, match=message):
    convert(tmp_path, tmp_path / 'out')
