"""Images without fine details: each is scaled down before the model sees it.

Pheye, last row of Table 1: the inputs of the best model are first scaled to 224 x 224 pixels, then
go through its ordinary pipeline; what the score loses came from the details.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
from typing import Any

from PIL import Image

from hrvlm_jax.core.images import resize_exact, to_rgb
from hrvlm_jax.vlm.answer import Answerer, Items, Question


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shrink:
  """Settings.

  Attributes:
    side: pixels of the square that every image is scaled to, its aspect ratio not kept.
  """

  side: int = 224

  def __post_init__(self):
    if self.side < 1:
      raise ValueError(f'Shrink: side must be at least 1, got {self.side}')

  def __call__(self, image: Image.Image) -> Image.Image:
    """The image in `side` x `side` pixels (bicubic)."""
    return resize_exact(to_rgb(image), (self.side, self.side))


class ShrinkAnswerer(Answerer):
  """The same model, and whatever is laid over it, shown scaled images."""

  def __init__(self, answerer: Answerer, shrink: Shrink = Shrink()):
    vars(self).update(vars(answerer))
    self.answerer, self.shrink = answerer, shrink
    self.methods = {**answerer.methods, 'shrink': dataclasses.asdict(shrink)}

  def shown(self, items: Items) -> list[tuple[tuple[Image.Image, ...], Question]]:
    """See `Answerer.shown`."""
    return self.answerer.shown([(tuple(map(self.shrink, images)), question)
                                for images, question in items])

  def batch(self, items: Sequence[Any]) -> dict[str, Any]:
    """See `Answerer.batch`."""
    return self.answerer.batch(items)
