"""Benchmark files with mistakes: every one is named, in one message, and nothing is scored."""

import json
from pathlib import Path
import shutil

import pytest

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.evaluation import benchmarks

SAMPLES = Path(__file__).parent / 'samples'


@pytest.fixture
def copy(tmp_path):
  """Copies a sample folder; returns it."""
  def make(name):
    return Path(shutil.copytree(SAMPLES / name, tmp_path / name))
  return make


def message(name, folder, split=None):
  with pytest.raises(UserError) as error:
    benchmarks.get(name).load(folder, split)
  return str(error.value)


def edit(path, change):
  value = json.loads(path.read_text('utf-8'))
  path.write_text(json.dumps(change(value) or value), 'utf-8')


def test_all_problems_in_one_message(copy):
  folder = copy('textvqa')

  def change(value):
    rows = value['data']
    rows[1]['question_id'] = rows[0]['question_id']
    rows[2]['answers'] = []
    rows[2]['image_id'] = 'gone'
    del rows[0]['question']
    rows.append('text')

  edit(folder / 'TextVQA_0.5.1_val.json', change)
  text = message('textvqa', folder)
  assert '4 problems' in text
  assert "data[0]: lacks 'question'" in text
  assert '103 has no reference answer' in text
  assert 'image of 103 is missing' in text and 'gone.jpg' in text
  assert "data[3]: found str 'text', expected a mapping" in text


def test_duplicated_ids(copy):
  folder = copy('docvqa')
  edit(folder / 'val_v1.0.json', lambda v: v['data'].append(v['data'][0]))
  text = message('docvqa', folder)
  assert 'id 1 is a duplicate of the one at val_v1.0.json:data[0]' in text


def test_long_lists_of_problems_are_cut(copy):
  folder = copy('gqa')
  edit(folder / 'testdev_balanced_questions.json', lambda v: {str(i): {} for i in range(30)})
  text = message('gqa', folder)
  assert 'and 70 more' in text and len(text.splitlines()) == 22


def test_broken_json(copy):
  folder = copy('gqa')
  (folder / 'testdev_balanced_questions.json').write_text('{"a": [1,\n')
  assert 'is not JSON' in message('gqa', folder) and 'line 2' in message('gqa', folder)


def test_missing_file_folder_split(tmp_path, copy):
  assert 'lacks TextVQA_0.5.1_val.json' in message('textvqa', tmp_path)
  assert 'no such folder' in message('textvqa', tmp_path / 'none')
  assert "unknown split 'tset'; it has val, test" in message('textvqa', copy('textvqa'), 'tset')


def test_wrong_file_under_the_right_name(copy):
  folder = copy('textvqa')
  (folder / 'TextVQA_0.5.1_val.json').write_text('[1, 2]')
  assert "has no top level key 'data'" in message('textvqa', folder)


def test_json_lines(copy):
  folder = copy('pope')
  path = folder / 'coco_pope_random.json'
  path.write_text(path.read_text() + '{"question_id":\n[]\n{"question_id": 9, "image": '
                  '"COCO_val2014_000000310196.jpg", "text": "x?", "label": "maybe"}\n')
  text = message('pope', folder)
  assert 'coco_pope_random.json:3: is not JSON' in text
  assert 'coco_pope_random.json:4: found list' in text
  assert "coco_pope_random.json:5: label is 'maybe', expected yes or no" in text


def test_unannotated_vqa_question(copy):
  folder = copy('vqav2')
  edit(folder / 'v2_mscoco_val2014_annotations.json', lambda v: v['annotations'].pop() and None)
  assert 'question_id 73000 has no annotation' in message('vqav2', folder)


def test_mme_text_files(copy):
  folder = copy('mme')
  (folder / 'count/0001.txt').write_text('One question? Please answer yes or no.\tYes\n')
  (folder / 'OCR/0001.txt').write_text('No tab here\nIs it?\tPerhaps\n')
  text = message('mme', folder)
  assert 'count/0001.txt: has 1 questions, expected 2' in text
  assert text.count('expected a question, a tab and Yes or No') == 2


def test_tsv(copy, tmp_path):
  folder = copy('mmbench')
  path = folder / 'mmbench_dev_en_20231003.tsv'
  lines = path.read_text().splitlines(keepends=True)
  bad = '7\tshort\n8\tWhich?\t\tcat\tdog\t\t\tC\tidentity\t99\ts\tl\t\td\n'
  path.write_text(''.join(lines) + bad)
  text = message('mmbench', folder)
  assert 'row 5: has 2 columns, the header has 14' in text
  assert 'row 6: has no image (refers to row 99)' in text
  path.write_text(lines[0] + '1\t"open')
  assert 'is never closed' in message('mmbench', folder)
  path.write_text('a\tb\n1\t2\n')
  assert 'has no column index' in message('mmbench', folder)


def test_options_with_a_gap_keep_their_letters(copy, tmp_path):
  """A = red, B empty, C = blue, D = green, answer C: blue is right, and B is not offered."""
  from hrvlm_jax.evaluation import prompts
  from hrvlm_jax.evaluation.metrics.choice import mcq_letter, mmmu

  row = {'id': 'a', 'image': 'images/1.png', 'question': 'Which?', 'category': 'ui'}
  folder = copy('4kpro')

  def read(**more):
    (folder / '4kpro.jsonl').write_text(json.dumps(row | more))
    sample = benchmarks.get('4kpro').load(folder)[0]
    assert benchmarks.get('4kpro').score([sample], ['C']).value == 100.0
    assert benchmarks.get('4kpro').score([sample], ['blue']).value == 100.0
    assert benchmarks.get('4kpro').score([sample], ['D']).value == 0.0
    text = prompts.load('4kpro').render(sample)
    assert 'A. red\nC. blue\nD. green\n' in text and 'B.' not in text
    return sample

  for gap in ('', None, float('nan'), ' ', 'nan'):
    assert read(options=['red', gap, 'blue', 'green'], answer='C').choices == \
      ('red', '', 'blue', 'green')
    read(A='red', B=gap, C='blue', D='green', E=gap, answer='C')
  read(A='red', C='blue', D='green', answer='C')
  for more, said in ((dict(options=['red', '', 'blue'], answer='B'), "answer 'B' is not the"),
                     (dict(options=['', None], answer='A'), 'has 0 options'),
                     (dict(options=['x'] * 27, answer='A'), 'has 27 options'),
                     (dict(options={'A': 'x'}, answer='A'), 'expected a list of texts')):
    (folder / '4kpro.jsonl').write_text(json.dumps(row | more))
    assert said in message('4kpro', folder)
  header = 'index\tquestion\timage\tA\tB\tC\tD\tanswer\tcategory\tcycle_category\n'
  picture = 'iVBORw0KGgo' * 10
  (tmp_path / 'hr_bench_4k.tsv').write_text(
    header + f'0\tWhich?\t{picture}\tred\t\tblue\tgreen\tD\tsingle\t0\n')
  assert benchmarks.get('hrbench').load(tmp_path)[0].choices == ('red', '', 'blue', 'green')
  assert mcq_letter('green', ('red', '', 'blue', 'green')) == 'D'
  assert mmmu('what it shows is a green door', ('red', '', 'blue', 'green')) == 'D'


def test_other_encodings_are_named(copy):
  folder = copy('mme')
  path = folder / 'artwork' / 'questions_answers_YN' / '0001.txt'
  lines = 'Is it a café? Please answer yes or no.\tYes\nIs it? Please answer yes or no.\tNo\n'
  for encoding in ('cp1252', 'utf-16', 'gbk'):
    path.write_text(lines, encoding)
    text = message('mme', folder)
    assert 'YN/0001.txt: is not UTF-8 text' in text and 'iconv' in text, encoding
  path.write_text(lines, 'utf-8-sig')  # a byte order mark is none of the text
  samples = benchmarks.get('mme').load(folder)
  assert [s.question for s in samples if s.id.startswith('artwork/0001/0')] == ['Is it a café?']
  for name, file in (('pope', 'coco_pope_random.json'), ('gqa', 'testdev_balanced_questions.json'),
                     ('hrbench', 'hr_bench_4k.tsv')):
    folder = copy(name)
    data = (folder / file).read_bytes()
    (folder / file).write_bytes(b'\xef\xbb\xbf' + data)
    benchmarks.get(name).load(folder)
    (folder / file).write_bytes(data[:20] + b'\xe9 ' + data[20:])
    assert 'is not UTF-8 text' in message(name, folder)
    shutil.rmtree(folder)


@pytest.mark.parametrize('change, said', [
  (dict(options=[]), 'has 0 options'),
  (dict(options=['a'] * 27), 'has 27 options'),
  (dict(options=['a', '']), '1 of them empty'),
  (dict(options='abcd'), "'options' is str"),
  (dict(bbox=[1, 2, 3, 4]), 'bbox: found'),
  (dict(bbox=[[1, 2, 3]]), 'bbox: found'),
  (dict(bbox=[[1, 2, 3, None]]), 'bbox: found'),
  (dict(bbox={'x': 1}), 'bbox: found'),
  ([1], 'found list, expected an object'),
  ('text', 'found str, expected an object'),
])
def test_odd_json_of_vstar(copy, change, said):
  folder = copy('vstar')
  path = folder / 'direct_attributes' / 'sa_4690.json'
  value = json.loads(path.read_text())
  path.write_text(json.dumps(value | change if isinstance(change, dict) else change))
  for name in ('vstar', 'vstar_likelihood'):
    text = message(name, folder)
    assert said in text and 'direct_attributes/sa_4690.json' in text


@pytest.mark.parametrize('name, file, change, said', [
  ('needle', 'needle.json', lambda v: v[0]['needle']['signs'][0].update(box=['a', 1, 2, 3]),
   'expected a list of boxes of 4 numbers'),
  ('needle', 'needle.json', lambda v: v[0]['needle'].update(signs=[[1]]) or v[0].update(boxes=7),
   None),
  ('infovqa', 'infographicsVQA_val_v1.0.json', lambda v: v['data'][0].update(answer_type=7), None),
  ('seed', 'SEED-Bench.json', lambda v: v.update(question_type=[1]), 'expected an object'),
  ('seed', 'SEED-Bench.json', lambda v: v['questions'][0].update(question_type_id=[1]), None),
  ('scienceqa', 'pid_splits.json', lambda v: v.update(test=5), 'expected a list'),
  ('scienceqa', 'problems.json', lambda v: [row.update(image=3) for row in v.values()] and None,
   'is missing'),
  ('mathvista', 'testmini.json', lambda v: v['1'].update(precision='many'), 'precision is'),
  ('mathvista', 'testmini.json', lambda v: v['2'].update(choices=[1, 2]), None),
  ('vqav2', 'v2_mscoco_val2014_annotations.json',
   lambda v: v['annotations'][0].update(answer_type=[3]), None),
])
def test_odd_values_are_named_or_do_not_matter(copy, name, file, change, said):
  from hrvlm_jax.evaluation.runner import score_predictions

  folder = copy(name)
  edit(folder / file, change)
  if said:
    assert said in message(name, folder)
    return
  (folder / 'answers.jsonl').write_text('')
  found = score_predictions(name, folder / 'answers.jsonl', data=folder, out=folder / 'out')
  assert found.value == 0 and (folder / 'out' / 'report.html').exists()


def test_damaged_parquet_files(copy):
  folder = copy('mmmu_pro')
  for path in folder.rglob('*.parquet'):
    data = bytearray(path.read_bytes())
    data[4:200] = bytes(196)
    path.write_bytes(data)
  assert 'is damaged' in message('mmmu_pro', folder, 'standard')


@pytest.mark.parametrize('image, kind', [([1], 'list'), ({'path': 'a'}, 'dict'), (7, 'int')])
def test_an_image_that_is_no_name(copy, image, kind):
  folder = copy('mathvista')
  path = folder / 'testmini.json'
  rows = json.loads(path.read_text())
  rows['2']['image'] = image
  path.write_text(json.dumps(rows))
  said = message('mathvista', folder)
  assert f'the image of 2 is {kind}' in said and 'expected the name of a file' in said, said


def test_json_that_python_cannot_read(copy):
  folder = copy('gqa')
  for text in ('[' * 100_000, '{"a": ' + '9' * 5000 + '}'):
    (folder / 'testdev_balanced_questions.json').write_text(text)
    assert 'is not JSON that can be read' in message('gqa', folder)


def test_quotation_marks_in_a_tsv(tmp_path):
  """An inch mark is a character; a cell that begins with one and never closes is named."""
  from hrvlm_jax.evaluation.benchmarks.tables import read_tsv
  path = tmp_path / 'a.tsv'

  def cells(text):
    path.write_text('index\tquestion\tanswer\n' + text)
    problems = []
    return [(row['index'], row['question']) for _, row in read_tsv(path, problems)], problems

  lone = '0\tA 5" disk?\tA\n1\tx\tB\n2\tA 3.5" one?\tA\n'
  assert cells(lone) == ([('0', 'A 5" disk?'), ('1', 'x'), ('2', 'A 3.5" one?')], [])
  assert cells('0\tA 5" disk?\tA\n1\tx\tB\n')[0] == [('0', 'A 5" disk?'), ('1', 'x')]
  assert cells('0\t"two\nlines ""so"""\tA\r\n1\tx\tB')[0] == [('0', 'two\nlines "so"'), ('1', 'x')]
  assert cells('0\t"Exit" says it\tA\n1\tx\tB\n')[0] == [('0', 'Exit says it'), ('1', 'x')]
  for text in ('0\t"open\tA\n1\tx\tB\n', '0\tx\tB\n1\t"open\tA\n'):
    with pytest.raises(UserError, match='begins in line [23] is never closed'):
      cells(text)
  found, problems = cells('0\t"swallows\tA\n1\tthe "\tB\n2\tx\tC\n')
  assert problems or len(found) == 3, found


def test_tsv_image_that_is_not_base64(copy):
  folder = copy('hrbench')
  path = folder / 'hr_bench_8k.tsv'
  head, row = path.read_text().splitlines()
  cells = row.split('\t')
  path.write_text(head + '\n' + '\t'.join([*cells[:-1], '*' * 100]) + '\n')
  sample, = benchmarks.get('hrbench').load(folder, '8k')
  with pytest.raises(UserError, match='row 1: the image is not base64'):
    sample.images[0].open()


def test_parquet(copy):
  folder = copy('realworldqa')
  (folder / 'test-00000-of-00001.parquet').write_bytes(b'PAR1')
  assert 'is not a parquet file' in message('realworldqa', folder)


def test_damaged_image_is_named(copy):
  folder = copy('gqa')
  (folder / 'images/n161313.jpg').write_bytes(b'\xff\xd8broken')
  sample = benchmarks.get('gqa').load(folder)[0]
  with pytest.raises(UserError, match='n161313.jpg'):
    sample.images[0].open()


def test_scienceqa_and_seed(copy):
  folder = copy('scienceqa')
  edit(folder / 'problems.json', lambda v: v['1'].update(answer=5) or v.pop('3') and None)
  text = message('scienceqa', folder)
  assert 'answer 5 is not one of 2 choices' in text and 'problem 3 is not in problems.json' in text
  folder = copy('seed')
  edit(folder / 'SEED-Bench.json', lambda v: v['questions'][0].update(answer='Z'))
  assert "answer is 'Z', expected A, B, C or D" in message('seed', folder)


def test_needle_and_others(copy):
  folder = copy('needle')

  def change(rows):
    rows[0]['conversations'].pop()
    del rows[1]['needle'], rows[1]['relative_area']

  edit(folder / 'needle.json', change)
  text = message('needle', folder)
  assert 'turns do not alternate' in text and 'no relative area' in text
  folder = copy('4kpro')
  path = folder / '4kpro.jsonl'
  path.write_text(path.read_text().replace('"gaming"', '"sports"', 1).replace('"B"', '"Q"', 1))
  text = message('4kpro', folder)
  assert "category 'sports' is not one of av, household, gaming, ui" in text
  assert "answer 'Q' is not the letter of one of its options" in text
  folder = copy('mathvista')
  edit(folder / 'testmini.json', lambda v: v['1'].pop('query') and None)
  assert "lacks 'query'" in message('mathvista', folder)
  folder = copy('ocrbench')
  edit(folder / 'OCRBench.json', lambda v: v[0].update(type='Odd'))
  assert "unknown type 'Odd'" in message('ocrbench', folder)


def test_mmvet_grades():
  from hrvlm_jax.evaluation.benchmarks.judged import mmvet_total
  samples = benchmarks.get('mmvet').load(SAMPLES / 'mmvet')
  grades = {'v1_0': {'score': [0.0, 0.5]}, 'v1_1': {'score': [1.0]}}
  total = mmvet_total(grades, samples, judge='a judge', date='2024-05-01')
  assert total['mmvet_total'] == 75 and total['by_capability']['math'] == 50
  assert total['judge'] == 'a judge'
  with pytest.raises(UserError, match='1 answers have none'):
    mmvet_total({'v1_0': grades['v1_0']}, samples, judge='x', date='y')


def test_captions_with_the_ptb_tokeniser(monkeypatch):
  from hrvlm_jax.evaluation.benchmarks import captions
  from hrvlm_jax.evaluation.metrics import cider
  monkeypatch.setattr(captions.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match='nocaps_ptb needs the package pycocoevalcap'):
    benchmarks.get('nocaps_ptb')
  monkeypatch.setattr(captions.importlib.util, 'find_spec', lambda name: name)
  monkeypatch.setattr(captions.shutil, 'which', lambda name: name)
  monkeypatch.setattr(cider, 'ptb_tokens', lambda texts: [text.lower().split() for text in texts])
  found = benchmarks.get('nocaps_ptb')
  samples = found.load(SAMPLES / 'nocaps')
  scores = found.score(samples, ['a cat on a mat', 'a dog runs in a park', 'a bird'])
  assert found.name == 'nocaps_ptb' and scores.values == {
    'cider_ptb': pytest.approx(212.76368436481268)}


def test_partly_hidden_labels(copy, tmp_path):
  import dataclasses

  from hrvlm_jax.evaluation.result import score_texts
  benchmark = benchmarks.get('gqa')
  samples = benchmark.load(SAMPLES / 'gqa')
  samples[0] = dataclasses.replace(samples[0], answers=None)
  with pytest.raises(UserError, match='1 of 3 samples have no labels'):
    score_texts(benchmark, 'x', samples, {}, identity={})
