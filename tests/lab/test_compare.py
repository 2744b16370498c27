"""`lab.compare`: refusals, table and plot, one tiny run that is taken up again."""

import dataclasses
import pathlib

import numpy as np
import pytest

from hrvlm_jax.checkpoint import store
from hrvlm_jax.core import paths
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.lab import compare, compare_config, compare_report, report, scenes
from hrvlm_jax.lab.needle import NeedleConfig, read_records, single_turns, write
from hrvlm_jax.language import config as language
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.baselines.anyres import AnyResConfig
from hrvlm_jax.systems.baselines.single_view import SingleViewConfig
from hrvlm_jax.systems.contract import ModelConfig, ProjectorConfig
from hrvlm_jax.systems.fusion import TwoPassFusion
from hrvlm_jax.systems.mc_llava.encoder import MCLlavaConfig
from hrvlm_jax.systems.ps3.config import PoolConfig, PS3Config, SaliencyConfig
from hrvlm_jax.systems.ps3.data import SampleConfig
from hrvlm_jax.systems.ps3.pretrain import PretrainOptions
from hrvlm_jax.systems.vila_hd.config import VilaHDConfig
from hrvlm_jax.training import optimizer, run_config
from hrvlm_jax.training.config import OptimizerConfig
from hrvlm_jax.vision.vit import ViTConfig
from hrvlm_jax.vlm import model as vlm

VISION = ViTConfig(image_size=16, patch_size=8, width=16, depth=1, heads=2, mlp_width=16,
                   pool='map')
TEXT = language.phi(vocab_size=384, width=16, depth=1, heads=2, mlp_width=16, max_positions=256)
HALF = (0.5, 0.5, 0.5)
ROW = {'accuracy': 0.5, 'accuracy_by_size': {'small': 0.25, 'medium': 0.5, 'large': 0.75},
       'tokens': 25.0, 'views': 1.0, 'encoder_gflops': 0.01, 'latency_ms': 3.0,
       'peak_memory_mb': 10.0, 'family': 'prefix'}


def single(vision=VISION, text=TEXT):
  encoder = SingleViewConfig(vision=vision, layer=-1, fit='squash', mean=HALF, std=HALF)
  return ModelConfig(system='single_view', encoder=encoder, text=text,
                     projector=ProjectorConfig(n_in=vision.width, n_out=text.width))


def config(**systems):
  return compare_config.CompareConfig(
    task=NeedleConfig.tiny(),
    encoder=compare_config.EncoderConfig(vision=VISION, window=80, last_tokens=2, steps=1),
    systems=systems, optimizer=OptimizerConfig(learning_rate=1e-3), train_images=4, eval_images=3,
    train_steps=2, batch_size=2, answer_batch=3, latency_answers=1, lengths=(128, 256))


def test_systems_that_cannot_be_compared_are_refused_with_all_reasons():
  other = dataclasses.replace(TEXT, width=32, mlp_width=32)
  wide = dataclasses.replace(VISION, width=32)
  tiled = AnyResConfig(vision=VISION, layer=-1, pinpoints=((160, 160),), merge='flat', width=16,
                       mean=HALF, std=HALF)
  with pytest.raises(UserError) as error:
    config(plain=single(), other=single(text=other), wide=single(vision=wide),
           tiled=ModelConfig(system='anyres', encoder=tiled, text=TEXT))
  text = str(error.value)
  assert 'the language models of plain, other, wide, tiled are not equal' in text
  assert 'wide: its tower (16 pixels, width 32, depth 1) is not the shared encoder' in text
  assert 'tiled:' in text and 'leave no room for text in 256 positions' in text


def test_table_and_plot_name_machine_and_chance(tmp_path):
  row = ROW
  results = {'systems': {'a': row, 'b': row | {'family': 'cross_attention'}}, 'chance': 0.04,
             'images': {'eval': 8}, 'steps': 2, 'seconds': 120.0, 'encoder_steps': 7,
             'machine': {'device': 'cpu', 'devices': 1, 'cores': 2}}
  results['systems']['b'] |= {'adapted': {'steps': 3, 'seconds': 4.0}, 'times': 2}
  text = compare_report.table(results)
  assert 'b: 2 times as many training steps.' in text and 'a: ' not in text
  assert '25.0%' in text and 'chance 4.0%' in text and 'cpu x 1, 2 cores' in text
  results['machine']['kind'] = 'AMD family 26, AVX-512, 2 cores'
  assert 'Machine: cpu x 1, AMD family 26, AVX-512, 2 cores; ' in compare_report.table(results)
  assert 'only' in text  # tokens of the cross-attention family are not comparable
  assert 'b: 3 steps (4 s) of pre-training' in text
  assert '| a | 50.0% | 25.0% |' in compare_report.markdown(results)
  compare_report.plot(results, tmp_path / 'plot.png')
  assert (tmp_path / 'plot.png').stat().st_size > 1000


def test_a_comparison_runs_and_is_taken_up_again(tmp_path, monkeypatch):
  made = config(plain=single())
  results = compare.Comparison(made, tmp_path, progress=False).run()
  row = results['systems']['plain']
  assert row['tokens'] == 4 and row['encoder_gflops'] > 0 and row['peak_memory_mb'] > 0
  assert (tmp_path / 'table.txt').exists() and (tmp_path / 'plot.png').exists()
  monkeypatch.setattr(compare.Comparison, 'learn_task', None)  # done before: not called
  # Parts of another comparison in the folder are not this one's time.
  compare.Comparison(made, tmp_path).part('train another', lambda: None)
  again = compare.Comparison(made, tmp_path, progress=False).run()
  assert again['systems']['plain'] == row and again['seconds'] == results['seconds'] > 0
  with pytest.raises(UserError, match='holds another comparison .train_steps differ'):
    compare.Comparison(dataclasses.replace(made, train_steps=3), tmp_path, progress=False)
  silent = {'plain': compare_config.ChangesConfig(zeros='projector/.*')}
  with pytest.raises(UserError, match='holds another comparison .changes.plain differ'):
    compare.Comparison(dataclasses.replace(made, changes=silent), tmp_path, progress=False)


def test_a_table_goes_between_its_marks_and_nowhere_else(tmp_path):
  document = tmp_path / 'a.md'
  document.write_text('before\n<!-- compare:begin -->\nold\n<!-- compare:end -->\nafter\n')
  report.insert('new\n', document, name='compare')
  assert document.read_text() == (
    'before\n<!-- compare:begin -->\nnew\n<!-- compare:end -->\nafter\n')
  document.write_text('<!-- compare:end --> <!-- compare:begin -->')
  with pytest.raises(UserError, match='add them where the table belongs'):
    report.insert('new', document, name='compare')


def test_single_turns_keep_every_question_with_its_box(tmp_path):
  write(NeedleConfig.tiny(turns=3), tmp_path, 2, seed=0, progress=False)
  records = read_records(tmp_path)
  rows = single_turns(records)
  assert len(rows) == 6
  for record, part in zip(records, (rows[:3], rows[3:]), strict=True):
    assert [row['box'] for row in part] == record['boxes']
    assert all(row['conversations'][0]['value'].count('<image>') == 1 for row in part)
    asked = [row['conversations'][0]['value'].split('\n')[1] for row in part]
    assert len(set(asked)) == 3 and all('sign' in text for text in asked)


def loaded(name, *argument):
  file = ':'.join([f'configs/compare/{name}.py', *argument])
  return run_config.load(compare_config.CompareConfig, file, [])


def test_the_shared_tower_has_a_place_in_every_system():
  made = loaded('needle_tiny', 'smoke')
  single = paths.flatten(vlm.build(made.systems['single_view']).abstract)
  shared = {path.removeprefix('vision/tower/'): np.zeros(leaf.shape, np.float32)
            for path, leaf in single.items() if path.startswith('vision/tower/')}
  places = {name: compare_config.tower_path(model, shared) for name, model in made.systems.items()}
  assert places == {'single_view': 'vision/tower/', 'mc_llava': 'vision/tower/',
                    'pheye': 'vision/tower/', 'anyres': 'vision/tower/', 's2': 'vision/tower/',
                    'llava_hr': 'vision/fast/', 'vila_hd': 'vision/ps3/tower/'}
  wrong = shared | {'pos_embed': np.zeros((4, 96), np.float32)}
  with pytest.raises(UserError, match='none of its towers .vision/tower/. has the shapes'):
    compare_config.tower_path(made.systems['mc_llava'], wrong)


def test_the_large_comparison_builds_with_real_sizes():
  made = loaded('needle_4k')
  task = made.task
  counts = {name: registry.get(model.system).count(task.width, task.height, model.encoder)
            for name, model in made.systems.items()}
  assert (task.width, task.height) == (3840, 2160)
  assert made.systems['vila_hd'].encoder.side == 3780 and counts['pheye'].views == 101
  assert counts['vila_hd'].tokens == 196 + sum(made.systems['vila_hd'].encoder.slots)
  for name, model in made.systems.items():
    flat = paths.flatten(vlm.build(model).abstract)
    size = sum(int(np.prod(leaf.shape)) for leaf in flat.values())
    assert 0.4e9 < size < 1e9, name  # float32 masters and two moments of all: below 16 GB


def test_one_system_may_train_otherwise_and_start_from_another_encoder(tmp_path):
  """Frozen language model, drawn settings, a tower of other sizes with its own pre-training."""
  crops = MCLlavaConfig(vision=VISION, max_crops=4, num_tokens=10, window=80, view_buckets=(5,))
  joined = ProjectorConfig(n_in=VISION.width, n_out=TEXT.width)
  crops = ModelConfig(system='mc_llava', encoder=crops, text=TEXT, projector=joined)
  deep = dataclasses.replace(VISION, depth=2)
  other = compare_config.EncoderConfig(vision=deep, window=80, last_tokens=2, steps=1)
  made = dataclasses.replace(
    config(plain=single()), encoders={'deep': other},
    systems={'plain': single(), 'crops': crops, 'deep': single(deep)},
    changes={'plain': compare_config.ChangesConfig(frozen='language/.*'),
             'deep': compare_config.ChangesConfig(zeros='projector/fc1/.*', times=2),
             'crops': compare_config.ChangesConfig(draw={'max_crops': (1, 4)},
                                                   learns='vision/tower/blocks/.*')})
  assert [compare_config.encoder_of(made, model) for model in made.systems.values()] == [
    '', '', 'deep']
  done = compare.Comparison(made, tmp_path, progress=False)
  assert done.encoders() == ['deep'] and 'encoder deep' in done.parts()
  done.prepare()
  groups = {name: optimizer.groups_of(done.run_config(name).training, vlm.build(model).abstract)
            for name, model in made.systems.items()}
  still = {name: {path.split('/')[0] for path, group in found.items() if group.frozen}
           for name, found in groups.items()}
  assert still == {'plain': {'vision', 'language'}, 'crops': {'vision'}, 'deep': {'vision'}}
  kernel = 'vision/tower/blocks/mlp/fc1/kernel'
  assert groups['plain'][kernel].frozen and not groups['crops'][kernel].frozen
  assert done.run_config('crops').data.draw == {'max_crops': (1, 4)}
  assert not done.run_config('deep').data.draw
  assert {name: done.run_config(name).training.steps // made.train_steps
          for name in made.systems} == {'plain': 1, 'crops': 1, 'deep': 2}
  silent = {path for path, leaf in store.load_leaves(tmp_path / 'start/deep') if not leaf.any()}
  assert {'projector/fc1/kernel', 'projector/fc1/bias'} <= silent
  assert not groups['deep']['projector/fc1/kernel'].frozen
  assert 'projector/fc1/kernel' not in dict(store.load_leaves(tmp_path / 'start/plain'))
  nothing = {'plain': compare_config.ChangesConfig(zeros='align/.*')}
  with pytest.raises(UserError, match='changes.plain.zeros: .* matches no parameter of plain'):
    compare.Comparison(dataclasses.replace(made, changes=nothing), tmp_path / 'other',
                       progress=False).zeros('plain', {'projector/fc1/kernel': None})
  with pytest.raises(UserError, match='encoders.again: its tower is that of an encoder before it'):
    dataclasses.replace(made, encoders={'deep': other, 'again': made.encoder})
  with pytest.raises(UserError, match='changes: no system is called others'):
    dataclasses.replace(made, changes={'others': compare_config.ChangesConfig()})
  with pytest.raises(UserError, match='changes.plain.times: found 0, expected 1 or more'):
    dataclasses.replace(made, changes={'plain': compare_config.ChangesConfig(times=0)})
  with pytest.raises(UserError, match='deep: its tower .* is not the shared encoder'):
    dataclasses.replace(made, encoders={})


def looking():
  """A VILA-HD around the tower of these tests."""
  tower = PS3Config(
    vision=dataclasses.replace(VISION, pool=None), scales=(16, 32), select_layers=(0,),
    max_select=4, budgets=(4,), pool=PoolConfig(width=16, heads=2, mlp_width=16),
    saliency=SaliencyConfig(width=8, out=8, depth=1, kernel=8, input_size=32))
  encoder = VilaHDConfig(tower=tower, width=TEXT.width, select_layer=-1, looks=1)
  return ModelConfig(system='vila_hd', encoder=encoder, text=TEXT, chat='vila_qwen2',
                     fusion=TwoPassFusion(selection_weight=1.0), after_image='\n')


def test_ps3_may_learn_from_captions_of_regions_and_its_selection_learns_on(tmp_path):
  regions = PretrainOptions(regions=SampleConfig(clean=False))
  made = dataclasses.replace(
    config(looking=looking()),
    adapt={'looking': compare_config.AdaptConfig(steps=2, batch_size=2, regions=regions)},
    changes={'looking': compare_config.ChangesConfig(learns='vision/ps3/selection/.*')})
  done = compare.Comparison(made, tmp_path, progress=False)
  done.prepare()
  done.adapt('looking')
  kept = dict(store.load_leaves(tmp_path / 'adapted/looking'))
  assert {path.split('/')[1] for path in kept} == {'tower', 'residual', 'selection'}
  shared = dict(store.load_leaves(tmp_path / 'encoder'))
  kernel = 'tower/blocks/mlp/fc1/kernel'
  assert np.abs(kept[f'ps3/{kernel}'] - shared[f'vision/{kernel}']).max() > 0  # it learned
  assert np.abs(kept[f'ps3/{kernel}'] - shared[f'vision/{kernel}']).max() < 0.1  # from its start
  assert np.isfinite(store.load_config(tmp_path / 'adapted/looking')['loss'])
  found = optimizer.groups_of(done.run_config('looking').training,
                              vlm.build(made.systems['looking']).abstract)
  still = {'/'.join(path.split('/')[:3]) for path, group in found.items() if group.frozen}
  assert still == {'vision/ps3/tower', 'vision/ps3/residual'}
  assert any(path.startswith('vision/ps3/selection/') for path in found)
  with pytest.raises(UserError, match='adapt.plain: regions are for PS3 in VILA-HD'):
    dataclasses.replace(config(plain=single()), adapt={'plain': made.adapt['looking']})


def test_what_does_not_learn_from_scenes_is_refused():
  with pytest.raises(UserError, match='SingleViewConfig: nothing of this encoder learns'):
    scenes.part(single().encoder)
  with pytest.raises(UserError, match='adapt: no system is called other'):
    dataclasses.replace(config(plain=single()),
                        adapt={'other': compare_config.AdaptConfig(steps=1)})


def test_a_kept_result_gives_the_section_of_a_document(tmp_path):
  (tmp_path / 'run').mkdir()
  (tmp_path / 'run/plot.png').write_bytes(b'png')
  results = {'systems': {'a': ROW}, 'chance': 0.04, 'images': {'eval': 8}, 'steps': 2,
             'seconds': 120.0, 'encoder_steps': 7,
             'machine': {'device': 'cpu', 'devices': 1, 'cores': 2}}
  kept = compare_report.keep(results, tmp_path / 'run', f'{tmp_path}/some.py:smoke')
  assert kept == tmp_path / 'results/some.json'
  assert (tmp_path / 'results/some_plot.png').read_bytes() == b'png'
  assert compare_report.section(kept) == compare_report.markdown(results)
  assert compare_report.section(tmp_path / 'results/other.json') == compare_report.NOT_RUN


def test_the_readme_says_what_was_run():
  root = pathlib.Path(__file__).parents[2]
  wanted = compare_report.section(root / 'configs/compare/results/needle_tiny.json')
  document = (root / 'README.md').read_text()
  found = document.split('<!-- compare:begin -->')[1].split('<!-- compare:end -->')[0]
  assert found.strip() == wanted.strip(), 'run hrvlm compare --keep --document README.md'
