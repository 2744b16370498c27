"""Every row of every table of the papers: run configs whose stages start from what they name.

Full sizes are built from shapes alone. Tiny ones run: stages, benchmarks on the made-up samples of
tests/evaluation, the table (`hrvlm sweep --smoke`).
"""

import json
import pathlib
import runpy
import shlex
import sys

import jax
import pytest

from hrvlm_jax.cli.main import main
from hrvlm_jax.core import paths
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.execution import Execution
from hrvlm_jax.lab import tables
from hrvlm_jax.lab.sweep import entries_of
from hrvlm_jax.parallel.topology import GIB
from hrvlm_jax.training import start
from hrvlm_jax.training.objectives import objective_of
from hrvlm_jax.training.optimizer import groups_of
from hrvlm_jax.training.program import run_dtypes
from hrvlm_jax.training.step import init_state
from hrvlm_jax.vlm import model as vlm
from tests import levels

FOLDER = pathlib.Path(__file__).parents[2] / 'configs' / 'ablations'
SAMPLES = pathlib.Path(__file__).parents[1] / 'evaluation' / 'samples'
FILES = ('llava_hr_table1', 'llava_hr_table2', 'llava_hr_table3', 'llava_hr_table4',
         'mc_llava_vstar', 'pheye_table1', 'pheye_table2', 'pheye_table4', 'pheye_table5',
         'vila_hd_table1', 'vila_hd_table4', 'vila_hd_table5', 'vila_hd_table6', 'vila_hd_table7',
         'vila_hd_table8', 'vila_hd_table12')


def names_of(name):
  """What a file defines."""
  sys.path.insert(0, str(FOLDER))
  try:
    return runpy.run_path(str(FOLDER / f'{name}.py'))
  finally:
    sys.path.pop(0)


ROWS = [(name, row) for name in FILES for row in names_of(name)['ROWS']]
# Rows that are built at the first level: a start of parts, one of a stage before, one of both.
FIRST = [('llava_hr_table2', 'clip_resampler'), ('pheye_table4', 'cls'),
         ('pheye_table5', 'monkey_448'), ('vila_hd_table6', 'no_scale_position')]


def path_of(name):
  return str(FOLDER / f'{name}.py')


def test_the_tables_of_the_papers_are_there():
  assert set(FILES) == {path.stem for path in FOLDER.glob('*.py')} - {
    'rows_llava_hr', 'rows_vila_hd'}
  readme = (FOLDER / 'README.md').read_text()
  for name in FILES:
    text = names_of(name)['__doc__']
    assert f'hrvlm sweep --config configs/ablations/{name}' in text and f'`{name}.py`' in readme
    assert all(word in text for word in ('Hardware:', 'Time:', 'Expected:'))


@pytest.mark.parametrize('name', FILES)
def test_numbers_of_a_row_are_those_of_its_columns(name):
  found = names_of(name)
  columns = [*found['TABLE'].benchmarks, *found['TABLE'].further]
  for row, value in found['ROWS'].items():
    numbers = value[1]
    assert numbers is None or len(numbers) <= len(columns), (row, numbers, columns)


def test_a_sweep_takes_a_file():
  entries = entries_of(path_of('llava_hr_table2'), [('seed', '3,4')])
  rows = names_of('llava_hr_table2')['ROWS']
  assert [entry.name for entry in entries] == [f'{row}_seed={s}' for row in rows for s in (3, 4)]
  assert all(entry.published and [name for name, _ in entry.stages] == ['stage1', 'stage2']
             for entry in entries)
  assert entries[0].stages[0][1].seed == 3
  with pytest.raises(UserError, match='row'):
    entries_of(path_of('llava_hr_table2'), [], only='nothing_of_the_kind')


def stored(entry, number):
  """Shapes of what a stage starts from: the parts of the start, or the stage before."""
  if number == 0:
    flat = paths.flatten(vlm.build(entry.all_stages[0][1].model).abstract)
    given = [part.partition('=')[0] for part in entry.table.parts_of(entry.row)]
    if entry.all_stages[0][1].model.system == 'ps3':  # SigLIP's own pool and temperature
      given += ['vision/pool_head', 'logit_scale', 'logit_bias']
    return {path: leaf for path, leaf in flat.items() if 'lora_' not in path
            and any(path == part or path.startswith(f'{part}/') for part in given)}
  name, config = entry.all_stages[number]
  before = paths.flatten(vlm.build(entry.all_stages[number - 1][1].model).abstract)
  moved = entry.table.joins.get(name)
  if moved is None:
    return before
  out = {here + path.removeprefix(there): leaf for there, here in moved.items()
         for path, leaf in before.items() if path.startswith(f'{there}/')}
  flat = paths.flatten(vlm.build(config.model).abstract)
  return out | {path: leaf for path, leaf in flat.items() if path.startswith('language/')}


@pytest.mark.parametrize('name, row', levels.rows('recipes', ROWS, first=FIRST))
def test_a_row_can_start(name, row):
  """Every stage finds in what it starts from all that it does not name as fresh."""
  entry = entries_of(path_of(name), [], only=row)[0]
  if not entry.trains or not entry.table.parts_of(row):
    assert entry.table.of(row).model in (*names_of(name)['ROWS'], None)
    return
  for number, (_, config) in enumerate(entry.all_stages):
    model = paths.flatten(vlm.build(config.model).abstract)
    there = stored(entry, number)
    start._check(config, config.training.init_from, there, model,
                 start.resampled_tables(there, model))
  assert entry.start_command.startswith(f'hrvlm convert --config {path_of(name)}:{row}')


@pytest.mark.parametrize('name, row', levels.rows('recipes', ROWS, first=FIRST[2:3]))
def test_the_loss_of_a_row_can_be_traced(name, row):
  """State and loss of the last stage, from shapes alone: nothing is computed."""
  config = entries_of(path_of(name), [], only=row)[0].config
  t, fn = config.training, vlm.build(config.model)
  groups = groups_of(t, fn.abstract)
  wanted = run_dtypes(t, groups, fn.abstract)
  state = jax.eval_shape(lambda p: init_state(t, groups, p), wanted)
  objective = objective_of(t)
  batch = objective.batch_shapes(config, 1, image=(900, 700)).arrays
  total, count = jax.eval_shape(
    lambda p, b: objective.loss(fn, p, b, ex=Execution(dtype='bfloat16', remat='layers')),
    state['params'], batch)
  assert total.shape == count.shape == ()


# Rows that run alone, with the row whose model they test; the first level has one of them.
CHOSEN = {'llava_hr_table2': ('clip_resampler',), 'pheye_table4': ('cross_vit',),
          'vila_hd_table4': ('full_1512', 'visionzip_1512_25')}


def smoke(name, rows, folder):
  """Runs rows of a file with tiny models; checks what they leave."""
  found = names_of(name)
  table = found['TABLE']
  assert main(['sweep', '--config', path_of(name), '--only', ','.join(rows), '--smoke', '--data',
               str(SAMPLES), '--limit', '1', '--out', str(folder), '--quiet']) == 0
  results = {one['name']: one for one in json.loads((folder / 'results.json').read_text())}
  text = (folder / 'table.txt').read_text()
  assert list(results) == list(rows)
  for row, one in results.items():
    numbers = found['ROWS'][row][1]
    assert all(f' / {value:g}' in text for value in numbers or () if value is not None)
    if row in table.planned:
      assert one['planned']['words'] in text
      if tables.MEMORY in table.further:
        assert f'{one["planned"]["need_bytes"] / GIB:.1f} / ' in text
    if row in table.left_out:
      assert one['note'] == table.left_out[row]
      continue
    assert set(one['scores']) == set(table.benchmarks)
    assert not [score for score in one['scores'].values() if 'error' in score], one['scores']
    if table.of(row).model is None:
      stages = table.stages_of(row)
      places = stages if len(stages) > 1 else ('',)
      assert all((folder / row / stage / 'config.json').exists() for stage in places)


@pytest.mark.parametrize('name', levels.rows('tables', CHOSEN, first=['pheye_table4']))
def test_a_row_runs_with_tiny_models(name, tmp_path):
  smoke(name, CHOSEN[name], tmp_path / 'out')


# Two parts of about an hour each: PS3's tables, and those of the other papers.
PS3 = [name for name in FILES if name.startswith('vila_hd')]


@pytest.mark.full('tables')
@pytest.mark.parametrize('name', [name for name in FILES if name not in PS3])
def test_a_whole_table_runs_with_tiny_models(name, tmp_path):
  smoke(name, list(names_of(name)['ROWS']), tmp_path / 'out')


@pytest.mark.full('tables_ps3')
@pytest.mark.parametrize('name', PS3)
def test_a_whole_table_of_ps3_runs_with_tiny_models(name, tmp_path):
  smoke(name, list(names_of(name)['ROWS']), tmp_path / 'out')


PLANNED = [(name, row) for name in FILES for row in names_of(name)['TABLE'].planned]


def is_what_its_command_says(found, folder):
  """A row's plan, against the command that it names."""
  verb, *words = shlex.split(found['command'].removeprefix('hrvlm '))
  status = main([verb, *words, *(('--json', str(folder / 'plan.json'))
                                 if found['step'] == 'train' else ())])
  assert status == int(found['out_of_memory']) == int(found['need_bytes'] > found['usable_bytes'])
  assert found['need_bytes'] == sum(found['bytes_per_device'].values())
  if found['step'] == 'train':
    asked = json.loads((folder / 'plan.json').read_text())
    assert {key: found[key] for key in asked} == asked
    assert found['out_of_memory'] == (found['rows'] > found['most_rows'])
  verdict = 'OUT OF MEMORY' if found['out_of_memory'] else found['words'].split(': ')[-1]
  assert 'by arithmetic' in found['words'] and verdict in found['words']


def test_rows_out_of_memory_are_planned(tmp_path):
  """In full size, in a smoke run too: the number of the planner beside the limit of a device."""
  assert main(['sweep', '--config', path_of('vila_hd_table1'), '--only', 'anyres_3780', '--smoke',
               '--quiet', '--out', str(tmp_path / 'out'), '--config.training.accumulate=16,2']) == 0
  results = json.loads((tmp_path / 'out' / 'results.json').read_text())
  text = (tmp_path / 'out' / 'table.txt').read_text()
  few, many = (one['planned'] for one in results)
  assert (few['topology'], few['mesh']['fsdp'], few['length']) == ('a100:64', 16, 23892)
  assert (few['rows'], many['rows']) == (1, 8) and few['most_rows'] == many['most_rows'] == 4
  limit = few['usable_bytes']
  assert limit == int(80 * GIB * 0.97) < many['need_bytes'] and many['out_of_memory']
  for one in (few, many):
    is_what_its_command_says(one, tmp_path)
    said = f'needs {one["need_bytes"] / GIB:.2f} GiB of {limit / GIB:.2f} GiB'
    assert said in one['words'] and f"the paper's ran out of memory; {one['words']}" in text
  assert 'OUT OF MEMORY; a device has room for' in many['words']
  assert not list((tmp_path / 'out').glob('*/sft'))  # not trained


@pytest.mark.full('tables')
@pytest.mark.parametrize('name, row', PLANNED)
def test_every_planned_row_says_what_the_planner_says(name, row, tmp_path):
  """As the table of a sweep has it (`smoke`), without training."""
  is_what_its_command_says(entries_of(path_of(name), [], only=row)[0].asked.answer(), tmp_path)


def test_a_start_that_is_not_there_is_said_with_its_command(tmp_path, capsys):
  assert main(['sweep', '--config', path_of('pheye_table4'), '--only', 'cls', '--out',
               str(tmp_path / 'out'), '--quiet']) == 2
  said = capsys.readouterr()
  assert 'made by: hrvlm convert --config' in said.out + said.err
  assert '--part vision/tower=CLIP_B_32 --part language=GPT2' in said.out
  assert main(['sweep', '--config', path_of('vila_hd_table1'), '--out', str(tmp_path / 'x'),
               '--list']) == 0
  listed = capsys.readouterr().out
  assert 'ps3_1512_44_100' in listed and 'align, from weights/vila_hd_table1_s2_756_start' in listed
  assert 'hrvlm plan --config' in listed and 's2_3780,sft --topology a100:64' in listed


def test_an_average_of_the_seven():
  names = ('textvqa', 'ocrbench')
  scores = {'textvqa': {'value': 60.0}, 'ocrbench': {'value': 500.0}}
  assert tables.average(scores, names) == 55.0
  assert tables.average({'textvqa': {'value': 60.0}}, names) is None


def test_memory_is_a_column_that_the_planner_fills():
  """Of LLaVA-HR, Table 1, whose row at 1022 pixels has no number of the paper: out of memory."""
  found = names_of('llava_hr_table1')
  assert set(found['TABLE'].planned) == set(found['ROWS'])
  row = {'values': {}, 'scores': {}, 'planned': {'need_bytes': 5 * GIB // 2, 'words': 'planned'}}
  rows = [row | {'name': name, 'published': found['ROWS'][name][1]}
          for name in ('llava_336', 'llava_1022')]
  first, second = (line for line in tables.text(found['TABLE'], rows).splitlines() if '2.5' in line)
  assert ' 2.5 / 28 ' in first and ' 2.5 / - ' in second


# What a row of a table differs in, typed off the papers: file, row -> (place, value).
GATES = {'default': 'tanh', 'gate_sigmoid': 'sigmoid', 'gate_hsigmoid': 'hsigmoid'}
# PS3, Tables 1, 4 and 12: share of the patches of all high-resolution scales that is selected.
SHARES = {'ps3_756_44': 0.44, 'ps3_1512_20': 0.20, 'ps3_1512_44': 0.44, 'ps3_3780_18': 0.18}


def test_rows_are_what_their_names_say():
  table = names_of('llava_hr_table3')['ROWS']
  assert {row: table[row][0].adapters.gate for row in GATES} == GATES
  assert table['direction_low_to_high'][0].adapters.direction == 'low_to_high'
  assert table['fusion_concat'][0].fusion == 'concat'
  assert table['fast_none'][0].fast is None and table['slow_none'][0].slow is None
  for name in ('vila_hd_table1', 'vila_hd_table12'):
    table = names_of(name)['ROWS']
    for row, share in SHARES.items():
      encoder = table[row][0].encoder
      patches = sum((side // 14) ** 2 for side in encoder.tower.scales[1:])
      assert abs(encoder.tokens / patches - share) < 0.006, (row, encoder.tokens, patches)
      assert encoder.tower.scales[-1] == int(row.split('_')[1])
  tested = names_of('vila_hd_table4')['TABLE'].tested
  assert tested['ps3_1512_50'].knobs == {'encoder': {'tokens': 7290}}
  assert tested['ps3_3780_20'].knobs == {'encoder': {'tokens': 17496}}
  assert tested['fastv_1512_25'].knobs['fastv'] == {'layer': 2, 'ratio': 0.75}
  assert tested['tome_1512_25'].knobs['prune'] == {'method': 'tome', 'keep': 0.25}
  rows = {row: entries_of(path_of('vila_hd_table6'), [], only=row)[0].stages
          for row in ('no_target_selection', 'no_scale_position', 'no_extra_position', 'one_scale',
                      'intra_image_contrast')}
  contrast = lambda row: rows[row][0][1].training.objective.contrast
  assert not contrast('no_target_selection').select_target
  assert contrast('intra_image_contrast').intra_image
  assert not rows['no_scale_position'][0][1].model.encoder.residual
  assert not rows['no_scale_position'][2][1].model.encoder.tower.residual
  assert not rows['no_extra_position'][2][1].model.encoder.positions
  assert rows['one_scale'][1][1].model.encoder.tower.scales == (378, 1512)
  modes = names_of('vila_hd_table7')['MODELS']
  assert {way: m.encoder.mode for way, m in modes.items()} == {
    'random': 'random', 'bottom_up': 'after_image', 'top_down': 'after_prompt'}
  data = {row: entries_of(path_of('vila_hd_table8'), [], only=row)[0].config.data.background
          for row in ('with', 'without')}
  assert data['without'] is None and data['with'].share == 0.5
  crop = names_of('pheye_table4')['ROWS']
  assert crop['cls'][0].encoder.tokens == 1 and crop['all'][0].encoder.tokens == 49
  assert crop['cross'][0].fusion.inside
  five = names_of('pheye_table5')['ROWS']
  assert five['monkey_448'][0].encoder.tokens == five['perceiver_448'][0].encoder.tokens == 257
