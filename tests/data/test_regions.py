"""Region records and tar shards: both forms give the same rows, and bad ones are named."""

import io
import json
import tarfile

import numpy as np
from PIL import Image
import pytest

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.data.build import build_records
from hrvlm_jax.data.rows import BadRow, ImageRef, decode_record, encode_record, open_images
from hrvlm_jax.lab.needle import NeedleConfig
from hrvlm_jax.lab.needle.regions import NeedleRegions, describe, write_regions
from hrvlm_jax.systems.ps3.records import RegionCheck, Regions, region_row, regions_of
from hrvlm_jax.systems.ps3.shards import RegionShards, expand, open_regions, write_shard


def picture(seed=0, size=(40, 30)):
  pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, 'PNG')
  return buffer.getvalue()


def annotation(**changes):
  return {'text': ['a sign', 'a dog'], 'box': [[1, 2, 10, 12], [5, 5, 30, 20]],
          'global_text': 'a street', **changes}


def shards(folder, names=('000', '001'), **changes):
  for number, name in enumerate(names):
    keys = [f'{number}{i}' for i in range(3)]
    write_shard(folder / f'image-{name}.tar', [(k, {'png': picture(int(k))}) for k in keys])
    write_shard(folder / f'text-{name}.tar', [
      (k, {'json': json.dumps(annotation(**changes)).encode()}) for k in keys])


def test_a_record_survives_encoding_and_shards(tmp_path):
  shards(tmp_path)
  source = RegionShards(str(tmp_path / 'image-{000..001}.tar'), tmp_path / 'text-*.tar')
  assert len(source) == 6 and [source[i].id for i in (0, 5)] == ['00', '12']
  regions = regions_of(source[4])
  assert regions.captions == ('a sign', 'a dog') and regions.global_caption == 'a street'
  assert regions.boxes[1] == (5, 5, 30, 20)
  assert open_images(source[4])[0].size == (40, 30)
  again = decode_record(encode_record(source[4]), 'here')
  assert regions_of(again) == regions and again.images[0].read() == picture(11)
  manifest = build_records(source, tmp_path / 'out', check=RegionCheck(), progress=False)
  copied = open_regions(str(manifest.parent))
  assert [regions_of(copied[i]) for i in range(6)] == [regions] * 6


def test_shards_may_hold_both_kinds(tmp_path):
  write_shard(tmp_path / 'a.tar', [('x/7', {'jpg': picture(), 'json': json.dumps(
    annotation(global_text=None)).encode()})])
  source = open_regions(str(tmp_path))
  assert source[0].id == 'x/7' and regions_of(source[0]).global_caption is None


def test_keys_that_do_not_match_are_named(tmp_path):
  write_shard(tmp_path / 'i.tar', [('a', {'png': picture()}), ('b', {'png': picture()}),
                                   ('c', {'txt': b'no image'})])
  write_shard(tmp_path / 't.tar', [('b', {'txt': b''}), ('c', {'json': b'{}'}),
                                   ('d', {'json': b'{}'})])
  with pytest.raises(UserError) as error:
    RegionShards(tmp_path / 'i.tar', tmp_path / 't.tar')
  for words in ('a: only in', 'd: only in', 'b: no json (txt)', 'c: no image (txt)'):
    assert words in str(error.value)
  with pytest.raises(UserError, match='no such tar file'):
    RegionShards(tmp_path / 'missing.tar')
  with pytest.raises(UserError, match=r'has 2 shards, .* has 1'):
    shards(tmp_path)
    RegionShards(tmp_path / 'image-*.tar', tmp_path / 't.tar')


@pytest.mark.parametrize('name', ['../out.png', '/etc/out.png', 'a/../../out.png'])
def test_names_that_lead_out_of_a_shard_are_refused(tmp_path, name):
  with tarfile.open(tmp_path / 'bad.tar', 'w:') as tar:
    tar.addfile(tarfile.TarInfo(name), io.BytesIO(b''))
  with pytest.raises(UserError, match='leads out of the shard'):
    RegionShards(tmp_path / 'bad.tar')


def test_links_repeats_and_damaged_files_are_refused(tmp_path):
  link = tarfile.TarInfo('a.png')
  link.type, link.linkname = tarfile.SYMTYPE, '/etc/passwd'
  with tarfile.open(tmp_path / 'link.tar', 'w:') as tar:
    tar.addfile(link)
  with pytest.raises(UserError, match='is a link or a device'):
    RegionShards(tmp_path / 'link.tar')
  with tarfile.open(tmp_path / 'twice.tar', 'w:') as tar:
    for _ in range(2):
      tar.addfile(tarfile.TarInfo('a.json'), io.BytesIO(b''))
  with pytest.raises(UserError, match='is there twice'):
    RegionShards(tmp_path / 'twice.tar')
  (tmp_path / 'text.tar').write_text('not a tar file' * 100)
  with pytest.raises(UserError, match='is not an uncompressed tar file'):
    RegionShards(tmp_path / 'text.tar')
  write_shard(tmp_path / 'short.tar', [('a', {'png': picture(), 'json': b'{}' * 3000})])
  data = (tmp_path / 'short.tar').read_bytes()
  (tmp_path / 'short.tar').write_bytes(data[:len(data) // 2])
  with pytest.raises(UserError, match='cut short|not an uncompressed tar file'):
    RegionShards(tmp_path / 'short.tar')


@pytest.mark.parametrize('content, kind, words', [
  (b'{', 'json', 'not valid JSON'), (b'\xff', 'encoding', 'not UTF-8'), (b'[]', 'form', 'is list'),
  (b'{}', 'regions', 'neither boxes nor'),
  (b'{"text": ["a"], "box": []}', 'regions', '0 boxes and 1 captions'),
  (b'{"text": "a", "box": [[1, 2, 3, 4]]}', 'regions', 'expected a list of texts'),
  (b'{"text": ["a"], "box": [[1, 2, 3]]}', 'regions', 'expected four numbers'),
  (b'{"text": ["a"], "box": [[5, 2, 5, 9]]}', 'regions', 'has no area'),
  (b'{"text": [3], "box": [[1, 2, 5, 9]]}', 'regions', 'expected a text')])
def test_bad_annotations_are_bad_rows(tmp_path, content, kind, words):
  write_shard(tmp_path / 'a.tar', [('a', {'png': picture(), 'json': content})])
  with pytest.raises(BadRow, match=words) as error:
    RegionShards(tmp_path / 'a.tar')[0]
  assert error.value.kind == kind and 'sample a' in str(error.value)


def test_boxes_outside_the_image_are_found_when_records_are_built():
  row = region_row('a', ImageRef('a.png', data=picture()),
                   Regions(boxes=((40, 0, 50, 10),), captions=('a',)), 'row a')
  with pytest.raises(BadRow, match='outside the image of 40x30'):
    RegionCheck()(row)


def test_brace_patterns(tmp_path):
  for name in ('a-08.tar', 'a-09.tar', 'a-10.tar', 'b.tar'):
    (tmp_path / name).touch()
  names = lambda pattern: [p.rsplit('/')[-1] for p in expand(str(tmp_path / pattern))]
  assert names('a-{08..10}.tar') == ['a-08.tar', 'a-09.tar', 'a-10.tar']
  assert names('{b,a-09}.tar') == ['b.tar', 'a-09.tar'] and len(expand(str(tmp_path))) == 4
  with pytest.raises(UserError, match='larger than the last'):
    names('a-{10..08}.tar')


def test_the_built_in_task_as_region_records(tmp_path):
  task = NeedleConfig.square()
  source = NeedleRegions(task, 3, seed=4)
  manifest = write_regions(task, tmp_path, 3, seed=4, progress=False)
  stored = open_regions(str(manifest.parent))
  assert len(stored) == 3 and stored[2].images[0].read() == source[2].images[0].read()
  regions = regions_of(stored[2])
  assert 3 <= len(regions.boxes) <= 4 and all(c in regions.global_caption
                                             for c in regions.captions)
  assert regions.captions[0].split()[1] == 'sign'
  from hrvlm_jax.lab.needle import plan
  assert describe(plan(task, 4, 2).signs[0], '').endswith('sign')
