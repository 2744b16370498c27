"""Curation: where windows go, what callables get, what is refused, and the command."""

import json
import sys

import numpy as np
from PIL import Image, ImageDraw
import pytest

from hrvlm_jax.cli import curate as verb
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.registry import load_callable
from hrvlm_jax.data.rows import BadRow
from hrvlm_jax.data.sources import ImageFolder
from hrvlm_jax.systems.ps3.curate import (
  CurateConfig,
  Curated,
  MaskConfig,
  edge_density,
  mask_density,
  plain_caption,
  windows,
)
from hrvlm_jax.systems.ps3.records import regions_of
from hrvlm_jax.systems.ps3.shards import open_regions

SMALL = CurateConfig(min_side=100, boxes=2, box_area=1600, stride=5)


def scene(size=(240, 160)):
  """A grey wall with a checkerboard of 40 x 40 pixels at (150, 60)."""
  pixels = np.full((size[1], size[0], 3), 128, np.uint8)
  board = np.indices((40, 40)).sum(0) // 4 % 2 * 255
  pixels[60:100, 150:190] = board[..., None]
  return Image.fromarray(pixels)


def covers(box, x1, y1, x2, y2):
  wide = max(0, min(box[2], x2) - max(box[0], x1))
  high = max(0, min(box[3], y2) - max(box[1], y1))
  return wide * high / ((x2 - x1) * (y2 - y1))


def test_edges_find_the_busy_part():
  found = windows(edge_density(scene()), SMALL)
  assert covers(found[0], 150, 60, 190, 100) > 0.8
  for x1, y1, x2, y2 in found:
    assert 0 <= x1 < x2 <= 240 and 0 <= y1 < y2 <= 160
    assert abs((x2 - x1) * (y2 - y1) - 1600) < 60
  assert windows(edge_density(Image.new('RGB', (240, 160))), SMALL) == []


def test_small_and_dense_masks_win_over_large_ones():
  large = np.zeros((160, 240), bool)
  large[:, :120] = True
  small = []
  for i in range(6):
    mask = np.zeros((160, 240), bool)
    mask[20 + 5 * i:24 + 5 * i, 180:190] = True
    small.append({'segmentation': mask})
  density = mask_density([large, *small], (240, 160))
  np.testing.assert_allclose(density.sum(), 7, rtol=1e-4)
  best = windows(density, SMALL)[0]
  assert best[0] >= 120 and covers(best, 180, 20, 190, 49) > 0.7
  with pytest.raises(UserError, match=r'mask 0 has shape \(240, 160\)'):
    mask_density([large.T], (240, 160))


def test_regions_of_an_image_overlap_only_a_little():
  noise = np.random.default_rng(0).random((400, 300)).astype(np.float32)
  found = windows(noise, CurateConfig(boxes=12, box_area=6000, overlap=0.1))
  assert len(found) == 12
  for i, a in enumerate(found):
    for b in found[:i]:
      shared = covers(a, *b) * (b[2] - b[0]) * (b[3] - b[1])
      areas = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
      assert shared / (sum(areas) - shared) <= 0.1 + 1e-9


def test_defaults_are_the_papers():
  masks = MaskConfig()
  assert (masks.points_per_side, masks.points_per_batch, masks.crop_n_layers,
          masks.crop_n_points_downscale_factor, masks.pred_iou_thresh,
          masks.stability_score_thresh, masks.min_mask_region_area) == (24, 128, 1, 1, 0.6, 0.85, 0)
  rows = np.zeros((1500, 1500), np.float32)
  rows[700:800, 700:800] = 1
  x1, y1, x2, y2 = windows(rows, CurateConfig())[0]
  assert abs((x2 - x1) * (y2 - y1) / (424 * 438) - 1) < 0.01


def test_callables_get_the_image_and_their_answers_are_kept(tmp_path):
  scene().save(tmp_path / 'a.png')
  asked = []

  def segment(image, config):
    asked.append((image.size, config.points_per_side))
    mask = np.zeros((image.height, image.width), bool)
    mask[10:30, 10:30] = True
    return [mask]

  def caption(image, window):
    return 'whole' if window is None else f'{image.crop(window).width} wide'

  source = Curated(source=ImageFolder(tmp_path), config=SMALL, segmenter=segment,
                   captioner=caption)
  row = source[0]
  regions = regions_of(row)
  assert asked == [((240, 160), 24)] and regions.global_caption == 'whole'
  assert regions.kind == 'photograph' and covers(regions.boxes[0], 10, 10, 30, 30) == 1
  assert regions.captions[0] == f'{regions.boxes[0][2] - regions.boxes[0][0]} wide'
  assert 'black' in plain_caption(Image.new('RGB', (90, 90)), None)
  words = plain_caption(scene(), (150, 60, 190, 100))
  assert 'on the right' in words and 'fine detail' in words


def test_documents_give_their_lines(tmp_path):
  page = Image.new('RGB', (200, 300), 'white')
  ImageDraw.Draw(page).text((20, 20), 'Invoice', 'black')
  page.save(tmp_path / 'page.png')
  lines = [{'box': [0.1, 0.05 + 0.1 * i, 0.9, 0.1 + 0.1 * i], 'text': f'Line number {i}'}
           for i in range(9)] + [{'box': [0, 0, 1, 1], 'text': '--'},
                                 {'box': [2, 2, 3, 3], 'text': 'off the page'}]
  (tmp_path / 'page.json').write_text(json.dumps({'lines': lines, 'relative': True}))
  source = Curated(source=ImageFolder(tmp_path), config=SMALL, kind='documents')
  regions = regions_of(source[0])
  assert regions.captions == ('Line number 0', 'Line number 8')
  np.testing.assert_allclose(regions.boxes[0], [20, 15, 180, 30])
  assert regions.global_caption is None and regions.kind == 'document'
  (tmp_path / 'page.json').write_text('{"lines": [{"box": [1]}]}')
  with pytest.raises(BadRow, match='page.json: expected'):
    source[0]
  (tmp_path / 'page.json').unlink()
  with pytest.raises(BadRow, match='page.json is missing'):
    source[0]


def test_images_of_the_wrong_size_and_empty_ones_are_bad_rows(tmp_path):
  scene().save(tmp_path / 'a.png')
  Image.new('RGB', (240, 160)).save(tmp_path / 'b.png')
  with pytest.raises(BadRow, match='longest side of 1000 to 4096'):
    Curated(source=ImageFolder(tmp_path))[0]
  with pytest.raises(BadRow, match='nothing salient'):
    Curated(source=ImageFolder(tmp_path), config=SMALL)[1]


@pytest.mark.parametrize('spec, words', [
  ('json', 'expected module:name'), ('no_such_module:f', 'cannot be imported'),
  ('json:no_such', 'has no no_such'), ('json:__name__', 'is str, expected a function')])
def test_callables_that_are_none(spec, words):
  with pytest.raises(UserError, match=words):
    load_callable(spec, '--captioner')


def test_settings_that_make_no_sense():
  with pytest.raises(UserError, match='boxes must be at least 1.*overlap must lie'):
    CurateConfig(boxes=0, overlap=1.5)
  with pytest.raises(UserError, match='max_side 10 is below min_side 1000'):
    CurateConfig(max_side=10)


def test_the_command(tmp_path, capsys, monkeypatch):
  images, out = tmp_path / 'images', tmp_path / 'out'
  images.mkdir()
  for name in 'abc':
    scene().save(images / f'{name}.png')
  (images / 'd.png').write_bytes(b'no image')
  settings = tmp_path / 'curate.json'
  settings.write_text(json.dumps({'min_side': 100, 'box_area': 1600, 'boxes': 2,
                                  'masks': {'points_per_side': 8}}))
  module = tmp_path / 'captions_of_a_test.py'
  module.write_text('def caption(image, window):\n  return f"seen {window is None}"\n')
  monkeypatch.syspath_prepend(tmp_path)
  assert verb.main([str(images), '--out', str(out), '--config', str(settings), '--quiet',
                    '--captioner', 'captions_of_a_test:caption']) == 0
  sys.modules.pop('captions_of_a_test')
  printed = capsys.readouterr().out
  assert '3 records in 1 shards, 1 images left out' in printed and 'd.png' in printed
  stored = open_regions(str(out))
  regions = regions_of(stored[1])
  assert len(stored) == 3 and regions.global_caption == 'seen True'
  assert set(regions.captions) == {'seen False'} and len(regions.boxes) <= 2
  again = [str(images), '--out', str(out), '--config', str(settings), '--quiet']
  with pytest.raises(UserError, match="captioner was 'captions_of_a_test:caption', is None"):
    verb.main(again)
  with pytest.raises(UserError, match='none of the 4 images can be used.*longest side of 1000'):
    verb.main([str(images), '--out', str(tmp_path / 'none'), '--quiet'])
  settings.write_text('{"boxs": 3}')
  with pytest.raises(UserError, match='boxs'):
    verb.main([str(images), '--out', str(out), '--config', str(settings)])
  with pytest.raises(UserError, match='--ocr goes with --kind documents'):
    verb.main([str(images), '--out', str(out), '--ocr', 'json:loads'])
