"""Parts of a model from releases of their own, as transformers, timm and trainers write them."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from hrvlm_jax.checkpoint import hf, store
from hrvlm_jax.checkpoint.rows import entries
from hrvlm_jax.cli.main import main
from hrvlm_jax.core import paths
from hrvlm_jax.core.config import to_dict
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.layers import LoRA
from hrvlm_jax.core.module import Functional
from hrvlm_jax.interop.starts import assemble
from hrvlm_jax.language import config as language
from hrvlm_jax.language.decoder import Decoder
from hrvlm_jax.systems import registry
from hrvlm_jax.vision import convnext
from hrvlm_jax.vision.vit import ViT
from hrvlm_jax.vlm import model as vlm
from tests.interop.releases import KINDS, layout, random_tensors, write_release

TEXTS = {
  'phi': language.phi(vocab_size=96, width=32, depth=2, heads=2, mlp_width=64),
  'llama': language.llama(vocab_size=96, width=32, depth=2, heads=2, mlp_width=64),
  'qwen2': language.qwen2(vocab_size=96, width=32, depth=2, heads=4, kv_heads=2, mlp_width=64),
  'gpt2': language.gpt2(vocab_size=96, width=32, depth=2, heads=2, max_positions=16),
}


def with_text(name, text):
  config = registry.get(name).tiny()
  projector = config.projector and dataclasses.replace(config.projector, n_out=text.width)
  return dataclasses.replace(config, text=text, projector=projector)


def of_transformers(kind, values, folder, **changes):
  """A randomly drawn model of transformers, saved to a folder."""
  torch.manual_seed(0)
  model = kind(kind.config_class(**values)).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.05 * torch.randn_like(parameter))
  model.to(torch.float32).save_pretrained(folder, **changes)
  return model


def bound(fn, folder, prefix):
  flat = {path.removeprefix(prefix): x for path, x in store.flatten(
    store.load_params(folder)).items() if path.startswith(prefix)}
  return fn.bind(paths.unflatten(flat))


@pytest.mark.parametrize('family', TEXTS)
def test_language_models_from_their_own_releases(family, tmp_path):
  text = TEXTS[family]
  values = language.config_to_hf(text)
  kind = getattr(transformers, values['architectures'][0])
  reference = of_transformers(kind, values, tmp_path / 'release')
  config = with_text('single_view', text)
  said = []
  fresh = assemble(config, [f'language={tmp_path / "release"}'], tmp_path / 'start',
                   say=said.append)
  assert fresh and not any(path.startswith('language/') for path in fresh)
  assert f'language: {len(store.describe(tmp_path / "start"))} parameters from' in said[-1]
  module = bound(Functional(lambda rngs: Decoder(text, rngs=rngs)), tmp_path / 'start', 'language/')
  ids = np.random.default_rng(0).integers(0, 96, (2, 7))
  expected = reference(torch.tensor(ids)).logits.detach().numpy()
  found = module.logits(module(module.embed(jnp.asarray(ids)), jnp.ones(ids.shape, bool)))
  np.testing.assert_allclose(found, expected, atol=1e-4 * max(1, np.abs(expected).max()))
  if family == 'gpt2':  # OpenAI's own release: the model without its head
    reference.transformer.save_pretrained(tmp_path / 'bare')
    assemble(config, [f'language={tmp_path / "bare"}'], tmp_path / 'again')
    assert all(np.array_equal(leaf, store.load_leaf(tmp_path / 'again', path)) for path, leaf in
               store.flatten(store.load_params(tmp_path / 'start')).items())
  with pytest.raises(UserError, match=f"of the family 'phi', the source has model_type '{family}'"
                     if family != 'phi' else 'nothing'):
    assemble(with_text('single_view', TEXTS['phi']), [f'language={tmp_path / "release"}'],
             tmp_path / 'other')
    raise UserError('nothing')


def test_a_backbone_of_other_settings_is_no_part(tmp_path):
  """All that no tensor shows, in one message; with the source's own settings it is one."""
  text = TEXTS['phi']
  values = language.config_to_hf(text)
  of_transformers(transformers.PhiForCausalLM, values, tmp_path / 'release')
  path = tmp_path / 'release' / 'config.json'
  given = json.loads(path.read_text()) | {
    'rope_parameters': {'rope_type': 'linear', 'factor': 4.0, 'rope_theta': 5e5,
                        'partial_rotary_factor': 0.25}, 'layer_norm_eps': 1e-3,
    'hidden_act': 'relu', 'num_attention_heads': 4, 'num_key_value_heads': 4}
  given = {k: v for k, v in given.items() if k not in ('rope_theta', 'rope_scaling',
                                                       'partial_rotary_factor')}
  path.write_text(json.dumps(given))
  with pytest.raises(UserError) as caught:
    assemble(with_text('single_view', text), [f'language={tmp_path / "release"}'], tmp_path / 'x')
  for setting in ('heads', 'head_dim', 'activation', 'norm_eps', 'rotary_dim', 'rope_theta',
                  'rope_linear_factor'):
    assert f'{setting} of the source is' in str(caught.value), setting
  taken = with_text('single_view', language.config_from_hf(given))
  assemble(taken, [f'language={tmp_path / "release"}'], tmp_path / 'start')
  given['rope_parameters'] = {'rope_type': 'yarn', 'factor': 4.0}
  path.write_text(json.dumps(given))
  with pytest.raises(UserError, match="rope_parameters type 'yarn'"):
    assemble(taken, [f'language={tmp_path / "release"}'], tmp_path / 'x')
  assert not (tmp_path / 'x').exists()


def test_a_tower_of_other_settings_or_colours_is_no_part(tmp_path):
  config = registry.get('mc_llava').tiny()
  tower = config.encoder.vision
  sizes = dict(image_size=tower.image_size, patch_size=tower.patch_size, hidden_size=tower.width,
               num_hidden_layers=tower.depth, num_attention_heads=tower.heads,
               intermediate_size=tower.mlp_width, layer_norm_eps=tower.norm_eps)
  of_transformers(transformers.SiglipVisionModel, sizes, tmp_path / 'release')
  part = [f'vision/tower={tmp_path / "release"}']
  assemble(config, part, tmp_path / 'start')
  path = tmp_path / 'release' / 'config.json'
  values = json.loads(path.read_text())
  path.write_text(json.dumps(values | {'num_attention_heads': 2, 'layer_norm_eps': 1e-3,
                                       'hidden_act': 'relu'}))
  (tmp_path / 'release' / 'preprocessor_config.json').write_text(json.dumps(
    {'image_mean': [0.48, 0.46, 0.41], 'image_std': [0.5, 0.5, 0.5]}))
  with pytest.raises(UserError) as caught:
    assemble(config, part, tmp_path / 'x')
  for text in ('heads of the source is 2', 'norm_eps of the source', 'activation of the source',
               'image_mean: is [0.48, 0.46, 0.41]'):
    assert text in str(caught.value), text
  assert not (tmp_path / 'x').exists()


def test_added_vocabulary_rows_are_the_mean(tmp_path):
  text = TEXTS['llama']
  of_transformers(transformers.LlamaForCausalLM, language.config_to_hf(text), tmp_path / 'release')
  said = []
  config = with_text('single_view', dataclasses.replace(text, vocab_size=99))
  assemble(config, [f'language={tmp_path / "release"}'], tmp_path / 'start', say=said.append)
  assert 'language/embed/embedding: rows 96 to 98 are the mean' in said[0]
  rows = store.load_leaf(tmp_path / 'start', 'language/embed/embedding')
  np.testing.assert_allclose(rows[96:], np.tile(rows[:96].mean(0), (3, 1)), rtol=1e-5, atol=1e-6)
  assert store.load_leaf(tmp_path / 'start', 'language/head/kernel').shape == (32, 99)
  fewer = with_text('single_view', dataclasses.replace(text, vocab_size=90))
  with pytest.raises(UserError, match=r'embed_tokens.weight: shape \(96, 32\)'):
    assemble(fewer, [f'language={tmp_path / "release"}'], tmp_path / 'other')


@pytest.mark.parametrize('name, path, kind', [
  ('llava_hr', 'vision/fast', 'CLIP'), ('pheye', 'vision/tower', 'CLIPVision'),
  ('mc_llava', 'vision/tower', 'Siglip')])
def test_towers_from_their_own_releases(name, path, kind, tmp_path):
  """Also the whole image-text release: its text tower is left out."""
  config = registry.get(name).tiny()
  tower = registry.get(name).backbones(config.encoder)[path]
  sizes = dict(image_size=tower.image_size, patch_size=tower.patch_size, hidden_size=tower.width,
               num_hidden_layers=tower.depth, num_attention_heads=tower.heads,
               intermediate_size=tower.mlp_width, layer_norm_eps=tower.norm_eps,
               hidden_act=tower.activation.replace('gelu_tanh', 'gelu_pytorch_tanh'))
  text = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
              vocab_size=50)
  values = sizes if kind == 'CLIPVision' else {'vision_config': sizes, 'text_config': text}
  reference = of_transformers(getattr(transformers, f'{kind}Model'), values, tmp_path / 'release')
  assemble(config, [f'{path}={tmp_path / "release"}'], tmp_path / 'start')
  assert all(p.startswith(f'{path}/') for p in store.describe(tmp_path / 'start'))
  module = bound(Functional(lambda rngs: ViT(tower, rngs=rngs)), tmp_path / 'start', f'{path}/')
  pixels = np.random.default_rng(0).standard_normal(
    (1, tower.image_size, tower.image_size, 3), np.float32)
  reference = getattr(reference, 'vision_model', reference)
  expected = reference(torch.tensor(pixels.transpose(0, 3, 1, 2))).last_hidden_state
  found = module(jnp.asarray(pixels))
  found = found if tower.class_token else module.post_norm(found)
  expected = expected.detach().numpy()
  np.testing.assert_allclose(found, expected, atol=1e-4 * max(1, np.abs(expected).max()))
  other = 'mc_llava' if tower.class_token else 'pheye'
  with pytest.raises(UserError, match='expected a release of model_type'):
    assemble(registry.get(other).tiny(), [f'vision/tower={tmp_path / "release"}'],
             tmp_path / 'other')


@pytest.mark.parametrize('source', ['timm', 'open_clip'])
def test_convnext_as_timm_and_open_clip_write_it(source, tmp_path):
  config = registry.get('llava_hr').tiny()
  tower = config.encoder.slow
  table = convnext.table(tower, layout=source)
  part = vlm.build(config).abstract['vision']['slow']
  rng = np.random.default_rng(0)
  tensors = {entry.names[0]: rng.normal(size=entry.shape).astype(np.float32)
             for entry in entries(table, part)}
  assert any(name.endswith('.gamma') for name in tensors)
  if source == 'open_clip':  # no classifier there; a text tower and a projection instead
    tensors = {n: x for n, x in tensors.items() if '.head.' not in n}
    tensors |= {'visual.head.proj.weight': np.ones((4, 4)), 'logit_scale': np.ones(())}
  else:
    tensors['head.fc.weight'] = np.ones((7, 3), np.float32)  # another number of classes
  hf.write_weights(tmp_path, tensors.items())
  settings = ({'architecture': 'convnext_large_mlp'} if source == 'timm' else
              {'model_cfg': {'vision_cfg': {'timm_model_name': 'convnext_large'}}})
  name = 'config.json' if source == 'timm' else 'open_clip_config.json'
  (tmp_path / name).write_text(json.dumps(settings))
  fresh = assemble(config, [f'vision/slow={tmp_path}'], tmp_path / 'start')
  assert {p for p in fresh if p.startswith('vision/slow/')} == {
    f'vision/slow/{p}' for p in paths.flatten(part) if p.startswith('head/')}
  prefix = 'visual.trunk.' if source == 'open_clip' else ''
  np.testing.assert_array_equal(
    store.load_leaf(tmp_path / 'start', 'vision/slow/stages/0/blocks/layer_scale')[0],
    tensors[f'{prefix}stages.0.blocks.0.gamma'])
  (tmp_path / name).unlink()
  with pytest.raises(UserError, match="expected a ConvNeXt of timm .*found 'neither'"):
    assemble(config, [f'vision/slow={tmp_path}'], tmp_path / 'other')


def test_ps3_vision_only_and_the_parts_of_vila(tmp_path):
  """A PS3 release (with its text tower) and a projector folder of their own, into VILA-HD."""
  config = registry.get('vila_hd').tiny()
  whole = random_tensors('vila_hd', KINDS['float32'])
  inside = {n.partition('/')[2]: x for n, x in whole.items() if n.startswith('vision_tower/')}
  extra = {'text_model.ln_final.weight': np.ones(4), 'logit_scale': np.ones(())}
  for folder, tensors, kind in (
      ('ps3', inside | extra, 'ps3'),
      ('projector', {n.partition('/')[2]: x for n, x in whole.items()
                     if n.startswith('mm_projector/')}, 'v2l_projector')):
    (tmp_path / folder).mkdir()
    hf.write_weights(tmp_path / folder, tensors.items())
    (tmp_path / folder / 'config.json').write_text(json.dumps({'model_type': kind}))
  flat = paths.flatten(vlm.build(config).abstract)
  others = sorted({p.split('/')[1] for p in flat if p.startswith('vision/')} - {'ps3'})
  parts = [f'vision/ps3={tmp_path / "ps3"}',
           f'{"+".join(f"vision/{name}" for name in others)}={tmp_path / "projector"}']
  fresh = assemble(config, parts, tmp_path / 'start')
  assert fresh == [p for p in flat if p.startswith('language/')]
  np.testing.assert_array_equal(
    store.load_leaf(tmp_path / 'start', 'vision/ps3/selection/prior_prompt'),
    inside['vision_model.prior_prompt'])


def test_ps3_trunk_and_text_tower_from_siglip(tmp_path):
  """Trunk, pool and text tower of Hugging Face's SigLIP; what PS3 adds starts fresh."""
  config = registry.get('ps3').tiny()
  v, t = config.encoder.vision, config.encoder.text
  side = v.table_grid * v.patch_size
  vision = dict(image_size=side, patch_size=v.patch_size, hidden_size=v.width,
                num_hidden_layers=v.depth, num_attention_heads=v.heads,
                intermediate_size=v.mlp_width)
  text = dict(hidden_size=t.width, num_hidden_layers=t.depth, num_attention_heads=t.heads,
              intermediate_size=t.mlp_width, vocab_size=t.vocab_size, projection_size=t.out,
              max_position_embeddings=t.context)
  of_transformers(transformers.SiglipModel, {'vision_config': vision, 'text_config': text},
                  tmp_path / 'release')
  fresh = assemble(config, [f'vision/tower={tmp_path / "release"}', f'text={tmp_path / "release"}'],
                   tmp_path / 'start')
  assert {'/'.join(path.split('/')[:2]) for path in fresh} == {
    'vision/residual', 'vision/selection', 'text/prompt_head'}
  scale = store.load_leaf(tmp_path / 'start', 'logit_scale')
  assert scale.shape == () and scale == hf.TensorFolder(tmp_path / 'release')['logit_scale'][0]
  tensors = hf.TensorFolder(tmp_path / 'release')
  name = next(n for n in tensors if n.endswith('head.attention.in_proj_weight'))
  found = [store.load_leaf(tmp_path / 'start', f'vision/pool_head/attn/{n}/kernel').T
           for n in 'qkv']
  np.testing.assert_array_equal(np.concatenate(found), tensors[name])


@pytest.mark.parametrize('wrapper', ['', 'base_model.model.'])
def test_stage_1_of_llava_hr_is_its_projector_file(wrapper, tmp_path):
  """`mm_projector.bin` of the trainer, wrapped or not; adapters and backbones start fresh."""
  config = registry.get('llava_hr').tiny()
  tensors = {wrapper + n: torch.tensor(x) for n, x in random_tensors(
    'llava_hr', KINDS['float32']).items() if 'mm_projector' in n or 'align_stages.' in n}
  torch.save(tensors, tmp_path / 'mm_projector.bin')
  source = tmp_path / 'mm_projector.bin'
  fresh = assemble(config, [f'projector+vision/align={source}'], tmp_path / 'start')
  assert 'vision/adapters/0/gate/fc1/kernel' in fresh
  np.testing.assert_array_equal(
    store.load_leaf(tmp_path / 'start', 'projector/fc1/kernel'),
    tensors[f'{wrapper}model.mm_projector.0.weight'].numpy().T)
  said = []
  assemble(config, [f'projector={source}'], tmp_path / 'half', say=said.append)
  assert '4 tensors of' in said[0] and 'belong to other parts and are not used' in said[0]
  del tensors[f'{wrapper}model.mm_projector.2.bias']
  torch.save(tensors, source)
  with pytest.raises(UserError, match='missing tensor model.mm_projector.2.bias'):
    assemble(config, [f'projector={source}'], tmp_path / 'other')


def test_lora_only(tmp_path):
  spec = LoRA(rank=2, alpha=4.0)
  config = with_text('single_view', dataclasses.replace(TEXTS['llama'], lora=(spec,)))
  names = [f'base_model.model.model.layers.{i}.self_attn.{m}_proj.lora_{x}.weight'
           for i in range(2) for m in 'qv' for x in 'AB']
  hf.write_weights(tmp_path, [(n, np.ones((2, 32) if 'lora_A' in n else (32, 2), np.float32))
                              for n in names], stem='adapter_model')
  settings = {'peft_type': 'LORA', 'r': 2, 'lora_alpha': 4}
  (tmp_path / 'adapter_config.json').write_text(json.dumps(settings))
  assemble(config, [f'lora={tmp_path}'], tmp_path / 'start')
  assert sorted(store.describe(tmp_path / 'start')) == [
    f'language/blocks/attn/{m}/lora_{x}' for m in 'qv' for x in 'ab']
  (tmp_path / 'adapter_config.json').write_text(json.dumps(settings | {'r': 4}))
  with pytest.raises(UserError, match='rank 4, alpha 4; the model has rank 2, alpha 4'):
    assemble(config, [f'lora={tmp_path}'], tmp_path / 'other')


def test_all_problems_of_all_parts_in_one_message(tmp_path):
  config = registry.get('llava_hr').tiny()
  tensors = random_tensors('llava_hr', KINDS['float32'])
  write_release(tmp_path / 'release', config, {n: x for n, x in tensors.items()
                                               if n != 'model.mm_projector.0.bias'})
  with pytest.raises(UserError) as caught:
    assemble(config, ['language', 'visoin=x', f'projektor={tmp_path / "release"}',
                      f'language={tmp_path / "none"}', f'projector={tmp_path / "release"}',
                      f'projector/fc1={tmp_path / "release"}'], tmp_path / 'start')
  text = str(caught.value)
  for sentence in ("part 'language': expected PATH=SOURCE", 'visoin=x: unknown part visoin',
                   'nearest known: projector', 'no such folder',
                   'missing tensor model.mm_projector.0.bias',
                   'given by projector and projector/fc1'):
    assert sentence in text, (sentence, text)
  assert not (tmp_path / 'start').exists()


def test_training_starts_from_the_parts(tmp_path, capsys):
  """The verb, then `training.init_from`: what no part gives is fresh, said and allowed by name."""
  config = registry.get('mc_llava').tiny()
  names = [names[0] for names, _ in layout('mc_llava')]
  tensors = random_tensors('mc_llava', KINDS['bfloat16'])
  write_release(tmp_path / 'release', config, {n: tensors[n] for n in names})
  (tmp_path / 'run.py').write_text(f"""
import ml_collections
def get_config():
  config = ml_collections.ConfigDict()
  config.model = {to_dict(config)!r}
  config.data = dict(train='none.json', lengths=(96,))
  config.training = dict(steps=1, batch_size=2, optimizer=dict(learning_rate=1e-3))
  return config
""")
  argv = ['convert', '--config', str(tmp_path / 'run.py'), '--to', str(tmp_path / 'start')]
  assert main([*argv, '--part', f'vision/tower={tmp_path / "release"}']) == 0
  out = capsys.readouterr().out
  assert 'start fresh' in out and 'training.init_from=' in out
  stored = store.describe(tmp_path / 'start')
  assert all(p.startswith('vision/tower/') for p in stored)
  assert {str(leaf.dtype) for leaf in stored.values()} == {'bfloat16'}
  assert main(argv) == 2
  assert 'give either --from FOLDER, or --config RUN.py with --part' in capsys.readouterr().err
