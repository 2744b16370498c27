"""Two passes: the language model reads a first look and the question, and says where to look."""

import torch
from torch import nn
from transformers import DynamicCache

from .ps3 import in_float32

NAME = 'hrvlm_valid'  # of a cache: which places of the prompt may be read


def prompt_ends(input_ids, mask, marker):
  """[b] place of the last token of the first question: one before the first `marker`; the last
  real token where there is none."""
  length, n = input_ids.shape[1], len(marker)
  last = (mask.cumsum(1) * mask).argmax(1)
  if not n or length < n:
    return last
  windows = input_ids.unfold(1, n, 1)
  hit = (windows == torch.tensor(marker, device=input_ids.device)).all(-1)
  hit &= mask[:, :length - n + 1]
  return torch.where(hit.any(1), hit.int().argmax(1) - 1, last)


class Shared:
  """Keys and values of the first pass for the places that both passes begin with: no later token
  changes them.

  Attributes:
    cache: of the first pass, whose rows have no padding and no high-resolution places.
    rank: [b t] place in it of every place of the prompt.
    room: of all rows, how many places in front of the prompt are in it.
  """

  def __init__(self, cache, mask, taken):
    self.cache, self.rank = cache, (mask.cumsum(1) - 1).clamp(min=0)
    left = mask & ~taken
    first = torch.where(left.any(1), left.int().argmax(1), mask.shape[1])
    self.room = int(first.min())

  def fill(self, cache, keep, repeats):
    """Gives the empty cache of the second pass all shared places but the last `keep` of the
    prompt, for `repeats` rows each; returns how many."""
    size = min(self.room, self.rank.shape[1] - keep)
    if size < 1:
      return 0
    index = self.rank[:, None, :size, None]
    for number, layer in enumerate(self.cache.layers):
      pick = lambda x: x.gather(2, index.to(x.device).expand(
        -1, x.shape[1], -1, x.shape[3])).repeat_interleave(repeats, 0)
      cache.update(pick(layer.keys), pick(layer.values), number)
    return size


def first_states(model, input_ids, mask, places, low, counts, keep=False):
  """([b d] final-normed state of the last token of the first question, after a pass over text and
  low-resolution tokens up to it, without padding or the places of high-resolution tokens; what a
  second pass can share of it, or None).

  Args:
    mask, places: bool [b t]: real tokens, visual ones.
    low: [v n d] low-resolution tokens of all pictures.
    counts: see `ps3_plan.HighDef`.
    keep: the second pass shares its keys and values.
  """
  ends = prompt_ends(input_ids, mask, model.config.prompt_marker or [])
  number = places.cumsum(1) - 1
  is_low = places & (number % counts.each < counts.low)
  place = torch.arange(input_ids.shape[1], device=input_ids.device)
  taken = mask & (is_low | ~places) & (place <= ends[:, None])
  text = model.get_input_embeddings()(input_ids.masked_fill(places, 0))
  start, rows = 0, []
  for row in range(len(input_ids)):
    pictures = int(places[row].sum()) // counts.each
    own = low[start:start + pictures].flatten(0, 1)
    start += pictures
    embeds = text[row].masked_scatter(is_low[row][:, None], own.to(text.device, text.dtype))
    rows.append(embeds[taken[row]])
  embeds = nn.utils.rnn.pad_sequence(rows, batch_first=True)
  lengths = torch.tensor([len(row) for row in rows], device=embeds.device)
  real = torch.arange(embeds.shape[1], device=embeds.device) < lengths[:, None]
  cache = DynamicCache() if keep else None
  out = model.language_model.model(inputs_embeds=embeds, attention_mask=real.long(),
                                   past_key_values=cache, use_cache=keep)
  state = out.last_hidden_state[torch.arange(len(rows), device=embeds.device),
                                (lengths - 1).clamp(min=0)]
  return state, Shared(cache, mask, taken) if keep else None


def look(model, input_ids, mask, pixel_values, first=None, asked=None, keep=False, places=None):
  """Both looks at the pictures of a batch: (tokens [n d], which of them are real [n], maps, what
  the second pass can share of the first or None).

  Nothing of the choice of patches has a gradient: the first pass runs without.

  Args:
    first: see `VilaHdVision.high`.
    asked: `look` of the processor, in place of the settings of the model.
    keep: see `first_states`.
    places: bool [b t] of visual tokens; default: all placeholders.
  """
  vision = model.vision
  counts = vision.counts_of(asked)
  places = model.places_of(input_ids) if places is None else places
  where = vision.ps3.selection.prior_prompt.device  # the encoder may lie on another one
  images = pixel_values.to(where).float()
  seen, low = vision.low(images, counts)
  prompt = shared = None
  if vision.steers(counts):
    with torch.no_grad():
      state, shared = first_states(model, input_ids, mask, places, low, counts, keep)
      pictures = places.sum(1) // counts.each
      in_float32(vision.prompt_head)
      prompt = vision.prompt_head(state.to(where).float()).repeat_interleave(
        pictures.to(where), 0)
  first = None if first is None else first.to(where)
  high, valid, maps = vision.high(seen, low, images, counts, prompt, first)
  tokens = torch.cat([low, high.to(low.dtype)], dim=1).flatten(0, 1)
  real = torch.cat([valid.new_ones(low.shape[:2]), valid], dim=1).flatten()
  return tokens, real, maps, shared
