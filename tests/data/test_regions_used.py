"""Region records of one's own: box statistics, questions with boxes, pages of PDF, recall."""

import dataclasses
import json

import jax
import numpy as np
from PIL import Image
import pytest

from hrvlm_jax.checkpoint import store
from hrvlm_jax.cli.main import main
from hrvlm_jax.core.config import to_dict
from hrvlm_jax.data.build import build_records
from hrvlm_jax.data.rows import ImageRef
from hrvlm_jax.data.sources import InMemory, open_source
from hrvlm_jax.language.prompt import tokenizer_of
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.ps3.records import RegionCheck, Regions, region_row
from hrvlm_jax.vlm import model as vlm


def png(path, size, seed=0):
  pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
  Image.fromarray(pixels).save(path)
  return path.read_bytes()


@pytest.fixture(scope='module')
def records(tmp_path_factory):
  """Three images of 1K and 2K; one of them a document, one record without boxes."""
  folder = tmp_path_factory.mktemp('records')
  make = lambda n, size, regions: region_row(
    f'r{n}', ImageRef(f'{n}.png', data=png(folder / f'{n}.png', size, n)), regions)
  rows = [
    make(0, (1200, 800), Regions(boxes=((0, 0, 100, 50), (800, 500, 900, 650)),
                                 captions=('red sign K', 'blue sign B'), kind='photograph')),
    make(1, (900, 1200), Regions(boxes=((10, 20, 210, 220),), captions=('green sign A',),
                                 kind='photograph')),
    make(2, (2400, 1000), Regions(boxes=((5, 5, 505, 25),), captions=('Page one of a letter',),
                                  kind='document')),
    make(3, (1000, 700), Regions(global_caption='A photograph.', kind='photograph')),
  ]
  build_records(InMemory(rows), folder / 'out', check=RegionCheck(), progress=False)
  return folder / 'out'


def test_box_statistics_by_type_and_size(records, tmp_path, capsys):
  out = ['--out', str(tmp_path / 's.json')]
  assert main(['analyse', 'boxes', '--records', str(records), *out]) == 0
  said = capsys.readouterr().out
  assert 'photograph, 1K - 2K: 3, 3, 133 x 133' in said  # (100+100+200)/3, (50+150+200)/3
  assert 'document, 2K - 4K: 1, 1, 500 x 20' in said
  rows = json.loads((tmp_path / 's.json').read_text())['rows']
  assert sum(row['images'] for row in rows) == 4


def asker(caption, box, size, kind):
  """A language model's part in `--asker`."""
  return f'Where is the {caption}?', f'{kind} {size[0]}'


def silent(caption, box, size, kind):
  """An asker that forgets the answer."""
  return caption


def test_captions_with_boxes_become_questions_with_boxes(records, tmp_path, capsys):
  out = tmp_path / 'asked'
  assert main(['data', 'questions', str(records), '--out', str(out)]) == 0
  assert '4 questions, 0 records left out' in capsys.readouterr().out
  rows = json.loads((out / 'train.json').read_text())
  first, page = rows[0], rows[3]
  assert first['box'] == [0, 0, 100, 50] and 'at the top left of the picture' in str(first)
  assert first['conversations'][1]['value'] == 'red sign K'
  assert 'of the page' in page['conversations'][0]['value']
  source = open_source(out / 'train.json')  # what training reads
  assert [source[n].extra['box'] for n in range(4)] == [row['box'] for row in rows]
  assert main(['data', 'check', str(out / 'train.json'), '--quiet']) == 0
  assert main(['data', 'questions', str(records), '--out', str(out)]) == 2
  assert 'is there already' in capsys.readouterr().err
  other = tmp_path / 'other'
  assert main(['data', 'questions', str(records), '--out', str(other), '--asker',
               f'{__name__}:asker']) == 0
  assert json.loads((other / 'train.json').read_text())[1]['conversations'][0]['value'] == (
    '<image>\nWhere is the blue sign B?')
  assert main(['data', 'questions', str(records), '--out', str(tmp_path / 'third'), '--asker',
               f'{__name__}:silent']) == 2
  assert 'expected two texts' in capsys.readouterr().err
  assert not (tmp_path / 'third/train.json').exists()


def saved(path, config):
  params = jax.jit(vlm.build(config).init)(jax.random.key(0))
  store.save_params(path, params, {'model': to_dict(config)})
  (path / 'tokenizer').mkdir()
  tokenizer_of('byte').save(path / 'tokenizer')
  return path


def even(config):
  """Looks of 5 and 20 patches, which come out even over all 500."""
  encoder = config.encoder
  if config.system == 'ps3':
    return dataclasses.replace(config, encoder=dataclasses.replace(encoder, max_select=25))
  tower = dataclasses.replace(encoder.tower, max_select=25)
  return dataclasses.replace(config, encoder=dataclasses.replace(encoder, tower=tower))


def test_recall_on_own_records(records, tmp_path, capsys):
  ps3 = saved(tmp_path / 'ps3', even(registry.get('ps3').tiny()))
  argv = ['analyse', 'recall', '--records', str(records), '--out', str(tmp_path / 'r.json'),
          '--batch-size', '4', '--checkpoint']
  assert main([*argv, str(ps3), '--shares', '0.25', '1.0']) == 0
  scores = json.loads((tmp_path / 'r.json').read_text())
  assert scores['regions'] == 4 and len(scores['scores']) == 6
  assert all(s['recall'] == 1 for s in scores['scores'] if s['share'] == 1)
  assert all(0 < s['recall'] < 1 for s in scores['scores'] if s['share'] == 0.25)
  vila = saved(tmp_path / 'vila', even(registry.get('vila_hd').tiny(looks=1)))
  assert main([*argv, str(vila), '--shares', '1.0', '0.3']) == 0
  whole, part = json.loads((tmp_path / 'r.json').read_text())['scores']
  assert whole['way'] == 'top_down' and whole['recall'] == 1 and part['recall'] < 1
  capsys.readouterr()
  assert main([*argv, str(ps3), '--shares', '1.5']) == 2
  plain = saved(tmp_path / 'plain', registry.get('single_view').tiny())
  assert main([*argv, str(plain)]) == 2
  assert 'does not select patches' in capsys.readouterr().err


PDF = b"""%PDF-1.4
1 0 obj <</Type /Catalog /Pages 2 0 R>> endobj
2 0 obj <</Type /Pages /Kids [3 0 R] /Count 1>> endobj
3 0 obj <</Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Contents 4 0 R
  /Resources <</Font <</F1 5 0 R>>>>>> endobj
4 0 obj <</Length 120>> stream
BT /F1 24 Tf 60 700 Td (A line of a letter) Tj ET
BT /F1 24 Tf 60 100 Td (Signed below) Tj ET
endstream endobj
5 0 obj <</Type /Font /Subtype /Type1 /BaseFont /Helvetica>> endobj
trailer <</Root 1 0 R>>
"""


def test_pages_of_pdf_become_region_records(tmp_path, capsys):
  (tmp_path / 'letter.pdf').write_bytes(PDF)
  out = tmp_path / 'out'
  assert main(['curate', str(tmp_path / 'letter.pdf'), '--kind', 'documents', '--out', str(out),
               '--page-side', '1600', '--quiet']) == 0
  assert '1 records' in capsys.readouterr().out
  row = open_source(out)[0]
  assert row.extra['captions'] == ['A line of a letter', 'Signed below']
  first, second = row.extra['boxes']
  # 24 points high, 60 points from the left, of a page of 600 x 800 points in 1200 x 1600 pixels.
  assert abs(first[0] - 120) < 8 and 180 < first[3] < 215 and 20 < first[3] - first[1] < 60
  assert abs(second[0] - 120) < 8 and second[1] > 1340
  (tmp_path / 'no.pdf').write_bytes(b'no pdf')
  assert main(['curate', str(tmp_path / 'no.pdf'), '--kind', 'documents', '--out',
               str(tmp_path / 'o2')]) == 2
  assert 'cannot be read as PDF' in capsys.readouterr().err
  assert main(['curate', str(tmp_path / 'letter.pdf'), '--out', str(tmp_path / 'o3')]) == 2
