"""Freshly drawn crops with labels, to pre-train a small vision encoder on the task's letters.

A crop is a window of a canvas, resized as a system's views are, with up to two signs in it. The
label says, for every colour, what the sign of that colour reads.
"""

from collections.abc import Iterable, Sequence
import dataclasses

from jaxtyping import Float32, Int32, UInt8
import numpy as np
from PIL import Image

from hrvlm_jax.core.images import resize_exact
from hrvlm_jax.lab.needle.config import NeedleConfig
from hrvlm_jax.lab.needle.generate import empty, generate
from hrvlm_jax.lab.needle.signs import Sign, draw, log_uniform, make_sign, overlap

NOTHING, CUT = -1, -2

_SIGNS = (0, 1, 1, 1, 1, 1, 2, 2, 2, 2)  # signs of a crop, equally likely entries
_WHOLLY_INSIDE = 0.75  # share of the signs that are not cut by the window's edge
_CROPS_PER_CANVAS = 16
_TRIES = 8


@dataclasses.dataclass(frozen=True)
class GlyphCrops:
  """n labelled crops.

  Attributes:
    pixels: RGB.
    letters: for every crop and colour of `config.colours` the indices in `config.alphabet` of the
      text on that colour's sign; -1 (`NOTHING`): no such sign, -2 (`CUT`): its text
      is partly outside, or two signs have the colour, so that neither answer would be fair.
    shapes: index in `config.shapes` of that sign, or -1.
    boxes: box (x0, y0, x1, y1) of that sign's text relative to the crop (0 to 1 inside it), or 0.
    shown: of every crop all its texts: (index of the first character, -1 or -2; index of the
      colour; box).
    things: of every view all its things: (index in `views.THINGS` or -2; box). cues: of every view
      the index in `views.states`, or -1. Of `views.task_views` only, whose `letters` may have other
      rows than colours.
  """

  pixels: UInt8[np.ndarray, 'n size size 3']
  letters: Int32[np.ndarray, 'n colours length']
  shapes: Int32[np.ndarray, 'n colours']
  boxes: Float32[np.ndarray, 'n colours 4']
  shown: Sequence[Sequence[tuple[int, int, np.ndarray]]]
  things: Sequence[Sequence[tuple[int, np.ndarray]]] = ()
  cues: Int32[np.ndarray, 'n'] | None = None

  def patch_letters(self, grid: int) -> Int32[np.ndarray, 'n patches']:
    """What each patch of a `grid` x `grid` view shows, in raster order.

    The index of the first character of the text whose box holds the patch's centre (or is nearest
    to the box's centre, for texts smaller than a patch); -1 elsewhere, -2 on a cut text. A loss on
    every patch teaches an encoder to read in a fraction of the steps that a loss on the
    last patches alone needs.
    """
    return self._patches(grid, ((i, letter, box) for i, shown in enumerate(self.shown)
                                for letter, _, box in shown))

  def patch_colours(self, grid: int) -> Int32[np.ndarray, 'n patches']:
    """The colour of the sign each patch shows a text of: index in `config.colours`, -1, -2."""
    return self._patches(grid, ((i, CUT if letter == CUT else colour, box)
                                for i, shown in enumerate(self.shown)
                                for letter, colour, box in shown))

  def patch_things(self, grid: int) -> Int32[np.ndarray, 'n patches']:
    """The thing each patch shows: index in `views.THINGS`, -1, -2 for one that is cut."""
    return self._patches(grid, ((i, thing, box) for i, things in enumerate(self.things)
                                for thing, box in things))

  def _patches(self, grid: int, marked: Iterable[tuple[int, int, np.ndarray]]):
    target = np.full((len(self.pixels), grid, grid), NOTHING, np.int32)
    centres = (np.arange(grid) + 0.5) / grid
    for i, value, box in marked:
      x0, y0, x1, y1 = box
      nearest_x, nearest_y = (int(np.clip((a + b) / 2 * grid, 0, grid - 1))
                              for a, b in ((x0, x1), (y0, y1)))
      columns, rows = (centres >= x0) & (centres < x1), (centres >= y0) & (centres < y1)
      columns[nearest_x] = rows[nearest_y] = True
      target[i][np.ix_(rows, columns)] = value
    return target.reshape(len(target), grid * grid)


def glyph_crops(
  config: NeedleConfig,
  rng: np.random.Generator,
  n: int,
  *,
  window: int,
  size: int,
  whole: float = 0.0,
) -> GlyphCrops:
  """n crops of `window` x `window` canvas pixels, resized to `size` x `size`.

  Args:
    config: the task; sizes, fonts, colours and backgrounds of the signs are its own.
    rng: source of all randomness; nothing is kept between calls.
    window: side of a system's crops in canvas pixels, at most the canvas' shorter side.
    size: side of the result in pixels.
    whole: share of the crops (0 to 1) that show a complete image of the task instead, squeezed to
      the same size, with the labels of all its signs, readable or not.

  Raises:
    ValueError: a window that is larger than the canvas.
  """
  if not 1 <= window <= min(config.width, config.height):
    raise ValueError(f'window: found {window}, expected 1 to {min(config.width, config.height)}')
  pixels = np.empty((n, size, size, 3), np.uint8)
  letters = np.full((n, len(config.colours), config.length), NOTHING, np.int32)
  shapes = np.full((n, len(config.colours)), -1, np.int32)
  boxes = np.zeros((n, len(config.colours), 4), np.float32)
  is_whole = rng.random(n) < whole
  canvas, shown = None, []
  config = dataclasses.replace(config, documents=None)  # letters are learned from made texts
  for i in range(n):
    if is_whole[i]:
      example = generate(config, int(rng.integers(2**62)), i)
      picture, signs = example.image, example.signs
      box = (0, 0, config.width, config.height)
    else:
      if i % _CROPS_PER_CANVAS == 0 or canvas is None:
        canvas = empty(config, rng)
      x = int(rng.integers(config.width - window + 1))
      y = int(rng.integers(config.height - window + 1))
      part = canvas[y:y + window, x:x + window].copy()
      signs, box = draw_signs(config, rng, window), (0, 0, window, window)
      for sign in signs:
        draw(part, sign, config.alphabet)
      picture = Image.fromarray(part)
    pixels[i] = np.asarray(resize_exact(picture, (size, size)))
    mine = []
    for sign in signs:
      colour = config.colours.index(sign.colour)
      label = _label(config, sign, box)
      twice = shapes[i, colour] >= 0
      shapes[i, colour] = config.shapes.index(sign.shape)
      letters[i, colour] = CUT if twice else label
      boxes[i, colour] = np.array(sign.text_box) / (box[2:] * 2)
      mine.append((label if isinstance(label, int) else label[0], colour, boxes[i, colour].copy()))
    shown.append(sorted(mine, key=lambda one: one[1]))
  return GlyphCrops(pixels=pixels, letters=letters, shapes=shapes, boxes=boxes, shown=shown)


def _label(config, sign, box):
  x0, y0, x1, y1 = sign.text_box
  if x0 >= box[0] and y0 >= box[1] and x1 <= box[2] and y1 <= box[3]:
    return [config.alphabet.index(c) for c in sign.text]
  if x1 <= box[0] or y1 <= box[1] or x0 >= box[2] or y0 >= box[3]:
    return NOTHING
  return CUT


def draw_signs(config: NeedleConfig, rng: np.random.Generator, window: int) -> list[Sign]:
  """Up to two signs of different colours whose centres lie in the window, without overlap."""
  count = _SIGNS[int(rng.integers(len(_SIGNS)))]
  colours = rng.permutation(len(config.colours))[:count].tolist()
  signs = []
  for colour in colours:
    shape = config.shapes[int(rng.integers(len(config.shapes)))]
    font = config.fonts[int(rng.integers(len(config.fonts)))]
    area = log_uniform(rng, *config.relative_area)
    text_size = config.text_size(config.text_height(area, font), font)
    width, height = config.sign_size(text_size, shape)
    inside = rng.random() < _WHOLLY_INSIDE
    for _ in range(_TRIES):
      u, v = rng.random(2).tolist()
      if inside:
        x, y = int(u * max(1, window - width + 1)), int(v * max(1, window - height + 1))
      else:
        x, y = int(u * window) - width // 2, int(v * window) - height // 2
      box = (x, y, x + width, y + height)
      if not any(overlap(box, other.box, config.gap) for other in signs):
        letters = rng.integers(len(config.alphabet), size=config.length).tolist()
        signs.append(make_sign(
          config, rng, text=''.join(config.alphabet[c] for c in letters),
          colour=config.colours[colour], shape=shape, font=font, text_size=text_size, corner=(x, y),
        ))
        break
  return signs
