"""What a config refuses, steps after which nothing is kept; the advice of messages is followed."""

import dataclasses
import errno
import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hrvlm_jax.checkpoint import store
from hrvlm_jax.cli.main import main
from hrvlm_jax.core import paths
from hrvlm_jax.core.config import from_dict, to_dict
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.language.prompt import tokenizer_of
from hrvlm_jax.training import bad_steps, loop, objectives
from hrvlm_jax.training.config import Group, OptimizerConfig, RunConfig
from hrvlm_jax.training.metrics import MetricsWriter, read_metrics
from hrvlm_jax.training.next_token import NextToken
from hrvlm_jax.training.optimizer import groups_of, optimizer
from hrvlm_jax.vlm import model as vlm
from tests.training.test_loop import MODEL, config, data  # noqa: F401 (a fixture)

NAN, INF = float('nan'), float('inf')


class Poison(NextToken):
  """Next tokens, and not a number for a batch in which the answer A3 is learned."""

  def loss(self, fn, params, batch, **options):
    total, count = super().loss(fn, params, batch, **options)
    bad = (batch['labels'] == tokenizer_of('byte').encode('3')[0]).any()
    return jnp.where(bad, jnp.nan, 1) * total, count


objectives.register('poison', f'{__name__}:Poison')


def change(values, key, value):
  *groups, name = key.split('.')
  for group in groups:
    values = values[group]
  values[name] = value


@pytest.mark.parametrize('key, values', [
  ('training.optimizer.learning_rate', (NAN, INF, -1.0)),
  ('training.optimizer.b1', (1.0, -0.1, NAN)), ('training.optimizer.b2', (1.0, 2.0)),
  ('training.optimizer.eps', (0.0, INF)), ('training.optimizer.clip_norm', (0.0, -1.0, NAN, INF)),
  ('training.optimizer.weight_decay', (-1.0, NAN)), ('training.optimizer.warmup', (INF, -1.0)),
  ('training.optimizer.ema', (0.0, 1.0)), ('training.steps', (0, -1)), ('training.keep', (0,)),
  ('training.keep_every', (0,)), ('training.loss_chunk', (0, -1)), ('training.eval_every', (-1,)),
  ('training.eval_images', (0,)), ('training.log_every', (0,)), ('training.groups', ([],)),
  ('training.spike_norm', (0.0, NAN)), ('training.bad_steps', (0,)),
  ('training.stall_minutes', (-1.0, NAN)), ('training.init_allow', (['('],)),
  ('data.lengths', ([], [-1], [64, 0])), ('data.workers', (-1,)), ('data.shards', (0,)),
  ('data.slots', (0,)), ('data.max_length', (0,)), ('data.group', ([0, 1],)), ('data.train', ('',)),
  ('seed', (-1, 2**32)), ('mesh.data', (0,)), ('data.packing.window', (0,)),
])
def test_numbers_that_cannot_be_meant_are_refused(key, values):
  for value in values:
    wrong = to_dict(config('x.json'))
    change(wrong, key, value)
    with pytest.raises(UserError) as error:
      from_dict(RunConfig, wrong, path='config')
    assert key.rsplit('.', 1)[-1] in str(error.value), error.value


def test_all_of_them_in_one_message():
  wrong = to_dict(config('x.json'))
  for key, value in (('training.optimizer.b1', 1.0), ('training.optimizer.clip_norm', 0.0),
                     ('training.steps', 0), ('data.lengths', []), ('seed', -1),
                     ('training.groups', [{'pattern': '('}])):
    change(wrong, key, value)
  with pytest.raises(UserError) as error:
    from_dict(RunConfig, wrong, path='config')
  for text in ('b1 must lie in [0, 1), got 1.0',
               'clip_norm must be above 0, got 0.0',
               'None does not clip', 'steps must be at least 1, got 0', 'seed',
               'lengths must name at least one, got none', 'is no regular expression'):
    assert text in str(error.value), error.value
  assert '5 problems' in str(error.value)


def test_patterns_that_name_nothing():
  flat = vlm.build(MODEL).abstract
  t = config('x.json').training
  ask = lambda **changes: groups_of(dataclasses.replace(t, **changes), flat)
  everything = Group(pattern='.*')
  with pytest.raises(UserError, match=r"'vison/tower/.*' matches no parameter .nearest: vision/"):
    ask(groups=(Group(pattern='vison/tower/.*', frozen=True), everything))
  with pytest.raises(UserError, match='freezes nothing: groups before it name all its'):
    ask(groups=(everything, Group(pattern='vision/tower/.*', frozen=True)))
  with pytest.raises(UserError, match="init_allow: 'vison/.*' matches no parameter"):
    ask(init_allow=('vison/.*',))
  assert ask(groups=(Group(pattern='.*/(bias|nothing)', decay=False), everything))
  assert ask(groups=(Group(pattern='vision/tower/.*', frozen=True),
                     Group(pattern='(?!vision/tower/).*'), everything))


@pytest.mark.parametrize('name', ['adamw', 'muon'])
@pytest.mark.parametrize('change', [{'b1': 0.5}, {'b2': 0.5}, {'eps': 0.1}])
def test_settings_of_the_optimizer_act(name, change):
  leaves = {'blocks/a/kernel': jnp.ones((2, 3, 4)), 'bias': jnp.ones(3)}
  grads = [jax.tree.map(lambda x, s=s: x * s, leaves) for s in (1e-3, 2e-3)]
  groups = dict.fromkeys(leaves, Group(pattern='.*'))

  def updates(**options):
    t = config('x', optimizer=OptimizerConfig(name=name, learning_rate=1e-3, **options)).training
    tx = optimizer(t, groups)
    state = tx.init(leaves)
    for grad in grads:
      found, state = tx.update(grad, state, leaves)
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(found)])

  assert not np.array_equal(updates(), updates(**change))


@pytest.fixture(scope='module')
def run(data, tmp_path_factory):  # noqa: F811
  """Four steps, a checkpoint of each."""
  workdir = tmp_path_factory.mktemp('bad') / 'run'
  loop.train(config(data, steps=4, checkpoint_every=1, keep=4, mfu=False), workdir, progress=False)
  assert store.steps(workdir) == [1, 2, 3, 4]
  return workdir


def go(data, workdir, *, resume_from=None, **options):  # noqa: F811
  c = config(data, **{'mfu': False, 'checkpoint_every': 1, 'keep': 2, **options})
  return loop.train(c, workdir, progress=False, resume_from=resume_from)


def test_no_checkpoint_of_a_bad_state_and_the_advice_works(data, run, tmp_path):  # noqa: F811
  """Parameters that overflow while the loss is finite; then each thing the message says to do."""
  wild = OptimizerConfig(learning_rate=1e30)
  shutil.copytree(run, tmp_path / 'w')
  with pytest.raises(UserError) as error:
    go(data, tmp_path / 'w', optimizer=wild)
  message = str(error.value)
  assert 'step 5 is bad' in message and 'parameter of' in message and 'bad_batch_5.npz' in message
  assert 'projector' in message or 'language' in message  # tensors are named
  assert store.steps(tmp_path / 'w')[-1] == 4 and not bad_steps.not_finite(tmp_path / 'w')
  assert '--resume-from 3' in message and 'lower training.optimizer.learning_rate' in message
  assert 'on_bad_step=skip' not in message  # would not help
  back = int(re.search(r'--resume-from (\d+)', message).group(1))
  assert go(data, tmp_path / 'w', resume_from=back).step == 6
  assert (tmp_path / 'w' / 'set_aside' / '4').is_dir()
  # The same words again, as a launcher that restarts would say: no second time.
  assert go(data, tmp_path / 'w', resume_from=back, steps=7).step == 7
  assert [row['step'] for row in read_metrics(tmp_path / 'w')] == [1, 2, 3, 4, 5, 6, 7]
  shutil.copytree(run, tmp_path / 'v')
  assert go(data, tmp_path / 'v').step == 6  # with a lower rate, from the last checkpoint
  with pytest.raises(UserError, match='no whole checkpoint of that step; there are'):
    go(data, tmp_path / 'v', resume_from=99)


def test_a_bad_batch_is_left_out_when_asked(data, tmp_path):  # noqa: F811
  poison = {'objective': 'poison', 'steps': 6}
  with pytest.raises(UserError, match='the loss is nan') as error:
    go(data, tmp_path, **poison)
  assert 'gradient of' in str(error.value) and 'on_bad_step=skip' in str(error.value)
  seen = {}
  c = config(data, mfu=False, on_bad_step='skip', optimizer=OptimizerConfig(
    learning_rate=1e-3, ema=0.5), **poison)
  copy = lambda state: jax.tree.map(np.array, {k: state[k] for k in ('params', 'opt', 'ema')})
  result = loop.train(c, tmp_path / 'skip', progress=False,
                      on_step=lambda step, state: seen.update({step: copy(state)}))
  assert result.step == 6
  rows = read_metrics(tmp_path / 'skip')
  bad = [row['step'] for row in rows if row['loss'] == 'nan']
  assert len(bad) == 3 and rows[-1]['skipped_steps'] == 3
  for step in range(2, 7):
    same = all(jax.tree.leaves(jax.tree.map(np.array_equal, seen[step], seen[step - 1])))
    assert same == (step in bad)
  assert not bad_steps.not_finite(tmp_path / 'skip')
  # Counted over starts, and bounded.
  with pytest.raises(UserError, match='not left out as 3 before it were, which is all'):
    go(data, tmp_path / 'skip', **(poison | {'steps': 12}), on_bad_step='skip', bad_steps=3,
       optimizer=c.training.optimizer)


def test_spikes(data, tmp_path):  # noqa: F811
  with pytest.raises(UserError, match=r'gradient norm .* \(training.spike_norm=1e-09\)'):
    go(data, tmp_path / 'a', spike_norm=1e-9)
  with pytest.raises(UserError, match='not left out as 2 before it were'):
    go(data, tmp_path / 'b', spike_norm=1e-9, on_bad_step='skip', bad_steps=2)


def test_parameters_that_hold_nan_are_named_at_once(data, run, tmp_path):  # noqa: F811
  params = paths.flatten(store.load_params(run, shardings='host'))
  name = next(path for path in params if path.startswith('language/') and 'kernel' in path)
  params[name] = np.full_like(params[name], np.nan)
  store.save_params(tmp_path / 'start', paths.unflatten(params), store.load_config(run))
  with pytest.raises(UserError, match=f'start holds NaN or infinity in 1 tensors .{name}'):
    go(data, tmp_path / 'w', init_from=str(tmp_path / 'start'))


def test_a_lost_position_in_the_data_is_refused(data, run, tmp_path, monkeypatch):  # noqa: F811
  shutil.copytree(run, tmp_path / 'w')
  (tmp_path / 'w' / 'checkpoints' / '4' / 'run' / 'data' / '0.json').unlink()
  with pytest.raises(UserError, match='0.json: cannot be read .*whole one is that of step 3'):
    go(data, tmp_path / 'w')
  monkeypatch.setenv('HRVLM_VERIFY', '0')
  with pytest.raises(UserError, match='position in the data is lost .*--resume-from STEP'):
    go(data, tmp_path / 'w')
  monkeypatch.delenv('HRVLM_VERIFY')
  assert go(data, tmp_path / 'w', resume_from='last-whole').step == 6


@pytest.mark.full('training')
def test_a_full_disk_leaves_nothing_half_written(data, run, tmp_path, monkeypatch):  # noqa: F811
  """Where a run writes at its start and at every step."""
  shutil.copytree(run, tmp_path / 'w')
  before = (tmp_path / 'w' / 'config.json').read_text()
  real = pathlib.Path.write_text

  def full(self, text, *arguments, **options):
    if self.parent == tmp_path / 'w' and self.name == 'config.tmp':
      real(self, text[:10])
      raise OSError(errno.ENOSPC, 'No space left on device', str(self))
    return real(self, text, *arguments, **options)

  with monkeypatch.context() as patch:
    patch.setattr(pathlib.Path, 'write_text', full)
    with pytest.raises(UserError, match='cannot write .*config.tmp: the disk is full'):
      go(data, tmp_path / 'w')
  assert (tmp_path / 'w' / 'config.json').read_text() == before
  with monkeypatch.context() as patch:
    def no_line(*arguments, **options):
      raise OSError(errno.ENOSPC, 'No space left on device')

    patch.setattr(MetricsWriter, 'write', no_line)
    with pytest.raises(UserError, match='cannot write .*/w: the disk is full'):
      go(data, tmp_path / 'w')
  assert go(data, tmp_path / 'w').step == 6


@pytest.mark.full('training')
def test_rows_without_a_target(data, tmp_path):  # noqa: F811
  rows = json.loads(pathlib.Path(data).read_text())
  folder = str(data).rsplit('/', 1)[0]
  for row in rows[:4]:
    row['conversations'][0]['value'] = '<image>\n' + 'word ' * 8
  mixed, cut = tmp_path / 'mixed.json', tmp_path / 'cut.json'
  mixed.write_text(json.dumps(rows))
  cut.write_text(json.dumps(rows[:4]))
  c = config(str(mixed), steps=4, mfu=False)
  short = lambda c: dataclasses.replace(c, data=dataclasses.replace(
    c.data, images=folder, max_length=40))
  result = loop.train(short(c), tmp_path / 'w', progress=False)
  assert result.bad_rows == {'no target': 8}
  c = dataclasses.replace(c, data=dataclasses.replace(c.data, train=str(cut)))
  with pytest.raises(UserError, match='no answer to learn within data.max_length=40'):
    loop.train(short(c), tmp_path / 'v', progress=False)


def test_the_command_line_names_the_damage_and_goes_on(data, run, tmp_path, capsys):  # noqa: F811
  """`hrvlm train` on a damaged newest checkpoint, `hrvlm doctor`, `--resume-from last-whole`."""
  workdir = tmp_path / 'w'
  shutil.copytree(run, workdir)
  (tmp_path / 'run.py').write_text(
    f'import ml_collections\nvalues = {to_dict(config(data, mfu=False))!r}\n'
    'def get_config():\n  return ml_collections.ConfigDict(values)\n')
  (damaged,) = (workdir / 'checkpoints' / '4' / 'params' / 'ocdbt.process_0' / 'd').iterdir()
  content = bytearray(damaged.read_bytes())
  content[-9] ^= 1
  damaged.write_bytes(content)
  command = ['train', '--config', str(tmp_path / 'run.py'), '--workdir', str(workdir), '--quiet']
  assert main(command) == 2
  said = capsys.readouterr().err
  assert damaged.name in said and '/checkpoints/4' in said and 'Traceback' not in said
  assert 'newest whole one is that of step 3: hrvlm train --resume-from 3 (or last-whole)' in said
  assert main(['doctor', str(workdir)]) == 1
  report = capsys.readouterr().out
  assert report.count('all as written') == 3 and damaged.name in report
  assert main([*command, '--resume-from', 'nonsense']) == 2
  assert 'expected the step of a checkpoint, or last-whole' in capsys.readouterr().err
  assert main([*command, '--resume-from', 'last-whole']) == 0
  assert 'going back to step 3' in capsys.readouterr().out and store.steps(workdir)[-1] == 6
  assert main(['doctor', str(workdir)]) == 0
