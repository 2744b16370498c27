"""Every key and file of a release is used, harmless for a reason, or refused by name."""

import json
import shutil

import numpy as np
import pytest
import torch

from hrvlm_jax.checkpoint import hf, store
from hrvlm_jax.checkpoint.settings import Reader
from hrvlm_jax.cli.main import main
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.interop.account import config_keys
from hrvlm_jax.interop.convert import Release, convert, recognise
from hrvlm_jax.language import config as language
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.baselines.layout import KEYS
from tests.interop.releases import KINDS, random_tensors, write_release

# LLaVA-1.5-7B's config.json as it is published.
LLAVA = {
  '_name_or_path': 'llava-v1.5-7b', 'architectures': ['LlavaLlamaForCausalLM'],
  'bos_token_id': 1, 'eos_token_id': 2, 'freeze_mm_mlp_adapter': False,
  'freeze_mm_vision_resampler': False, 'hidden_act': 'silu', 'hidden_size': 4096,
  'image_aspect_ratio': 'pad', 'initializer_range': 0.02, 'intermediate_size': 11008,
  'max_length': 4096, 'max_position_embeddings': 4096, 'mm_hidden_size': 1024,
  'mm_projector_type': 'mlp2x_gelu', 'mm_resampler_type': None, 'mm_use_im_patch_token': False,
  'mm_use_im_start_end': False, 'mm_vision_select_feature': 'patch',
  'mm_vision_select_layer': -2, 'mm_vision_tower': 'openai/clip-vit-large-patch14-336',
  'model_type': 'llava', 'num_attention_heads': 32, 'num_hidden_layers': 32,
  'num_key_value_heads': 32, 'pad_token_id': 0, 'pretraining_tp': 1, 'rms_norm_eps': 1e-05,
  'rope_scaling': None, 'tie_word_embeddings': False, 'torch_dtype': 'float16',
  'transformers_version': '4.31.0', 'tune_mm_mlp_adapter': False,
  'tune_mm_vision_resampler': False, 'unfreeze_mm_vision_tower': False, 'use_cache': True,
  'use_mm_proj': True, 'vocab_size': 32000}
ANYRES = LLAVA | {'image_aspect_ratio': 'anyres', 'mm_patch_merge_type': 'spatial_unpad',
                  'image_grid_pinpoints': [[336, 672], [672, 336]]}


def read(folder, values):
  (folder / 'config.json').write_text(json.dumps(values))
  return recognise(folder)


def without(values, *keys):
  return {key: value for key, value in values.items() if key not in keys}


def test_llava_as_published(tmp_path):
  assert read(tmp_path, LLAVA) == registry.get('single_view').released['llava_1_5_7b']
  assert read(tmp_path, ANYRES).encoder.merge == 'spatial_unpad'
  local = LLAVA | {'mm_vision_tower': './checkpoints/clip-vit-large-patch14-336'}
  assert read(tmp_path, local) == read(tmp_path, LLAVA)


@pytest.mark.parametrize('changes, found', [
  ({'image_aspect_ratio': 'square'}, ('encoder', 'fit', 'crop')),
  ({'image_aspect_ratio': None}, ('encoder', 'fit', 'crop')),
  ({'mm_vision_select_layer': -1}, ('encoder', 'layer', -1)),
  ({'mm_projector_type': 'linear'}, ('projector', 'kind', 'linear')),
  ({'mm_projector_type': 'mlp3x_gelu'}, ('projector', 'depth', 3)),
  ({'rope_parameters': {'rope_type': 'linear', 'factor': 4.0, 'rope_theta': 5e5}},
   ('text', 'rope_linear_factor', 4.0)),
  ({'rope_parameters': {'rope_type': 'default', 'rope_theta': 5e5}}, ('text', 'rope_theta', 5e5)),
  ({'rope_scaling': {'type': 'linear', 'factor': 2.0}}, ('text', 'rope_linear_factor', 2.0)),
  ({'rms_norm_eps': 1e-6}, ('text', 'norm_eps', 1e-6)),
  ({'num_key_value_heads': None}, ('text', 'kv_heads', 32)),
  ({'chat': 'plain'}, (None, 'chat', 'plain'))])
def test_settings_of_llava_that_are_taken(changes, found, tmp_path):
  config = read(tmp_path, LLAVA | changes)
  part, key, value = found
  assert getattr(config if part is None else getattr(config, part), key) == value
  assert config != read(tmp_path, LLAVA) or changes == {'num_key_value_heads': None}


def test_what_llava_leaves_out_is_what_its_classes_have(tmp_path):
  """image_aspect_ratio absent is the centre crop; sizes are those of LlamaConfig."""
  config = read(tmp_path, without(LLAVA, 'image_aspect_ratio', 'hidden_size', 'rms_norm_eps',
                                  'intermediate_size', 'num_hidden_layers', 'vocab_size'))
  assert config.encoder.fit == 'crop'
  assert (config.text.width, config.text.mlp_width, config.text.depth) == (4096, 11008, 32)
  assert config.text.norm_eps == 1e-6  # LlamaConfig's, not Vicuna's


@pytest.mark.parametrize('changes, key', [
  ({'mm_vision_select_feature': 'cls_patch'}, 'mm_vision_select_feature'),
  ({'mm_use_im_start_end': True}, 'mm_use_im_start_end'),
  ({'use_mm_proj': False}, 'use_mm_proj'),
  ({'mm_vision_tower': 'google/siglip-so400m-patch14-384'}, 'mm_vision_tower'),
  ({'mm_vision_tower': None}, 'mm_vision_tower'),
  ({'mm_projector_type': 'identity'}, 'mm_projector_type'),
  ({'mm_projector_type': 7}, 'mm_projector_type'),
  ({'mm_resampler_type': 'perceiver'}, 'mm_resampler_type'),
  ({'image_aspect_ratio': 'anyres_max_9'}, 'image_aspect_ratio'),
  ({'image_aspect_ratio': 'highres'}, 'image_aspect_ratio'),
  ({'eos_token_id': 128009, 'vocab_size': 128256}, 'vicuna_v1'),
  ({'vocab_size': 128256}, 'vocab_size'),
  ({'_name_or_path': 'liuhaotian/llava-llama-2-13b-chat'}, '_name_or_path'),
  ({'chat': 'llava_llama_3'}, 'chat'),
  ({'pretraining_tp': 2}, 'pretraining_tp'),
  ({'quantization_config': {'bits': 4}}, 'quantization_config'),
  ({'attention_bias': True}, 'attention_bias'),
  ({'rope_scaling': {'type': 'dynamic', 'factor': 2.0}}, "rope_scaling type 'dynamic'"),
  ({'rope_parameters': {'rope_type': 'llama3', 'factor': 8.0}}, "rope_parameters type 'llama3'"),
  ({'rope_scaling': {'factor': 2.0}}, 'rope_scaling.rope_type'),
  ({'rope_scaling': {'type': 'linear', 'factor': 'two'}}, 'rope_scaling.factor'),
  ({'rope_theta': 1e4, 'rope_parameters': {'rope_theta': 5e5}}, 'two places'),
  ({'rope_scaling': 'linear'}, 'rope_scaling'),
  ({'mm_vision_select_layer': 'last'}, 'mm_vision_select_layer'),
  ({'hidden_act': 'gelu_fast'}, 'hidden_act'), ({'hidden_size': None}, 'hidden_size'),
  ({'hidden_size': '4096'}, 'hidden_size'), ({'num_hidden_layers': -1}, 'num_hidden_layers'),
  ({'rms_norm_eps': float('nan')}, 'rms_norm_eps'), ({'num_attention_heads': 31}, 'hidden_size'),
  ({'num_key_value_heads': 5}, 'heads 32 is not a multiple'),
  ({'tie_word_embeddings': 'yes'}, 'tie_word_embeddings'),
  ({'repetition_penalty': 1.3}, 'repetition_penalty'),
  ({'something_new': 1}, 'something_new')])
def test_settings_of_llava_that_are_refused_by_name(changes, key, tmp_path):
  for values in (LLAVA, ANYRES):
    if 'image_aspect_ratio' in changes and values is ANYRES:
      continue
    with pytest.raises(UserError) as caught:
      read(tmp_path, values | changes)
    assert key in str(caught.value) and 'config.json' in str(caught.value), caught.value


def test_every_harmless_key_has_a_reason():
  for name in registry.names():
    for key, rule in registry.get(name).keys.items():
      assert len(getattr(rule, 'reason', 'used or refused')) > 9, (name, key)
  assert set(LLAVA) <= set(KEYS)


def test_left_out_sizes_are_those_of_transformers():
  """Beside the classes themselves, all three families and both towers."""
  import transformers

  from hrvlm_jax.vision import vit

  for kind, cls in (('phi', transformers.PhiConfig), ('llama', transformers.LlamaConfig),
                    ('qwen2', transformers.Qwen2Config)):
    ours, theirs = language.config_from_hf({'model_type': kind}), cls()
    found = (ours.vocab_size, ours.width, ours.depth, ours.heads, ours.kv_heads, ours.mlp_width,
             ours.max_positions, ours.tie_embeddings, ours.init_std)
    assert found == (
      theirs.vocab_size, theirs.hidden_size, theirs.num_hidden_layers, theirs.num_attention_heads,
      theirs.num_key_value_heads or theirs.num_attention_heads, theirs.intermediate_size,
      theirs.max_position_embeddings, theirs.tie_word_embeddings, theirs.initializer_range)
    rope = theirs.rope_parameters
    assert ours.rope_theta == rope['rope_theta'] and rope['rope_type'] == 'default'
    assert ours.rotary_dim == ours.head_dim * rope.get('partial_rotary_factor', 1.0)
    eps = theirs.layer_norm_eps if kind == 'phi' else theirs.rms_norm_eps
    assert ours.norm_eps == eps
  towers = {True: transformers.CLIPVisionConfig, False: transformers.SiglipVisionConfig}
  for clip, cls in towers.items():
    ours, theirs = vit.config_from_hf(Reader({}), clip=clip), cls()
    assert (ours.image_size, ours.patch_size, ours.width, ours.depth, ours.heads, ours.mlp_width,
            ours.norm_eps, ours.channels) == (
      theirs.image_size, theirs.patch_size, theirs.hidden_size, theirs.num_hidden_layers,
      theirs.num_attention_heads, theirs.intermediate_size, theirs.layer_norm_eps,
      theirs.num_channels)


@pytest.fixture(scope='module')
def release(tmp_path_factory):
  """A tiny MC-LLaVA release with its tokenizer."""
  folder = tmp_path_factory.mktemp('account') / 'release'
  return write_release(folder, registry.get('mc_llava').tiny(),
                       random_tensors('mc_llava', KINDS['float32']))


def changed(release, folder, name='config.json', **files):
  shutil.copytree(release, folder)
  path = folder / name
  values = json.loads(path.read_text()) if path.exists() else {}
  for key, value in files.items():
    place = values
    *parts, last = key.split('__')
    for part in parts:
      place = place[part]
    if value is ...:
      place.pop(last)
    else:
      place[last] = value
  path.write_text(json.dumps(values))
  return folder


def test_convert_says_what_it_did_and_keeps_the_ends_of_answers(release, tmp_path, capsys):
  folder = changed(release, tmp_path / 'a', 'generation_config.json', eos_token_id=[256, 260, 3],
                   repetition_penalty=1.25, no_repeat_ngram_size=4, temperature=0.7)
  (folder / 'README.md').write_text('# A model')
  (folder / 'training_args.bin').write_bytes(b'x')
  assert main(['convert', '--from', str(folder), '--to', str(tmp_path / 'to')]) == 0
  out = capsys.readouterr().out
  for line in ('config.json: used: architectures, model_type, vision_config.model_type',
               'config.json: changes nothing (only of the loss of the original): ignore_index',
               'generation_config.json: used: eos_token_id, repetition_penalty, no_repeat_ngram',
               'README.md: not used (for people)', 'training_args.bin: not used (of a training',
               'temperature'):
    assert line in out.replace('do_sample, ', ''), (line, out)
  facts = json.loads((tmp_path / 'to' / 'source.json').read_text())
  assert any('README.md' in line for line in facts['account'])
  from hrvlm_jax.vlm.answer import Answerer

  answerer = Answerer.load(tmp_path / 'to')
  sampling = answerer.sampling(max_new_tokens=3)
  assert sampling.stop_ids == (256, 260, 3)
  assert (sampling.repetition_penalty, sampling.no_repeat_ngram_size) == (1.25, 4)
  assert answerer.sampling(repetition_penalty=1.0).repetition_penalty == 1.0
  assert main(['export', '--checkpoint', str(tmp_path / 'to'), '--to', str(tmp_path / 'back')]) == 0
  again = json.loads((tmp_path / 'back' / 'generation_config.json').read_text())
  assert again['eos_token_id'] == [256, 260, 3] and again['repetition_penalty'] == 1.25


@pytest.mark.parametrize('name, changes, key', [
  ('config.json', {'vision_config': None}, 'vision_config'),
  ('config.json', {'text_config': ['x']}, 'text_config'),
  ('config.json', {'hrvlm__max_crops': 'many'}, 'hrvlm.max_crops'),
  ('config.json', {'hrvlm': 5}, 'hrvlm'),
  ('config.json', {'text_config__use_sliding_window': True}, 'use_sliding_window'),
  ('config.json', {'vision_config__vision_use_head': False}, 'vision_use_head'),
  ('config.json', {'text_config__surprise': 1}, 'text_config.surprise'),
  ('generation_config.json', {'eos_token_id': 'stop'}, 'eos_token_id'),
  ('generation_config.json', {'repetition_penalty': -1}, 'repetition_penalty'),
  ('generation_config.json', {'suppress_tokens': [1]}, 'suppress_tokens'),
  ('generation_config.json', {'stop_strings': ['x']}, 'stop_strings'),
  ('tokenizer_config.json', {'add_eos_token': True}, 'add_eos_token'),
  ('tokenizer_config.json', {'unheard_of': 1}, 'unheard_of'),
  ('preprocessor_config.json', {'image_mean': [0.48, 0.46, 0.41]}, 'image_mean'),
  ('preprocessor_config.json', {'std': [0.26, 0.26, 0.27]}, 'std: is'),
  ('preprocessor_config.json', {'resample': 2}, 'resample'),
  ('preprocessor_config.json', {'size': {'height': 7, 'width': 7}}, 'size'),
  ('preprocessor_config.json', {'do_normalize': False}, 'do_normalize'),
  ('weights.bin', {}, 'weights.bin'), ('notes.xyz', {}, 'notes.xyz')])
def test_files_that_say_otherwise_are_refused(release, name, changes, key, tmp_path):
  folder = changed(release, tmp_path / 'a', name, **changes)
  with pytest.raises(UserError) as caught:
    convert(folder, tmp_path / 'to')
  assert key in str(caught.value) and name in str(caught.value), caught.value
  assert not (tmp_path / 'to').exists()


def test_the_advice_about_an_unknown_key_works(release, tmp_path):
  folder = changed(release, tmp_path / 'a', surprise=1)
  with pytest.raises(UserError, match='take the key out of the file and convert again'):
    Release(folder)
  values = json.loads((folder / 'config.json').read_text())
  (folder / 'config.json').write_text(json.dumps(without(values, 'surprise')))
  Release(folder)
  (folder / 'mm_other.pt').write_bytes(b'x')
  with pytest.raises(UserError, match='move it out of the folder'):
    Release(folder)
  (folder / 'mm_other.pt').unlink()
  Release(folder)


def test_rotary_settings_of_transformers_5(release, tmp_path):
  """The checkpoint has what the file says, and transformers computes the same with it."""
  folder = changed(release, tmp_path / 'a', text_config__rope_theta=...,
                   text_config__rope_scaling=..., text_config__partial_rotary_factor=...,
                   text_config__rope_parameters={
                     'rope_type': 'linear', 'factor': 4.0, 'rope_theta': 5e4,
                     'partial_rotary_factor': 0.25})
  assert main(['convert', '--from', str(folder), '--to', str(tmp_path / 'to'), '--check']) == 0
  text = recognise(folder).text
  assert (text.rope_theta, text.rotary_dim, text.rope_linear_factor) == (5e4, 8, 4.0)
  assert store.load_config(tmp_path / 'to')['model']['text']['rope_theta'] == 5e4


def llava(folder):
  """A tiny LLaVA (single view)."""
  config = registry.get('single_view').tiny()
  return config, write_release(folder, config, random_tensors('single_view', KINDS['float32']))


def test_a_lora_folder_of_llava_keeps_its_projector(tmp_path):
  """adapter_model.safetensors with non_lora_trainables.bin beside it; halves are refused."""
  config, base = llava(tmp_path / 'base')
  tensors, rng, adapter = hf.TensorFolder(base), np.random.default_rng(0), {}
  for name in tensors:
    if name.startswith('model.layers.') and name.endswith('_proj.weight'):
      module = f'base_model.model.{name.removesuffix(".weight")}'
      out, width = tensors.shapes[name]
      adapter[f'{module}.lora_A.weight'] = rng.standard_normal((4, width)).astype(np.float32)
      adapter[f'{module}.lora_B.weight'] = rng.standard_normal((out, 4)).astype(np.float32)
  lora = tmp_path / 'lora'
  lora.mkdir()
  settings = {'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'r': 4, 'lora_alpha': 8,
              'bias': 'none', 'target_modules': ['q_proj', 'k_proj', 'v_proj'],
              'option_of_a_later_peft': None}
  (lora / 'adapter_config.json').write_text(json.dumps(settings))
  beside = {f'base_model.model.{n}': torch.full(tensors.shapes[n], 7.0)
            for n in tensors if 'mm_projector' in n}
  write = lambda found: hf.write_weights(lora, found.items(), stem='adapter_model')
  write(adapter)
  torch.save(beside, lora / 'non_lora_trainables.bin')
  said = []
  convert(base, tmp_path / 'to', adapter=lora, say=said.append)
  assert any('non_lora_trainables.bin: takes the place of' in line for line in said)
  assert any('an option that is off): option_of_a_later_peft' in line for line in said)
  kernel = store.load_leaf(tmp_path / 'to', 'projector/fc1/kernel')
  assert (kernel == 7.0).all()
  files = json.loads((tmp_path / 'to' / 'source.json').read_text())['files']
  assert 'lora/non_lora_trainables.bin' in files
  # A tensor that the base does not have, one alone of two, a layer less, other settings.
  torch.save(beside | {'base_model.model.model.mm_other.weight': torch.ones(2)},
             lora / 'non_lora_trainables.bin')
  with pytest.raises(UserError, match='mm_other.weight: the base has no tensor of this name'):
    convert(base, tmp_path / 'x', adapter=lora)
  torch.save(beside, lora / 'non_lora_trainables.bin')
  first = next(n for n in adapter if n.endswith('lora_B.weight'))
  write(without(adapter, first))
  with pytest.raises(UserError, match='has lora_A alone, expected lora_A and lora_B'):
    convert(base, tmp_path / 'x', adapter=lora)
  write({n: x for n, x in adapter.items() if '.layers.0.' in n})
  with pytest.raises(UserError, match=r'has no tensors of model.layers.1.self_attn.q_proj'):
    convert(base, tmp_path / 'x', adapter=lora)
  write(adapter)
  for value in (True, {}, False):
    (lora / 'adapter_config.json').write_text(json.dumps(settings | {'use_something': value}))
    with pytest.raises(UserError, match='use_something'):
      convert(base, tmp_path / 'x', adapter=lora)
  (lora / 'adapter_config.json').write_text(json.dumps(settings))
  values = json.loads((base / 'config.json').read_text())
  values['rope_theta'] = 5e5
  (lora / 'config.json').write_text(json.dumps(values))
  with pytest.raises(UserError, match='text/rope_theta is 500000.0, the base has 10000.0'):
    convert(base, tmp_path / 'x', adapter=lora)
  assert not (tmp_path / 'x').exists()


def test_what_a_file_of_ours_says_twice_has_to_agree(tmp_path):
  _, base = llava(tmp_path / 'base')
  values = json.loads((base / 'config.json').read_text())
  (base / 'config.json').write_text(json.dumps(values | {'image_aspect_ratio': 'pad'}))
  with pytest.raises(UserError, match='image_aspect_ratio: is "pad", but the settings under'):
    recognise(base)


def test_a_tokenizer_without_the_template_s_tokens_is_refused_at_once(release, tmp_path):
  folder = changed(release, tmp_path / 'a')
  name = folder / 'tokenizer.json'
  name.write_text(name.read_text().replace('<|im_end|>', '<|other|>'))
  (folder / 'tokenizer_config.json').write_text('{}')
  with pytest.raises(UserError, match="has no token '<.im_end.>'"):
    convert(folder, tmp_path / 'to')


@pytest.mark.parametrize('name', ['mc_llava', 'pheye', 'llava_hr', 'single_view', 'ps3'])
def test_config_json_as_transformers_5_writes_it(name):
  """Opened and saved there, a file has keys of the library's own; each has its account."""
  import transformers

  system = registry.get(name)
  before = json.loads(json.dumps(system.to_release(system.tiny())['config.json']))
  known = {'phi', 'llama', 'qwen2', 'siglip_vision_model', 'clip_vision_model'}
  inner = {key: transformers.AutoConfig.for_model(**value).to_dict()
           for key, value in before.items()
           if isinstance(value, dict) and value.get('model_type') in known}
  text = {} if 'text_type' not in before else transformers.AutoConfig.for_model(
    before['text_type'], **{key: value for key, value in before.items()
                            if key not in ('model_type', 'hrvlm', 'mm_hidden_size')}).to_dict()
  whole = transformers.PretrainedConfig(**{
    key: value for key, value in before.items() if key != 'model_type'}).to_dict()
  after = json.loads(json.dumps(text | whole | before | inner, default=str))
  new = {'transformers_version', 'dtype', 'chunk_size_feed_forward', 'id2label'}
  assert new <= after.keys() - before.keys()
  config = system.from_release(after)
  assert config == system.from_release(before)
  found = config_keys(after, system, config)
  assert not found.problems
  told = {key.partition('.')[0] for key in (*found.used, *found.harmless)}
  assert told == after.keys()
