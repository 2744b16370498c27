"""Golden check of PS3's text tower."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from hrvlm_jax.checkpoint.rows import import_tensors
from hrvlm_jax.core.layers import unit
from hrvlm_jax.core.module import Functional
from hrvlm_jax.language.captions import CLEANERS
from hrvlm_jax.systems.ps3 import weights
from hrvlm_jax.systems.ps3.text import TextTower
from tests.parity.cases.ps3.common import waive_notes
from tests.parity.cases.runner import Case, check


@check('ps3', 'text_tower')
def text_tower(case: Case) -> None:
  """Embeddings, every block, projection, prompt; caption cleaning."""
  waive_notes(case)
  config = weights.text_from_hf(case.config['text_config'].plain())
  fn = Functional(lambda rngs: TextTower(config, rngs=rngs))
  rows = weights.text_table()
  params = import_tensors(case.weights(), rows, fn.abstract)
  ids = jnp.asarray(case.input('input_ids').astype(np.int32))

  def states(p, ids):
    module = fn.bind(p)
    x = module.embeddings(ids)
    values = {'embeddings': x, 'ln_final': module.norm(module.states(x)),
              'pooled_output': module(ids), 'pooled_normalized': unit(module(ids)),
              'prompt': module.prompt(module.features(ids))}
    return values | {f'hidden.{i}': module.states(x, stop=i + 1) for i in range(config.depth)}

  for key, value in jax.jit(states)(params, ids).items():
    if case.has(key):
      case.expect(key, value)
  case.expect_json(('layer_norm_eps_prompt_proj',), fn.bind(params).prompt_head.norm.eps)
  if 'clean_inputs' in case.config:
    inputs = case.config['clean_inputs'].plain()
    for name in case.config['clean_outputs']:
      case.expect_json(('clean_outputs', name), [CLEANERS[name](text) for text in inputs])
