"""Evaluation inside a run: its data, bad rows, kills; what W&B and TensorBoard get."""

import json
import pathlib
import sys
import types

import numpy as np
from PIL import Image
import pytest

from hrvlm_jax.checkpoint import layout, store
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.training import loop
from hrvlm_jax.training.answers import Answers
from hrvlm_jax.training.metrics import MetricsWriter, read_metrics
from hrvlm_jax.training.workdir import Workdir
from tests.training.test_loop import config, data  # noqa: F401 (a fixture)
from tests.training.test_workdir import bucket  # noqa: F401 (a fixture)


def row(i, image='0.png', answer='A', question='<image>\nWhat?'):
  turns = [{'from': 'human', 'value': question}, {'from': 'gpt', 'value': answer}]
  return {'id': str(i), 'conversations': turns} | ({'image': image} if image else {})


@pytest.fixture(scope='module')
def folder(data):  # noqa: F811
  """Where the pictures are; beside them one that ends too early, and one too long."""
  place = pathlib.Path(data).parent
  Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(
    place / 'torn.jpg')
  strip = Image.new('RGB', (900, 20))  # more views than tokens
  strip.save(place / 'strip.png')
  (place / 'torn.jpg').write_bytes((place / 'torn.jpg').read_bytes()[:700])
  return place


def test_rows_that_cannot_be_used_are_left_out(data, folder, tmp_path, capsys):  # noqa: F811
  bad = [row(0), row(1, image=None, question='2+2?', answer='4'), row(2, image='none.png'),
         row(3, image='strip.png'), row(4, image='torn.jpg'),
         row(5) | {'conversations': row(5)['conversations'][:1]}, row(6)]
  (folder / 'held_out.json').write_text(json.dumps(bad))
  options = {'eval_every': 2, 'checkpoint_every': 2, 'steps': 4, 'mfu': False}
  c = config(data, eval=str(folder / 'held_out.json'), **options)
  assert loop.train(c, tmp_path / 'w', progress=False).step == 4
  said = capsys.readouterr().out
  assert 'eval: 2 of 7 rows cannot be used' in said and '1 conversation' in said
  for step in (2, 4):
    answers = [json.loads(line) for line in (
      tmp_path / 'w' / 'evaluation' / str(step) / 'answers.jsonl').read_text().splitlines()]
    assert [answer['id'] for answer in answers] == ['0', '1', '6'], step
  counts = [r.get('eval_bad_rows') for r in read_metrics(tmp_path / 'w') if 'eval_accuracy' in r]
  assert counts == [4, 4]
  (folder / 'held_out.json').write_text(json.dumps(bad[2:3]))
  with pytest.raises(UserError, match='none of the rows of eval can be used'):
    loop.train(c, tmp_path / 'v', progress=False)


def test_it_reads_what_training_reads(data, folder, tmp_path):  # noqa: F811
  import pyarrow as pa
  import pyarrow.parquet as pq

  rows = [row(i, image=f'{i}.png') for i in range(3)]
  pq.write_table(pa.table({
    'image': [(folder / f'{i}.png').read_bytes() for i in range(3)],
    'conversations': [r['conversations'] for r in rows]}), tmp_path / 'a.parquet')
  (tmp_path / 'folder').mkdir()
  for name in ('a.png', 'b.png'):
    (tmp_path / 'folder' / name).write_bytes((folder / '0.png').read_bytes())
    (tmp_path / 'folder' / name.replace('png', 'txt')).write_text('a picture')
  parts = {'parts': [{'name': n, 'path': data, 'images': str(folder)} for n in ('x', 'y')]}
  (tmp_path / 'm.mixture.json').write_text(json.dumps(parts))
  for name, count in (('a.parquet', 3), ('folder', 2), ('m.mixture.json', 16)):
    evaluator = Answers(Answers.Options(data=str(tmp_path / name)))
    evaluator.prepare(config(data), layout=None, workdir=tmp_path)
    assert len(evaluator.rows) == count and not evaluator.bad, name
    assert evaluator._images(evaluator.rows[0]['index'])[0].size[0] >= 20


@pytest.mark.full('training')
def test_an_evaluation_that_was_cut_off_happens_again(data, tmp_path, monkeypatch):  # noqa: F811
  options = {'eval_every': 2, 'eval_images': 2, 'eval_overlays': 0, 'checkpoint_every': 2,
             'steps': 4, 'mfu': False}
  c = config(data, eval=data, **options)
  real = Answers.run

  def cut(self, params, step):
    if step == at:
      raise OSError('the machine is gone')
    return real(self, params, step)

  for at in (2, 4):
    monkeypatch.setattr(Answers, 'run', cut)
    with pytest.raises(OSError, match='gone'):
      loop.train(c, tmp_path, progress=False)
    assert store.steps(tmp_path)[-1] == at  # saved before it was evaluated
    monkeypatch.setattr(Answers, 'run', real)
    if at == 2:
      loop.train(config(data, eval=data, **(options | {'steps': 3, 'eval_every': 2})), tmp_path,
                 progress=False)
      steps = [r['step'] for r in read_metrics(tmp_path) if 'eval_accuracy' in r]
      assert steps == [2, 3]
  loop.train(c, tmp_path, progress=False)
  assert [r['step'] for r in read_metrics(tmp_path) if 'eval_accuracy' in r] == [2, 3, 4]
  before = read_metrics(tmp_path)
  loop.train(c, tmp_path, progress=False)  # nothing is left to do
  assert read_metrics(tmp_path) == before


def board_steps(folder, tag='loss'):
  """What TensorBoard would show: events of all files in order, and what a restart purges."""
  from tensorboardX.proto import event_pb2
  from tensorboardX.record_writer import masked_crc32c  # noqa: F401 (the format of the files)

  shown = []
  for file in sorted(folder.iterdir()):
    content, place = file.read_bytes(), 0
    while place < len(content):
      size = int.from_bytes(content[place:place + 8], 'little')
      event = event_pb2.Event.FromString(content[place + 12:place + 12 + size])
      place += 16 + size
      if event.session_log.status == event_pb2.SessionLog.START:
        shown = [step for step in shown if step < event.step]
      shown += [event.step for value in event.summary.value if value.tag == tag]
  return shown


def test_tensorboard_has_every_step_once(tmp_path):
  def write(start, steps, close=True):
    writer = MetricsWriter(tmp_path, start=start, total=8, progress=False)
    for step in steps:
      writer.write(step, {'loss': 1.0})
    (writer.close if close else writer.flush)()
    return writer

  kept = write(0, (1, 2, 3, 4), close=False)  # then killed: on the disk since the checkpoint
  assert board_steps(tmp_path / 'tensorboard') == [1, 2, 3, 4]
  write(3, (4, 5, 6))
  assert sorted(board_steps(tmp_path / 'tensorboard')) == [1, 2, 3, 4, 5, 6]
  kept.close()


def wandb_stub(monkeypatch):
  """The options of every start."""
  started = []
  run = types.SimpleNamespace(log=lambda values, step: None, finish=lambda: None)
  monkeypatch.setitem(sys.modules, 'wandb', types.SimpleNamespace(
    init=lambda **options: started.append(options) or run))
  return started


def test_a_machine_in_a_bucket_is_lost_without_a_word(
    data, bucket, monkeypatch):  # noqa: F811
  """What a checkpoint needs is there with it: lines of metrics, and the name of the run at W&B."""
  to_path = layout.to_path
  monkeypatch.setattr(layout, 'to_path', lambda place: to_path(
    str(place).replace('gs://', f'{bucket}/')))
  started = wandb_stub(monkeypatch)

  def lost(step, _):
    if step == 5:
      raise OSError('the machine is gone')

  with monkeypatch.context() as patch:
    patch.setattr(Workdir, '__exit__', lambda *_: None)  # nobody is left to copy anything
    with pytest.raises(OSError, match='gone'):
      loop.train(config(data, wandb='p', mfu=False, checkpoint_every=2), 'gs://b/llava_run_7',
                 progress=False, on_step=lost)
  assert store.steps(bucket / 'b' / 'llava_run_7') == [2, 4]
  loop.train(config(data, wandb='p', mfu=False), 'gs://b/llava_run_7', progress=False)
  assert [r['step'] for r in read_metrics(bucket / 'b' / 'llava_run_7')] == [1, 2, 3, 4, 5, 6]
  assert len(started) == 2 and started[0]['id'] == started[1]['id']
  assert {o['name'] for o in started} == {'llava_run_7'}


def test_wandb_goes_on_with_the_run_of_the_address(tmp_path, monkeypatch):
  started = wandb_stub(monkeypatch)
  for _ in range(2):
    MetricsWriter(tmp_path / '..' / tmp_path.name, start=0, total=1, progress=False, wandb='p',
                  name='llava_run_7').close()
  assert started[0]['id'] == started[1]['id'] and {o['name'] for o in started} == {'llava_run_7'}


def test_an_odd_line_of_metrics_is_passed_over(tmp_path):
  (tmp_path / 'metrics.jsonl').write_bytes(
    b'{"step": 1, "loss": 2.0}\n[1]\n7\n{"step": "x"}\n\xff\xfe\n'
    + b'[' * 100_000 + b'\n{"step": 2, "loss": 1.0}\n{"st')
  assert [r['step'] for r in read_metrics(tmp_path)] == [1, 2]
  MetricsWriter(tmp_path, start=1, total=3, progress=False, tensorboard=False).close()
  assert [r['step'] for r in read_metrics(tmp_path)] == [1]
