"""Generation: Phi, Pheye's decoder with its cross-attention blocks, VILA-HD's second pass."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness.ours import Side
from benchmarks.harness.program import Program
from benchmarks.ours.vision import images
from hrvlm_jax.checkpoint.rows import Table, joined, prefixed
from hrvlm_jax.core.module import Functional, Module
from hrvlm_jax.language import config as language
from hrvlm_jax.language.config import table as language_table
from hrvlm_jax.language.decoder import Decoder
from hrvlm_jax.language.generate import Generator, Sampling, TextGenerator, pad_to_bucket
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.contract import VisualTokens
from hrvlm_jax.systems.pheye import config as pheye
from hrvlm_jax.systems.pheye.weights import block_table
from hrvlm_jax.systems.vila_hd import config as vila_hd
from hrvlm_jax.vlm import model as vlm
from hrvlm_jax.vlm.cross_attention import CrossAttention, CrossAttentionVLM


def _tokens(generated) -> dict[str, np.ndarray]:
  return {'tokens': np.asarray(generated.tokens)}


class Phi(Side):
  """Greedy answer of a Phi decoder to a prompt of ids. settings: prompt, new (tokens)."""

  def config(self) -> language.DecoderConfig:
    """Phi-1.5."""
    if self.settings.get('tiny'):
      return language.phi(vocab_size=264, width=128, depth=4, heads=4, mlp_width=256)
    return language.RELEASED['phi_1_5']

  def model(self):
    config = self.config()
    return Functional(lambda rngs: Decoder(config, rngs=rngs)), language_table(config)

  def inputs(self, rng):
    ids = rng.integers(5, self.config().vocab_size, (1, self.settings['prompt']))
    return {'ids': ids.astype(np.int32)}

  def program(self, fn, params, inputs):
    generator = TextGenerator(self.config(), params, ex=self.ex.plain)
    ids, sampling = inputs['ids'], Sampling(max_new_tokens=self.settings['new'])
    valid = np.ones(ids.shape, bool)
    inner = generator.generator
    return Program(
      run=lambda: generator.generate(ids, valid, sampling), outputs=_tokens,
      trace=self._trace(inner, ids, generator),
      after=lambda: {'compilations': inner.compilations()})

  def _trace(self, inner: Generator, ids, generator: TextGenerator):
    """The prompt once and a step for every token after the first."""
    new = self.settings['new']

    def whole(params, embeds, valid):
      budget = -(-new // 16) * 16
      logits, cache = inner.prefill_fn(params, embeds, valid, {}, slots=embeds.shape[1] + budget,
                                         ex=inner.ex)
      slots = jnp.pad(valid, ((0, 0), (0, budget)))

      def body(carry, _):
        logits, slots, cache = carry
        return inner.step_fn(params, jnp.argmax(logits, -1), slots, cache, 0, {},
                              ex=inner.ex), None

      return jax.lax.scan(body, (logits, slots, cache), None, length=new - 1)[0][0]

    padded, valid = pad_to_bucket(ids, np.ones(ids.shape, bool))
    return whole, (inner.params, generator.embed(padded).astype(self.dtype), jnp.asarray(valid))


class Reader(CrossAttentionVLM):
  """Pheye without its encoder: decoder and cross-attention blocks, layers unrolled."""

  def __init__(self, config, *, unrolled: bool = True, rngs):
    Module.__init__(self)
    self.config = config
    self.language = Decoder(config.text, unrolled=unrolled, rngs=rngs)
    self.fusion = CrossAttention(config.fusion, config.text, unrolled=unrolled, rngs=rngs)

  def media_of(self, tokens):
    """Keys and values of visual tokens [b m e]."""
    return self.fusion.media(VisualTokens(tokens, jnp.ones(tokens.shape[:2], bool)))


class PheyeGenerate(Side):
  """Greedy answer of Pheye's decoder over visual tokens. settings: prompt, new, release."""

  def config(self):
    """A released decoder with its blocks."""
    if self.settings.get('tiny'):
      return pheye.tiny()
    return pheye.RELEASED[self.settings['release']]

  def model(self):
    config = self.config()
    text = prefixed(language_table(config.text), ours='language/')
    at = config.fusion.layers(config.text.depth)
    blocks = Table(tuple(
      dataclasses.replace(row, indices=at, theirs=f'cross_attn_layers.{{i}}.{row.theirs}')
      for row in block_table().rows))
    table = joined(text, prefixed(blocks, ours='fusion/blocks/'))
    return Functional(lambda rngs: Reader(config, unrolled=False, rngs=rngs)), table

  def inputs(self, rng):
    config = self.config()
    ids = rng.integers(5, config.text.vocab_size, (1, self.settings['prompt']))
    shape = (1, config.encoder.tokens, config.fusion.width)
    return {'ids': ids.astype(np.int32), 'visual': rng.standard_normal(shape, np.float32)}

  def place(self, path, leaf):
    """Layer by layer: a stacked and a separate copy of all weights would not fit into memory."""
    before, blocks, after = path.partition('blocks/')
    if not blocks:
      return super().place(path, leaf)
    return {f'{before}{blocks}{number}/{after}': jnp.array(layer, self.dtype)
            for number, layer in enumerate(leaf)}

  def program(self, fn, params, inputs):
    config = self.config()
    apart = Functional(lambda rngs: Reader(config, rngs=rngs))
    generator = Generator(apart, params, ex=self.ex.plain)
    media = jax.jit(lambda params, x: apart.apply(params, x, method='media_of'))
    ids, valid = pad_to_bucket(inputs['ids'], np.ones(inputs['ids'].shape, bool))
    visual = jnp.asarray(inputs['visual'], self.dtype)
    embeds = jnp.take(generator.params['language']['embed']['embedding'], ids, axis=0)
    sampling = Sampling(max_new_tokens=self.settings['new'])

    def run():
      extras = {'media': media(generator.params, visual)}
      return generator.generate(embeds, valid, sampling, extras=extras)

    return Program(run=run, outputs=_tokens,
                   after=lambda: {'compilations': generator.compilations() + media._cache_size()})


class TwoPass(Side):
  """VILA-HD up to the first token of the answer, both passes. settings: question, depth, reuse."""

  reuse = True

  def config(self):
    """The released encoder and a Qwen2 language model of fewer or smaller layers."""
    if self.settings.get('tiny'):
      return vila_hd.tiny()
    config = vila_hd.RELEASED[self.settings['release']]
    text = dataclasses.replace(language.RELEASED['qwen2_1_5b'], depth=self.settings['depth'],
                               vocab_size=32000)
    encoder = dataclasses.replace(config.encoder, width=text.width)
    return dataclasses.replace(config, encoder=encoder, text=text)

  def model(self):
    config = self.config()
    return vlm.build(config), registry.get('vila_hd').table(config)

  def inputs(self, rng):
    encoder = self.config().encoder
    picture = images(rng, 1, encoder.side)[0]
    return {'picture': ((picture + 1) * 127.5).astype(np.uint8),
            'question': rng.integers(5, 260, self.settings['question']).astype(np.int32)}

  def program(self, fn, params, inputs):
    from PIL import Image

    config = self.config()
    system = registry.get('vila_hd')
    example = system.views([Image.fromarray(inputs['picture'])], config.encoder)
    views = jax.tree.map(jnp.asarray, system.batch([example], config.encoder))
    count, question = int(example['tokens'][0]), inputs['question']
    apart = vlm.build(config, unrolled=True)
    params = vlm.unroll(config, params)
    text = lambda fill: np.full(count, fill, np.int32)
    batch = {
      'tokens': jnp.asarray(np.concatenate([text(0), question])[None]),
      'visual_index': jnp.asarray(np.concatenate(
        [np.arange(count), np.full(len(question), -1)])[None], jnp.int32),
      'valid': jnp.ones((1, count + len(question)), bool), 'views': views}

    def answer(params, batch):
      embeds, valid, extras = apart.apply(params, batch, reuse=self.reuse, ex=self.ex.plain,
                                          method='prompt')
      logits, _, _ = apart.apply(params, embeds, valid, slots=valid.shape[1] + 16,
                                 method='prefill', ex=self.ex.plain, **extras)
      return {'logits': logits}

    return self.jit(answer, params, batch)


class TwoPassAgain(TwoPass):
  """The same with everything recomputed in the second pass."""

  reuse = False
