"""PS3's text tower: caption -> contrastive feature and selection prompt.

An open_clip text transformer without any mask, neither causal nor for padding: the pad id and the
length are part of the function, and the feature is read at the LAST position, padding or not.
Source: `NVlabs/PS3: ps3/modeling_ps3_text.py, tokenization_ps3.py`. Axis letters: b captions,
t positions, d width, o feature width.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.execution import HERE, Execution
from hrvlm_jax.core.layers import Embedding, LayerNorm, Linear, normal, unit
from hrvlm_jax.core.module import Module, Param, Rngs, scan_layers, stacked
from hrvlm_jax.language.captions import CaptionTokenizer
from hrvlm_jax.language.tokenizer import Tokenizer
from hrvlm_jax.systems.ps3.config import PS3Config, TextConfig
from hrvlm_jax.systems.ps3.selection import ProjectionHead
from hrvlm_jax.vision.vit import Block, ViTConfig


def tokenizer(vocabulary: Tokenizer, config: TextConfig) -> CaptionTokenizer:
  """Captions -> int32 rows [b context], cleaned ("canonicalize") and padded as the tower expects.

  Args:
    vocabulary: c4_en 32000 (SigLIP) or Gemma 256000 (SigLIP2), or any other for own models.
  """
  return CaptionTokenizer(vocabulary, context_length=config.context, end=1, pad=config.pad)


def prompt_ids(texts: Sequence[str], vocabulary: Tokenizer, config: PS3Config) -> np.ndarray | None:
  """See `System.prompt_ids`.

  Raises:
    UserError: a vocabulary that is larger than the tower's table.
  """
  if config.text is None:
    return None
  ids = tokenizer(vocabulary, config.text)(texts)
  if int(ids.max()) >= config.text.vocab_size:
    raise UserError(f'prompt: the tokenizer gives id {int(ids.max())}, the text tower has '
                    f'{config.text.vocab_size} rows; use the tokenizer that belongs to the model')
  return ids


class TextTower(Module):
  """Token and position tables, pre-norm blocks, last position, projection, prompt head."""

  def __init__(self, config: TextConfig, *, param_dtype=jnp.float32, rngs: Rngs):
    self.config = c = config
    make = dict(param_dtype=param_dtype, rngs=rngs)
    # The block is the vision tower's; a text has no image size.
    block = ViTConfig(image_size=1, patch_size=1, width=c.width, depth=c.depth, heads=c.heads,
                      mlp_width=c.mlp_width, activation=c.activation, norm_eps=c.norm_eps)
    self.embed = Embedding(c.vocab_size, c.width, **make)
    self.pos_embed = Param(normal(0.01)(rngs.params(), (c.context, c.width), param_dtype))
    self.blocks = stacked(lambda r: Block(block, param_dtype=param_dtype, rngs=r), c.depth,
                          rngs=rngs)
    self.norm = LayerNorm(c.width, eps=c.norm_eps, **make)
    self.projection = Linear(c.width, c.out, kernel_init=normal(c.width**-0.5), **make)
    self.prompt_head = ProjectionHead(c.out, c.prompt_width, c.prompt_width, **make)

  def embeddings(self, ids: Int[Array, 'b t'], *, ex: Execution = HERE) -> Float[Array, 'b t d']:
    """Token plus position."""
    return self.embed(ids, dtype=ex.dtype) + self.pos_embed[:ids.shape[1]].astype(ex.dtype)

  def states(self, x: Float[Array, 'b t d'], *, stop: int | None = None,
             ex: Execution = HERE) -> Float[Array, 'b t d']:
    """Output of the block before `stop` (the last by default)."""
    body = lambda block, x, _: (block(x, ex=ex)[0], None)
    return scan_layers(self.blocks, x, body, stop=stop, ex=ex)[0]

  def __call__(self, ids: Int[Array, 'b t'], *, ex: Execution = HERE) -> Float[Array, 'b o']:
    """`pooled_output`: the projected last position, not normalised."""
    x = self.states(self.embeddings(ids, ex=ex), ex=ex)
    return self.projection(self.norm(x[:, -1]))

  def features(self, ids: Int[Array, 'b t'], *, ex: Execution = HERE) -> Float[Array, 'b o']:
    """Contrastive features: of unit length, float32."""
    return unit(self(ids, ex=ex))

  def prompt(self, features: Float[Array, 'b o']) -> Float[Array, 'b d']:
    """Unit-length features -> selection prompt in the trunk's width."""
    return self.prompt_head(features)
