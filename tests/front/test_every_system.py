"""The same calls for every system, in its tiny size: what one cannot do is a sentence."""

import jax
import numpy as np
import pytest

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.execution import Execution
from hrvlm_jax.front.model import Model
from hrvlm_jax.language.prompt import tokenizer_of
from hrvlm_jax.systems import registry
from hrvlm_jax.vlm import model as vlm
from hrvlm_jax.vlm.answer import Answerer
from hrvlm_jax.vlm.encode import ImageEncoder
from tests import levels

SHORT = {'max_new_tokens': 3}


@pytest.mark.parametrize('name', levels.rows(
  'systems', [name for name in registry.names() if name not in ('reduced', 'tiling')],
  first=['pheye']))
def test_asked_in_every_way(name, make_picture):
  config = registry.get(name).tiny()
  params = jax.jit(vlm.build(config).init)(jax.random.key(0))
  first, second = make_picture(64, 48), make_picture(90, 40, 1)
  if config.text is None:
    model = Model(config, encoder=ImageEncoder(config, params), ex=Execution(), name=name)
    assert model.encode(first).ndim == 2 and model.overlay(first).size[0] > 0
    assert f'Model({name}, {name}: ' in repr(model)
    with pytest.raises(UserError, match='is an encoder alone'):
      model.ask(first, 'What?')
    return
  answerer = Answerer(config, params, tokenizer_of('byte'))
  model = Model(config, answerer=answerer, ex=Execution(), name=name)
  answer = model.ask(first, 'What?', **SHORT)
  before = model.compilations()
  assert model.ask(first, 'What?', **SHORT) == answer and model.compilations() == before
  assert ''.join(model.stream(first, 'What?', **SHORT)).strip() == answer
  assert np.isfinite(model.encode(first)).all() and model.overlay(first, 'What?').size[0] > 0
  assert all(np.isfinite(found.mean_loss) for found in model.score(first, 'What?', ['A', 'BC']))
  chat = model.chat(system='Be short.')
  said = chat.ask('What?', first, **SHORT)
  if config.chat == 'pheye':
    with pytest.raises(UserError, match='has one question and one answer'):
      chat.ask('And now?', **SHORT)
    with pytest.raises(UserError, match='exactly one image per prompt'):
      model.ask([first, second], 'Which?', **SHORT)
    return
  again = chat.ask('And here?', second, **SHORT)
  assert model.ask(chat.messages[:-1], **SHORT) == again and said == chat.messages[2]['content']
  assert isinstance(model.ask([first, second], 'Which?', **SHORT), str)
