"""Packed rows: what the model computes of an example does not depend on its neighbours."""

import functools
import json

import jax
import numpy as np
from PIL import Image
import pytest

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.data.packing import Packing
from hrvlm_jax.data.pipeline import neighbours
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.training.batches import make_batches
from hrvlm_jax.training.config import DataConfig, OptimizerConfig, RunConfig, TrainingConfig
from hrvlm_jax.training.next_token import NextToken
from hrvlm_jax.vlm import model as vlm
from tests import levels

SIZES = [(20, 30), (200, 90), None, (64, 64), (150, 160), (90, 40), (33, 31), None, (128, 96),
         (40, 40), (300, 50), (77, 99)]
BAD = 5


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Twelve rows: images of many sizes, text alone, one image that is damaged after its header."""
  path = tmp_path_factory.mktemp('packing')
  rng = np.random.default_rng(0)
  rows = []
  for i, size in enumerate(SIZES):
    talk = [{'from': 'human', 'value': ('<image>\n' if size else '') + 'What?' * (i % 4 + 1)},
            {'from': 'gpt', 'value': f'{i}' * (3 * i + 1)}]
    row = {'id': str(i), 'conversations': talk}
    if size:
      pixels = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
      Image.fromarray(pixels).save(path / f'{i}.png')
      row['image'] = f'{i}.png'
    rows.append(row)
  (path / 'good.json').write_text(json.dumps(rows))
  data = (path / f'{BAD}.png').read_bytes()
  (path / 'cut.png').write_bytes(data[:len(data) // 2])
  rows[BAD]['image'] = 'cut.png'
  rows[2]['image'] = 'none.png'
  (path / 'bad.json').write_text(json.dumps(rows))
  (path / 'both.mixture.json').write_text(json.dumps({'parts': [
    {'path': 'good.json', 'weight': 2, 'format': {'turns': 1, 'suffix': ' Be brief.'}},
    {'path': 'bad.json', 'weight': 1}], 'size': 18}))
  return path


def config(system, file, *, lengths, batch_size=6, accumulate=1, seed=1, **data):
  return RunConfig(
    model=system if isinstance(system, ModelConfig) else registry.get(system).tiny(),
    data=DataConfig(train=str(file), lengths=lengths, **data), seed=seed,
    training=TrainingConfig(steps=1, batch_size=batch_size, accumulate=accumulate,
                            optimizer=OptimizerConfig(learning_rate=1e-3)))


LENGTHS = {'mc_llava': (256, 320, 768, 1536), 'anyres': (160, 320, 768, 1536),
           'llava_hr': (320, 512, 768, 1536)}


@pytest.mark.parametrize('system', levels.rows('training', sorted(LENGTHS), first=['mc_llava']))
def test_packed_rows_train_as_rows_of_their_own(folder, system):
  """Loss, number of targets and gradients of a step, 1e-6."""
  lengths = LENGTHS[system]
  plain = next(make_batches(config(system, folder / 'good.json', lengths=lengths)))
  packed = next(make_batches(config(system, folder / 'good.json', lengths=lengths,
                                    packing=Packing(rows=2))))
  assert packed['tokens'].shape[0] == 2 and plain['tokens'].shape[0] == 6
  assert packed['segments'].max() >= 3
  assert packed['valid'].sum() == plain['valid'].sum()
  starts = packed['positions'][packed['valid']] == 0
  assert starts.sum() == 6  # positions restart in every example
  fn = vlm.build(registry.get(system).tiny())
  params = fn.init(jax.random.key(0))

  def loss(params, batch):
    total, count = NextToken(None).loss(fn, params, batch, key=None, chunk=64)
    return total / count, count

  with jax.default_matmul_precision('highest'):
    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (one, targets), grad = step(params, plain)
    (two, other), same = step(params, packed)
  assert targets == other > 50
  np.testing.assert_allclose(two, one, rtol=1e-6)
  for a, b in zip(jax.tree.leaves(grad), jax.tree.leaves(same)):
    np.testing.assert_allclose(b, a, atol=1e-6 * max(1, float(np.abs(a).max())))


def stream(folder, count=None, host=0, hosts=None, **options):
  if hosts is not None:
    options['own'] = functools.partial(neighbours, host=host, hosts=hosts)
  batches = make_batches(config(
    'mc_llava', folder / options.pop('file', 'good.json'), lengths=(256, 768, 1536),
    **options.pop('run', {}), **options.pop('data', {}),
    packing=Packing(**({'rows': 4, 'window': 3} | options.pop('packing', {})))), **options)
  return batches if count is None else ([next(batches) for _ in range(count)], batches)


def same(a, b):
  flat_a, flat_b = jax.tree.leaves_with_path(a), jax.tree.leaves_with_path(b)
  assert [p for p, _ in flat_a] == [p for p, _ in flat_b]
  for (path, x), (_, y) in zip(flat_a, flat_b):
    np.testing.assert_array_equal(x, y, err_msg=str(path))


@pytest.mark.parametrize('accumulate', levels.rows('training', [1, 2], first=[2]))
def test_hosts_make_the_same_global_batches(folder, accumulate):
  """1, 2 and 4 hosts; the last with bad rows, which every host counts once."""
  run = {'batch_size': 16, 'accumulate': accumulate}
  options = {'run': run, 'data': {'shards': 4}, 'packing': {'rows': 8}, 'file': 'bad.json'}
  whole, alone = stream(folder, 3, **options)
  axis = int(accumulate > 1)
  for hosts in (2, 4):
    parts = [stream(folder, 3, **options, host=host, hosts=hosts) for host in range(hosts)]
    for step in range(3):
      joined = jax.tree.map(lambda *x: np.concatenate(x, axis), *(made[step] for made, _ in parts))
      same(joined, whole[step])
    assert sum((batches.counts for _, batches in parts), start=type(alone.counts)()) == alone.counts
  assert alone.counts['missing'] and alone.counts['damaged']
  assert dict(alone.counts) == {'missing': 4, 'damaged': 4}  # 48 positions are 4 epochs


@pytest.mark.parametrize('workers', levels.rows('training', [0, 1], first=[1]))
def test_resume_in_the_middle_of_a_window(folder, workers):
  """With workers, shuffling, mixing, bad rows and packing on; then on two hosts."""
  options = {'run': {'batch_size': 4}, 'data': {'shards': 2}, 'packing': {'rows': 2},
             'file': 'both.mixture.json'}
  whole, reference = stream(folder, 8, **options)
  _, batches = stream(folder, 4, **options)  # windows have 3 steps
  state = json.loads(json.dumps(batches.get_state()))
  again = stream(folder, **options | {'data': {'shards': 2, 'workers': workers}})
  again.set_state(state)
  for want in whole[4:]:
    same(next(again), want)
  assert again.counts == reference.counts
  again.close()
  halves = []  # two hosts go on where one stopped
  for host in range(2):
    half = stream(folder, **options, host=host, hosts=2)
    half.set_state(state)
    halves.append([next(half) for _ in range(3)])
  for want, *parts in zip(whole[4:], *halves):
    same(jax.tree.map(lambda *x: np.concatenate(x), *parts), want)
  other = stream(folder, **options | {'packing': {'rows': 2, 'window': 2}})
  with pytest.raises(UserError, match='packing was 2 packed rows, window 3.*window 2'):
    other.set_state(state)


def test_every_example_comes_once(folder):
  """The answers that two epochs train are those of the file, however they are dealt out."""
  batches = stream(folder, run={'batch_size': 4}, packing={'rows': 2, 'window': 3})
  answers = []
  for batch in (next(batches) for _ in range(6)):
    for row in range(2):
      for segment in range(1, batch['segments'][row].max() + 1):
        labels = batch['labels'][row][batch['segments'][row] == segment]
        answers.append(bytes(labels[(labels >= 0) & (labels < 256)].tolist()).decode())
  assert sorted(answers) == sorted([f'{i}' * (3 * i + 1) for i in range(12)] * 2)


def test_bad_rows_leave_holes(folder):
  (batch,), batches = stream(folder, 1, file='bad.json', run={'batch_size': 12},
                             packing={'rows': 4, 'window': 1})
  assert dict(batches.counts) == {'missing': 1, 'damaged': 1}
  assert sum(len(set(row[row > 0])) for row in batch['segments']) == 10
  with pytest.raises(UserError, match='none.png: no such file'):
    next(stream(folder, file='bad.json', run={'batch_size': 12}, data={'bad_rows': 'fatal'},
                packing={'rows': 4, 'window': 1}))


def test_what_cannot_be_packed_is_refused(folder):
  for system, words in (('pheye', 'cross-attention'), ('vila_hd', 'first pass')):
    with pytest.raises(UserError, match=words):
      make_batches(config(system, folder / 'good.json', lengths=(256,), packing=Packing(rows=2)))
  with pytest.raises(UserError, match='would undo the groups'):
    stream(folder, data={'order': 'grouped'})
  with pytest.raises(UserError, match='packing.rows=4'):
    stream(folder, run={'batch_size': 6, 'accumulate': 3}, packing={'rows': 4})
  with pytest.raises(ValueError, match='window'):
    Packing(window=0)


def test_a_host_may_own_any_shards(folder):
  """Hosts of a torus hold rows that are no neighbours; slots are a multiple of the devices."""
  run, data = {'batch_size': 8}, {'shards': 4}
  whole, _ = stream(folder, 2, run=run, data=data)

  class Layout:
    shards = 8

    def parts(self, shards):
      assert shards == 4
      return 1, 3

  batches = make_batches(config(
    'mc_llava', folder / 'good.json', lengths=(256, 768, 1536), packing=Packing(rows=4, window=3),
    **run, **data), Layout())
  assert (batches.own, batches.shards) == ((1, 3), 4)
  for want in whole:
    found = next(batches)
    cut = lambda x: np.concatenate([np.split(x, 4)[shard] for shard in (1, 3)])
    same({k: v for k, v in found.items() if k != 'views'},
         {k: cut(v) for k, v in want.items() if k != 'views'})
    slots = len(found['views']['pixels'])
    assert slots % 4 == 0  # two shards of two devices each
    pictures = lambda shard, part, n: part['views']['pixels'].reshape(
      n, -1, *part['views']['pixels'].shape[1:])[shard]
    for i, shard in enumerate((1, 3)):
      a, b = pictures(i, found, 2), pictures(shard, want, 4)
      shared = min(len(a), len(b))
      np.testing.assert_array_equal(a[:shared], b[:shared])
      assert not a[shared:].any() and not b[shared:].any()
