"""Folders whose model is transformers' own class: which models, the placeholder, sizes that
LlavaNext is told, and what is refused on the way back. What all folders do is in
`test_transformers`."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
import torch
import transformers

from hrvlm_jax.checkpoint import hf
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.front import loading
from hrvlm_jax.interop import folder, native
from hrvlm_jax.interop.convert import convert, recognise
from hrvlm_jax.interop.torch import processing_hrvlm, sizes_llava_next
from hrvlm_jax.language.prompt import BYTE_SPECIALS, tokenizer_of
from hrvlm_jax.language.tokenizer import ByteTokenizer, tokenizer_from_files
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.baselines import anyres
from hrvlm_jax.systems.contract import ProjectorConfig
from hrvlm_jax.systems.fusion import CrossAttentionFusion
from hrvlm_jax.vlm.answer import text_of
from tests import levels
from tests.interop.pytorch import LIMIT, Pair, near, picture
from tests.interop.tiny_models import CLIP, MODELS, NATIVE, PHI, SIGLIP

SENTENCEPIECE = pathlib.Path(__file__).parents[1] / 'goldens/llava_hr/data/tokenizer.model'
SINGLE, ANYRES = MODELS['single_view'], MODELS['anyres']


def encoder(config, **changes):
  """The model with other settings of its encoder."""
  return dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, **changes))


def vision(config, **changes):
  """The model with other settings of its tower."""
  return encoder(config, vision=dataclasses.replace(config.encoder.vision, **changes))


def test_which_models_have_a_class():
  """All tiny ones as listed, all released ones; not those with a setting that the class lacks."""
  for name, config in MODELS.items():
    kind = native.model_type(config)
    assert native.CLASSES.get(kind) == NATIVE.get(name), name
  for system in ('single_view', 'anyres'):
    for config in registry.get(system).released.values():
      assert native.model_type(config) is not None
  others = [
    dataclasses.replace(SINGLE, text=PHI, projector=ProjectorConfig(n_in=CLIP.width, n_out=72)),
    dataclasses.replace(SINGLE, projector=dataclasses.replace(SINGLE.projector, depth=3)),
    dataclasses.replace(SINGLE, projector=dataclasses.replace(
      SINGLE.projector, kind='linear', depth=1)),
    dataclasses.replace(SINGLE, projector=None, image_token=None, chat='pheye',
                        fusion=CrossAttentionFusion(width=CLIP.width, interval=1)),
    encoder(SINGLE, class_only=True), encoder(SINGLE, last_tokens=3),
    vision(SINGLE, post_norm=False), vision(SINGLE, patch_bias=True),
    vision(SINGLE, pre_norm=False), vision(SINGLE, position='crop'),
    vision(SINGLE, position_grid=9), vision(MODELS['single_view/siglip'], pool_mlp_width=7),
    encoder(ANYRES, merge='spatial'), encoder(ANYRES, merge='flat'),
    encoder(ANYRES, projector='mlp3x_gelu'), encoder(ANYRES, projector='linear'),
  ]
  assert [config for config in others if native.model_type(config)] == []
  for config in (encoder(SINGLE, fit='crop'), encoder(SINGLE, fit='squash', layer=-1),
                 encoder(SINGLE, last_tokens=25), encoder(SINGLE, mean=(0.1, 0.2, 0.3)),
                 vision(SINGLE, activation='gelu')):
    assert native.model_type(config) == 'llava'


def test_the_placeholder_has_a_row_and_no_text():
  """The vocabulary's own `<image>`, a row behind the tokenizer's, the byte of NUL; else none."""
  size = lambda rows: dataclasses.replace(SINGLE, text=dataclasses.replace(
    SINGLE.text, vocab_size=rows))
  byte = tokenizer_of('byte')
  assert native.placeholder(size(300), byte) == byte.vocabulary['<image>']
  others = {token: index for token, index in BYTE_SPECIALS.items() if token != '<image>'}
  other = ByteTokenizer(others, {'eos': '</s>', 'bos': '<s>'})
  assert native.placeholder(size(300), other) == 299
  assert native.placeholder(size(other.vocab_size), other) is None  # no token names its NUL
  assert not native.fits(size(other.vocab_size), other)
  pieces = tokenizer_from_files({'tokenizer.model': SENTENCEPIECE.read_bytes()})
  found = native.placeholder(size(pieces.vocab_size), pieces)
  assert found == pieces.vocabulary['<0x00>'] and pieces.encode('\0', bos=False)[-1] == found
  assert native.placeholder(size(pieces.vocab_size + 1), pieces) == pieces.vocab_size


def test_nul_stands_for_a_picture_and_is_refused_in_a_text(tmp_path):
  """LLaMA's vocabulary, all of whose rows are tokens."""
  pieces = tokenizer_from_files({'tokenizer.model': SENTENCEPIECE.read_bytes()})
  config = dataclasses.replace(SINGLE, text=dataclasses.replace(
    SINGLE.text, vocab_size=pieces.vocab_size))
  hf.write_extra(tmp_path, folder.files(config, pieces))
  place = pieces.vocabulary['<0x00>']
  assert hf.read_json(tmp_path / 'config.json')['image_token_index'] == place
  pair = Pair(config, None, tmp_path)
  for text in ('What?', 'A <0x00> in it, Ünïcode \u4f60'):
    ids = pair.inputs([([picture((61, 47))], text)])['input_ids'][0].numpy()
    row = text_of(config, pieces).prompt(text, [config.encoder.tokens])
    np.testing.assert_array_equal(
      ids, np.where(row['visual_index'] >= 0, place, row['tokens']), err_msg=text)
  with pytest.raises(ValueError, match='whose token stands for visual tokens'):
    pair.inputs([([picture((61, 47))], 'What\0?')])


PINPOINTS = [ANYRES.encoder.pinpoints, MODELS['anyres/siglip'].encoder.pinpoints,
             anyres.PINPOINTS, tuple((w * 336, h * 336) for w in range(1, 7) for h in range(1, 7)
                                     if w * h < 7)]


def model_and_encoder(pinpoints):
  """(a LlavaNext without its parameters, an encoder) with these resolutions."""
  config = MODELS['anyres/siglip' if pinpoints == PINPOINTS[1] else 'anyres']
  tower = config.encoder.vision
  if pinpoints[0][0] % 336 == 0:
    tower = dataclasses.replace(tower, image_size=336, patch_size=14)
  config = encoder(config, pinpoints=pinpoints, vision=tower)
  values = folder.files(config, tokenizer_of('byte'))['config.json']
  with torch.device('meta'):
    model = transformers.LlavaNextForConditionalGeneration(transformers.LlavaNextConfig(
      **{k: v for k, v in values.items() if k not in ('architectures', 'model_type')}))
  return model, config.encoder


# Of those up to 400 pixels: the map's edge falls on a cell's, and the two round apart.
TOLD = [(55, 176), (88, 55), (88, 99), (110, 352), (176, 110), (176, 198), (328, 205), (352, 110)]


def sizes(n):
  """Sizes of all kinds: edges on cells of the map, elongated, tiny, large."""
  rng = np.random.default_rng(5)
  yield from TOLD
  yield from ((1, 1), (2, 97), (900, 3), (3, 900), (38, 38), (576, 577), (336, 336), (672, 672))
  for w, h in rng.integers(1, 40, (n, 2)):
    yield int(w), int(h)
  for w, h, k in rng.integers(1, 60, (n, 3)):
    yield int(w * k), int(h * k)
  for w, h in rng.integers(1, 3000, (n, 2)):
    yield int(w), int(h)


@pytest.mark.parametrize('pinpoints, n', levels.rows(
  'interop', [(p, n) for p in PINPOINTS for n in (40, 1000)],
  first=[(p, 40) for p in PINPOINTS]), ids=str)
def test_llava_next_takes_the_tokens_that_we_take(pinpoints, n):
  """Its own packing, told our size, beside our index; and it does need to be told sometimes."""
  model, c = model_and_encoder(pinpoints)
  told = 0
  for width, height in sizes(n):
    canvas = anyres.tile_grid(width, height, c)
    size = processing_hrvlm.llava_next_size(Sized(width, height), c)
    told += size != (height, width)
    views, each = 1 + canvas[0] * canvas[1], c.vision.grid**2
    cells = torch.arange(1, 1 + views * each).reshape(views, each, 1)
    (found,), _ = model.model.pack_image_features(
      [cells], torch.tensor([size]), 'default', torch.zeros(1, dtype=cells.dtype))
    np.testing.assert_array_equal(
      found[:, 0].numpy(), anyres.gather_index(width, height, c), err_msg=f'{width} {height}')
  assert told >= (len(TOLD) if pinpoints == anyres.PINPOINTS else 0)


def test_the_processor_tells_the_size(tmp_path):
  """Beside the tiles, filled up to the most of a picture; as many places as tokens."""
  tower = dataclasses.replace(CLIP, image_size=336, patch_size=14)
  config = encoder(ANYRES, vision=tower, pinpoints=anyres.PINPOINTS)
  pair = Pair.light(config, tmp_path)
  images = [picture(TOLD[0]), picture((1400, 300))]
  inputs = pair.inputs([([image], 'What?') for image in images])
  told = tuple(inputs['image_sizes'][0].tolist())
  assert told == processing_hrvlm.llava_next_size(images[0], config.encoder) != TOLD[0][::-1]
  assert inputs['image_sizes'][1].tolist() == [300, 1400]
  views = [anyres.count(*image.size, config.encoder).views for image in images]
  assert views == [3, 4] and inputs['pixel_values'].shape == (2, 4, 3, 336, 336)
  assert not inputs['pixel_values'][0, 3:].any() and inputs['pixel_values'][0, 2].any()
  places = (inputs['input_ids'] == hf.read_json(tmp_path / 'config.json')['image_token_index'])
  assert places.sum(1).tolist() == [
    anyres.count(*image.size, config.encoder).tokens for image in images]


@dataclasses.dataclass
class Sized:
  """Stands for a picture of which the size alone is read."""

  width: int
  height: int

  @property
  def size(self):
    return self.width, self.height


def test_a_size_that_no_size_gives_is_said(monkeypatch):
  monkeypatch.setattr(sizes_llava_next, 'taken', lambda *args: None)
  with pytest.raises(ValueError, match='picture of 61 x 47 pixels.*resize it by a pixel'):
    processing_hrvlm.llava_next_size(Sized(61, 47), ANYRES.encoder)


@pytest.mark.parametrize('name', levels.rows('interop', NATIVE, first=['anyres']))
def test_the_model_is_of_transformers(name, pair, tmp_path):
  """It opens without code of the folder; the processor is ours, and asked for by name."""
  from transformers import AutoModelForImageTextToText, AutoProcessor

  model = AutoModelForImageTextToText.from_pretrained(pair.folder, dtype=torch.float32).eval()
  assert type(model) is getattr(transformers, NATIVE[name])
  files = {path.name for path in pair.folder.glob('*.py')}
  assert 'processing_hrvlm.py' in files and not {f for f in files if 'modeling' in f}
  assert 'auto_map' not in hf.read_json(pair.folder / 'config.json')
  card = (pair.folder / 'README.md').read_text()
  assert f'The model is `{NATIVE[name]}` of transformers' in card
  items = [*pair.items(2), ([picture((40, 31)), picture((90, 60))], 'Two?'), ([], 'None')]
  inputs = pair.inputs(items)
  with torch.no_grad():
    found = model(**inputs).logits[inputs['attention_mask'].bool()].numpy()
  assert near(found, pair.logits(items)) <= LIMIT
  assert loading.load(pair.folder).config == pair.config
  with pytest.raises(Exception, match='.'):  # never other pixels without a word
    AutoProcessor.from_pretrained(pair.folder)(images=[picture((61, 47))], text='<image>',
                                               return_tensors='pt')


def test_what_transformers_wrote_comes_back(pair_of, tmp_path):
  """Names of the modules, of the releases and of older versions; a grown vocabulary; contradictions
  and a tensor under two names are refused."""
  pair = pair_of('anyres')
  model = pair.model
  for place, options in (('own', {}), ('modules', dict(save_original_format=False))):
    model.save_pretrained(tmp_path / place, **options)
    assert convert(tmp_path / place, tmp_path / f'{place} back') == pair.config
    back = Pair(pair.config, tmp_path / f'{place} back', None).params
    assert_equal(back, pair.params)
  old = {native.canonical(key): value for key, value in load_file(
    tmp_path / 'modules' / 'model.safetensors').items()}
  assert set(old) == set(load_file(pair.folder / 'model.safetensors'))
  twice = tmp_path / 'twice'
  model.save_pretrained(twice)
  save_file(load_file(twice / 'model.safetensors') | {
    'model.image_newline': old['image_newline'], 'image_newline': old['image_newline']},
    twice / 'model.safetensors')
  with pytest.raises(UserError, match='two names of one tensor'):
    convert(twice, tmp_path / 'no')
  grown = transformers.LlavaNextForConditionalGeneration.from_pretrained(pair.folder)
  grown.resize_token_embeddings(300)
  grown.save_pretrained(tmp_path / 'grown')
  assert convert(tmp_path / 'grown', tmp_path / 'g').text.vocab_size == 300


def assert_equal(a, b):
  """Two trees of parameters, bit by bit."""
  from hrvlm_jax.core import paths
  a, b = paths.flatten(a), paths.flatten(b)
  assert a.keys() == b.keys()
  for key, value in a.items():
    np.testing.assert_array_equal(value, b[key], err_msg=key)


def changed(**changes):
  """config.json of AnyRes with other values; nested ones by `a__b`."""
  values = json.loads(json.dumps(folder.files(ANYRES, tokenizer_of('byte'))['config.json']))
  for key, value in changes.items():
    place, *inner = key.split('__')
    if inner:
      values[place][inner[0]] = value
    else:
      values[place] = value
  return values


@pytest.mark.parametrize('changes, message', [
  (dict(vision_feature_layer=-1), r'vision_feature_layer is -1, model says -2'),
  (dict(vision_feature_select_strategy='full'), "is 'full', model says 'default'"),
  (dict(image_grid_pinpoints=[[47, 94]]), r'image_grid_pinpoints is \[\[47, 94\]\]'),
  (dict(projector_hidden_act='silu'), "'silu', model says 'gelu'"),
  (dict(multimodal_projector_bias=False), 'multimodal_projector_bias is False'),
  (dict(vision_config__patch_size=7), 'vision_config says patch_size 7'),
  (dict(vision_config__hidden_act='gelu'), "activation 'gelu'"),
  (dict(vision_config__model_type='siglip_vision_model'), 'vision_config.model_type'),
  (dict(text_config__rms_norm_eps=0.1), 'text_config says norm_eps 0.1'),
  (dict(model_type='llava'), "model_type is 'llava', but the settings under model are those of "
                             'llava_next'),
  (dict(format='hrvlm-9'), "format is 'hrvlm-9'"),
  (dict(something=1), 'something'),
])
def test_contradictions_are_refused(changes, message, tmp_path):
  (tmp_path / 'config.json').write_text(json.dumps(changed()))
  assert recognise(tmp_path) == ANYRES
  (tmp_path / 'config.json').write_text(json.dumps(changed(**changes)))
  with pytest.raises(UserError, match=message):
    recognise(tmp_path)


def test_settings_of_a_call_are_the_class_s(tmp_path):
  """What the model would not read is refused by name."""
  for name, wrong, right in (('anyres', dict(pinpoints=[[47, 94]]), {}),
                             ('single_view', dict(last_tokens=3), dict(fit='squash'))):
    place = tmp_path / name
    place.mkdir()
    pair = Pair.light(MODELS[name], place)
    assert 'visual_index' not in pair.inputs(pair.items(2), **right)
    with pytest.raises(ValueError, match=f'a call can change: {next(iter(wrong))}'):
      pair.inputs(pair.items(1), **wrong)


def test_other_towers_of_crop_see_the_centre(tmp_path):
  """`fit` crop of plain LLaVA in the model code of ours, too."""
  from tests.interop.pytorch import assert_same_views
  config = encoder(MODELS['single_view/squash'], fit='crop')
  images = folder.files(config, tokenizer_of('byte'))['preprocessor_config.json']
  theirs = processing_hrvlm.HrvlmImageProcessor(images['system'], images['encoder'])
  for size in ((61, 47), (33, 201), (38, 38), (1, 9)):
    assert_same_views(config, theirs, picture(size))
  assert native.model_type(config) is None
  assert SIGLIP.pool == 'map'
