"""Multiply-adds, parameters and cache of ViT and decoder configs, from their sizes alone.

Exact for the matrix products of a forward pass as this library computes them: both attention
products, every token (class tokens and padding too), full squares under a causal mask. Norms,
activations, softmax, rotary embedding and table look-ups are not counted. One multiply-add is two
FLOPs. Configs are read by attribute (`vision.vit.ViTConfig`, `language.config.DecoderConfig`).
`parallel.flops.count_flops` counts the same in a traced program. `complexity` holds Pheye's
equations.
"""

from collections.abc import Sequence
import dataclasses
from typing import Protocol

import jax
import numpy as np
from PIL import Image

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.evaluation.analysis import complexity
from hrvlm_jax.parallel.flops import count_flops
from hrvlm_jax.systems import registry
from hrvlm_jax.vlm import model as vlm
from hrvlm_jax.vlm.answer import model_config


class ViT(Protocol):
  """The sizes of a vision transformer that its cost depends on."""

  patch_size: int
  channels: int
  width: int
  depth: int
  mlp_width: int
  class_token: bool


class Decoder(Protocol):
  """The sizes of a decoder that its cost depends on."""

  vocab_size: int
  width: int
  depth: int
  heads: int
  kv_heads: int
  head_dim: int
  mlp_width: int
  gated_mlp: bool


@dataclasses.dataclass(frozen=True)
class Cost:
  """Multiply-adds by kind.

  Attributes:
    linear: projections and MLPs. attention: q.k and probs.v. embed: patch embedding. head: logits.
  """

  linear: int = 0
  attention: int = 0
  embed: int = 0
  head: int = 0

  def __add__(self, other: 'Cost') -> 'Cost':
    return Cost(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other))))

  @property
  def multiply_adds(self) -> int:
    return self.linear + self.attention + self.embed + self.head

  @property
  def flops(self) -> int:
    """Floating point operations, two for each multiply-add."""
    return 2 * self.multiply_adds


def vit(config: ViT, patches: int, *, views: int = 1, depth: int | None = None,
        lora_rank: int = 0, context: int = 0) -> Cost:
  """A vision transformer over `views` images of `patches` patches each.

  Args:
    depth: layers that run, where not all do (a hidden state before the last is taken).
    lora_rank: rank of LoRA branches on all six products of a layer and the patch embedding.
    context: further keys each token attends to (PS3's low-resolution prefix).
  """
  depth = config.depth if depth is None else depth
  tokens = patches + int(config.class_token)
  d, m = config.width, config.mlp_width
  per_token = 4 * d * d + 2 * d * m + lora_rank * (8 * d + 2 * (d + m))
  patch = config.patch_size**2 * config.channels
  return Cost(
      linear=views * depth * tokens * per_token,
      attention=views * depth * 2 * d * tokens * (tokens + context),
      embed=views * patches * (patch * d + lora_rank * (patch + d)))


def decoder(config: Decoder, tokens: int, *, past: int = 0, logits: int = 1) -> Cost:
  """A decoder over `tokens` new positions with `past` cached ones.

  Args:
    logits: at how many positions the head runs (1 in prefill and decoding, all in training).
  """
  d, inner = config.width, config.heads * config.head_dim
  kv = config.kv_heads * config.head_dim
  mlp = (3 if config.gated_mlp else 2) * d * config.mlp_width
  per_token = 2 * d * inner + 2 * d * kv + mlp
  return Cost(
      linear=config.depth * tokens * per_token,
      attention=config.depth * 2 * inner * tokens * (past + tokens),
      head=logits * d * config.vocab_size)


def cross_attention(d: int, d_vision: int, *, tokens: int, image_tokens: int, blocks: int,
                    inner: int | None = None, mlp: int | None = None,
                    cached: bool = False) -> Cost:
  """Pheye's cross-attention blocks (section 3.3 of its text) over `tokens` text positions.

  Args:
    cached: keys and values of the image are at hand already.
  """
  inner = max(d, d_vision) if inner is None else inner
  mlp = 4 * d if mlp is None else mlp
  keys_values = 0 if cached else 2 * image_tokens * d_vision * inner
  return Cost(linear=blocks * (keys_values + tokens * (2 * d * inner + 2 * d * mlp)),
              attention=blocks * 2 * inner * tokens * image_tokens)


def mlp(widths: Sequence[int], tokens: int) -> Cost:
  """A chain of linear layers, such as a projector: widths n_in, hidden, ..., n_out."""
  return Cost(linear=tokens * sum(a * b for a, b in zip(widths, widths[1:])))


def vit_parameters(config: ViT, positions: int, *, patch_bias: bool, pre_norm: bool,
                   post_norm: bool) -> int:
  """Parameters of a vision transformer: biases, norms, position table; no pool, no LoRA."""
  d, m = config.width, config.mlp_width
  layer = 4 * (d * d + d) + (d * m + m) + (m * d + d) + 4 * d
  patch = config.patch_size**2 * config.channels * d + (d if patch_bias else 0)
  norms = 2 * d * (int(pre_norm) + int(post_norm))
  return config.depth * layer + patch + positions * d + (d if config.class_token else 0) + norms


def decoder_parameters(config: Decoder) -> int:
  """Parameters of a decoder, biases, norms and untied head as its config says (no LoRA)."""
  d, inner = config.width, config.heads * config.head_dim
  kv = config.kv_heads * config.head_dim
  flag = lambda name: int(getattr(config, name, False))
  norm = d * (2 if getattr(config, 'norm', 'rmsnorm') == 'layernorm' else 1)
  attention = 2 * d * inner + 2 * d * kv
  attention += flag('qkv_bias') * (inner + 2 * kv) + flag('out_bias') * d
  ups = 2 if config.gated_mlp else 1
  mlp_size = (ups + 1) * d * config.mlp_width + flag('mlp_bias') * (ups * config.mlp_width + d)
  norms = norm * (1 if flag('parallel_block') else 2)
  head = 0 if flag('tie_embeddings') else config.vocab_size * d
  head += flag('head_bias') * config.vocab_size
  return config.depth * (attention + mlp_size + norms) + norm + config.vocab_size * d + head


def cache_bytes(config: Decoder, positions: int, *, bytes_per_value: int = 2) -> int:
  """Key and value cache of one row."""
  return config.depth * 2 * config.kv_heads * config.head_dim * positions * bytes_per_value


@dataclasses.dataclass(frozen=True)
class AnswerCost:
  """What one answer costs.

  Attributes:
    vision: encoder and projector, once. prefill: the prompt. decode: all generated tokens.
    positions: longest cache. cache_bytes: of keys and values at the end.
  """

  vision: Cost
  prefill: Cost
  decode: Cost
  positions: int
  cache_bytes: int

  @property
  def flops(self) -> int:
    return self.vision.flops + self.prefill.flops + self.decode.flops


def prefix_answer(text: Decoder, vision: Cost, *, image_tokens: int, text_tokens: int,
                  new_tokens: int, bytes_per_value: int = 2) -> AnswerCost:
  """One answer of a model whose image tokens stand in the prompt.

  Args:
    vision: encoder and projector. text_tokens: of the prompt. new_tokens: generated ones; the first
      comes out of the prefill, so new_tokens - 1 decoding steps follow.
  """
  prompt = image_tokens + text_tokens
  decode = Cost()
  for step in range(new_tokens - 1):
    decode += decoder(text, 1, past=prompt + step)
  positions = prompt + max(new_tokens - 1, 0)
  return AnswerCost(vision, decoder(text, prompt), decode, positions,
                    cache_bytes(text, positions, bytes_per_value=bytes_per_value))


def run(*, checkpoint: str | None = None, width: int = 1024, height: int = 768,
        text_tokens: int = 64, new_tokens: int = 64) -> list[str]:
  """What one answer costs; without a checkpoint: the numbers of Pheye's complexity analysis.

  Args:
    checkpoint: a model whose image tokens stand in the prompt; its weights are not read.
    width, height: of the image in pixels.
    text_tokens, new_tokens: of the prompt, and generated.

  Raises:
    UserError: no checkpoint there, or a model of another kind.
  """
  if checkpoint is None:
    return [f'{row.quantity}: {row.value:.6g}'
            + ('' if row.paper is None else f' (paper: {row.paper:g})')
            + (f'; {row.remark}' if row.remark else '') for row in complexity.table()]
  config = model_config(checkpoint)
  if not config.fusion.in_prompt:
    raise UserError(f'{checkpoint}: costs are known of models whose image tokens stand in the '
                    f'prompt, found the fusion {config.fusion.kind!r}')
  system, fn = registry.get(config.system), vlm.build(config)
  views = system.batch([system.views([Image.new('RGB', (width, height))], config.encoder)],
                       config.encoder)
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype), views)
  encode = lambda params, views: fn.apply(params, views, method='encode').values
  vision = Cost(linear=count_flops(encode, fn.abstract, shapes) // 2)
  tokens = system.count(width, height, config.encoder).tokens
  cost = prefix_answer(config.text, vision, image_tokens=tokens, text_tokens=text_tokens,
                       new_tokens=new_tokens)
  return [f'{tokens} image tokens and {text_tokens} of text, {new_tokens} new ones: '
          f'{cost.flops / 1e9:,.1f} GFLOP',
          *(f'  {part}: {getattr(cost, part).flops / 1e9:,.1f} GFLOP'
            for part in ('vision', 'prefill', 'decode')),
          f'language model: {decoder_parameters(config.text):,} parameters; cache of '
          f'{cost.positions} positions: {cost.cache_bytes / 2**20:,.2f} MiB in bfloat16']
