"""How many patches of which scale each look of PS3 takes: integers that follow from settings."""

from types import SimpleNamespace

# What a call of a processor can change of a look; the model gets it as one row of numbers, in this
# order, the budgets last.
LOOK = ('looks', 'tokens', 'first_scales', 'smooth')
_NONE, _ALL = -1, -2


def packed(look):
  """Settings of a look as a row of integers: those of `LOOK`, then the budgets, if any."""
  number = lambda x: _NONE if x is None else _ALL if x == 'all' else int(x)
  return [*(number(look.get(name)) for name in LOOK), *(look.get('budgets') or ())]


def unpacked(row):
  """The settings of a row of `packed`; budgets None where it has none."""
  values = [None if x == _NONE else 'all' if x == _ALL else x for x in row]
  found = dict(zip(LOOK, values))
  return found | {'smooth': bool(found['smooth']), 'budgets': values[len(LOOK):] or None}


def replaced(c, **values):
  """Settings with other values."""
  return SimpleNamespace(**(vars(c) | values))


class Plan:
  """Grids of the scales of a square picture, and tokens [look][high scale].

  Args:
    c: settings of PS3.
    looks: of a full budget each, or 'all'.
    tokens: high-resolution tokens in place of `looks`.
    first: use the first high scales only, as the original does (see `_share`).
    budgets: tokens per high scale in one look; None: those of the settings.
  """

  def __init__(self, c, looks=None, tokens=None, first=None, budgets=None):
    side, base, patch = c.scales[-1], c.scales[0], c.vision.patch_size
    short = max(int(base / side * side) // patch, 1) * patch
    # The long side of a scale is the thumbnail's times a whole zoom, the short one whole patches.
    self.sizes = [(base, base)] + [(base * (s // base), short * (s // base)) for s in c.scales[1:]]
    self.grids = [(h // patch, w // patch) for h, w in self.sizes]
    self.cells = [rows * columns for rows, columns in self.grids[1:]]
    budgets = budgets or c.budgets or shares(c)
    self.counts = []
    if looks == 0 and tokens is None or tokens == 0:
      return
    total, available = sum(budgets), sum(self.cells[:first])
    if tokens is not None:
      wanted = min(tokens, available)
      lengths = [None] * (-(-wanted // total) - 1) + [wanted % total or total]
    else:
      cover = -(-available // total)
      lengths = [None] * (cover if looks == 'all' else min(looks, cover))
    left = list(self.cells)
    last = len(left) if first is None or c.quirks != 'strict' else first
    for length in lengths:
      wanted = _share(length, budgets, first, c.quirks)
      if min(wanted) < 0:
        raise ValueError(f'first_scales={first} leaves a scale with a budget of {min(wanted)} '
                         f'tokens of {total}; use a larger first_scales')
      for i, room in enumerate(left):
        if room < wanted[i]:
          if i + 1 < last:
            wanted[i + 1] += wanted[i] - room
          wanted[i] = room
      left = [a - b for a, b in zip(left, wanted)]
      self.counts.append(wanted)

  @property
  def deepest(self):
    """Per high scale, how many cells are taken in all."""
    return [sum(look[i] for look in self.counts) for i in range(len(self.cells))]

  @property
  def tokens(self):
    """High-resolution tokens of all looks."""
    return sum(self.deepest)


def shares(c):
  """Tokens per high scale in one look, by area; the rest goes to the last scale."""
  areas = [s**2 for s in c.scales[1:]]
  found = [int(c.max_select * area / sum(areas)) for area in areas]
  return [*found[:-1], found[-1] + c.max_select - sum(found)]


def _share(length, budgets, first, quirks):
  """The budget of one look before what a full scale cannot take moves on."""
  total, wanted = sum(budgets), list(budgets)
  if length is not None and length != total:
    wanted = [int(b * length / total) for b in budgets]
    wanted[-1] += length - sum(wanted)
  if first is None:
    return wanted
  asked, strict = sum(wanted), quirks == 'strict'
  source = list(budgets) if strict else wanted
  head = sum(source[:first])
  if head < 1:
    raise ValueError(f'first_scales={first} selects scales without any budget')
  found, later = [int(b / head * asked) for b in source[:first]], len(wanted) - first
  if strict:
    found[-1] += asked - sum(found)
    return found + [0] * later
  # One token for each later scale, and what is missing to the FULL budget for the last one.
  found += [1] * later
  found[-1] += total - sum(found)
  return found


def slots(grid, selected, side):
  """The most blocks of side x side patches that can be complete when `selected` of grid x grid
  patches are: filling the cheapest averaging windows first."""
  blocks = -(-grid // side)
  starts = [i * grid // blocks for i in range(blocks + 1)]
  widths = [b - a for a, b in zip(starts, starts[1:])]
  number, used = 0, 0
  for cost in sorted(a * b for a in widths for b in widths):
    used += cost
    if used > selected:
      break
    number += 1
  return number


class HighDef:
  """The counts of VILA-HD that processor and model must agree on.

  Args:
    c: settings of its encoder.
  """

  def __init__(self, c, side):
    tower = c.tower
    scales = len(tower.scales) - 1
    self.choices = [scales - 1, scales] if c.dynamic_aspect == 'on' else [None]
    looks = None if c.tokens is not None else c.looks
    self.plans = [Plan(tower, looks, c.tokens, first, c.budgets) for first in self.choices]
    grid = tower.scales[0] // tower.vision.patch_size
    self.low = (-(-grid // side)) ** 2
    self.slots = [max(slots(own[0], plan.deepest[i], side) for plan in self.plans)
                  for i, own in enumerate(self.plans[0].grids[1:])]
    self.high = max(sum(self.slots), 1)
    self.each, self.smooth = self.low + self.high, c.smooth
    self.looks_closer = bool(self.plans[-1].counts)
    # Above half way between the last two scales, a picture uses all of them.
    self.threshold = (tower.scales[-2] + tower.scales[-1]) / 2
    self.scales, self.largest = scales, tower.scales[-1]

  def first(self, width, height):
    """High scales of a picture of that size, where sizes decide."""
    if len(self.choices) == 1:
      return self.scales
    whole = max(width, height) > self.threshold or self.largest <= 2000
    return self.scales - (not whole)
