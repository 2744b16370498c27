"""README's lines, and one loaded model from the command line: many questions, a conversation."""

import io
import json
import pathlib
import re
import time

from PIL import Image
import pytest

import hrvlm_jax
from hrvlm_jax.cli.main import main
from hrvlm_jax.evaluation import model as evaluated
from hrvlm_jax.front import loading

ROOT = pathlib.Path(__file__).parents[2]
CHECKPOINT = 'runs/quickstart/checkpoint'
SHORT = ['--checkpoint', CHECKPOINT, '--max-new-tokens', '4']


@pytest.fixture(autouse=True)
def here(world, model, monkeypatch):
  """The folder, and the model that is loaded already in place of another start."""
  monkeypatch.chdir(world)
  load = loading.load

  def loaded(what, **options):
    plain = not options.get('encoder') and not options.get('methods')
    return model if str(what) == CHECKPOINT and plain else load(what, **options)

  monkeypatch.setattr(loading, 'load', loaded)
  return world


def asked(capsys, *argv, status=0):
  """(standard output, standard error) of `hrvlm ask` or another verb."""
  assert main(list(argv)) == status
  return capsys.readouterr()


def test_the_lines_of_the_readme_run(here, capsys, model):
  lines = re.search(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.DOTALL)[1]
  assert len([line for line in lines.splitlines() if line.strip()]) <= 5
  names = {}
  exec(compile(lines, 'README.md', 'exec'), names)
  assert capsys.readouterr().out.strip()
  assert Image.open('crops.png').size == (400, 80)
  # The second question of the same shape: no compilation, and next to no time.
  before, began = names['model'].compilations(), time.process_time()
  names['model'].ask('runs/quickstart/data/eval/images/000000.png', 'What does the blue sign say?')
  assert names['model'].compilations() == before
  assert time.process_time() - began < 0.2 * 4  # 0.2 s; programs of the suite are not optimised


def test_ask_takes_what_python_takes(here, capsys, monkeypatch, model):
  text, words = 'What is this?', ['ask', *SHORT]
  expected = model.ask('photo.png', text, max_new_tokens=4)
  assert asked(capsys, *words, 'photo.png', text).out.strip() == expected
  found = asked(capsys, *words, 'photo.png', text, '--json').out
  assert json.loads(found) == {'question': text, 'answer': expected}
  pipe = io.TextIOWrapper(io.BytesIO(pathlib.Path('photo.png').read_bytes()))
  monkeypatch.setattr('sys.stdin', pipe)
  assert asked(capsys, *words, '-', text).out.strip() == expected
  assert asked(capsys, *words, 'Only text?').out.strip() == \
    model.ask(None, 'Only text?', max_new_tokens=4)
  for argv, message in (
      (['photo.png'], 'is an image; write the question'), ([], 'there is no question'),
      (['photo.png', ' '], 'the question is empty'), (['https://x.org/a.png', text], 'not fetched'),
      (['Text?', '--overlay', 'o.png'], 'there is none'), (['x*.png', text], 'has no images'),
      (['a.png', text, '--images', '.'], '--images belongs to --questions'),
      (['--questions', 'none.jsonl'], 'no such file; expected JSON lines'),
      (['a.png', '--questions', 'own.jsonl'], 'has its images and questions in the file')):
    assert message in asked(capsys, *words, *argv, status=2).err


def test_folders_and_patterns_ask_about_each_image(here, capsys, model, tmp_path):
  (tmp_path / 'in').mkdir()
  for name in ('a.png', 'in/b.png'):
    (tmp_path / name).write_bytes(pathlib.Path('photo.png').read_bytes())
  (tmp_path / 'c.png').write_bytes(b'no image')
  expected = model.ask('photo.png', 'What?', max_new_tokens=4)
  out, err = asked(capsys, 'ask', *SHORT, str(tmp_path), 'What?', status=1)
  assert out == f'{tmp_path}/a.png: {expected}\n{tmp_path}/in/b.png: {expected}\n'
  assert 'c.png: ' in err and '1 of 3 lines could not be asked' in err
  out, _ = asked(capsys, 'ask', *SHORT, str(tmp_path / '*.png'), 'What?', '--json', status=1)
  records = [json.loads(line) for line in out.splitlines()]
  assert [record['image'][-5:] for record in records] == ['a.png', 'c.png']
  assert records[0]['answer'] == expected and 'error' in records[1]


QUESTIONS = [
  {'id': 'a', 'image': 'photo.png', 'question': 'What?'}, '{"image": "photo.png"',
  {'messages': [{'role': 'user', 'content': [{'type': 'image', 'image': 'other.png'},
                                             {'type': 'text', 'text': 'Where?'}]}]},
  {'question': 'No image?'}, {'image': 'nowhere.png', 'question': 'What?'},
  {'images': ['photo.png', 'other.png'], 'question': 'Both?'}, [1], {'image': 'photo.png'},
  {'question': 'x', 'messages': []}, {'question': ' '}, {'question': 5},
]


def test_a_file_of_questions(here, capsys, model, tmp_path, monkeypatch):
  lines = [line if isinstance(line, str) else json.dumps(line) for line in QUESTIONS]
  (here / 'q.jsonl').write_text('\n'.join(lines[:1] + [''] + lines[1:]) + '\n')
  words = ['ask', *SHORT, '--questions', 'q.jsonl', '--json', '--batch-size', '3']
  out, err = asked(capsys, *words, '--out', str(tmp_path / 'out.jsonl'), status=1)
  records = [json.loads(line) for line in out.splitlines()]
  assert [record['line'] for record in records] == [1, *range(3, 13)]
  errors = [record.get('error') for record in records]
  words_of = ('', 'is not JSON', '', '', 'nowhere.png: no such file', '', 'is list, expected',
              'needs either "question"', 'has both', 'the question is empty', '"question" is int')
  assert all((error or '').find(word) >= 0 and bool(error) == bool(word)
             for error, word in zip(errors, words_of, strict=True)), errors
  assert records[0]['id'] == 'a' and '7 of 11 lines could not be asked' in err
  ask = lambda *item: model.ask(*item, max_new_tokens=4)
  assert records[0]['answer'] == ask('photo.png', 'What?')
  assert records[2]['answer'] == ask('other.png', 'Where?')
  assert records[3]['answer'] == ask(None, 'No image?')
  assert records[5]['answer'] == ask(['photo.png', 'other.png'], 'Both?')

  # Killed in the middle of a line, and started again: what is there stays, the rest is asked.
  kept = (tmp_path / 'out.jsonl').read_bytes().splitlines(keepends=True)
  (tmp_path / 'out.jsonl').write_bytes(b''.join(kept[:4]) + kept[4][:10])
  out, err = asked(capsys, *words, '--out', str(tmp_path / 'out.jsonl'), status=1)
  assert len(out.splitlines()) == 7 and '4 were answered before' in err
  assert (tmp_path / 'out.jsonl').read_bytes().splitlines(keepends=True) == kept
  changed = ['ask', '--checkpoint', CHECKPOINT, '--max-new-tokens', '5', *words[5:]]
  assert 'other lines, another model or other settings' in asked(
    capsys, *changed, '--out', str(tmp_path / 'out.jsonl'), status=2).err
  (tmp_path / 'x.jsonl').write_text('{"a": 1}\n')
  assert 'line 1: is no record of hrvlm ask' in asked(
    capsys, *words, '--out', str(tmp_path / 'x.jsonl'), status=2).err

  # The same from standard input.
  monkeypatch.setattr('sys.stdin', io.StringIO('\n'.join(lines[:1] + lines[3:4]) + '\n'))
  out, _ = asked(capsys, 'ask', *SHORT, '--questions', '-')
  assert out.splitlines() == [' '.join(records[n]['answer'].splitlines()) for n in (0, 3)]


def test_empty_answers_are_said_to_be_empty(here, capsys, model, monkeypatch):
  monkeypatch.setattr(model, 'stream', lambda *_, **__: iter(()))
  monkeypatch.setattr(model.answerer, 'decode', lambda row: '')
  out, err = asked(capsys, 'ask', *SHORT, 'photo.png', 'What?')
  assert out == '\n' and 'the answer is empty' in err
  assert '3 of 3 answers are empty' in asked(
    capsys, 'ask', *SHORT, '--questions', 'own.jsonl').err
  monkeypatch.setattr('sys.stdin', io.StringIO('What?\n'))
  assert 'the answer is empty' in asked(capsys, 'chat', *SHORT).err


def test_penalties_are_options(here, capsys, model, monkeypatch):
  """The settings reach ask, chat and eval; without them those of the model's files count."""
  seen, sampling = [], type(model.answerer).sampling

  def recorded(self, **options):
    seen.append(sampling(self, **options))
    return seen[-1]

  monkeypatch.setattr(type(model.answerer), 'sampling', recorded)
  monkeypatch.setattr('hrvlm_jax.cli.evaluate._answerer', lambda *_: model.answerer)
  given = ['--no-repeat-ngram-size', '2', '--repetition-penalty', '3']
  ask = ['ask', *SHORT, 'photo.png', 'What is written?', '--json']
  chat = ['chat', *SHORT, 'photo.png']
  evaluated = ['eval', *SHORT, '--benchmark', 'own', '--data', 'own.jsonl', '--out', 'e',
               '--batch-size', '1', '--limit', '1', '--quiet']
  for argv in (ask, chat, evaluated):
    for more, want in (([], (1.0, 0)), (given, (3.0, 2))):
      monkeypatch.setattr('sys.stdin', io.StringIO('What is written?\n'))
      target = ['--out', f'e{len(more)}'] if argv is evaluated else []
      asked(capsys, *argv, *more, *target)
      assert (seen[-1].repetition_penalty, seen[-1].no_repeat_ngram_size) == want, argv
  kept = json.loads(pathlib.Path('e4/result.json').read_text())['generation']
  assert kept['repetition_penalty'] == 3.0 and kept['no_repeat_ngram_size'] == 2
  greedy = json.loads(asked(capsys, *ask).out)['answer']
  drawn = asked(capsys, *ask, '--temperature', '5', '--min-p', '1').out
  assert json.loads(drawn)['answer'] == greedy and seen[-1].min_p == 1.0  # the likeliest is left
  for argv in (ask, chat):
    for option, value, said in (('--repetition-penalty', '0', 'repetition_penalty must be'),
                                ('--repetition-penalty', 'nan', 'repetition_penalty must be'),
                                ('--min-p', '2', 'min_p must lie'),
                                ('--no-repeat-ngram-size', '-1', 'must not be negative')):
      monkeypatch.setattr('sys.stdin', io.StringIO('x\n'))
      assert said in asked(capsys, *argv, option, value, status=2).err
  assert 'must be a number above 0' in asked(
    capsys, *evaluated, '--repetition-penalty', '-1', status=2).err
  scored = ['eval', '--benchmark', 'own', '--data', 'own.jsonl', '--out', 'p', '--predictions', 'x']
  assert '--repetition-penalty: decides how' in asked(
    capsys, *scored, '--repetition-penalty', '2', status=2).err


def test_what_has_no_room_is_said(here, capsys, model, monkeypatch, caplog):
  """More new tokens than memory: refused at once; more positions than the model knows: a line."""
  ask = ['ask', *SHORT, 'photo.png', 'What?']
  for number in ('2000000000', '2147483647', '100000000'):
    said = asked(capsys, *ask, '--max-new-tokens', number, status=2).err
    assert f'max_new_tokens {number}: keys and values of 1 x 1' in said and 'at most ' in said
    fits = int(re.search(r'at most (\d+) new', said).group(1))
    assert 0 < fits < int(number)
  for seed in ('99999999999999999999', '-99999999999999999999'):
    said = asked(capsys, *ask, '--temperature', '1', '--seed', seed, status=2).err
    assert 'expected a whole number of 64 bits' in said
  for value in ('nan', 'inf', '-1', '1e-30'):
    assert 'temperature must be 0' in asked(capsys, *ask, '--temperature', value, status=2).err
  context = model.answerer.context
  monkeypatch.setattr(context, '_said', set())
  model.ask('photo.png', 'What?', max_new_tokens=4)
  assert not caplog.messages
  monkeypatch.setattr(context, 'most', 30)
  asked(capsys, *ask)
  asked(capsys, *ask)  # said once
  [said] = caplog.messages
  assert re.match(r'a prompt has \d+ positions, the language model was made for 30: answers', said)
  caplog.clear()
  monkeypatch.setattr(context, '_said', set())
  monkeypatch.setattr(context, 'most', int(re.search(r'has (\d+)', said).group(1)) + 1)
  model.ask('photo.png', 'What?', max_new_tokens=4)
  [said] = caplog.messages
  assert said.startswith('a prompt and its answer have ')


def test_a_conversation_in_the_terminal(here, capsys, model, monkeypatch):
  script = ['photo.png What is this?', 'And now?', '/overlay looked.png', '/histry', '/history',
            'nowhere', '/image "other.png"', '/overlay', 'Another?', '/new', '/system Be short.',
            'Hello?', '/history', '/help', '/quit', 'never asked']
  monkeypatch.setattr('sys.stdin', io.StringIO('\n'.join(script) + '\n'))
  out, err = asked(capsys, 'chat', *SHORT, status=1)
  chat = model.chat()
  answers = [chat.ask('What is this?', 'photo.png', max_new_tokens=4),
             chat.ask('And now?', max_new_tokens=4)]
  assert out.startswith('\n'.join(answers) + '\ndrawn: looked.png\nuser: [image] What is this?\n')
  assert 'unknown command /histry (nearest known: /history)' in err
  assert Image.open('looked.png').size == (120, 90) and Image.open('overlay.png').size == (300, 80)
  fresh = model.chat(system='Be short.')
  answer = fresh.ask('Hello?', max_new_tokens=4)
  assert f'system: Be short.\nuser: Hello?\nassistant: {answer}\n' in out
  assert '/quit' in out and 'never asked' not in out


def test_a_template_of_one_turn_says_so(capsys):
  """Pheye was trained on one question and one answer."""
  from hrvlm_jax.core.errors import UserError
  from hrvlm_jax.language.chat import ASSISTANT, USER, Dialogue, Message
  from hrvlm_jax.language.prompt import Text, tokenizer_of

  text = Text(tokenizer=tokenizer_of('byte'), chat='pheye', image_token=None)
  turns = (Message(USER, 'A?'), Message(ASSISTANT, 'B.'), Message(USER, 'C?'))
  with pytest.raises(UserError, match='has one question and one answer, found 3 messages; begin a'):
    text.prompt(Dialogue(turns, (1, 0, 0)), [0])
  assert len(text.prompt(Dialogue(turns[:1], (1,), 'Own.'), [0])['tokens'])
  assert hrvlm_jax.__version__


def test_own_questions_several_benchmarks_and_a_grid_of_knobs(here, capsys, tmp_path, monkeypatch):
  lines = asked(capsys, 'eval', '--list').out.splitlines()
  assert any(line.startswith('textvqa ') for line in lines) and len(lines) > 20
  assert any(line.startswith('own ') for line in lines)
  rows = [{'image': 'other.png', 'question': f'What{n}?', 'answers': ['STOP', 'stop sign'],
           'category': 'ab'[n % 2]} for n in range(3)]
  (here / 'more.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  words = ['eval', *SHORT, '--quiet', '--benchmark', 'own', '--data', 'more.jsonl']
  out = asked(capsys, *words, '--metric', 'contains', '--out', str(tmp_path / 'one')).out
  assert 'own (all), 3 samples: contains = ' in out and '  a: ' in out

  # The V* grid of the article in one command; a combination that cannot be is said, not fatal.
  grid = [*words, '--sweep', 'encoder.max_crops=4,9', '--sweep', 'encoder.num_tokens=2,40',
          '--out', str(tmp_path / 'grid')]
  out, err = asked(capsys, *grid, status=2)
  table = (tmp_path / 'grid/table.txt').read_text()
  assert table in out and table.splitlines()[0].split() == ['max_crops', 'num_tokens', 'own']
  assert 'num_tokens=2 is below the number of views' in err
  assert 'of 4 evaluations failed' in err and 'failed' in table
  results = json.loads((tmp_path / 'grid/results.json').read_text())
  assert [row['values']['encoder.max_crops'] for row in results] == [4, 4, 9, 9]
  done = tmp_path / 'grid/max_crops=9_num_tokens=40'
  config = json.loads((done / 'result.json').read_text())['preprocessing']['encoder']
  assert (config['max_crops'], config['num_tokens']) == (9, 40)
  assert min(Image.open(tmp_path / 'grid/plot.png').size) > 300

  # Two benchmarks, each with its folder.
  (tmp_path / 'data/realworldqa').mkdir(parents=True)
  (tmp_path / 'data/own').mkdir()
  (tmp_path / 'data/own/own.jsonl').write_text(json.dumps(rows[0]) + '\n')
  (tmp_path / 'data/own/other.png').write_bytes(pathlib.Path('other.png').read_bytes())
  (tmp_path / 'data/realworldqa/0.png').write_bytes(pathlib.Path('photo.png').read_bytes())
  (tmp_path / 'data/realworldqa/annotations.jsonl').write_text(json.dumps(
    {'id': '0', 'image': '0.png', 'question': 'How many?\nA. 1\nB. 2', 'answer': 'A'}) + '\n')
  both = ['eval', *SHORT, '--quiet', '--benchmark', 'own,realworldqa', '--data',
          str(tmp_path / 'data'), '--out', str(tmp_path / 'both')]
  queues, kind = [], evaluated.Queue

  def made(*positional, **named):
    queues.append(kind(*positional, **named))
    return queues[-1]

  monkeypatch.setattr(evaluated, 'Queue', made)
  assert asked(capsys, *both).out.count('written: ') == 3
  assert len(queues) == 1  # compiled programs serve every benchmark
  assert {path.name for path in (tmp_path / 'both').iterdir()} == {
    'own', 'realworldqa', 'table.txt', 'plot.png', 'results.json'}

  for argv, message in (
      ([*words, '--metric', 'anl', '--out', 'x'], 'unknown metric anl (nearest known: anls)'),
      (['eval', *SHORT, '--benchmark', 'own'], '--data, --out: missing'),
      ([*words, '--out', 'x', '--sweep', 'max_crops=4'], 'such as encoder.max_crops=25,100'),
      ([*words, '--out', 'x', '--metric', 'letter'], "has no 'choices'"),
      (['eval', *SHORT, '--benchmark', 'pope', '--data', '.', '--out', 'x', '--metric', 'plain'],
       '--metric belongs to --benchmark own')):
    assert message in asked(capsys, *argv, status=2).err


def test_letters_and_several_references():
  from hrvlm_jax.evaluation.benchmarks.base import Sample
  from hrvlm_jax.evaluation.benchmarks.own import own

  sample = Sample('0', (), 'Which?', ('(b)',), choices=('red', 'blue'))
  assert own('letter').score([sample], ['B. blue']).value == 100
  several = Sample('0', (), 'Which?', ('STOP', 'stop sign'))
  values = {name: own(name).score([several], ['A stop sign!']).value
            for name in ('plain', 'contains', 'exact', 'vqa')}
  # Of two references one is left out in turn, and three alike would be full marks.
  assert values == {'plain': 0, 'contains': 100, 'exact': 0, 'vqa': pytest.approx(100 / 6)}
