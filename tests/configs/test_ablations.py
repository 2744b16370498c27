"""Every row of every ablation table: a run config whose loss can be traced at its full size."""

import pathlib
import runpy

import jax
import pytest

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.execution import Execution
from hrvlm_jax.lab.sweep import entries_of
from hrvlm_jax.training.objectives import objective_of
from hrvlm_jax.training.optimizer import groups_of
from hrvlm_jax.training.program import run_dtypes
from hrvlm_jax.training.step import init_state
from hrvlm_jax.vlm import model as vlm
from tests import levels

FOLDER = pathlib.Path(__file__).parents[2] / 'configs' / 'ablations'
FILES = sorted(path.name for path in FOLDER.glob('*.py'))
ROWS = [(name, row) for name in FILES for row in runpy.run_path(str(FOLDER / name))['ROWS']]


def test_the_tables_of_the_papers_are_there():
  assert set(FILES) >= {'llava_hr_table2.py', 'llava_hr_table3.py', 'pheye_variants.py',
                        'vila_hd_table1.py'}
  for name in FILES:
    text = runpy.run_path(str(FOLDER / name))['__doc__']
    assert f'hrvlm sweep --config configs/ablations/{name}' in text
    assert all(word in text for word in ('Hardware:', 'Time:', 'Expected:'))


@pytest.mark.parametrize('name', FILES)
def test_a_sweep_takes_the_file(name):
  entries = entries_of(str(FOLDER / name), [('seed', '3,4')])
  rows = runpy.run_path(str(FOLDER / name))['ROWS']
  assert [entry.name for entry in entries] == [f'{row}_seed={s}' for row in rows for s in (3, 4)]
  assert any(entry.published for entry in entries)
  assert len({str(entry.config.model) for entry in entries}) >= len(rows) - 1
  with pytest.raises(UserError, match='row'):
    entries_of(str(FOLDER / name), [], only='nothing_of_the_kind')


@pytest.mark.parametrize('name, row', levels.rows(
  'recipes', ROWS, first={name: (name, row) for name, row in reversed(ROWS)}.values()))
def test_the_loss_of_a_row_can_be_traced(name, row):
  """State and loss, from shapes alone: nothing is computed."""
  config = entries_of(str(FOLDER / name), [], only=row)[0].config
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


# What a row of a table differs in, typed off the papers: file, row -> (place, value).
GATES = {'default': 'tanh', 'gate_sigmoid': 'sigmoid', 'gate_hsigmoid': 'hsigmoid'}
# PS3, Table 1: share of the patches of all high-resolution scales that is selected.
SHARES = {'ps3_756_44': 0.44, 'ps3_1512_20': 0.20, 'ps3_1512_44': 0.44, 'ps3_3780_18': 0.18}


def test_rows_are_what_their_names_say():
  table = runpy.run_path(str(FOLDER / 'llava_hr_table3.py'))['ROWS']
  assert {row: table[row][0].adapters.gate for row in GATES} == GATES
  assert table['direction_low_to_high'][0].adapters.direction == 'low_to_high'
  assert table['fusion_concat'][0].fusion == 'concat'
  assert table['fast_none'][0].fast is None and table['slow_none'][0].slow is None
  table = runpy.run_path(str(FOLDER / 'vila_hd_table1.py'))['ROWS']
  for row, share in SHARES.items():
    encoder = table[row][0].encoder
    patches = sum((side // 14) ** 2 for side in encoder.tower.scales[1:])
    assert abs(encoder.tokens / patches - share) < 0.006, (row, encoder.tokens, patches)
    assert encoder.tower.scales[-1] == int(row.split('_')[1])
