"""How the visual tokens of an image lie on it: what pooling, ViCrop and overlays ask a system."""

from __future__ import annotations

import dataclasses

from PIL import Image

from hrvlm_jax.systems.pictures import pad_geometry

Box = tuple[float, float, float, float]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


@dataclasses.dataclass(frozen=True)
class TokenMap:
  """A run of an image's tokens that form a map, row by row.

  Attributes:
    start: the first of them.
    box: (x0, y0, x1, y1) of the part of the picture they show, as fractions of its sides; None: a
      part that depends on the image's size (a centre crop).
  """

  rows: int
  columns: int
  start: int = 0
  box: Box | None = WHOLE

  @property
  def tokens(self) -> slice:
    """Which of the image's tokens they are."""
    return slice(self.start, self.start + self.rows * self.columns)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
  """The maps that every image has, whatever its size.

  Attributes:
    maps: tokens in none of them stand in no place of the image, or in one that depends on it.
    view: side in pixels of the view behind the map of the whole picture.
    background: colour of the square on which an image is centred before it is looked at; None: the
      picture is the image, its sides squashed.
    std: of the normalised pixels.
  """

  maps: tuple[TokenMap, ...]
  view: int
  background: tuple[int, ...] | None = None
  std: tuple[float, ...] = (0.5, 0.5, 0.5)

  @property
  def whole(self) -> TokenMap | None:
    """The finest map that shows the whole picture."""
    found = [m for m in self.maps if m.box == WHOLE]
    return max(found, key=lambda m: m.rows * m.columns, default=None)

  def covers(self, tokens: int | None) -> bool:
    """Whether the maps, one after the other, are all of so many tokens."""
    start = 0
    for one in self.maps:
      if one.start != start:
        return False
      start = one.tokens.stop
    return start == tokens

  def picture(self, image: Image.Image) -> Image.Image:
    """What the boxes are fractions of."""
    if self.background is None or image.width == image.height:
      return image
    side, place = pad_geometry(*image.size)
    canvas = Image.new('RGB', (side, side), self.background)
    canvas.paste(image.convert('RGB'), place)
    return canvas
