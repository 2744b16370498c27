"""Host-side integers of PS3: sizes of the scales, number of looks, tokens per look and scale.

Nothing here looks at pixels or probabilities: WHICH cells are taken is decided on the device, HOW
MANY per look and scale follows from the image's size and the arguments alone. Source:
`NVlabs/PS3: ps3/modeling_ps3.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
from typing import Literal

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.images import check_size
from hrvlm_jax.systems.ps3.config import PS3Config

Size = tuple[int, int]  # (rows, columns): of pixels or of cells


@dataclasses.dataclass(frozen=True)
class Plan:
  """Everything static about encoding one batch of equally large images.

  Attributes:
    sizes: (height, width) in pixels of every scale, the thumbnail first.
    grids: (rows, columns) in patches of every scale.
    counts: [instance][look][high scale] tokens; one instance stands for all where they agree.
  """

  sizes: tuple[Size, ...]
  grids: tuple[Size, ...]
  counts: tuple[tuple[tuple[int, ...], ...], ...]

  @property
  def looks(self) -> int:
    """Number of looks; 0 is the thumbnail alone."""
    return len(self.counts[0])

  @property
  def cells(self) -> tuple[int, ...]:
    """Cells per high scale."""
    return tuple(rows * cols for rows, cols in self.grids[1:])

  @property
  def look_tokens(self) -> tuple[int, ...]:
    """Tokens of every look (the same for all instances)."""
    return tuple(sum(look) for look in self.counts[0])

  @property
  def tokens(self) -> int:
    """Tokens of the whole result, the thumbnail's included."""
    rows, cols = self.grids[0]
    return rows * cols + sum(self.look_tokens)

  @property
  def deepest(self) -> tuple[int, ...]:
    """Per high scale, how many ranks any instance uses."""
    return tuple(max(sum(look[i] for look in looks) for looks in self.counts)
                 for i in range(len(self.cells)))

  def look(self, number: int) -> tuple[tuple[int, ...], ...]:
    """[instance][high scale] tokens of one look."""
    return tuple(looks[number] for looks in self.counts)


def scale_sizes(height: int, width: int, config: PS3Config) -> tuple[Size, ...]:
  """(height, width) of every scale for an image of that size.

  The thumbnail is square. Higher scales keep the aspect ratio: the long side is the thumbnail's
  times a whole zoom, the short side is counted in whole thumbnail patches. Some square sizes lose
  a column that way (1059 x 1059 becomes 54 x 52 cells): the original evaluates
  int(s0 / long * short) in double precision in this order, and so do we.

  Raises:
    UserError: a side below 1.
  """
  check_size(width, height)
  first, patch = config.scales[0], config.vision.patch_size
  short_cells = lambda long, short: max(int(first / long * short) // patch, 1)
  sizes = [(first, first)]
  for scale in config.scales[1:]:
    zoom = scale // first
    if height >= width:
      sizes.append((first * zoom, short_cells(height, width) * patch * zoom))
    else:
      sizes.append((short_cells(width, height) * patch * zoom, first * zoom))
  return tuple(sizes)


def make_plan(
  height: int,
  width: int,
  config: PS3Config,
  *,
  num_looks: int | Literal['all'] | None = None,
  num_tokens: int | None = None,
  first_scales: int | Sequence[int] | None = None,
) -> Plan:
  """The plan for images of height x width pixels.

  Args:
    num_looks: looks of a full budget each, at most as many as cover the image; 'all' covers it.
    num_tokens: high-resolution tokens instead; every look is full except the last.
    first_scales: only the first n high scales, one number or one per instance. As in the
      original, each later scale still gets a token and the rounding rest (`quirks='reference'`),
      and budget the first scales cannot use spills over to them.

  Raises:
    UserError: both or neither of `num_looks` and `num_tokens`, numbers out of range, a budget that
      `first_scales` makes negative, or instances whose looks differ in length.
  """
  sizes = scale_sizes(height, width, config)
  patch = config.vision.patch_size
  grids = tuple((h // patch, w // patch) for h, w in sizes)
  cells = [rows * cols for rows, cols in grids[1:]]
  firsts = _firsts(first_scales, len(cells))
  if num_looks == 0 or num_tokens == 0:
    return Plan(sizes, grids, ((),))
  budgets = config.resolved_budgets
  total = sum(budgets)
  reach = max((n for n in firsts if n is not None), default=len(cells))
  available = sum(cells[:reach])
  lengths = _look_lengths(num_looks, num_tokens, total, available)
  counts = tuple(_instance(lengths, budgets, cells, first, config.quirks) for first in firsts)
  if len({tuple(map(sum, looks)) for looks in counts}) > 1:
    raise UserError(
      'first_scales differs between the images of the batch so that their looks differ in length '
      f'({[list(map(sum, looks)) for looks in counts]} tokens); encode them one by one')
  return Plan(sizes, grids, counts if len(set(counts)) > 1 else counts[:1])


def _firsts(value, scales: int) -> list[int | None]:
  values = list(value) if isinstance(value, Sequence) else [value]
  for n in values:
    if n is not None and not 1 <= n <= scales:
      raise UserError(f'first_scales must lie in 1..{scales} (the high scales), got {n}')
  return values


def _look_lengths(num_looks, num_tokens, total: int, available: int) -> list[int | None]:
  """Tokens asked of every look; None is a full budget."""
  if num_looks is not None and num_tokens is not None:
    raise UserError(f'num_looks={num_looks!r} and num_tokens={num_tokens!r} exclude each other; '
                    'give one of them')
  if num_tokens is not None:
    if isinstance(num_tokens, str):
      raise UserError(f'num_tokens must be a number, got {num_tokens!r}; to encode the whole image '
                      "use num_looks='all'")
    if num_tokens < 0:
      raise UserError(f'num_tokens must not be negative, got {num_tokens}')
    wanted = min(num_tokens, available)
    looks = -(-wanted // total)
    return [None] * (looks - 1) + [wanted % total or total]
  if num_looks is None:
    raise UserError('give num_looks (a number or "all") or num_tokens')
  cover = -(-available // total)
  if num_looks == 'all':
    return [None] * cover
  if isinstance(num_looks, str) or num_looks < 0:
    raise UserError(f"num_looks must be 'all' or a number from 0, got {num_looks!r}")
  return [None] * min(num_looks, cover)


def _instance(lengths, budgets, cells, first: int | None, quirks: str):
  """[look][scale] tokens of one instance."""
  left = list(cells)
  last = first if first is not None and quirks == 'strict' else len(cells)  # spill ends there
  looks = []
  for length in lengths:
    wanted = _share(length, budgets, first, quirks)
    if min(wanted) < 0:
      raise UserError(
        f'first_scales={first} leaves a scale with a budget of {min(wanted)} tokens of '
        f'{sum(budgets)} (budgets {list(budgets)}); use a larger first_scales or quirks="strict"')
    taken = []
    for i, available in enumerate(left):
      if available < wanted[i]:
        if i + 1 < last:
          wanted[i + 1] += wanted[i] - available
        wanted[i] = available
      taken.append(wanted[i])
    left = [a - t for a, t in zip(left, taken, strict=True)]
    looks.append(tuple(taken))
  return tuple(looks)


def _share(length: int | None, budgets, first: int | None, quirks: str) -> list[int]:
  """The budget of one look before the spill-over."""
  total = sum(budgets)
  wanted = list(budgets)
  if length is not None and length != total:
    wanted = [int(b * length / total) for b in budgets]
    wanted[-1] += length - sum(wanted)
  if first is None:
    return wanted
  asked = sum(wanted)
  source = list(budgets) if quirks == 'strict' else wanted
  head = sum(source[:first])
  if head < 1:
    raise UserError(f'first_scales={first} selects scales without any budget ({source} tokens per '
                    'scale); use a larger first_scales, more tokens or quirks="strict"')
  shares = [int(b / head * asked) for b in source[:first]]
  later = len(wanted) - first
  if quirks == 'strict':
    shares[-1] += asked - sum(shares)
    return shares + [0] * later
  # The original gives each later scale one token and the last scale whatever is missing to the
  # FULL budget, also in a shortened look.
  shares += [1] * later
  shares[-1] += total - sum(shares)
  return shares
