"""Attention with separate projections, through the attention interface of transformers."""

from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.siglip.modeling_siglip import eager_attention_forward


def attend(module, q, k, v, *, scale, mask=None):
  """[n h t p] of queries, keys and values -> [n t h p], as `config._attn_implementation` says.

  Args:
    module: has `config`, `training`.
    mask: bool, broadcast to [n h t s]; True may be looked at.
  """
  name = module.config._attn_implementation or 'eager'
  run = eager_attention_forward if name == 'eager' else ALL_ATTENTION_FUNCTIONS[name]
  if mask is not None and name == 'eager':
    mask = q.new_zeros(mask.shape).masked_fill(~mask, float('-inf'))
  return run(module, q, k, v, mask, is_causal=False, scaling=scale, dropout=0.0)[0]


class Attention(nn.Module):
  """q, k, v, out; queries of one sequence, keys and values of another or of the same."""

  is_causal = False

  def __init__(self, width, heads, config, *, n_in=None, inner=None, scale=None):
    super().__init__()
    self.config, self.heads = config, heads
    inner, n_in = inner or width, n_in or width
    self.scale = (inner // heads) ** -0.5 if scale is None else scale
    self.q, self.k = nn.Linear(width, inner), nn.Linear(n_in, inner)
    self.v, self.out = nn.Linear(n_in, inner), nn.Linear(inner, width)

  def split(self, x):
    """[n t e] -> [n h t p]."""
    return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

  def keys_values(self, x):
    """[n s i] -> two of [n h s p]."""
    return self.split(self.k(x)), self.split(self.v(x))

  def forward(self, x, other=None, *, keys_values=None, mask=None):
    """[n t d] -> [n t d].

    Args:
      other: [n s i], what is read; default: x itself.
      keys_values: of what is read, where they are known already.
    """
    k, v = keys_values or self.keys_values(x if other is None else other)
    y = attend(self, self.split(self.q(x)), k, v, scale=self.scale, mask=mask)
    return self.out(y.flatten(2))
