"""Golden checks of the decoder (system `language_models`)."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np

from hrvlm_jax.checkpoint.rows import import_tensors
from hrvlm_jax.core.attention import attention
from hrvlm_jax.core.module import Functional
from hrvlm_jax.language import config as language
from hrvlm_jax.language.config import config_from_hf
from hrvlm_jax.language.decoder import Decoder, default_positions, inverse_frequencies, rope_table
from hrvlm_jax.language.generate import Sampling, TextGenerator
from hrvlm_jax.training.losses import token_cross_entropy
from tests.parity.cases.runner import OPERATOR, Case, check

_NOTES = {
  'config.json:golden/seed': 'seed of the weights, which are stored',
  'config.json:golden/attention': 'how the reference ran',
  'config.json:golden/transformers': 'how the reference ran',
  'config.json:golden/seq_len': 'implied by input_ids',
}


@check('language_models', 'causal_lm')
def causal_lm(case: Case) -> None:
  """Logits, states, RoPE, padding, loss, cache, greedy tokens; float32."""
  config = config_from_hf(case.config)
  golden = case.config['golden']
  budget, pad = golden['gen_len'], golden['pad_token_id']
  for pattern, reason in _NOTES.items():
    case.waive(pattern, reason)
  fn = Functional(lambda rngs: Decoder(config, rngs=rngs))
  params = import_tensors(case.weights(), language.table(config), fn.abstract)
  module = fn.bind(params)

  ids = case.input('input_ids')
  full = jnp.ones(ids.shape, bool)
  embeds = module.embed(ids)
  states = module.hidden_states(embeds, full)
  names = ['embed', *(f'layer{i}_out' for i in range(config.depth)), 'final_normed']
  for name, state in zip(names, states, strict=True):
    if case.has(f'hidden_states.{name}'):
      case.expect(f'hidden_states.{name}', state)
  logits_of = jax.jit(lambda tokens, mask, positions: module.logits(
    module(module.embed(tokens), mask, positions=positions)))
  case.expect('logits', logits_of(ids, full, None))
  _layer0(case, config, module, embeds, full)
  for group in ('rightpad', 'leftpad'):
    tokens = case.input(f'{group}.input_ids')
    mask = jnp.asarray(case.input(f'{group}.attention_mask') > 0)
    if group == 'leftpad':
      case.exact('leftpad.position_ids', default_positions(mask))
    logits = logits_of(tokens, mask, None)
    case.expect(f'{group}.logits', jnp.where(mask[..., None], logits, 0))
    if group == 'rightpad':
      total, count = token_cross_entropy(logits, case.input('loss.labels'))
      case.expect('loss.value', np.reshape(total / count, (1,)))
  _generation(case, TextGenerator(config, params), module, budget, pad)
  _cache(case, module)


def _layer0(case, config, module, embeds, full):
  """Layer 0 taken apart: single operators."""
  q, k, v, probs = module.attention_of(embeds, full, 0)
  heads_first = lambda x: jnp.swapaxes(x, 1, 2)
  case.expect('layer0.q_rope', heads_first(q), tol=OPERATOR)
  case.expect('layer0.k_rope', heads_first(k), tol=OPERATOR)
  case.expect('layer0.v', heads_first(v), tol=OPERATOR)
  case.expect('layer0.attn_probs', probs, tol=OPERATOR)
  case.expect('layer0.attn_context', attention(q, k, v, causal=True), tol=OPERATOR)
  positions = jnp.arange(embeds.shape[1])[None]
  rope = rope_table(config, positions)
  case.expect('rope.cos', jnp.tile(rope.cos[0], 2), tol=OPERATOR)
  case.expect('rope.sin', jnp.tile(rope.sin[0], 2), tol=OPERATOR)
  case.expect('rope.inv_freq', inverse_frequencies(config), tol=OPERATOR)


def _generation(case, generator, module, budget, pad):
  prompt, mask = case.input('generate.prompt_ids'), case.input('generate.prompt_mask') > 0
  greedy = Sampling(max_new_tokens=budget, pad_id=pad)
  out = generator.generate(prompt, mask, greedy, keep_logits=True)
  case.exact('generate.new_tokens', out.tokens)
  case.expect('generate.step_logits', out.logits)
  case.expect_json(('golden', 'min_top1_top2_gap_generate'), _gap(out.logits), tol=1e-3)
  stop = case.config['golden']['generate_eos_token_id']
  stopped = generator.generate(
    prompt, mask, Sampling(max_new_tokens=budget, pad_id=pad, stop_ids=(stop,)))
  case.exact('generate_eos.new_tokens', stopped.tokens)
  embeds = case.input('embeds.inputs_embeds')
  valid = jnp.asarray(case.input('embeds.attention_mask') > 0)
  logits = module.logits(module(jnp.asarray(embeds), valid))
  case.expect('embeds.logits', jnp.where(valid[..., None], logits, 0))
  out = generator.generator.generate(embeds, valid, greedy, keep_logits=True)
  case.exact('embeds.new_tokens', out.tokens)
  case.expect('embeds.step_logits', out.logits)
  case.expect_json(('golden', 'min_top1_top2_gap_embeds'), _gap(out.logits), tol=1e-3)


def _gap(logits) -> float:
  """Smallest distance of the best and the second logit over all steps."""
  ranked = np.sort(logits, axis=-1)
  return float((ranked[..., -1] - ranked[..., -2]).min())


def _cache(case, module):
  prompt, mask = case.input('generate.prompt_ids'), case.input('generate.prompt_mask') > 0
  _, _, cache = module.prefill(module.embed(prompt), jnp.asarray(mask), slots=prompt.shape[1])
  for key in case.keys:
    if found := re.fullmatch(r'cache\.prompt\.([kv])(\d+)', key):
      case.expect(key, jnp.where(mask[:, None, :, None], cache[found[1]][int(found[2])], 0))
