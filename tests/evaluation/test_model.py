"""A tiny random model through the runner: answers, likelihoods, overlays, provenance."""

import json
import os
from pathlib import Path
import subprocess
import sys

import jax
import numpy as np
from PIL import Image
import pytest

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.evaluation.model import EvaluatedModel, array_hash
from hrvlm_jax.evaluation.runner import Options, evaluate
from hrvlm_jax.language.prompt import tokenizer_of
from hrvlm_jax.systems import registry
from hrvlm_jax.vlm import model as vlm
from hrvlm_jax.vlm.answer import Answerer

SAMPLES = Path(__file__).parent / 'samples'


def build(system):
  config = registry.get(system).tiny()
  rng = np.random.default_rng(0)
  fill = lambda leaf: (0.1 * rng.standard_normal(leaf.shape)).astype(np.float32)
  params = jax.tree.map(fill, vlm.build(config).abstract)  # quicker than compiling `init`
  return EvaluatedModel(Answerer(config, params, tokenizer_of('byte')), max_new_tokens=4)


@pytest.fixture(scope='module')
def model():
  return build('mc_llava')


def test_benchmark_with_a_real_model(model, tmp_path):
  asked = model.described(name='tiny', checkpoint_hash=array_hash(model.answerer.generator.params))
  result = evaluate('needle', asked, data=SAMPLES / 'needle', out=tmp_path / 'r',
                    options=Options(batch_size=3, progress=False))
  assert result.n == 3 and result.n_missing == 0
  value = json.loads((tmp_path / 'r/result.json').read_text())
  assert value['system'] == 'mc_llava' and value['generation'] == {'max_new_tokens': 4}
  assert value['preprocessing']['encoder'] and len(value['checkpoint_hash']) == 64
  record = json.loads((tmp_path / 'r/predictions.jsonl').open().readline())
  assert record['num_image_tokens'] > 0 and 1 <= record['num_new_tokens'] <= 4
  compiled = model._queues[3].compilations()  # with other longest answers nothing is compiled anew
  evaluate('needle', model.with_longest(2).described(name='tiny'), data=SAMPLES / 'needle',
           out=tmp_path / 'short', options=Options(batch_size=3, progress=False))
  assert model._queues[3].compilations() == compiled
  value = json.loads((tmp_path / 'short/result.json').read_text())
  assert value['generation'] == {'max_new_tokens': 2}
  lines = (tmp_path / 'short/predictions.jsonl').read_text().splitlines()
  assert {json.loads(line)['num_new_tokens'] for line in lines} <= {1, 2}


def test_likelihood_is_the_loss_of_each_option(model, tmp_path):
  picture = Image.new('RGB', (60, 40), (200, 20, 20))
  triples = [(picture, 'What?', option) for option in ('red', 'a rather long option', 'red')]
  losses = model.likelihood(triples)
  assert losses[0] == pytest.approx(losses[2], rel=1e-5) and min(losses) > 0
  shorter = model.likelihood([(p, q, 'red') for p, q, _ in triples])
  assert shorter[0] == pytest.approx(losses[0], rel=1e-4)  # padding does not change it
  with_stop, without = model.score(triples)[0], model.score(triples, stop=False)[0]
  assert with_stop.tokens == without.tokens + 1
  assert with_stop.log_probability < without.log_probability
  result = evaluate('vstar_likelihood', model.described(name='tiny'), data=SAMPLES / 'vstar',
                    out=tmp_path / 'r', options=Options(progress=False))
  assert result.metric == 'accuracy_likelihood'


def test_one_continuation_at_most_is_greedy(model):
  picture = Image.new('RGB', (60, 40), (20, 20, 200))
  scores = model.score([(picture, 'What?', letter) for letter in 'abc'], stop=False)
  assert sum(score.greedy for score in scores) <= 1
  assert np.isfinite([score.log_probability for score in scores]).all()


EIGHT_DEVICES = """
import sys
sys.path.insert(0, sys.argv[1])
import jax
import numpy as np
from hrvlm_jax.language.prompt import tokenizer_of
from hrvlm_jax.evaluation.model import EvaluatedModel
from hrvlm_jax.evaluation.runner import Options, evaluate
from hrvlm_jax.systems import registry
from hrvlm_jax.parallel.layout import Layout
from hrvlm_jax.vlm import laid, model as vlm
from hrvlm_jax.vlm.answer import Answerer
assert jax.device_count() == 8
config = registry.get('mc_llava').tiny()
rng = np.random.default_rng(0)
fill = lambda leaf: (0.1 * rng.standard_normal(leaf.shape)).astype(np.float32)
params = jax.tree.map(fill, vlm.build(config).abstract)
for devices in (1, 8):
  layout = None if devices == 1 else Layout({'data': 4, 'fsdp': 2})
  held = params if layout is None else laid.lay(config, params, layout)
  model = EvaluatedModel(Answerer(config, held, tokenizer_of('byte'), layout=layout),
                         max_new_tokens=4)
  result = evaluate('needle', model.described(name='tiny'), data=sys.argv[2],
                    out=f'{sys.argv[3]}/{devices}', options=Options(batch_size=8, progress=False))
  print(devices, result.value)
"""


def test_one_device_equals_eight(tmp_path):
  environment = os.environ | {'XLA_FLAGS': '--xla_force_host_platform_device_count=8'}
  root = Path(__file__).parents[2]
  command = [sys.executable, '-c', EIGHT_DEVICES, str(root), str(SAMPLES / 'needle'), str(tmp_path)]
  done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
  assert done.returncode == 0, done.stderr[-2000:]
  assert (tmp_path / '1/predictions.jsonl').read_bytes() == \
    (tmp_path / '8/predictions.jsonl').read_bytes()


def test_global_share_of_a_cross_attention_model(model):
  picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 60, 3), np.uint8))
  triples = [(picture, 'Describe it.', 'a sign'), (picture, 'Describe it.', 'a longer sign')]
  pheye = build('pheye')
  shares = pheye.global_attention(triples)
  assert shares.ndim == 2 and len(shares) == 2 and shares.size > 2
  assert ((shares > 0) & (shares < 1)).all()
  again = pheye.global_attention(triples[::-1])
  assert again[::-1] == pytest.approx(shares, abs=1e-5)
  with pytest.raises(UserError, match='mc_llava: has no cross-attention'):
    model.global_attention(triples)


def test_array_hash_sees_every_change():
  params = {'a': np.zeros(3, np.float32), 'b': np.ones(2, np.float32)}
  changed = {'a': np.zeros(3, np.float32), 'b': np.array([1, 2], np.float32)}
  assert array_hash(params) == array_hash(dict(params)) != array_hash(changed)
