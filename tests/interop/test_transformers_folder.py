"""Folders for transformers: what is in them, released sizes, templates, tokenizers, refusals."""

import ast
import dataclasses
import json
import pathlib
import re

import numpy as np
import pytest
import torch
import transformers

from hrvlm_jax.checkpoint import hf, store
from hrvlm_jax.checkpoint.rows import entries
from hrvlm_jax.checkpoint.settings import account as settings_account
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.front import loading
from hrvlm_jax.interop import folder, native
from hrvlm_jax.interop.convert import convert
from hrvlm_jax.interop.export import export
from hrvlm_jax.interop.jinja import chat_template
from hrvlm_jax.interop.torch import (
  configuration_hrvlm,
  modeling_hrvlm,
  modeling_ps3,
  processing_hrvlm,
)
from hrvlm_jax.language.chat import TEMPLATES, Dialogue, Message, render, rendered_text
from hrvlm_jax.language.prompt import tokenizer_of
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.fusion import TwoPassFusion
from hrvlm_jax.vlm import model as vlm
from tests import levels
from tests.interop.pytorch import Pair, assert_same_views, picture
from tests.interop.tiny_models import MODELS


@pytest.mark.parametrize('name', TEMPLATES)
def test_chat_templates_render_what_ours_do(name):
  """Several turns, pictures in later ones, a system text, placeholders in what people write."""
  import jinja2

  def refuse(message):
    raise jinja2.TemplateError(message)

  environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
  environment.globals['raise_exception'] = refuse
  template, own = environment.from_string(chat_template(TEMPLATES[name])), TEMPLATES[name]
  turns = [('user', ' What <image> is\n"this"? ', 2), ('assistant', ' A c\u00e4t. <image>\n', 0),
           ('user', 'And {{ this }}?', 1)]
  for n in (1, 3):
    for system in (None, 'Be <brief>.\n'):
      asked = Dialogue(tuple(Message(role, text) for role, text, _ in turns[:n]),
                       tuple(count for *_, count in turns[:n]), system)
      messages = [] if system is None else [{'role': 'system', 'content': system}]
      for role, text, count in turns[:n]:
        parts = [{'type': 'image'}] * count + [{'type': 'text', 'text': text}]
        messages.append({'role': role, 'content': parts if role == 'user' else text})
      make = lambda: template.render(messages=messages, add_generation_prompt=True)  # noqa: B023
      try:
        expected = rendered_text(render(own, asked.written(own), system=system, generation=True))
      except UserError:
        with pytest.raises(jinja2.TemplateError):
          make()
      else:
        assert make() == expected


RELEASED = [(system, release) for system in folder.CLASSES
            for release in registry.get(system).released]


@pytest.mark.parametrize('system, release', levels.rows(
  'interop', RELEASED, first=[('mc_llava', 'mc_llava_3b')]))
def test_released_sizes_have_the_same_tensors(system, release):
  """Names and shapes, on the meta device; a tied output layer is no tensor of its own."""
  config = registry.get(system).released[release]
  if system == 'vila_hd':
    config = dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, looks=1))
  files = folder.files(config, tokenizer_of('byte'))
  said, name = files['config.json'], folder.CLASSES[system]
  values = {k: v for k, v in said.items() if k not in ('architectures', 'auto_map', 'model_type')}
  kind, = said['architectures']
  whole = native.is_native(said)
  assert whole == (system in ('single_view', 'anyres'))
  if whole:
    make, settings = getattr(transformers, kind), getattr(transformers, kind).config_class
    table, named = native.table(config), native.canonical
  else:
    make = getattr(modeling_hrvlm if config.text else modeling_ps3, kind)
    settings = getattr(configuration_hrvlm, f'{name}Config')
    table, named = folder.table(config), str
  with torch.device('meta'):
    model = make(settings(**values))
  ours = {entry.names[0]: entry.shape for entry in entries(table, vlm.build(config).abstract)}
  theirs = {named(key): tuple(x.shape) for key, x in model.state_dict().items()}
  assert ours == {key: shape for key, shape in theirs.items() if key not in table.tied}
  if whole:  # what transformers writes of it comes back
    written = json.loads(model.config.to_json_string())
    assert folder.recognise(written) == config
    assert not folder.contradictions(written, config)
    assert not settings_account(written, folder.KEYS).problems


@pytest.mark.parametrize('system, release', levels.rows(
  'interop', RELEASED, first=[('mc_llava', 'mc_llava_3b'), ('vila_hd', 'vila_hd_8b_1_5k_siglip')]))
def test_released_sizes_see_the_same_pixels(system, release):
  config = registry.get(system).released[release]
  tokenizer = None if config.text is None else tokenizer_of('byte')
  values = folder.files(config, tokenizer)['preprocessor_config.json']
  theirs = processing_hrvlm.HrvlmImageProcessor(
    values['system'], values['encoder'], values.get('token_maps'))
  assert_same_views(config, theirs, picture((1600, 1100)))


def test_the_code_stands_alone():
  """No file imports JAX or the package; every system that the exporter knows has its classes."""
  for path in folder.CODE.glob('*.py'):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
      names = [a.name for a in node.names] if isinstance(node, ast.Import) else (
        [node.module] if isinstance(node, ast.ImportFrom) and not node.level else [])
      assert not [n for n in names if n.split('.')[0] in ('jax', 'flax', 'hrvlm_jax')], path
      if isinstance(node, ast.ImportFrom) and node.level:  # what transformers copies with a file
        assert node.level == 1 and (folder.CODE / f'{node.module}.py').exists(), path
  named = {path.stem: set(re.findall(r'^ *from \.(\w+) import', path.read_text(), re.M))
           for path in folder.CODE.glob('*.py')}
  for entry in ('configuration_hrvlm', 'modeling_hrvlm', 'modeling_ps3', 'processing_hrvlm'):
    for other in named[entry]:  # transformers 5.0 copies what the entry itself names
      assert named[other] <= named[entry] | {entry}, (entry, other)
  known = set(folder.CLASSES) - {'reduced'}
  assert known == set(modeling_hrvlm.VISION) == set(processing_hrvlm.VIEWS)


def test_the_folder_names_and_hashes_its_code(tmp_path):
  pair = Pair.make(MODELS['single_view/squash'], tmp_path)
  names = {path.name for path in folder.CODE.glob('*.py')} - {'__init__.py'}
  facts = hf.read_json(pair.folder / 'manifest.json')
  assert names <= facts['files'].keys()
  hf.check_manifest(pair.folder)
  (pair.folder / 'pixels.py').write_text('import os')
  with pytest.raises(UserError, match='pixels.py'):
    hf.check_manifest(pair.folder)
  card = (pair.folder / 'README.md').read_text()
  assert 'trust_remote_code' in card and 'library_name: transformers' in card
  marker = tmp_path / 'marker'
  for path in pathlib.Path(pair.folder).glob('*.py'):
    path.write_text(f'open({str(marker)!r}, "w")')
  assert loading.load(pair.folder).config == pair.config
  convert(pair.folder, tmp_path / 'back')
  assert not marker.exists()
  before, after = (store.load_params(place, vlm.build(pair.config).abstract)
                   for place in (pair.checkpoint, tmp_path / 'back'))
  from hrvlm_jax.core import paths
  again = paths.flatten(after)
  for key, value in paths.flatten(before).items():
    np.testing.assert_array_equal(value, again[key], err_msg=key)


@pytest.mark.parametrize('place', ['llava_hr/data', 'llava_hr/full'])
def test_a_sentencepiece_model_has_the_same_ids(place, tmp_path):
  """The released LLaMA tokenizers are such; the golden cases hold tiny ones."""
  from transformers import AutoTokenizer

  from hrvlm_jax.language.tokenizer import tokenizer_from_files

  path = pathlib.Path(__file__).parents[1] / 'goldens' / place / 'tokenizer.model'
  ours = tokenizer_from_files({'tokenizer.model': path.read_bytes()})
  hf.write_extra(tmp_path, folder._tokenizer_files(ours))
  theirs = AutoTokenizer.from_pretrained(tmp_path)
  rng = np.random.default_rng(0)
  letters = list('abcdeing THEROS\n\t  .,:12é\u4f60\U0001f600<>/') + [
    '</s>', '<s>', '<unk>', ' USER:']
  for length in [0, 1, 2, 3, *rng.integers(4, 60, 60)]:
    text = ''.join(rng.choice(letters, length))
    ids = ours.encode(text)
    assert theirs(text)['input_ids'] == ids, repr(text)
    assert theirs(text, add_special_tokens=False)['input_ids'] == ours.encode(text, bos=False)
  assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)


@pytest.mark.parametrize('change, message', [
  (lambda c: dataclasses.replace(c, text=dataclasses.replace(c.text, rope_linear_factor=1.0,
                                                             norm='layernorm')), 'model.text.norm'),
  (lambda c: dataclasses.replace(c, system='toy'), 'system toy'),
  (lambda c: dataclasses.replace(MODELS['vila_hd'], fusion=TwoPassFusion(selection_weight=1.0)),
   'selection_weight'),
  (lambda c: dataclasses.replace(c, text=None, projector=None), 'without a language model'),
])
def test_what_has_no_code_is_refused_by_name(change, message):
  with pytest.raises(UserError, match=message) as error:
    folder.check(change(MODELS['single_view']), what='c')
  assert '--for original' in str(error.value)


def test_an_unknown_layout_is_refused():
  with pytest.raises(UserError, match="layout: found 'onnx', expected one of original, transf"):
    export('/no/such', '/no/such/either', layout='onnx')
