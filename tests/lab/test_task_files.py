"""The tasks on disk and on the user's own pictures and pages: records, sheets, commands."""

import dataclasses
import io
import json
import pathlib

import numpy as np
from PIL import Image
import pytest

from hrvlm_jax.cli.main import main
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.data.pdf import PdfPages, _same_word
from hrvlm_jax.evaluation import benchmarks
from hrvlm_jax.lab import needle, symbols
from hrvlm_jax.lab.compare import Comparison
from hrvlm_jax.lab.compare_config import CompareConfig
from hrvlm_jax.lab.needle import NeedleConfig, documents, kinds, sheet
from hrvlm_jax.lab.needle.reader import read
from hrvlm_jax.lab.needle.regions import NeedleRegions, probes
from hrvlm_jax.lab.report import markdown_table
from hrvlm_jax.language import config as language
from hrvlm_jax.language.prompt import Text, tokenizer_of
from hrvlm_jax.systems.ps3.config import tiny_encoder
from hrvlm_jax.systems.ps3.records import regions_of
from hrvlm_jax.training import run_config
from hrvlm_jax.training.config import RunConfig

ROOT = pathlib.Path(__file__).parents[2]
COMPOSED = ('relate', 'page')


def pdf(path, pages):
  """A PDF file; a page is a list of (x, y, size, text) in points from the lower left."""
  objects = {3: b'<</Type /Font /Subtype /Type1 /BaseFont /Helvetica>>'}
  for number, lines in enumerate(pages):
    drawn = b'\n'.join(b'BT /F1 %d Tf %d %d Td (%s) Tj ET' % (size, x, y, text.encode())
                       for x, y, size, text in lines)
    objects[4 + 2 * number] = b'<</Length %d>> stream\n%s\nendstream' % (len(drawn), drawn)
    objects[5 + 2 * number] = (
      b'<</Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Contents %d 0 R '
      b'/Resources <</Font <</F1 3 0 R>>>>>>' % (4 + 2 * number))
  kids = b' '.join(b'%d 0 R' % (5 + 2 * i) for i in range(len(pages)))
  objects[1] = b'<</Type /Catalog /Pages 2 0 R>>'
  objects[2] = b'<</Type /Pages /Kids [%s] /Count %d>>' % (kids, len(pages))
  body = b''.join(b'%d 0 obj %s endobj\n' % item for item in sorted(objects.items()))
  path.write_bytes(b'%PDF-1.4\n' + body + b'trailer <</Root 1 0 R>>\n')
  return path


def columns(words, seed):
  """A page with a title and two columns whose lines are not level with each other."""
  rng = np.random.default_rng(seed)
  lines = [(60, 740, 22, 'A title over both columns')]
  for column in (0, 1):
    for row in range(28):
      picked = rng.choice(words, 5, replace=False)
      lines.append((50 + 265 * column, 700 - 20 * row + 6 * column, 11, ' '.join(picked)))
  return lines


@pytest.fixture(scope='module')
def book(tmp_path_factory):
  words = [word.lower() for word in kinds.WORDS if len(word) > 3]
  return pdf(tmp_path_factory.mktemp('pdf') / 'book.pdf', [columns(words, 0), columns(words, 1)])


def test_pages_of_pdf_files(book, tmp_path):
  config = NeedleConfig.medium('page', documents=str(book), turns=2)
  answers, heights = [], []
  for index in range(40):
    made = needle.plan(config, 0, index)
    record = json.loads(json.dumps(needle.record(made, '')))
    assert read(record) == list(made.answers)
    record['task']['cue']['state'] = 1 - made.cue.state
    assert read(record) == [turn.other for turn in made.turns]
    assert all(0 <= b[0] < b[2] <= config.width and 0 <= b[1] < b[3] <= config.height
               for b in made.boxes)
    answers += [t.answer.upper() for t in made.turns if t.kind == 'after']
    heights.append(made.signs[0].box[3] - made.signs[0].box[1])
  assert set(answers) <= set(kinds.WORDS) | {'OVER', 'BOTH', 'TITLE', 'A', 'COLUMNS'}
  assert len(answers) > 20 and max(heights) > 2 * min(heights)
  plain = dataclasses.replace(config, cues=())
  for index in range(12):  # ink in every box, none elsewhere
    example = needle.generate(plain, 0, index)
    dark = np.asarray(example.image.convert('L')) < 128
    for x0, y0, x1, y1 in example.boxes:
      assert dark[y0:y1, x0:x1].any()
      dark[max(0, y0 - 1):y1 + 1, max(0, x0 - 2):x1 + 2] = False
    assert dark.sum() <= 2, index
  needle.write(config, tmp_path, 12, seed=0, workers=4, progress=False)
  for index, record in enumerate(needle.read_records(tmp_path)):
    with Image.open(tmp_path / record['image']) as image:
      assert image.tobytes() == needle.generate(config, 0, index).image.tobytes()
  again = needle.generate(config, 0, 3)
  documents._page.cache_clear()
  documents._pages.cache_clear()
  documents._lines.cache_clear()
  assert needle.generate(config, 0, 3).image.tobytes() == again.image.tobytes()


def test_words_of_a_page_are_whole_and_lines_that_touch_are_rows(tmp_path):
  """Letters that share a place (as those of ligatures) are one word; tight lines stay all."""
  lines = [(60, 700 - 12 * row, 13, f'row{"abcdefgh"[row]} between two more words here')
           for row in range(8)]
  path = pdf(tmp_path / 'tight.pdf', [lines])
  found = PdfPages(path, side=800).words(0)[1]
  assert [[word for word, _ in line] for line in found] == [line[3].split() for line in lines]
  box = (10, 0, 20, 30)
  assert _same_word(box, (10, 0, 20, 30)) and _same_word(box, (22, 1, 40, 29))
  assert not _same_word(box, (40, 0, 60, 30)) and not _same_word(box, (10, 40, 20, 70))
  config = NeedleConfig.medium('page', documents=str(path), cues=(), ask=('row',))
  rows = {needle.plan(config, 0, index).signs for index in range(20)}
  tops = [sorted({sign.box[1] for sign in signs}) for signs in rows]
  steps = [np.diff(top) for top in tops if len(top) > 2]
  assert steps and all(step.max() <= step.min() + 2 for step in steps)  # none between is missing


def test_documents_that_cannot_be_used(tmp_path, capsys):
  line = [(60, 700, 12, 'two words')]
  (tmp_path / 'no.pdf').write_bytes(b'nothing')
  (tmp_path / 'folder').mkdir()
  for path, words in (
    (pdf(tmp_path / 'empty.pdf', []), 'cannot be read as PDF'),  # no page
    (pdf(tmp_path / 'scan.pdf', [[], []]), 'no text layer'),
    (pdf(tmp_path / 'short.pdf', [line]), 'no part of its 1 pages has two rows'),
    (tmp_path / 'no.pdf', 'cannot be read as PDF'),
    (tmp_path / 'folder', 'has no pages'),
    (tmp_path / 'none.pdf', 'no such file'),
  ):
    assert main(['needle', '--task', 'page', '--documents', str(path), '--train', '1',
                 '--eval', '1', '--out', str(tmp_path / 'out')]) == 2, path
    said = capsys.readouterr().err
    assert words in said and path.name in said and len(said.splitlines()) == 1, said
    assert not (tmp_path / 'out').exists()
  # Nor do photographs that are not there.
  assert main(['needle', '--photographs', str(tmp_path / 'folder'), '--train', '1', '--eval', '1',
               '--out', str(tmp_path / 'out')]) == 2
  assert 'no image in' in capsys.readouterr().err and not (tmp_path / 'out').exists()


@pytest.mark.parametrize('task', COMPOSED)
def test_photographs_as_backgrounds(task, tmp_path):
  photo = np.random.default_rng(0).integers(0, 256, (9, 7, 3)).astype(np.uint8)
  Image.fromarray(photo).resize((300, 200)).save(tmp_path / 'a.png')
  config = NeedleConfig.medium(task, photographs=str(tmp_path), cues=())
  for index in range(4):
    made = needle.generate(config, 0, index)
    assert read(needle.record(made, '')) == list(made.answers)
    plain = needle.generate(NeedleConfig.medium(task, cues=()), 0, index)
    one, two = np.asarray(made.image).astype(int), np.asarray(plain.image).astype(int)
    if task == 'relate':
      assert made.boxes == plain.boxes
      for x0, y0, x1, y1 in made.boxes:  # the same signs on another ground
        assert (one[y0:y1, x0:x1] == two[y0:y1, x0:x1]).all()
    else:  # the words lie on the paper, which leaves a twentieth of the photograph
      assert all(min(b[:2]) >= 12 and max(b[2:]) <= 228 for b in made.boxes)
    assert np.abs(one[:10] - two[:10]).mean() > 20
  (tmp_path / 'bad').mkdir()
  (tmp_path / 'bad/b.png').write_bytes(b'\x89PNG nothing')
  with pytest.raises(UserError, match='b.png'):
    needle.generate(dataclasses.replace(config, photographs=str(tmp_path / 'bad')), 0, 0)


@pytest.mark.parametrize('task', COMPOSED)
def test_records_are_read_by_the_benchmark(task, tmp_path):
  config = NeedleConfig.medium(task, turns=3)
  needle.write(config, tmp_path, 5, seed=3, progress=False)
  records = needle.read_records(tmp_path)
  benchmark = benchmarks.get('needle')
  samples = benchmark.load(tmp_path, 'all')
  assert len(samples) == 15
  for number, sample in enumerate(samples):
    record, turn = records[number // 3], number % 3
    made = needle.plan(config, 3, number // 3)
    assert sample.question == made.questions[turn] and sample.answers == (made.answers[turn],)
    assert sample.meta['boxes'] == record['evidence'][turn] == [
      list(box) for box in made.turns[turn].evidence]
    assert sample.meta['relative_area'] == made.turns[turn].relative_area
    assert sample.meta['kind'] == made.turns[turn].kind
  scores = benchmark.score(samples, [sample.answers[0] for sample in samples])
  assert scores.values['needle_accuracy'] == 100
  asked = {turn.kind for i in range(5) for turn in needle.plan(config, 3, i).turns}
  assert set(scores.by_category) == asked | {'fine text', 'medium text', 'broad text'}
  rows = needle.single_turns(records)
  assert len(rows) == 15 and all(len(row['box']) == 4 for row in rows)


@pytest.mark.parametrize('task', COMPOSED)
def test_region_records_hold_every_sign_word_and_thing(task):
  source = NeedleRegions(NeedleConfig.medium(task), 3, seed=0)
  for index in range(3):
    found, made = regions_of(source[index]), needle.plan(source.config, 0, index)
    assert found.kind == task and found.boxes[:len(made.signs)] == made.boxes
    assert len(found.boxes) == len(made.signs) + len(made.things)
    words = {'relate': {'house', 'circle'}, 'page': {f'word {made.signs[0].text}'}}[task]
    assert words <= set(found.captions)
  encoder = tiny_encoder(vocab_size=512, max_select=110)
  tokenize = lambda texts: np.array([[len(text)] for text in texts], np.int32)
  batch = next(probes(source.config, encoder, tokenize, seed=0, images=2, batch_size=2))
  for index in range(2):
    made = needle.plan(source.config, 0, index)
    assert source.config.alphabet[batch['answer'][index]] == made.target.text


@pytest.mark.parametrize('task', COMPOSED)
def test_crops_and_symbols_to_learn_from(task):
  config = NeedleConfig.medium(task, turns=3)
  crops = needle.glyph_crops(config, np.random.default_rng(0), 40, window=80, size=40, whole=0.3)
  patches = crops.patch_letters(5)
  assert patches.max() > 5 and patches.min() == needle.CUT
  whole = needle.glyph_crops(config, np.random.default_rng(0), 6, window=80, size=240, whole=1.0)
  for shown, patches in zip(whole.shown, whole.patch_letters(60).reshape(6, 60, 60), strict=True):
    assert len(shown) >= 4  # every sign or word of a picture has its letter under its box
    for letter, _, (x0, y0, x1, y1) in shown:
      assert patches[int((y0 + y1) * 30), int((x0 + x1) * 30)] == letter >= 0
  text = language.phi(vocab_size=264, width=16, depth=1, heads=2, mlp_width=16, max_positions=1024)
  writing = Text(tokenizer=tokenizer_of('byte'), chat='mc_llava', image_token='<image>')
  head = symbols.SymbolsConfig(needle=config, text=text, steps=2, slots=(25,), batch_size=4,
                               lengths=(1024,), writing=(writing,))
  batch = head.draw(0)
  marks = symbols.marks(config)
  for row in range(4):
    made = needle.plan(config, 0, row)
    there = {(int(c), int(letter)) for c, letter in zip(
      batch['colours'][row], batch['letters'][row], strict=True) if c >= 0}
    assert there == {(mark, letter) for mark, letter, _ in symbols.symbols_of(config, made)}
    assert marks[batch['cues'][row]] == f'{made.cue.kind} {made.cue.state}'
    assert batch['lit'][row].any()
  plain = dataclasses.replace(head, uncued=1.0).draw(0)
  assert (plain['cues'] == needle.NOTHING).all() and not plain['lit'].any()
  one = dataclasses.replace(head, needle=dataclasses.replace(config, turns=1, ask=config.ask[:1]),
                            uncued=0.5)
  first, second = (dataclasses.replace(one, uncued_ask=kinds).draw(0)['tokens']
                   for kinds in (config.ask[1:], ()))
  assert first.shape != second.shape or (first != second).any()
  asked = dataclasses.replace(one, uncued_ask=config.ask[1:]).draw(1)  # its steps are over
  np.testing.assert_array_equal(asked['tokens'], one.draw(1)['tokens'])
  assert batch['places'].shape == (4, 25, 2) and batch['places'].max() < symbols.PLACES
  with pytest.raises(UserError, match='slots'):
    dataclasses.replace(head, slots=(4,)).draw(0)


def test_folders_from_before_a_field_go_on(tmp_path):
  config = NeedleConfig.tiny()
  needle.write(config, tmp_path / 'a', 2, seed=0, progress=False)
  task = json.loads((tmp_path / 'a/task.json').read_text())
  for key in ('task', 'cues', 'documents'):
    del task['config'][key]
  (tmp_path / 'a/task.json').write_text(json.dumps(task))
  needle.write(config, tmp_path / 'a', 3, seed=0, progress=False)
  with pytest.raises(UserError, match=r'another needle task \(it differs in config.cues\)'):
    needle.write(dataclasses.replace(config, cues=('tint',)), tmp_path / 'a', 3, seed=0,
                 progress=False)
  compared = run_config.load(CompareConfig,
                             str(ROOT / 'configs/compare/needle_tiny.py:smoke'))
  Comparison(compared, tmp_path / 'b', progress=False)
  kept = json.loads((tmp_path / 'b/config.json').read_text())
  for key in ('task', 'cues', 'documents'):
    del kept['task'][key]
  (tmp_path / 'b/config.json').write_text(json.dumps(kept))
  Comparison(compared, tmp_path / 'b', progress=False)
  other = dataclasses.replace(compared, task=NeedleConfig.medium('relate'))
  with pytest.raises(UserError, match='task differ'):
    Comparison(other, tmp_path / 'b', progress=False)


def test_configs_name_a_task():
  for task in kinds.TASKS:
    found = run_config.load(CompareConfig,
                            str(ROOT / f'configs/compare/needle_tiny.py:{task},smoke'))
    kept = NeedleConfig.medium(task)
    if task == 'relate':  # one kind of question, after all kinds without cues
      assert found.language.uncued_ask == kept.ask and found.language.uncued and found.turns == 1
      kept = dataclasses.replace(kept, ask=('side',))
    assert found.task == kept and found.train_steps == 3
    assert found.described == (task in COMPOSED)
    depths = {model.text.depth for model in found.systems.values()}
    assert depths == {4 if task in COMPOSED else 2}
  for path in sorted((ROOT / 'configs/tiny').glob('*.py')):
    for task in COMPOSED:
      run = run_config.load(RunConfig, f'{path}:{task}')
      assert task in run.data.train and task in run.training.init_from
    with pytest.raises(UserError, match='nearest known: relate'):
      run_config.load(RunConfig, f'{path}:relates')


def test_the_command_writes_a_task(tmp_path, capsys):
  argv = ['needle', '--preset', 'square', '--train', '2', '--eval', '1', '--out']
  assert main([*argv, str(tmp_path / 'r'), '--task', 'relate', '--cues', 'tint,scene']) == 0
  records = needle.read_records(tmp_path / 'r/train')
  assert len(records[0]['conversations']) == 6
  assert {record['task']['cue']['kind'] for record in records} <= {'tint', 'scene'}
  assert main([*argv, str(tmp_path / 'p'), '--task', 'page', '--cues', 'none']) == 0
  assert needle.read_records(tmp_path / 'p/eval')[0]['task']['cue'] is None
  assert main([*argv, str(tmp_path / 'q'), '--task', 'page', '--cues', 'moon']) == 2
  assert 'unknown name moon' in capsys.readouterr().err
  assert main([*argv, str(tmp_path / 'n'), '--preset', 'medium', '--cues', 'tint', '--areas',
               '0.0019,0.0318']) == 0
  first = needle.read_records(tmp_path / 'n/train')[0]
  assert first['task']['name'] == 'needle' and read(first)[0] == first['answer']
  assert main([*argv, str(tmp_path / 'q'), '--areas', 'large']) == 2
  assert "--areas: found 'large', expected two numbers" in capsys.readouterr().err
  assert main(['needle', '--sheet', str(tmp_path / 'r'), '--preset', 'square']) == 2  # a folder
  assert 'is a folder' in capsys.readouterr().err
  assert main(['needle', '--tables', str(tmp_path / 'none.md')]) == 2


@pytest.mark.parametrize('task', kinds.TASKS)
def test_the_sheets_of_the_pages_are_what_the_command_writes(task):
  kept = ROOT / f'docs/tasks/{task}.png'
  made = sheet.sheet(NeedleConfig.medium(task))
  assert kept.stat().st_size < 400_000
  with Image.open(kept) as one, Image.open(io.BytesIO(made)) as two:
    assert one.size == two.size
    # The palette is Pillow's, which may choose other colours in another version.
    differs = np.abs(np.asarray(one.convert('RGB')).astype(int) - np.asarray(two.convert('RGB')))
    assert (differs > 24).mean() < 0.01


def test_the_tables_of_the_page_are_made():
  page = (ROOT / 'docs/tasks.md').read_text()
  for header, *rows in (sheet.table(), sheet.sizes()):
    assert '\n'.join(markdown_table(header, rows)) in page
