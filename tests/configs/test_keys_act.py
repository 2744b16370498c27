"""Every key of a config acts: another value changes a batch or a program, or is refused.

`SHOWN` names the test of those that do neither: what a run writes, says or waits for.
"""

import json
import pathlib
import re

import numpy as np
from PIL import Image
import pytest
import tokenizers

from hrvlm_jax.core.config import from_dict, to_dict
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.systems import registry
from hrvlm_jax.training.config import RunConfig
from tests import levels
from tests.configs import acting
from tests.configs.acting import Change

ROOT = pathlib.Path(__file__).parents[1]
OBJECTIVES = {'vila_hd': 'two_pass', 'ps3': 'ps3_pretrain'}
# Keys of these classes are the same in every system: they are changed in one.
WHOLE = 'single_view'
SHARED = r'(data|training|mesh|model\.text)\..*|model\.(chat|image_token|after_image)|seed|' \
         r'(model\.encoder\.(encoder|vision|fast)|.*\.tower)\..*'
BUSY = {'mc_llava': 'draw', 'vila_hd': 'boxes'}  # keys of data that only these follow
ACTIVATIONS = ('relu', 'silu', 'gelu', 'gelu_tanh', 'quick_gelu')
# LLaVA-HR without its second path, at a size whose tokens fit into a row.
VIT_ALONE = {'*.slow': None, '*.adapters': None, '*.image_size': 128}
ONE_LORA = {'rank': 2, 'alpha': 4.0}

# Pattern of a path -> other values of the key, tried in turn. What has none here gets numbers near
# by, the other words of its type, or the opposite.
OTHERS = {
  r'.*\.activation': ACTIVATIONS,
  r'.*\.norm': ('rmsnorm', 'layernorm'),
  r'.*\.lora': ([ONE_LORA],),
  r'.*\.(vision|fast)\.pool': (None, 'map'),
  r'.*\.(vision|fast)\.pool_(mlp_)?width': (Change(48, {'*.pool': 'map'}),),
  r'.*\.(vision|fast)\.position': ('crop', 'resample'),
  r'.*\.(vision|fast)\.position_grid': (20, Change(20, {'*.position': 'crop'})),
  r'.*\.class_only': (Change(True, {'*.vision.class_token': True}),),
  r'.*\.last_tokens': (3,),
  r'model\.text\.tie_embeddings': (Change(True, {'*.head_bias': False}),),
  r'model\.text\.learned_positions': (Change(True, joint={'*.rotary_dim': 0}),),
  r'model\.text\.pad_vocab_to': (128,),
  r'model\.projector\.kind': ('linear', 'mlp'),
  r'model\.chat': ('vicuna_v1', 'mc_llava'),
  r'model\.after_image': ('\n', ''),
  r'model\.encoder\.crop_cap': (7,),
  r'model\.encoder\.view_buckets': ([2, 4, 8, 16],),
  r'.*\.fit': ('squash', 'pad', 'crop'),
  r'model\.fusion\.from_layer': (Change(1, {'*.interval': 1}),),
  r'model\.fusion\.inside': (Change(True, {'model.text.parallel_block': False}),),
  r'.*\.adapters\..*': ('low_to_high', 'conv', 'mlp', 'sigmoid', 'vector', 'mapped'),
  r'.*\.depthwise': ('grouped', 'shifted'),
  r'model\.encoder\.aspect': ('square', 'pad'),
  r'model\.encoder\.fusion': (Change('concat', joint={'model.projector.n_in': 192}),),
  r'model\.encoder\.reduce': (Change('average', VIT_ALONE),),
  r'model\.encoder\.reduce_factor': (Change(4, {**VIT_ALONE, '*.reduce': 'average'}),),
  r'model\.encoder\.queries': (Change(100, {**VIT_ALONE, '*.reduce': 'queries'}),),
  r'model\.encoder\.select_layer': (Change(-1, VIT_ALONE), -1, -3),
  r'.*\.budgets': ([4, 8], [16, 16]),
  r'.*\.quirks': (Change('reference', {'*.num_tokens': 6}),
                  Change('strict', {'*.look': {'looks': None, 'tokens': 40, 'first_scales': 1}})),
  r'model\.encoder\.scales': ([40, 80, 320], Change([40, 160], {'*.max_tiles': 16})),
  r'.*\.min_tiles': (5,),
  r'.*\.select_layers': ([0, 1],),
  r'.*\.looks_at_once': (Change(True, {'*.look': {'looks': 2}}),),
  r'.*\.look\.looks': (2,),
  r'.*\.look\.tokens': (Change(8, joint={'*.looks': None}),),
  r'.*\.(first|second)\.name': ('third',),
  r'.*\.pinpoints': ([[40, 80], [80, 40]],),
  r'model\.projector': ({'n_in': 128, 'n_out': 128}, {'n_in': 96, 'n_out': 96}),
  r'model\.encoder\.projector': (
    'linear', 'mlp2x_gelu', 'mlp_downsample',
    Change('mlp_downsample', joint={'*.width': 128, 'model.projector': None})),
  r'model\.encoder\.width': (256, 128),
  r'.*\.adapter': ({'hidden': 40, 'out': 64, 'depth': 1},),
  r'.*\.tower\.text': ({
    'vocab_size': 264, 'context': 32, 'width': 64, 'depth': 1, 'heads': 4, 'mlp_width': 64,
    'out': 64, 'prompt_width': 64},),
  r'.*\.(tokens|first_scales)': (1, 8),
  r'data\.train': (acting.other_rows,),
  r'data\.images': (acting.other_images,),
  r'data\.tokenizer': (acting.tokenizer,),
  r'data\.lengths': ([512],),
  r'data\.max_length': (100,),
  r'data\.too_long': (Change('refuse', {'data.max_length': 100}),),
  r'data\.slots': (64,),
  r'data\.packing\.rows': (2,),
  r'data\.packing\.slots': ([64],),
  r'data\.group': (Change([2, 2], {'data.order': 'grouped'}),),
  r'data\.max_pixels': (12000,),
  r'data\.inexact_decode': (16,),
  r'data\.background': ({'side': [300, 400]},),
  r'data\.draw': ({'max_crops': [1, 4]},),
  r'training\.groups\.\d\.pattern': (r'.*/kernel',),
  r'training\.frozen_dtype': (Change('bfloat16', {'training.groups': [
    {'pattern': 'vision/.*', 'frozen': True}, {'pattern': '.*'}]}),),
  r'training\.optimizer\.(clip_norm|ema)': (0.5,),
}

# Refused by name, with the words of the message.
REFUSED = {
  r'.*\.channels': 'channels must lie in',
  r'.*\.(first|second)\.name': 'must be named',
  r'.*\.first\.frozen': 'train_first_adapter',
  r'model\.encoder\.width': 'width',  # of the language model; they change together
  r'model\.projector': 'project',
  r'model\.projector\.n_in': 'have width',
  r'training\.groups\.\d\.pattern': 'does not cover',
  r'training\.attention': 'needs an NVIDIA GPU',
  r'data\.bad_rows': 'cut.png',  # what it is for
  r'data\.(boxes|draw)': 'remove it',
}

# What neither a batch nor a program shows: the test that does.
SHOWN = {
  r'model\.system': 'systems/test_registry.py',
  r'model\.encoder\.inner': 'systems/test_registry.py',
  r'(.*\.)?kind|.*\.objective\.name|.*\.evaluators': 'training/test_toy_objective.py',
  r'model\.text\.family': 'interop/test_round_trip.py',
  r'model\.text\.max_positions': 'front/test_commands.py::test_what_has_no_room_is_said',
  r'data\.(eval|split|eval_split|fields|eval_fields)': 'data/test_splits.py',
  r'model\.image_token': 'interop/test_transformers_folder.py',
  r'model\.text': 'systems/test_ps3_model.py',
  r'training\.objective\.annotations': 'training/test_regions.py',
  r'data\.shards': 'data/test_packed_rows.py',
  r'data\.workers': 'training/test_workers.py',
  r'mesh\..*': 'parallel/test_mesh.py',
  r'training\.(eval_every|eval_images|eval_overlays)':
    'training/test_loop.py::test_evaluation_keeps_answers_and_pictures',
  r'training\.(log_every|checkpoint_every|keep|keep_every|mfu)':
    'training/test_loop.py::test_metrics',
  r'training\.profile': 'training/test_loop.py::test_the_profiled_window_is_there',
  r'training\.wandb': 'training/test_loop.py::test_weights_and_biases',
  r'training\.keep_heap': 'core/test_heap.py::test_freed_memory_stays_where_a_run_asks_for_it',
  r'training\.deterministic':
    'training/test_loop.py::test_a_deterministic_run_refuses_what_would_change_its_bits',
  r'training\.spike_norm': 'training/test_bad_steps.py::test_spikes',
  r'training\.(on_bad_step|bad_steps)':
    'training/test_bad_steps.py::test_a_bad_batch_is_left_out_when_asked',
  r'training\.stall_minutes': 'training/test_lock.py::test_a_phase_that_stands_still_ends_the_run',
  r'training\.(init_from|init_allow)': 'training/test_loop.py::test_hand_over_is_said_aloud',
}


def match(table, name):
  """What a table says of a path, and None."""
  return next((value for pattern, value in table.items() if re.fullmatch(pattern, name)), None)


def add_row(rows, image, *, text='What is it?', answer='a sign', box=True):
  """A question about an image."""
  place = {'box': [8, 8, 40, 40]} if box else {}
  rows.append({'id': f'{len(rows)}', 'image': image, **place, 'conversations': [
    {'from': 'human', 'value': f'<image>\n{text}'}, {'from': 'gpt', 'value': answer}]})


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  """Pictures of several sizes and kinds, one of them cut off; two files of rows about them."""
  folder, rng, rows = tmp_path_factory.mktemp('keys'), np.random.default_rng(0), []
  for place in ('pictures', 'others'):
    (folder / place).mkdir()

  def picture(name, width, height, channels=3, **options):
    pixels = rng.integers(0, 255, (height // 8, width // 8, channels), dtype=np.uint8)
    image = Image.fromarray(pixels.repeat(8, 0).repeat(8, 1))
    image.save(folder / 'pictures' / name, **options)
    image.rotate(180).save(folder / 'others' / name)

  for number in range(6):
    picture(f'{number}.png', 96 + 16 * number, 120)
    add_row(rows, f'{number}.png', answer='a' * (number + 1))
  turned = Image.Exif()
  turned[0x0112] = 6
  picture('clear.png', 96, 96, 4)
  picture('small.png', 48, 56)  # one crop
  picture('turned.jpg', 160, 96, exif=turned)
  content = (folder / 'pictures' / '0.png').read_bytes()
  (folder / 'pictures' / 'cut.png').write_bytes(content[:200])
  (folder / 'others' / 'cut.png').write_bytes(content[:200])
  add_row(rows, 'clear.png')
  add_row(rows, 'small.png')
  add_row(rows, 'turned.jpg')
  add_row(rows, 'cut.png')
  add_row(rows, '1.png', text='word ' * 30)
  (folder / 'rows.json').write_text(json.dumps(rows))
  (folder / 'other.json').write_text(json.dumps(rows[::-1][:-1]))
  words = tokenizers.Tokenizer(tokenizers.models.WordLevel(
    {'<unk>': 0, '<s>': 1, '</s>': 2, '<image>': 3, 'What': 4, 'word': 5}, unk_token='<unk>'))
  words.add_special_tokens(['<image>'])
  words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  (folder / 'words').mkdir()
  words.save(str(folder / 'words' / 'tokenizer.json'))
  (folder / 'words' / 'tokenizer_config.json').write_text(
    json.dumps({'eos_token': '</s>', 'bos_token': '<s>', 'unk_token': '<unk>'}))
  return folder


def values_of(system, data):
  """The plain values of a tiny run."""
  values = {
    'model': to_dict(registry.get(system).tiny()),
    'data': {'train': str(data / 'rows.json'), 'images': str(data / 'pictures'),
             'lengths': [384, 512]},
    'training': {'steps': 100, 'batch_size': 4, 'accumulate': 2, 'optimizer': {
      'learning_rate': 1e-3, 'warmup': 4.0, 'ema': 0.9, 'weight_decay': 0.1},
      'objective': OBJECTIVES.get(system, 'next_token')}}
  if system == 'ps3':
    values['data'] |= acting.regions(data)
  return to_dict(from_dict(RunConfig, values))


def others_of(run, path, value):
  """Other values to try."""
  found = match(OTHERS, '.'.join(map(str, path)))
  if found is None:
    found = acting.changed(value, acting.words_of(run, path))
  return [other for other in found if other != value]


def does_not_act(system, data, wanted):
  """Sentences about the keys of a system, of those that are wanted, that change nothing."""
  values, problems = values_of(system, data), []
  run = from_dict(RunConfig, values)
  base = acting.Observed(run)
  for path, value in acting.leaves(values):
    name = '.'.join(map(str, path))
    if not wanted(name) or match(SHOWN, name):
      continue
    words, seen = match(REFUSED, name), []
    for other in others_of(run, path, value):
      try:
        before, after = acting.applied(values, path, other, data)
        new = acting.Observed(from_dict(RunConfig, after))
        old = base if before is values else acting.Observed(from_dict(RunConfig, before))
        if any(getattr(new, side)() != getattr(old, side)() for side in base.SIDES):
          break
        seen.append(f'{other!r} changes nothing')
      except UserError as error:
        if words is not None and words in str(error):
          break
        seen.append(f'{other!r}: {str(error)[:200]}')
      except Exception as error:  # noqa: BLE001 - a finding: neither acts nor is refused by name
        seen.append(f'{other!r}: {type(error).__name__}: {str(error)[:200]}')
    else:
      problems.append(f'{name}: {"; ".join(seen) or f"nothing to try beside {value!r}"}')
  return problems


def test_every_key_has_another_value_or_a_test_that_shows_it(data):
  problems = []
  for system in registry.names():
    values = values_of(system, data)
    run = from_dict(RunConfig, values)
    for path, value in acting.leaves(values):
      name = '.'.join(map(str, path))
      if not match(SHOWN, name) and not others_of(run, path, value):
        problems.append(f'{system}: {name} = {value!r}')
  assert not problems
  for shown in SHOWN.values():
    file, _, test = shown.partition('::')
    text = (ROOT / file).read_text()
    assert not test or f'def {test}(' in text, shown


def test_keys_of_the_data_act(data):
  """The first level's share; programs are traced in the second."""
  wanted = lambda name: name.startswith('data.') and name != 'data.max_pixels' or name == 'seed'
  assert does_not_act(WHOLE, data, wanted) == []


@pytest.mark.parametrize('system', levels.rows('recipes', registry.names(), first=[]))
def test_keys_act(system, data):
  own = BUSY.get(system)
  wanted = lambda name: system == WHOLE or name == f'data.{own}' or not re.fullmatch(SHARED, name)
  assert does_not_act(system, data, wanted) == []
