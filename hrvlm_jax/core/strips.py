"""Large pictures resized strip by strip: the bytes of `images.resize_exact`, without making the
whole of an intermediate picture."""

from PIL import Image

from hrvlm_jax.core.images import BICUBIC

# Pixels of one piece of an intermediate picture: large pictures are resized in strips of this size.
_PIECE = 1 << 23


def resize_part(
  image: Image.Image, size: tuple[int, int], box: tuple[int, int, int, int],
  resample: Image.Resampling = BICUBIC,
) -> Image.Image:
  """`resize_exact(image, size, resample).crop(box)` byte for byte, without making the rest.

  The horizontal pass runs on strips of rows, of which only the columns of the box are kept, the
  vertical one on strips of columns. Besides the result, no picture is larger than 8 million pixels
  or one row or column of the whole, whichever is more, and one of (box width x image height).

  Args:
    image: RGB or L.
    box: inside `size`.
  """
  x0, y0, x1, y1 = box
  if not (0 <= x0 < x1 <= size[0] and 0 <= y0 < y1 <= size[1]):
    raise ValueError(f'box {tuple(box)}: expected a box with pixels inside {size[0]} x {size[1]}')
  wide, high = x1 - x0, y1 - y0
  narrow = image
  if size[0] != image.width:
    narrow = Image.new(image.mode, (wide, image.height))
    step = max(1, _PIECE // size[0])
    for top in range(0, image.height, step):
      end = min(top + step, image.height)
      strip = image if end - top == image.height else image.crop((0, top, image.width, end))
      strip = strip.resize((size[0], end - top), resample)
      narrow.paste(strip if wide == size[0] else strip.crop((x0, 0, x1, end - top)), (0, top))
  elif wide != image.width:
    narrow = image.crop((x0, 0, x1, image.height))
  if size[1] == image.height:
    return narrow.copy() if narrow is image and high == image.height else (
      narrow.crop((0, y0, wide, y1)))
  out = Image.new(image.mode, (wide, high))
  step = max(1, _PIECE // size[1])
  for left in range(0, wide, step):
    end = min(left + step, wide)
    strip = narrow if end - left == wide else narrow.crop((left, 0, end, image.height))
    strip = strip.resize((end - left, size[1]), resample)
    out.paste(strip if high == size[1] else strip.crop((0, y0, end - left, y1)), (left, 0))
  return out


def resize_on_canvas(
  image: Image.Image, canvas: tuple[int, int], place: tuple[int, int], colour: tuple[int, ...],
  size: tuple[int, int], resample: Image.Resampling = BICUBIC,
) -> Image.Image:
  """`resize_exact(page, size, resample)` of a one-coloured page with the image pasted on it.

  Byte for byte, but the page is never made whole: rows and columns outside the image stay that
  colour in either pass (weights of a pixel sum to one). Besides the result, no picture is larger
  than 8 million pixels or (size x canvas), whichever is more.

  Args:
    image: RGB, inside the canvas at `place` (x, y).
    canvas: (width, height) of the page.
    colour: of the page.
  """
  x, y = place
  if not (x >= 0 and x + image.width <= canvas[0] and y >= 0 and y + image.height <= canvas[1]):
    raise ValueError(f'image of {image.width} x {image.height} at {place} leaves the canvas of '
                     f'{canvas[0]} x {canvas[1]}')
  band = Image.new('RGB', (size[0], image.height))  # rows of the image, squeezed horizontally
  step = max(1, _PIECE // canvas[0])
  for top in range(0, image.height, step):
    end = min(top + step, image.height)
    strip = image if end - top == image.height else image.crop((0, top, image.width, end))
    if image.width != canvas[0]:
      page = Image.new('RGB', (canvas[0], end - top), colour)
      page.paste(strip, (x, 0))
      strip = page
    if canvas[0] != size[0]:
      strip = strip.resize((size[0], end - top), resample)
    band.paste(strip, (0, top))
  if image.height == canvas[1] == size[1]:
    return band
  out = Image.new('RGB', size)
  step = max(1, _PIECE // canvas[1])
  for left in range(0, size[0], step):
    end = min(left + step, size[0])
    strip = band if end - left == size[0] else band.crop((left, 0, end, image.height))
    if image.height != canvas[1]:
      page = Image.new('RGB', (end - left, canvas[1]), colour)
      page.paste(strip, (0, y))
      strip = page
    if canvas[1] != size[1]:
      strip = strip.resize((end - left, size[1]), resample)
    out.paste(strip, (left, 0))
  return out
