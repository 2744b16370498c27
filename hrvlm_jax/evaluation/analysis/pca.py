"""Features as colours: the first three principal components (PS3, Figure 14).

Axis letters: h, w feature grid, d feature width, k components.
"""

from collections.abc import Sequence
import dataclasses

from jaxtyping import Bool, Float, UInt8
import numpy as np
from PIL import Image

from hrvlm_jax.checkpoint.files import whole_file
from hrvlm_jax.core.images import open_image, to_rgb
from hrvlm_jax.vlm.encode import ImageEncoder


@dataclasses.dataclass(frozen=True)
class Components:
  """A fitted projection: mean [d], axes [k d] (orthonormal rows), share of variance of each [k]."""

  mean: np.ndarray
  axes: np.ndarray
  explained: np.ndarray


def fit(
    maps: Sequence[Float[np.ndarray, 'h w d']],
    *,
    valid: Sequence[Bool[np.ndarray, 'h w']] | None = None,
    count: int = 3,
) -> Components:
  """Principal components of the tokens of all maps together, so that their colours compare.

  The sign of each axis is fixed by making its largest entry positive.

  Args:
    maps: feature grids of one encoder; sizes may differ, widths not.
    valid: tokens to use (PS3 encodes only selected patches); default: all.

  Raises:
    ValueError: no tokens, fewer features or tokens than components, values that are not finite.
  """
  masks = valid if valid is not None else [np.ones(m.shape[:2], bool) for m in maps]
  if not maps or len(masks) != len(maps):
    raise ValueError(f'expected maps and a mask for each, got {len(maps)} and {len(masks)}')
  tokens = np.concatenate([np.asarray(m, np.float64)[mask] for m, mask in zip(maps, masks)])
  if min(tokens.shape) < count:
    raise ValueError(f'{count} components need as many tokens and features, got {tokens.shape}')
  if not np.isfinite(tokens).all():
    raise ValueError('features contain values that are not finite')
  mean = tokens.mean(axis=0)
  centred = tokens - mean
  # The d x d scatter matrix: cheap however many tokens a 4K image has.
  values, vectors = np.linalg.eigh(centred.T @ centred)
  order = np.argsort(values)[::-1][:count]
  axes = vectors[:, order].T
  signs = np.sign(axes[np.arange(count), np.abs(axes).argmax(axis=1)])
  total = values.clip(min=0).sum()
  explained = values[order].clip(min=0) / total if total > 0 else np.zeros(count)
  return Components(mean, axes * np.where(signs == 0, 1, signs)[:, None], explained)


def colours(
    maps: Sequence[Float[np.ndarray, 'h w d']],
    components: Components | None = None,
    *,
    valid: Sequence[Bool[np.ndarray, 'h w']] | None = None,
    tail: float = 1.0,
) -> list[UInt8[np.ndarray, 'h w 3']]:
  """Feature maps as RGB pictures: component 1 is red, 2 green, 3 blue.

  Args:
    components: from `fit`; default: fitted on these maps.
    valid: tokens that exist; the others become black.
    tail: percent of extreme values on each side that are cut off before scaling to 0..255.
  """
  components = components or fit(maps, valid=valid)
  masks = valid if valid is not None else [np.ones(m.shape[:2], bool) for m in maps]
  projected = [(np.asarray(m, np.float64) - components.mean) @ components.axes[:3].T for m in maps]
  used = np.concatenate([p[mask] for p, mask in zip(projected, masks)])
  low, high = np.percentile(used, [tail, 100 - tail], axis=0)
  scale = np.where(high > low, high - low, 1.0)
  pictures = []
  for values, mask in zip(projected, masks):
    levels = np.rint(255 * np.clip((values - low) / scale, 0, 1)).astype(np.uint8)
    pictures.append(np.where(mask[..., None], levels, 0).astype(np.uint8))
  return pictures


def side_by_side(pictures: Sequence[UInt8[np.ndarray, 'h w 3']], *, height: int,
                 gap: int = 4) -> Image.Image:
  """Pictures in one row, scaled to one height by nearest neighbour: each token stays visible."""
  scaled = []
  for picture in pictures:
    rows, columns = picture.shape[:2]
    width = max(1, round(columns * height / rows))
    scaled.append(Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST))
  total = sum(image.width for image in scaled) + gap * (len(scaled) - 1)
  page = Image.new('RGB', (total, height), (255, 255, 255))
  left = 0
  for image in scaled:
    page.paste(image, (left, 0))
    left += image.width + gap
  return page


def run(*, checkpoint: str, images: Sequence[str], out: str, height: int = 448) -> list[str]:
  """Visual tokens of images as colours, each beside its picture; one projection for all of them.

  Args:
    checkpoint: a model whose visual tokens form a grid on the image.
    images: image files.
    out: picture to write.
    height: of the rows in pixels.

  Raises:
    UserError: a model without such a grid, bad files.
  """
  encoder = ImageEncoder.load(checkpoint)
  grid = encoder.system.whole_grid(encoder.config.encoder, what='The picture of visual tokens')
  one = grid.whole
  opened = [open_image(path, exif='apply') for path in images]
  maps = [np.asarray(encoder(image).values[0], np.float32)[one.tokens]
          .reshape(one.rows, one.columns, -1) for image in opened]
  components = fit(maps)
  rows = [side_by_side([np.asarray(to_rgb(grid.picture(image))), picture], height=height)
          for image, picture in zip(opened, colours(maps, components))]
  page = Image.new('RGB', (max(row.width for row in rows), height * len(rows)), (255, 255, 255))
  for number, row in enumerate(rows):
    page.paste(row, (0, height * number))
  with whole_file(out) as part:
    page.save(part)
  return [f'component {i}: {share:.1%} of the variance'
          for i, share in enumerate(components.explained, 1)]
