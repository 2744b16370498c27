"""Two passes: the language model reads a first look and the question, and says where to look."""

import torch
from torch import nn

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


def first_states(model, input_ids, mask, places, low):
  """[b d] final-normed state of the last token of the first question, after a pass over text and
  low-resolution tokens up to it; without padding or the places of high-resolution tokens.

  Args:
    mask, places: bool [b t]: real tokens, visual ones.
    low: [v n d] low-resolution tokens of all pictures.
  """
  vision = model.vision
  ends = prompt_ends(input_ids, mask, model.config.prompt_marker or [])
  number = places.cumsum(1) - 1
  is_low = places & (number % vision.each < vision.counts.low)
  place = torch.arange(input_ids.shape[1], device=input_ids.device)
  taken = mask & (is_low | ~places) & (place <= ends[:, None])
  text = model.get_input_embeddings()(input_ids.masked_fill(places, 0))
  start, rows = 0, []
  for row in range(len(input_ids)):
    pictures = int(places[row].sum()) // vision.each
    own = low[start:start + pictures].flatten(0, 1)
    start += pictures
    embeds = text[row].masked_scatter(is_low[row][:, None], own.to(text.dtype))
    rows.append(embeds[taken[row]])
  embeds = nn.utils.rnn.pad_sequence(rows, batch_first=True)
  lengths = torch.tensor([len(row) for row in rows], device=embeds.device)
  real = torch.arange(embeds.shape[1], device=embeds.device) < lengths[:, None]
  out = model.language_model.model(inputs_embeds=embeds, attention_mask=real.long(),
                                   use_cache=False)
  return out.last_hidden_state[torch.arange(len(rows), device=embeds.device),
                               (lengths - 1).clamp(min=0)]


def look(model, input_ids, mask, pixel_values, first=None):
  """Both looks at the pictures of a batch: (tokens [n d], which of them are real [n], maps).

  Nothing of the choice of patches has a gradient: the first pass runs without.
  """
  vision = model.vision
  places = input_ids == model.config.image_token_id
  images = pixel_values.float()
  seen, low = vision.low(images)
  prompt = None
  if vision.steers:
    with torch.no_grad():
      state = first_states(model, input_ids, mask, places, low)
      counts = places.sum(1) // vision.each
      in_float32(vision.prompt_head)
      prompt = vision.prompt_head(state.float()).repeat_interleave(counts, 0)
  high, valid, maps = vision.high(seen, low, images, prompt, first)
  tokens = torch.cat([low, high.to(low.dtype)], dim=1).flatten(0, 1)
  real = torch.cat([valid.new_ones(low.shape[:2]), valid], dim=1).flatten()
  return tokens, real, maps
