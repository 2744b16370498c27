"""The analyses of the papers on small made-up numbers with known answers."""

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
from PIL import Image
import pytest

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.evaluation import benchmarks
from hrvlm_jax.evaluation.analysis import attention, curves, pca, resolution, sizes
from hrvlm_jax.evaluation.runner import Answer, Model, Options, Setup, evaluate

SAMPLES = Path(__file__).parent / 'samples'
ANSWERS = ['stop'] * 7 + ['stop sign'] * 3


@pytest.mark.parametrize('token,score', [
  ('stop', 0.8846), ('st', 0.5758), ('sign', 0.3596), ('main', 0.0923), ('STOP', 0.8846),
])
def test_similarity_of_the_worked_example(token, score):
  assert round(sizes.similarity(token, ANSWERS), 4) == score


def test_area_of_the_text_asked_for():
  boxes = [(0, 0, .5, .5), (0, 0, .2, .1), (0, 0, .9, .9)]
  assert sizes.text_area(['main', 'stop', 'st'], boxes, ANSWERS) == pytest.approx(.02)
  assert sizes.best_token(['stop', 'Stop'], ANSWERS) == 0
  with pytest.raises(ValueError, match='2 OCR tokens but 1 boxes'):
    sizes.text_area(['a', 'b'], boxes[:1], ANSWERS)


def test_area_of_the_object_asked_for():
  names, areas = ['dog', 'dog', 'car'], [10, 30, 50]
  by_answer = sizes.object_area(names, areas, 100, 'What runs?', ['dog'] * 10)
  by_question = sizes.object_area(names, areas, 100, 'How many cars?', ['2'] * 9 + ['three'])
  assert (by_answer, by_question) == (.3, .5)


def test_tertiles_and_relative_change():
  areas = [.5, .1, .3, .2, .6, .4, .7]
  groups = sizes.tertiles(areas)
  assert groups == ['medium', 'fine', 'fine', 'fine', 'broad', 'medium', 'broad']
  assert sizes.accuracy_by_tertile([1, 2, 3], [1, 0, .5]) == {'fine': 1, 'medium': 0, 'broad': .5}
  ids = [str(i) for i in range(6)]
  before = dict(zip(ids, [.5, .5, .5, .5, 0, 0]))
  after = dict(zip(ids, [1, .5, .5, .5, 0, 1]))
  changes = sizes.relative_change(dict(zip(ids, range(6))), before, after)
  assert [c.tertile for c in changes] == ['fine', 'medium', 'broad']
  assert [c.relative_percent for c in changes[:2]] == [50, 0]
  assert np.isnan(changes[2].relative_percent) and changes[2].count == 2
  with pytest.raises(ValueError, match='not scored on the same samples'):
    sizes.relative_change({'a': 1}, before, after)


def run(folder, name, answers):
  data = SAMPLES / name
  first_line = lambda text: text.split('\n')[0]
  answer = lambda pairs: [answers[first_line(text)] for _, text in pairs]
  return evaluate(name, Model(setup=Setup(model='toy'), answer=answer), data=data, out=folder,
                  options=Options(progress=False))


def test_textvqa_tertiles_from_the_official_files(tmp_path):
  data = SAMPLES / 'textvqa'
  samples = benchmarks.get('textvqa').load(data)
  areas = sizes.text_areas(samples, data / 'TextVQA_Rosetta_OCR_v0.2_val.json')
  # nokia -> NOKIA (.3 x .1), birds -> 8 or NOKIA alike 0, the first; stop -> STOP (.5 x .5)
  assert areas == pytest.approx({'101': .03, '102': .03, '103': .25})
  questions = [s.question for s in samples]
  run(tmp_path / 'a', 'textvqa', dict(zip(questions, ['nokia', 'x', 'stop'])))
  run(tmp_path / 'b', 'textvqa', dict(zip(questions, ['nokia', '2', 'stop sign'])))
  changes = sizes.compare_runs(areas, tmp_path / 'a', tmp_path / 'b')
  assert [(c.before, c.after) for c in changes] == [
    (1, 1), (0, 1), (pytest.approx(.6), 1)]
  sizes.write_changes(changes, tmp_path / 'c.json')
  assert json.loads((tmp_path / 'c.json').read_text())[2]['relative_percent'] == \
    pytest.approx(200 / 3)
  with pytest.raises(UserError, match='lacks 1 of the 4 samples, such as 999'):
    sizes.compare_runs(areas | {'999': .1}, tmp_path / 'a', tmp_path / 'b')
  bad = tmp_path / 'bad.json'
  bad.write_text('{"data": [{"image_id": "im1", "ocr_info": [{}]}]}')
  with pytest.raises(UserError, match=r'data\[0\]: expected image_id and ocr_info'):
    sizes.text_areas(samples, bad)


def test_vqav2_objects(tmp_path):
  samples = benchmarks.get('vqav2').load(SAMPLES / 'vqav2')
  path = tmp_path / 'instances.json'
  path.write_text(json.dumps({
    'categories': [{'id': 1, 'name': 'dog'}, {'id': 2, 'name': 'shirt'}],
    'images': [{'id': 42, 'width': 10, 'height': 10}, {'id': 73, 'width': 10, 'height': 20}],
    'annotations': [{'image_id': 42, 'category_id': 1, 'area': 5},
                    {'image_id': 42, 'category_id': 2, 'area': 50},
                    {'image_id': 73, 'category_id': 2, 'area': 40}]}))
  areas = sizes.object_areas(samples, path)
  assert areas['42001'] == .05 and areas['73000'] == .2  # `How many dogs?` names the dog
  assert set(sizes.draw(areas, 2)) < set(areas) and sizes.draw(areas, 9) == areas
  assert sizes.draw(areas, 2) == sizes.draw(areas, 2)


def test_minimum_resolution():
  right = {224: True, 448: False, 896: True, 1792: True}
  assert resolution.minimum_side(right) == 896
  assert resolution.minimum_side(right, rule='first') == 224
  assert resolution.minimum_side({224: True, 448: False}) is None
  found = resolution.requirement({256: [1, 0, 0], 1024: [1, 1, 0], 4096: [1, 1, 0]},
                                 [3000, 800, 3000])
  assert found.sides == (256, 800, None) and found.solved == pytest.approx(2 / 3)
  assert found.median == 528 and found.image_median == 3000
  assert found.share == pytest.approx({256: 1 / 3, 1024: 2 / 3, 4096: 2 / 3})
  with pytest.raises(ValueError, match='same questions at every side'):
    resolution.requirement({256: [1]}, [1, 2])


def test_shrunk_images_reach_the_model():
  seen = []
  fn = curves.at_side(lambda pairs: seen.extend(p for p, _ in pairs) or ['x'] * len(pairs), 10)
  fn([(Image.new('RGB', (40, 20)), 'q'), (None, 'q'), ((Image.new('L', (4, 4)),) * 2, 'q')])
  assert seen[0].size == (10, 5) and seen[1] is None and [i.size for i in seen[2]] == [(4, 4)] * 2


def test_sweep_writes_curve_and_goes_on(tmp_path):
  calls = []

  def make(knobs):
    def answer(pairs):
      calls.append(dict(knobs))
      good = knobs['max_crops'] >= 8
      return [Answer('GHJ' if good else 'x', 'eos', knobs['num_tokens'], 1)] * len(pairs)
    return Model(setup=Setup(model='toy'), answer=answer)

  settings = [{'max_crops': c, 'num_tokens': t} for t in (728, 1456) for c in (4, 8)]
  options = dict(x='max_crops', out=tmp_path, data=SAMPLES / 'needle',
                 options=Options(progress=False))
  points = curves.sweep('needle', make, settings, **options)
  assert [p.value for p in points] == pytest.approx([0, 100 / 3, 0, 100 / 3])
  assert [p.image_tokens for p in points] == [728, 728, 1456, 1456]
  assert {p.series for p in points} == {'num_tokens 728', 'num_tokens 1456'}
  rows = list(csv.DictReader((tmp_path / 'curve.csv').open()))
  assert [row['max_crops'] for row in rows] == ['4.0', '8.0', '4.0', '8.0']
  assert Image.open(tmp_path / 'curve.png').size[0] > 300
  before = len(calls)
  again = curves.sweep('needle', make, settings, **options)
  assert len(calls) == before
  assert [dataclasses.replace(p, seconds=0) for p in again] == \
    [dataclasses.replace(p, seconds=0) for p in points]
  with pytest.raises(UserError, match="each with the knob 'looks'"):
    curves.sweep('needle', make, settings, **(options | {'x': 'looks'}))
  with pytest.raises(UserError, match='comes twice'):
    curves.sweep('needle', make, settings[:1] * 2, **options)


def test_global_share():
  even = np.full((3, 2, 4, 10), .1)
  assert attention.global_share(even, first_row=2, global_tokens=2) == pytest.approx([.2] * 3)
  probs = np.zeros((2, 3, 4))  # heads, rows, tokens
  probs[:, 0, 3] = 1  # a prompt row, not counted
  probs[0, 1, 0] = probs[1, 1, 1] = probs[0, 2, 0] = probs[1, 2, 3] = 1
  assert attention.global_share(probs, first_row=1, global_tokens=2) == pytest.approx(.75)
  shares = np.array([[.1], [.2], [.3], [.4], [.5], [.6]])
  grouped = attention.share_by_tertile(shares, [6, 5, 4, 3, 2, 1])
  assert {k: round(float(v[0]), 3) for k, v in grouped.items()} == {
    'fine': .55, 'medium': .35, 'broad': .15}


@pytest.mark.parametrize('change,text', [
  (dict(first_row=4), 'none of a generated token'), (dict(global_tokens=11), '10 image tokens'),
])
def test_global_share_refuses(change, text):
  with pytest.raises(ValueError, match=text):
    attention.global_share(np.full((2, 4, 10), .1), **(dict(first_row=1, global_tokens=2) | change))
  with pytest.raises(ValueError, match='do not sum to 1'):
    attention.global_share(np.ones((2, 4, 10)), first_row=1, global_tokens=2)


def test_pca_finds_planted_directions():
  rng = np.random.default_rng(0)
  axes = np.linalg.qr(rng.normal(size=(16, 3)))[0].T
  weights = rng.normal(size=(2, 6, 8, 3)) * [5, 3, 1]
  maps = list(weights @ axes + rng.normal(size=16))
  found = pca.fit(maps)
  for planted, axis in zip(axes, found.axes):
    assert abs(planted @ axis) == pytest.approx(1, abs=0.05)
  assert found.axes @ found.axes.T == pytest.approx(np.eye(3), abs=1e-9)
  assert found.explained.sum() == pytest.approx(1)
  again = pca.fit([m.copy() for m in maps])
  assert np.array_equal(found.axes, again.axes)
  assert all(axis[np.abs(axis).argmax()] > 0 for axis in found.axes)


def test_pca_pictures():
  features = np.zeros((4, 6, 5))
  features[:, 3:, 0] = 10  # two halves
  features[0, :, 1] = 1
  features[1, :, 2] = .5
  mask = np.ones((4, 6), bool)
  mask[3] = False
  picture, = pca.colours([features], valid=[mask])
  assert picture.shape == (4, 6, 3) and (picture[3] == 0).all()
  assert abs(int(picture[2, 0, 0]) - int(picture[2, 5, 0])) > 200
  page = pca.side_by_side([picture, picture], height=40)
  assert page.size == (124, 40)
  with pytest.raises(ValueError, match='components need'):
    pca.fit([np.zeros((1, 2, 5))])
  with pytest.raises(ValueError, match='not finite'):
    pca.fit([np.full((4, 4, 5), np.nan)])
