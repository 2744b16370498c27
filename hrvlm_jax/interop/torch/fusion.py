"""How visual tokens reach the language model beside standing in the prompt: cross-attention."""

import torch
from torch import nn

from .attention import Attention
from .towers import Mlp

HEAD_WIDTH = 64
NAME = 'hrvlm_media'  # of a cache: keys and values of the visual tokens


def counts_of(media):
  """Visual tokens of each row; see `CrossAttention.media`."""
  keys, _, mask = media[0]
  return [keys.shape[2]] * len(keys) if mask is None else mask.flatten(1).sum(1).tolist()


class CrossBlock(nn.Module):
  """x += attn(norm1(x), media); x += mlp(norm2(x))."""

  def __init__(self, width, c, config):
    super().__init__()
    largest = max(width, c.width)
    self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-5), nn.LayerNorm(width, eps=1e-5)
    self.attn = Attention(width, largest // HEAD_WIDTH, config, n_in=c.width,
                          inner=largest // c.reduce, scale=HEAD_WIDTH**-0.5)
    self.mlp = Mlp(width, 4 * width // c.reduce, width)

  def forward(self, x, keys, values, mask):
    """[n t d]; keys and values [n h m p], mask bool [n 1 1 m] or None."""
    x = x + self.attn(self.norm1(x), keys_values=(keys, values), mask=mask)
    return x + self.mlp(self.norm2(x))


class CrossAttention(nn.Module):
  """A block in front of every `interval`-th layer of the language model.

  Args:
    depth: layers of the language model.
  """

  def __init__(self, c, width, depth, config):
    super().__init__()
    self.at = [i for i in range(c.from_layer, depth) if (i + 1) % c.interval == 0]
    self.blocks = nn.ModuleList(CrossBlock(width, c, config) for _ in self.at)

  def media(self, features, counts):
    """Keys, values and mask of every block, once for all tokens that are generated.

    Args:
      features: [n e], the visual tokens of all rows.
      counts: of each row.
    """
    rows = features.split(counts)
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = None
    if len(set(counts)) > 1:
      place = torch.arange(padded.shape[1], device=padded.device)
      mask = (place < torch.tensor(counts, device=padded.device)[:, None])[:, None, None]
    return [(*block.attn.keys_values(padded), mask) for block in self.blocks]

  def hook(self, layers):
    """Makes the blocks run in front of their layers; `media` comes as an argument of the call,
    so that a layer that is computed again reads the same."""
    for number, layer in enumerate(layers):
      block = self.at.index(number) if number in self.at else None
      layer.register_forward_pre_hook(self._before(block), with_kwargs=True)

  def _before(self, index):
    def run(layer, args, kwargs):
      media = kwargs.pop('media', None)
      if index is None or media is None:
        return args, kwargs
      first = args[0] if args else kwargs['hidden_states']
      keys, values, mask = media[index]
      if len(keys) != len(first):  # beams and samples are several rows of one prompt
        times = len(first) // len(keys)
        keys, values = (x.repeat_interleave(times, 0) for x in (keys, values))
        mask = None if mask is None else mask.repeat_interleave(times, 0)
      x = self.blocks[index](first, keys, values, mask)
      if args:
        return (x, *args[1:]), kwargs
      return args, kwargs | {'hidden_states': x}

    return run
