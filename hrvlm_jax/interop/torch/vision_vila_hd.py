"""VILA-HD's encoder: PS3, a block projector, and a head that turns a state of the language model
into the prompt of the selection."""

import torch
from torch import nn
from torch.nn import functional as F

from .blocks import BlockProjector, described
from .ps3 import PS3, ProjectionHead
from .ps3_plan import HighDef, replaced, unpacked


class LinearHead(nn.Module):
  """fc1 alone."""

  def __init__(self, n_in, n_out):
    super().__init__()
    self.fc1 = nn.Linear(n_in, n_out)

  def forward(self, x):
    """[n i] -> [n o]."""
    return self.fc1(x)


def prompt_head(c):
  """The head that the settings name; None: without."""
  inner = c.tower.vision.width
  if c.prompt_head is None:
    return None
  return LinearHead(c.width, inner) if c.prompt_head == 'linear' else (
    ProjectionHead(c.width, 2 * inner, inner))


class VilaHdVision(nn.Module):
  """Low-resolution tokens first, then, for a prompt, those of the chosen patches."""

  def __init__(self, c, config):
    super().__init__()
    self.c = c
    tower, inner = c.tower, c.tower.vision.width
    self.grid = tower.scales[0] // tower.vision.patch_size
    self.layer = tower.vision.depth + c.select_layer
    self.counts = HighDef(c, described(c.projector)[0])
    self.ps3 = PS3(tower, config)
    self.projector = BlockProjector(c.projector, inner, c.width,
                                    grid=self.grid if c.positions else None,
                                    scales=len(tower.scales))
    self.prompt_head = prompt_head(c)

  def counts_of(self, asked=None):
    """The counts of a call: the model's, or those of the processor's `look`."""
    if asked is None:
      return self.counts
    found = unpacked(asked.flatten().tolist())
    found.pop('first_scales')
    return HighDef(replaced(self.c, **found), self.projector.side)

  def steers(self, counts):
    """Whether the question decides what is encoded."""
    return self.c.mode == 'after_prompt' and counts.looks_closer

  def low(self, images, counts):
    """[v 3 S S] -> (PS3's thumbnail pass, low-resolution tokens [v n d])."""
    found = self.ps3.low(images, keep=-self.c.select_layer, select=counts.looks_closer)
    x = self.projector(found.hidden[self.layer])
    side = round(x.shape[1] ** 0.5)
    return found, (x + self.projector.positions(0, side)).to(x.dtype)

  def high(self, seen, tokens, images, counts, prompt, first=None):
    """(tokens [v k d], which of the places hold one [v k], maps per high scale).

    Args:
      seen, tokens: of `low`.
      counts: of `counts_of`.
      prompt: [v c]; None follows saliency.
      first: [v] high scales of each picture, where sizes decide.
    """
    if not counts.looks_closer:
      return tokens[:, :1], tokens.new_ones(len(tokens), 1, dtype=torch.bool), ()
    if len(counts.choices) == 1:
      return self._look(seen, tokens, images, counts, prompt, counts.plans[0])
    out = None
    for choice, plan in zip(counts.choices, counts.plans):
      part = self._look(seen, tokens, images, counts, prompt, plan)
      if out is None:
        out = part
        continue
      mine = first == choice
      pick = lambda old, new: torch.where(mine.view(-1, *[1] * (old.ndim - 1)), new, old)  # noqa: B023
      out = (pick(out[0], part[0]), pick(out[1], part[1]), tuple(map(pick, out[2], part[2])))
    return out

  def _look(self, seen, low, images, counts, prompt, plan):
    with torch.no_grad():  # the choice of cells has no gradient
      probs = self.ps3.probabilities(seen, prompt, plan, smooth=counts.smooth)
    out = self.ps3.look(seen, images, probs, plan)
    return (*self._blocks(out.hidden[self.layer], low, out.maps, counts.slots), tuple(out.maps))

  def _blocks(self, features, low, maps, slots):
    """Tokens of the blocks all of whose patches were chosen, in places fixed per scale."""
    batch, side = len(features), self.projector.side
    chosen = torch.cat([m.flatten(1) for m in maps], dim=1) > 0
    index = torch.where(chosen, self.grid**2 + chosen.cumsum(1) - 1, -1)
    tokens, valid, start = [], [], 0
    for scale, (m, room) in enumerate(zip(maps, slots), 1):
      grid = m.shape[1]
      own = index[:, start:start + grid * grid].unflatten(1, (grid, grid))
      start += grid * grid
      if not room:
        continue
      blocks = -(-grid // side)
      keep = F.adaptive_max_pool2d(1 - m[:, None].float(), blocks).flatten(1) == 0
      order = torch.sort(keep.int(), dim=1, descending=True, stable=True)[1][:, :room]
      own = F.pad(own, (0, blocks * side - grid, 0, blocks * side - grid), value=-1)
      own = own.unflatten(2, (blocks, side)).unflatten(1, (blocks, side)).transpose(2, 3)
      own = own.flatten(3).flatten(1, 2)  # n blocks side*side
      patches = own.gather(1, order[..., None].expand(-1, -1, side * side))
      rows = torch.arange(batch, device=features.device)[:, None, None]
      taken = features[rows, patches.clamp(min=0)]
      taken = taken.masked_fill((patches < 0)[..., None], 0).flatten(2)
      where = self.projector.positions(scale, blocks)
      x = self.projector.project(taken)
      tokens.append((x + (where if isinstance(where, float) else where[order])).to(x.dtype))
      valid.append(keep.gather(1, order))
    if not tokens:
      return low[:, :1], low.new_ones(batch, 1, dtype=torch.bool)
    tokens, valid = torch.cat(tokens, dim=1), torch.cat(valid, dim=1)
    none = ~valid.any(dim=1)  # then the first low-resolution token stands in
    head = torch.where(none[:, None], low[:, 0], tokens[:, 0])
    tokens = torch.cat([head[:, None], tokens[:, 1:]], dim=1)
    return tokens, torch.cat([valid[:, :1] | none[:, None], valid[:, 1:]], dim=1)
