"""Files as they are found in the wild: each becomes views, or a fault counted by its kind."""

from collections import Counter
import json

import numpy as np
from PIL import Image
import pytest

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.data.checks import check_source
from hrvlm_jax.data.packing import Packing
from hrvlm_jax.data.sources import open_source
from hrvlm_jax.systems import registry
from hrvlm_jax.training.batches import make_batches
from hrvlm_jax.training.config import DataConfig, OptimizerConfig, RunConfig, TrainingConfig

TALK = [{'from': 'human', 'value': '<image>\nWhat?'}, {'from': 'gpt', 'value': 'This.'}]
# kind of fault, or None for a file that is used
FILES = {
  'good.jpg': None, 'animated.gif': None, 'animated.webp': None, 'cmyk.jpg': None,
  'deep.png': None, 'deep_rgb.png': None, 'one.png': None, 'palette.png': None, 'grey.jpg': None,
  'truncated.jpg': 'damaged', 'truncated.png': 'damaged', 'zero.jpg': 'empty',
  'page.jpg': 'not an image', 'drawing.svg': 'not an image', 'none.jpg': 'missing',
  'folder.jpg': 'missing', '../outside.jpg': 'path', '/etc/hostname': 'path', 'link.jpg': 'path',
  'linked/outside.jpg': 'path', 'bomb.png': 'too large',
}


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  """data.jsonl: a row per file, and rows that are no rows; returns kinds by row."""
  root = tmp_path_factory.mktemp('wild')
  folder = root / 'images'
  folder.mkdir()
  rng = np.random.default_rng(0)
  image = Image.fromarray(rng.integers(0, 256, (50, 70, 3), np.uint8))
  frames = [image, image.rotate(90), image.rotate(180)]
  image.save(folder / 'good.jpg')
  image.save(root / 'outside.jpg')
  for name in ('animated.gif', 'animated.webp'):
    frames[0].save(folder / name, save_all=True, append_images=frames[1:])
  image.convert('CMYK').save(folder / 'cmyk.jpg')
  image.convert('L').save(folder / 'grey.jpg')
  image.convert('P').save(folder / 'palette.png', transparency=3)
  ramp = np.linspace(0, 65535, 50 * 70).reshape(50, 70).astype(np.uint16)
  Image.fromarray(ramp).save(folder / 'deep.png')
  image.save(folder / 'deep_rgb.png')
  image.crop((0, 0, 1, 1)).save(folder / 'one.png')
  for suffix in ('jpg', 'png'):
    image.save(root / f'whole.{suffix}')
    whole = (root / f'whole.{suffix}').read_bytes()
    (folder / f'truncated.{suffix}').write_bytes(whole[:len(whole) // 2])
  (folder / 'zero.jpg').write_bytes(b'')
  (folder / 'page.jpg').write_text('<!DOCTYPE html><html>404</html>')
  (folder / 'drawing.svg').write_text('<svg></svg>')
  (folder / 'folder.jpg').mkdir()
  (folder / 'link.jpg').symlink_to(root / 'outside.jpg')
  (folder / 'linked').symlink_to(root)
  Image.new('1', (20_000, 9000)).save(folder / 'bomb.png')
  lines, kinds = [], []
  for name, kind in FILES.items():
    lines.append(json.dumps({'image': name, 'conversations': TALK}).encode())
    kinds.append(kind)
  for line, kind in ((b'{"conversations": ', 'json'), (b'{"id": "\xff"}', 'encoding'),
                     (b'[1, 2]', 'form'), (b'{"image": "good.jpg"}', 'form')):
    lines.append(line)
    kinds.append(kind)
  (root / 'data.jsonl').write_bytes(b'\n'.join(lines))
  return root, kinds


def config(data, system, rows, **options):
  root, _ = data
  return RunConfig(
    model=registry.get(system).tiny(),
    data=DataConfig(train=str(root / 'data.jsonl'), images=str(root / 'images'), shuffle=False,
                    lengths=(256, 512, 1024), **options),
    training=TrainingConfig(steps=1, batch_size=rows, optimizer=OptimizerConfig(
      learning_rate=1e-3)))


def test_check_names_them_all(data):
  root, kinds = data
  source = open_source(root / 'data.jsonl', images=root / 'images')
  report = check_source(source, workers=0, progress=False)
  assert {fault.position: fault.kind for fault in report.faults} == {
    index: kind for index, kind in enumerate(kinds) if kind}
  assert all(f'(line {fault.position + 1})' in fault.message for fault in report.faults)


@pytest.mark.parametrize('system', ['mc_llava', 'llava_hr', 'pheye', 'vila_hd', 'anyres'])
@pytest.mark.parametrize('packing', [Packing(), Packing(window=2)], ids=['plain', 'planned'])
def test_batches_count_them_and_use_the_rest(data, system, packing):
  _, kinds = data
  batches = make_batches(config(data, system, len(kinds), packing=packing, shards=1))
  batch = next(batches)
  wanted = Counter(kind for kind in kinds if kind)
  if packing.active:  # the second half of the window
    trained = (batch['labels'] >= 0).any(axis=1).sum()
    batch = next(batches)
    assert dict(batches.counts) == {kind: 2 * n for kind, n in wanted.items()}
    trained += (batch['labels'] >= 0).any(axis=1).sum()
    assert trained == 2 * kinds.count(None)
    return
  assert dict(batches.counts) == dict(wanted)
  trained = (batch['labels'] >= 0).any(axis=1)
  assert trained.tolist() == [kind is None for kind in kinds]


def test_one_bad_file_can_end_a_run(data):
  with pytest.raises(UserError, match='truncated.jpg: the image data is truncated'):
    next(make_batches(config(data, 'mc_llava', len(data[1]), bad_rows='fatal')))


def test_pictures_come_out_as_a_person_sees_them(data):
  """First frames, colours of CMYK, all of 16 bits."""
  folder = data[0] / 'images'
  source = open_source(folder.parent / 'data.jsonl', images=folder)
  names = list(FILES)
  system = registry.get('single_view')
  encoder = system.tiny().encoder

  def seen(name):
    image, = (ref.open() for ref in source[names.index(name)].images)
    return system.views([image], encoder)['pixels'][0].astype(int)

  good = seen('good.jpg')
  for name in ('animated.gif', 'animated.webp', 'cmyk.jpg', 'deep_rgb.png', 'palette.png'):
    assert np.abs(seen(name) - good).mean() < 40, name
    assert np.abs(seen(name) - good[::-1, ::-1]).mean() > np.abs(seen(name) - good).mean()
  deep = seen('deep.png')
  assert deep.min() < 20 and deep.max() > 235  # a ramp, not white


@pytest.mark.parametrize('system', registry.names())
def test_very_long_images(system):
  """30000 x 20 and 20 x 30000: views inside the bucket, or the documented refusal; quickly."""
  found = registry.get(system)
  encoder = (next(iter(found.released.values())) if found.released else found.tiny()).encoder
  if system in ('ps3', 'vila_hd'):  # 3780 pixels square, the same code at 160
    encoder = found.tiny().encoder
  for size in ((30_000, 20), (20, 30_000), (1, 1)):
    image = Image.new('RGB', size, (10, 200, 30))
    try:
      count = found.count(*size, encoder)
    except UserError as error:
      assert 'too elongated' in str(error)
      with pytest.raises(UserError, match='too elongated'):
        found.views([image], encoder)
      continue
    views = found.views([image], encoder)
    assert views['tokens'].tolist() == [count.tokens]
    pixels = views.get('pixels', views.get('0/pixels'))
    assert pixels.reshape(-1, 3).max(axis=0).tolist()[1] == 200
