"""A fusion answers for itself: one from outside the package joins, loads, trains and answers."""

import dataclasses
import pathlib
import re
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from hrvlm_jax.core.config import from_dict, to_dict
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.execution import HERE, Execution
from hrvlm_jax.core.layers import Linear
from hrvlm_jax.language.prompt import tokenizer_of
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.systems.fusion import FUSIONS, Fusion
from hrvlm_jax.training.next_token import NextToken
from hrvlm_jax.vlm import fastv, model as vlm
from hrvlm_jax.vlm.answer import Answerer

PACKAGE = pathlib.Path(vlm.__file__).parents[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeanFusion(Fusion):
  """The mean of the visual tokens is added to every word."""

  model: ClassVar[str] = 'tests.vlm.test_fusion:MeanVLM'
  in_prompt: ClassVar[bool] = False
  one_pass: ClassVar[bool] = False
  unpackable: ClassVar[str] = 'a row has one mean'
  kind: str = 'mean'
  gain: float = 1.0

  def check(self, model):
    """A mean of nothing is refused."""
    return [] if self.gain else ['fusion.gain is 0: nothing is seen']


class MeanVLM(vlm.VLM):
  def __init__(self, config, *, unrolled=False, param_dtype=jnp.float32, rngs):
    super().__init__(config, unrolled=unrolled, param_dtype=param_dtype, rngs=rngs)
    self.mix = Linear(config.encoder.vision.width, config.text.width, param_dtype=param_dtype,
                      rngs=rngs)

  def embed(self, batch, visual, *, ex=HERE):
    text = self.language.embed(batch['tokens'], dtype=ex.dtype)
    mean = self.mix(visual.values.mean(axis=1)) * self.config.fusion.gain
    return text + mean[:, None].astype(text.dtype), batch['valid']


@pytest.fixture
def config(monkeypatch):
  monkeypatch.setenv('HRVLM_FUSIONS', 'mean=tests.vlm.test_fusion:MeanFusion')
  base = registry.get('single_view').tiny()
  return dataclasses.replace(base, fusion=MeanFusion(), projector=None, image_token=None)


def test_a_fusion_from_outside_loads_trains_and_answers(config):
  assert from_dict(ModelConfig, to_dict(config)) == config
  fn = vlm.build(config)
  params = fn.init(jax.random.key(0))
  assert isinstance(fn.bind(params), MeanVLM)
  answerer = Answerer(config, params, tokenizer_of('byte'))
  images = [Image.new('RGB', (50, 40), colour) for colour in ('red', 'blue')]
  batch = answerer.batch([([image], 'What?') for image in images])
  batch['labels'] = np.where(batch['valid'], batch['tokens'], -100)

  objective = NextToken(NextToken.Options(name='next_token'))

  def loss(params, batch, ex):
    return objective.loss(fn, params, batch, ex=ex)[0]

  run = jax.jit(jax.value_and_grad(loss), static_argnums=2)
  value, grads = run(params, batch, Execution(gradients=True))
  assert value > 0 and float(jnp.abs(grads['mix']['kernel']).max()) > 0
  assert len(answerer.answer([([images[0]], 'What?')], max_new_tokens=2)) == 1


def test_others_ask_the_fusion(config):
  assert config.fusion.positions(9) == 0 and FUSIONS.get('prefix')().positions(9) == 9
  assert FUSIONS.get('two_pass').objective == 'two_pass' and FUSIONS.get('two_pass').boxes
  with pytest.raises(UserError, match="fusion 'mean' has none"):
    fastv.build(config, fastv.FastV())
  with pytest.raises(ValueError, match='fusion.gain is 0: nothing is seen'):
    dataclasses.replace(config, fusion=MeanFusion(gain=0.0))
  with pytest.raises(ValueError, match="fusion 'mean' has another model, tests.vlm.test_fusion"):
    from hrvlm_jax.core.module import Functional
    Functional(lambda rngs: fastv.FastVVLM(config, fastv.FastV(), rngs=rngs))


def test_kinds_that_nobody_knows_are_refused(config):
  values = to_dict(config)
  with pytest.raises(UserError, match=r'unknown fusion maen \(nearest known: mean\)'):
    from_dict(ModelConfig, values | {'fusion': {'kind': 'maen'}})
  with pytest.raises(UserError, match='unknown key fusion.gian'):
    from_dict(ModelConfig, values | {'fusion': {'kind': 'mean', 'gian': 2.0}})
  without = {key: value for key, value in values.items() if key != 'fusion'}
  assert from_dict(ModelConfig, without).fusion.kind == 'prefix'


def test_no_room_asks_which_fusion_it_is():
  """Only the models themselves know their fusions' classes."""
  chain = re.compile(r'isinstance\([^)]*(Prefix|TwoPass|CrossAttention)Fusion')
  for path in PACKAGE.rglob('*.py'):
    assert not chain.search(path.read_text()), path
