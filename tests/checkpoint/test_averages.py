"""The moving average of a training is what a reader gets, unless it asks for the last step."""

import numpy as np
import pytest

from hrvlm_jax.checkpoint import averages, hf, store
from hrvlm_jax.checkpoint.store import TrainStore
from hrvlm_jax.cli.main import main
from hrvlm_jax.core import paths
from hrvlm_jax.core.config import to_dict
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.language.prompt import tokenizer_of
from hrvlm_jax.systems import registry
from tests.interop.releases import random_params

PATH = 'projector/fc1/kernel'


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """(work directory with an average of the projector, its parameters)."""
  folder = tmp_path_factory.mktemp('averages') / 'run'
  config = registry.get('single_view').tiny()
  params = random_params(config)
  mean = {path: x + 1 for path, x in paths.flatten(params).items() if path.startswith('projector')}
  with TrainStore(folder, config={'model': to_dict(config)}) as kept:
    kept.save(3, {'params': params, 'step': np.int32(3), 'ema': mean})
  (folder / 'tokenizer').mkdir()
  tokenizer_of('byte').save(folder / 'tokenizer')
  return folder, paths.flatten(params)


def test_the_average_is_taken_where_there_is_one(run):
  folder, params = run
  for weights, more in ((None, 1), ('ema', 1), ('raw', 0)):
    found = paths.flatten(averages.load_params(folder, weights=weights))
    np.testing.assert_allclose(found[PATH], params[PATH] + more, rtol=1e-6)
    np.testing.assert_array_equal(found['language/norm/scale'], params['language/norm/scale'])
    np.testing.assert_allclose(averages.stored(folder, weights)(PATH), params[PATH] + more,
                               rtol=1e-6)
  assert averages.which(folder, None)[0] == 'ema'
  assert 'moving average (ema)' in averages.which(folder, None)[1]
  with pytest.raises(UserError, match='expected raw or ema'):
    averages.which(folder, 'mean')


def test_verbs_say_which_and_export_writes_it(run, tmp_path, capsys):
  folder, params = run
  argv = ['export', '--checkpoint', str(folder), '--to']
  assert main([*argv, str(tmp_path / 'mean #2 %?')]) == 0
  assert 'moving average (ema), as in-run evaluation judges' in capsys.readouterr().out
  assert main([*argv, str(tmp_path / 'raw'), '--weights', 'raw']) == 0
  assert 'those of the last step (raw)' in capsys.readouterr().out
  name = 'model.mm_projector.0.weight'
  for target, more in (('mean #2 %?', 1), ('raw', 0)):
    np.testing.assert_allclose(hf.TensorFolder(tmp_path / target)[name].T, params[PATH] + more,
                               rtol=1e-6)
  assert main(['convert', '--from', str(tmp_path / 'raw'), '--to', str(tmp_path / 'ck')]) == 0
  np.testing.assert_array_equal(store.load_leaf(tmp_path / 'ck', PATH), params[PATH])
  assert averages.which(tmp_path / 'ck', None) == ('raw', '')
  assert main(['export', '--checkpoint', str(tmp_path / 'ck'), '--to', str(tmp_path / 'x'),
               '--weights', 'ema']) == 2
  assert 'take --weights raw' in capsys.readouterr().err
