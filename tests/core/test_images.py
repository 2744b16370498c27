import io
import struct
import threading
import zlib

import numpy as np
from PIL import Image
import pytest

from hrvlm_jax.core import images, strips
from hrvlm_jax.core.errors import UserError

RNG = np.random.default_rng(0)


def noise(width, height, mode='RGB'):
  channels = len(Image.new(mode, (1, 1)).getbands())
  shape = (height, width) if channels == 1 else (height, width, channels)
  return Image.fromarray(RNG.integers(0, 256, shape, dtype=np.uint8), mode)


def encoded(image, kind, **options):
  buffer = io.BytesIO()
  image.save(buffer, kind, **options)
  return buffer.getvalue()


def png_chunk(kind, data):
  return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


@pytest.mark.parametrize('kind, count, after', [
  ('zTXt', 1, False), ('iTXt', 1, False), ('iCCP', 1, False), ('tEXt', 1, True),
  ('zTXt', 80, False)])
def test_metadata_of_a_png_does_not_matter(kind, count, after, tmp_path):
  """More than Pillow takes: 1 MiB in one chunk, 64 MiB in all; in front of the pixels or behind."""
  picture = noise(6, 4)
  plain = encoded(picture, 'PNG')
  data = bytes((2 << 20) if count == 1 else (1 << 20) - 100)
  body = {'zTXt': b'Comment\0\0' + zlib.compress(data), 'iCCP': b'icc\0\0' + zlib.compress(data),
          'iTXt': b'XML:com.adobe.xmp\0\1\0\0\0' + zlib.compress(data),
          'tEXt': b'Comment\0' + data}[kind]
  place = plain.index(b'IEND') - 4 if after else 33  # behind the header
  large = plain[:place] + png_chunk(kind.encode(), body) * count + plain[place:]
  opened = images.open_image(large)
  assert opened.tobytes() == picture.tobytes()
  (tmp_path / 'a.png').write_bytes(large)
  assert images.image_size(large) == images.image_size(tmp_path / 'a.png') == (6, 4)
  with pytest.raises(UserError, match='damaged'):  # what is wrong elsewhere still is
    images.open_image(large[:-40 if not after else place - 10])


@pytest.mark.parametrize('kind, mode', [
  ('PNG', 'RGBA'), ('PNG', 'LA'), ('PNG', 'P'), ('GIF', 'P'), ('WEBP', 'RGBA'), ('PNG', '1')])
def test_a_transparent_page_is_white_where_asked(kind, mode):
  """Black text on a transparent page: a browser shows black on white."""
  page = Image.new('LA', (8, 8), (0, 0))
  page.paste((0, 255), (2, 2, 5, 5))
  options = {'lossless': True} if kind == 'WEBP' else {}
  if mode in ('P', '1'):
    grey = page.getchannel('A').point(lambda a: 1 if a else 0).convert('L')
    flat = Image.new('P', (8, 8))
    flat.putpalette([0, 0, 0] * 256)
    flat.paste(grey)
    options['transparency'] = 0
    data = encoded(flat, kind, **options)
  else:
    data = encoded(page.convert(mode), kind, **options)
  seen = np.asarray(images.to_rgb(images.open_image(data, alpha='white')))
  ink = np.asarray(page.getchannel('A')) > 0
  assert (seen[ink] == 0).all() and (seen[~ink] == 255).all()
  assert (np.asarray(images.to_rgb(images.open_image(data))) == 0).all()  # as the originals
  opaque = encoded(noise(4, 4), 'PNG')
  assert images.open_image(opaque, alpha='white').tobytes() == images.open_image(opaque).tobytes()
  with pytest.raises(ValueError, match='alpha'):
    images.open_image(data, alpha='black')


def test_pixel_limit():
  assert images.MAX_PIXELS == 178_956_970
  header = encoded(Image.new('1', (8, 8)), 'PNG')
  wide = header[:16] + struct.pack('>II', 20_000, 10_000) + header[24:29]
  bomb = wide + struct.pack('>I', zlib.crc32(wide[12:29])) + header[33:]
  with pytest.raises(UserError, match='200000000 pixels, the limit is 178956970.*--max-pixels'):
    images.open_image(bomb)
  assert images.image_size(bomb, max_pixels=200_000_000) == (20_000, 10_000)


def test_heic_is_named():
  with pytest.raises(UserError, match='HEIC or HEIF; save it as JPEG or PNG'):
    images.open_image(b'\x00\x00\x00\x18ftypheic\x00\x00\x00\x00' + bytes(40))


@pytest.mark.parametrize('content, words', [
  (b'', 'empty'),
  (b'<!DOCTYPE html><html><body>404</body></html>', 'web page'),
  (b'\x00' * 100, 'is not an image'),
  (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', 'is not an image'),
])
def test_not_an_image(tmp_path, content, words):
  path = tmp_path / 'photo.jpg'
  path.write_bytes(content)
  with pytest.raises(UserError, match=words) as caught:
    images.open_image(path)
  assert 'photo.jpg' in str(caught.value)
  assert '\n' not in str(caught.value)


def test_missing_and_folder(tmp_path):
  with pytest.raises(UserError, match='no such file'):
    images.open_image(tmp_path / 'none.png')
  with pytest.raises(UserError, match='is a folder'):
    images.open_image(tmp_path)
  with pytest.raises(UserError, match='cannot be read|no such file'):
    images.open_image('a\0b.png')


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP', 'GIF', 'BMP', 'TIFF', 'PPM'])
def test_truncated(kind):
  data = encoded(noise(64, 48), kind)
  assert images.open_image(data).size == (64, 48)
  with pytest.raises(UserError, match='truncated|damaged') as caught:
    images.open_image(data[:len(data) // 2], name='half')
  assert str(caught.value).startswith('half: ')


@pytest.mark.filterwarnings('ignore::UserWarning:PIL')
@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'GIF', 'TIFF'])
def test_every_truncation_is_one_sentence(kind):
  data = encoded(noise(9, 7), kind)
  for length in range(0, len(data), 7):
    try:
      images.open_image(data[:length])
    except UserError as error:
      assert '\n' not in str(error)


def test_pixel_limit_is_checked_before_decoding():
  # The header promises 60000 x 60000 pixels; the data behind it is missing.
  png = bytearray(encoded(noise(8, 8), 'PNG'))
  png[16:24] = (60000).to_bytes(4, 'big') * 2
  png[29:33] = struct.pack('>I', zlib.crc32(png[12:29]))
  with pytest.raises(UserError, match='60000 x 60000 = 3600000000 pixels, the limit is'):
    images.open_image(bytes(png))
  before = Image.MAX_IMAGE_PIXELS
  with pytest.raises(UserError, match='the limit is 63'):
    images.open_image(encoded(noise(8, 8), 'PNG'), max_pixels=63)
  assert before == Image.MAX_IMAGE_PIXELS
  assert images.open_image(encoded(noise(8, 8), 'PNG'), max_pixels=64).size == (8, 8)


def test_size_from_the_header(tmp_path):
  data = encoded(noise(60, 40), 'JPEG')
  assert images.image_size(data[:-300]) == (60, 40)
  path = tmp_path / 'a.jpg'
  path.write_bytes(data)
  assert images.image_size(path) == (60, 40)
  for content, kind in ((b'', 'empty'), (b'<html>', 'not an image')):
    path.write_bytes(content)
    with pytest.raises(images.ImageError) as caught:
      images.image_size(path)
    assert caught.value.kind == kind
  with pytest.raises(images.ImageError, match='the limit is 9'):
    images.image_size(data, max_pixels=9)
  with pytest.raises(images.ImageError, match='no such file'):
    images.image_size(tmp_path / 'b.jpg')


def test_animated_gives_first_frame():
  frames = [Image.new('RGB', (6, 4), colour) for colour in ('red', 'blue')]
  data = encoded(frames[0], 'GIF', save_all=True, append_images=frames[1:])
  image = images.open_image(data)
  assert images.to_array(image).shape == (4, 6, 3)
  assert images.to_array(image)[0, 0].tolist() == [255, 0, 0]


def test_exif_orientation():
  image = Image.new('RGB', (6, 4), 'black')
  image.putpixel((0, 0), (255, 255, 255))
  exif = Image.Exif()
  exif[0x0112] = 6  # the stored image must be turned clockwise by 90 degrees
  data = encoded(image, 'PNG', exif=exif)
  upright = images.open_image(data)
  assert upright.size == (4, 6)
  assert upright.getpixel((3, 0)) == (255, 255, 255)
  assert images.open_image(data, exif='ignore').size == (6, 4)
  with pytest.raises(ValueError, match='exif'):
    images.open_image(data, exif='maybe')


def test_open_keeps_the_mode():
  for mode in ('L', 'LA', 'RGB', 'RGBA'):
    assert images.open_image(encoded(noise(5, 4, mode), 'PNG')).mode == mode
  assert images.open_image(encoded(noise(5, 4).quantize(8), 'PNG')).mode == 'P'


def test_sixteen_bit_is_scaled():
  values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
  image = images.open_image(encoded(Image.fromarray(values), 'PNG'))
  assert images.to_array(image)[0, :, 0].tolist() == [0, 1, 128, 255]
  whole = Image.fromarray(values.astype(np.int32))
  assert images.to_array(whole)[0, :, 2].tolist() == [0, 1, 128, 255]
  fraction = Image.fromarray(np.array([[0, 0.5, 1, np.nan]], dtype=np.float32))
  assert images.to_array(fraction)[0, :, 0].tolist() == [0, 128, 255, 0]


def test_cmyk_grey_and_one_bit():
  cmyk = Image.new('CMYK', (2, 2), (0, 255, 255, 0))
  assert images.to_array(images.open_image(encoded(cmyk, 'TIFF')))[0, 0].tolist() == [255, 0, 0]
  assert images.to_array(Image.new('L', (1, 1), 7))[0, 0].tolist() == [7, 7, 7]
  assert images.to_array(Image.new('1', (1, 1), 1))[0, 0].tolist() == [255, 255, 255]
  assert images.to_rgb(Image.new('LAB', (1, 1), (255, 128, 128))).mode == 'RGB'


def test_alpha_policies():
  clear = Image.new('RGBA', (1, 1), (10, 20, 30, 0))
  assert images.to_array(images.to_rgb(clear))[0, 0].tolist() == [10, 20, 30]
  assert images.to_array(images.to_rgb(clear, alpha='white'))[0, 0].tolist() == [255, 255, 255]
  palette = Image.new('P', (1, 1), 0)
  palette.putpalette([10, 20, 30])
  palette.info['transparency'] = b'\x00'
  assert images.to_array(images.to_rgb(palette))[0, 0].tolist() == [10, 20, 30]
  assert images.to_array(images.to_rgb(palette, alpha='white'))[0, 0].tolist() == [255, 255, 255]


def two_pass(values, new_width, new_height):
  """Pillow's integer bicubic from its definition: horizontal pass, 8 bits, vertical pass."""

  def weights(old, new):
    table = np.zeros((new, old), dtype=np.int64)
    scale = old / new
    stretch = max(scale, 1.0)
    for i in range(new):
      centre = (i + 0.5) * scale
      low = max(0, int(centre - 2 * stretch + 0.5))
      high = min(old, int(centre + 2 * stretch + 0.5))
      x = np.abs((np.arange(low, high) - centre + 0.5) / stretch)
      w = np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1,
                   np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))
      w = w / w.sum() * 2**22
      table[i, low:high] = np.trunc(w + np.where(w < 0, -0.5, 0.5)).astype(np.int64)
    return table

  def apply(table, data):
    return np.clip((2**21 + table @ data) >> 22, 0, 255)

  rows = apply(weights(values.shape[1], new_width), values.astype(np.int64).T).T
  return apply(weights(values.shape[0], new_height), rows).astype(np.uint8)


def test_resize_is_horizontal_first_for_tall_images():
  image = noise(20, 130, 'L')
  expected = two_pass(np.asarray(image), 14, 14)
  np.testing.assert_array_equal(np.asarray(images.resize_exact(image, (14, 14))), expected)
  np.testing.assert_array_equal(np.asarray(images.resize_exact(Image.fromarray(
    np.array([[0, 50, 200, 255]], np.uint8)), (2, 1))), [[37, 215]])


@pytest.mark.parametrize('mode', ['L', 'RGB', 'RGBA', 'LA'])
def test_resize_equals_pillow_for_wide_images(mode):
  image = noise(60, 25, mode)
  for size in ((10, 9), (10, 25), (60, 25), (60, 9), (71, 25), (10, 31)):
    mine = images.resize_exact(image, size)
    assert mine.mode == mode
    np.testing.assert_array_equal(np.asarray(mine), np.asarray(image.resize(size, images.BICUBIC)))


def test_resize_palette_is_nearest():
  image = noise(13, 40).quantize(16)
  mine = images.resize_exact(image, (7, 8))
  assert mine.mode == 'P'
  expected = image.convert('RGB').resize((7, 8), images.NEAREST)
  np.testing.assert_array_equal(images.to_array(mine), np.asarray(expected))


def test_resize_and_crop_refuse_nonsense():
  image = noise(5, 5)
  with pytest.raises(ValueError, match='size'):
    images.resize_exact(image, (0, 3))
  with pytest.raises(ValueError, match='box'):
    images.crop(image, (0, 0, 6, 5))
  with pytest.raises(ValueError, match='box'):
    images.crop(image, (2, 0, 2, 5))
  part = images.crop(image, (1, 2, 4, 5))
  np.testing.assert_array_equal(np.asarray(part), np.asarray(image)[2:5, 1:4])


@pytest.mark.parametrize('piece', [1 << 23, 500])
def test_parts_and_canvases_are_those_of_the_whole(monkeypatch, piece):
  """Byte for byte, in one piece and in many strips."""
  monkeypatch.setattr(strips, '_PIECE', piece)
  rng = np.random.default_rng(piece)
  for _ in range(25):
    width, height = (int(n) for n in np.exp(rng.uniform(0, 5.3, 2)))
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
    size = tuple(int(n) for n in rng.integers(1, 200, 2))
    x0, y0 = (int(rng.integers(0, n)) for n in size)
    box = (x0, y0, int(rng.integers(x0 + 1, size[0] + 1)), int(rng.integers(y0 + 1, size[1] + 1)))
    part = strips.resize_part(image, size, box)
    assert part.tobytes() == images.resize_exact(image, size).crop(box).tobytes()
    canvas = (width + int(rng.integers(0, 90)), height + int(rng.integers(0, 90)))
    place = tuple(int(rng.integers(0, c - n + 1)) for c, n in zip(canvas, image.size))
    page = Image.new('RGB', canvas, (122, 116, 104))
    page.paste(image, place)
    made = strips.resize_on_canvas(image, canvas, place, (122, 116, 104), size)
    assert made.tobytes() == images.resize_exact(page, size).tobytes()
  with pytest.raises(ValueError, match='leaves the canvas'):
    strips.resize_on_canvas(image, image.size, (1, 0), (0, 0, 0), (8, 8))
  with pytest.raises(ValueError, match='box'):
    strips.resize_part(image, (8, 8), (0, 0, 9, 8))


def test_scaled_decoding_is_asked_for(tmp_path):
  image = Image.effect_noise((640, 480), 80).convert('RGB')
  image.save(tmp_path / 'a.jpg')
  image.save(tmp_path / 'a.png')
  for name, wanted in (('a.jpg', (320, 240)), ('a.png', (640, 480))):
    path = tmp_path / name
    assert images.open_image(path).size == images.image_size(path) == (640, 480)
    assert images.open_image(path, inexact=200).size == wanted
    assert images.image_size(path, inexact=200) == wanted
    assert images.open_image(path, inexact=400).size == (640, 480)


@pytest.mark.parametrize('suffix', ['jpg', 'png', 'webp', 'tif'])
def test_sizes_of_turned_images(tmp_path, suffix):
  exif = Image.Exif()
  exif[0x0112] = 6
  path = tmp_path / f'a.{suffix}'
  Image.new('RGB', (30, 20)).save(path, exif=exif)
  assert images.image_size(path) == images.open_image(path, exif='ignore').size
  assert images.image_size(path, exif='apply') == images.open_image(path).size == (20, 30)
  Image.new('RGB', (30, 20)).save(path)
  assert images.image_size(path, exif='apply') == (30, 20)


def test_opening_does_not_disturb_other_threads():
  """Pillow's own limit is lifted while a header is read; others crop at that very time."""
  file = io.BytesIO()
  noise(60, 40).save(file, 'PNG')
  image, stop = noise(90, 90), threading.Event()

  def open_many():
    while not stop.is_set():
      images.image_size(file.getvalue())

  before = Image.MAX_IMAGE_PIXELS
  thread = threading.Thread(target=open_many)
  thread.start()
  try:
    for _ in range(2000):
      image._crop(image.im, (1, 1, 80, 80))  # as Image.crop, which compares with the limit twice
  finally:
    stop.set()
    thread.join()
  assert before == Image.MAX_IMAGE_PIXELS
