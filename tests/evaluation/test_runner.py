"""Runs that stop and go on, several processes, the result folder."""

import json
import os
from pathlib import Path
import shutil
import signal
import subprocess
import sys

import pytest

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.evaluation import records
from hrvlm_jax.evaluation.runner import Answer, Model, Options, Setup, evaluate, score_predictions

SAMPLES = Path(__file__).parent / 'samples'
SETUP = Setup(model='toy', checkpoint='here', checkpoint_hash='0' * 64,
              generation={'temperature': 0}, preprocessing={'views': 3})
KEYS = ('task', 'split', 'metric', 'value', 'values', 'n', 'n_missing', 'n_truncated',
        'by_category', 'ci95', 'model', 'checkpoint_hash', 'config', 'preprocessing',
        'prompt_template', 'generation', 'dataset', 'scorer_version', 'git', 'packages')


def by_length(pairs):
  return ['yes' if len(question) % 2 else 'no' for _, question in pairs]


def run(out, answer_fn=by_length, name='mme', *, overlay=None, **options):
  return evaluate(name, Model(setup=SETUP, answer=answer_fn, overlay=overlay),
                  data=SAMPLES / name, out=out,
                  options=Options(**{'batch_size': 4, 'progress': False, **options}))


def test_result_has_all_provenance(tmp_path):
  run(tmp_path / 'r')
  value = json.loads((tmp_path / 'r/result.json').read_text())
  assert set(KEYS) <= set(value)
  assert value['prompt_template']['sha256'] and value['dataset']['sha256']
  assert value['packages']['numpy'] and value['generation'] == {'temperature': 0}


def test_interrupted_run_goes_on_and_gives_the_same_files(tmp_path):
  run(tmp_path / 'whole')
  calls = []

  def fails_later(pairs):
    if len(calls) == 3:
      raise RuntimeError('stop')
    calls.append(len(pairs))
    return by_length(pairs)

  with pytest.raises(RuntimeError):
    run(tmp_path / 'cut', fails_later)
  assert not (tmp_path / 'cut/result.json').exists()
  asked = []

  def counts(pairs):
    asked.append(len(pairs))
    return by_length(pairs)

  run(tmp_path / 'cut', counts)
  assert len(asked) == 4  # 28 questions, 12 were answered before
  for name in ('predictions.jsonl', 'mme_results/OCR.txt'):
    assert (tmp_path / 'cut' / name).read_bytes() == (tmp_path / 'whole' / name).read_bytes()


@pytest.mark.parametrize('processes', [2, 3])
def test_several_processes_equal_one(tmp_path, processes):
  one = run(tmp_path / 'one')
  results = [run(tmp_path / 'many', process_index=i, process_count=processes)
             for i in reversed(range(processes))]  # the first process merges, so it comes last
  assert results[:-1] == [None] * (processes - 1)
  assert results[-1].value == one.value and results[-1].ci95 == one.ci95
  assert (tmp_path / 'many/predictions.jsonl').read_bytes() == \
    (tmp_path / 'one/predictions.jsonl').read_bytes()


def test_going_on_with_another_number_of_processes(tmp_path):
  left = [1, 1]

  def two_batches(pairs):
    left.pop()
    return by_length(pairs)

  with pytest.raises(IndexError):
    run(tmp_path / 'r', two_batches, process_index=0, process_count=2)
  asked = []
  run(tmp_path / 'r', lambda pairs: asked.append(len(pairs)) or by_length(pairs))
  assert len(asked) == 5  # 28 - 8 questions in batches of 4
  run(tmp_path / 'one')
  assert (tmp_path / 'r/predictions.jsonl').read_bytes() == \
    (tmp_path / 'one/predictions.jsonl').read_bytes()


KILLED = """
import sys, time
sys.path.insert(0, sys.argv[3])
from hrvlm_jax.evaluation.runner import Model, Options, Setup, evaluate
def slow(pairs):
  time.sleep(0.05)
  print('batch', flush=True)
  return [question[:1] for _, question in pairs]
evaluate('mme', Model(setup=Setup(model='x'), answer=slow), data=sys.argv[1], out=sys.argv[2],
         options=Options(batch_size=2, progress=False))
"""


def test_kill_9_loses_at_most_one_batch(tmp_path):
  root = Path(__file__).parents[2]
  command = [sys.executable, '-c', KILLED, str(SAMPLES / 'mme'), str(tmp_path / 'r'), str(root)]
  process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
  batches = 0
  for _ in process.stdout:
    batches += 1
    if batches == 5:
      os.kill(process.pid, signal.SIGKILL)
      break
  process.stdout.close()
  process.wait()
  shard = tmp_path / 'r/predictions-00000-of-00001.jsonl'
  with records.PredictionsFile(shard) as file:
    assert len(file.done) >= 2 * (batches - 1)  # all but the batch in work
  again = subprocess.run(command, capture_output=True, text=True, timeout=60)
  assert again.returncode == 0, again.stderr
  assert again.stdout.count('batch') <= 14 - (batches - 1)
  assert json.loads((tmp_path / 'r/result.json').read_text())['n_missing'] == 0


@pytest.mark.parametrize('torn', [b'{"sample_id": "c", "te', b'{"sample_id": "c", "te\n'])
def test_torn_last_line_is_cut_off(tmp_path, torn):
  path = tmp_path / 'p.jsonl'
  whole = b'{"sample_id": "a", "text": "1"}\n{"sample_id": "b", "text": "2"}\n'
  path.write_bytes(whole + torn)
  with records.PredictionsFile(path) as file:
    assert list(file.done) == ['a', 'b']
    file.append([{'sample_id': 'c', 'text': 'é\n'}])
  assert records.read(path)['c']['text'] == 'é\n'
  assert path.read_bytes().startswith(whole)


def test_answers_files_of_llava(tmp_path):
  """`question_id`, a number or a text, names the sample; other keys do not matter."""
  path = tmp_path / 'answers.jsonl'
  rows = [{'question_id': 7, 'prompt': 'q', 'text': 'cat', 'answer_id': 'x', 'model_id': 'llava',
           'metadata': {}}, {'question_id': 'b', 'text': 'dog'}]
  path.write_text('\n'.join(map(json.dumps, rows)))
  assert {key: row['text'] for key, row in records.read(path).items()} == {'7': 'cat', 'b': 'dog'}
  path.write_text('{"question_id": true, "text": "x"}\n{"question_id": null, "text": "x"}')
  with pytest.raises(UserError, match='2 problems') as error:
    records.read(path)
  assert 'line 1: expected' in str(error.value)


def test_half_a_character_of_an_answer_is_the_replacement_mark(tmp_path):
  path = tmp_path / 'p.jsonl'
  with records.PredictionsFile(path) as file:
    file.append([{'sample_id': 'a', 'text': 'so \ud83d'}])
  assert records.read(path)['a']['text'] == 'so \ufffd'
  path.write_text('{"sample_id": "a", "text": "so \\ud83d"}\n')  # an escape of JSON
  assert records.read(path)['a']['text'] == 'so \ufffd'


def test_damaged_predictions_are_refused_in_one_message(tmp_path):
  path = tmp_path / 'p.jsonl'
  path.write_text('nonsense\n{"sample_id": "a", "text": "1"}\n{"sample_id": "a", "text": "2"}\n'
                  '{"sample_id": 3}\n')
  with pytest.raises(UserError) as error:
    records.read(path)
  text = str(error.value)
  assert '3 problems' in text and 'line 1: is not a JSON object' in text
  assert 'line 3: sample_id a is a duplicate' in text and 'line 4: expected' in text


def test_folder_of_another_run_is_refused(tmp_path):
  run(tmp_path / 'r')
  with pytest.raises(UserError, match='differs in generation'):
    setup = Setup(model='toy', checkpoint='here', checkpoint_hash='0' * 64,
                  generation={'temperature': 1}, preprocessing={'views': 3})
    evaluate('mme', Model(setup=setup, answer=by_length), data=SAMPLES / 'mme', out=tmp_path / 'r')


def test_finished_run_asks_nothing(tmp_path):
  run(tmp_path / 'r')
  run(tmp_path / 'r', lambda pairs: pytest.fail('asked again'))


def test_limit_empty_and_truncated_answers_are_said(tmp_path):
  result = run(tmp_path / 'r', lambda pairs: [Answer('', 'length', 5, 2)] * len(pairs), limit=3)
  assert (result.n, result.n_empty, result.n_truncated) == (3, 3, 3)
  notes = ' '.join(result.notes)
  assert 'only the first 3' in notes and '3 answers are empty' in notes


def test_wrong_answer_functions(tmp_path):
  with pytest.raises(UserError, match='gave 1 answers to 4 questions'):
    run(tmp_path / 'a', lambda pairs: ['x'])
  with pytest.raises(UserError, match='gave int, expected texts'):
    run(tmp_path / 'b', lambda pairs: [1] * len(pairs))
  with pytest.raises(UserError, match='needs likelihoods'):
    run(tmp_path / 'c', name='vstar_likelihood')
  with pytest.raises(UserError, match='nearest known: mmvet|nearest known: mme'):
    evaluate('mmee', Model(setup=SETUP, answer=by_length), data='x', out=tmp_path / 'd')


def test_last_batch_is_filled_up(tmp_path):
  sizes = []
  run(tmp_path / 'r', lambda pairs: sizes.append(len(pairs)) or by_length(pairs), batch_size=5)
  assert sizes == [5] * 6


def test_score_only(tmp_path):
  path = tmp_path / 'p.jsonl'
  rows = [{'sample_id': 'human_1', 'text': 'yes'}, {'sample_id': 'human_0', 'text': '10'}]
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  result = score_predictions('chartqa', path, data=SAMPLES / 'chartqa')
  assert result.n_missing == 1 and result.values['em_relaxed'] == pytest.approx(200 / 3)
  assert '1 of 3 samples have no prediction; they count as wrong' in result.notes
  path.write_text('{"sample_id": "martian_1", "text": "yes"}\n')
  with pytest.raises(UserError, match='1 predictions are of samples that chartqa test does not'):
    score_predictions('chartqa', path, data=SAMPLES / 'chartqa')


def test_report_shows_pictures_boxes_and_overlays(tmp_path):
  seen = []

  def overlay(picture, question):
    seen.append(question)
    return picture.convert('L')

  run(tmp_path / 'r', lambda pairs: ['<b>ABC</b>'] + ['DEF'] * (len(pairs) - 1), name='needle',
      overlay=overlay)
  page = (tmp_path / 'r/report.html').read_text()
  assert page.count('data:image/jpeg;base64') == 6 and len(seen) == 3
  assert '&lt;b&gt;ABC&lt;/b&gt;' in page and '<b>ABC' not in page
  assert 'needle_accuracy = 33.33' in page and page.count('class="example wrong"') == 2


def test_own_prompt_file(tmp_path):
  template = tmp_path / 'p.txt'
  template.write_text('Q: {question}')
  run(tmp_path / 'r', prompt_file=template, limit=1)
  assert json.loads((tmp_path / 'r/run.json').read_text())['prompt_template']['text'] == \
    'Q: {question}'
  template.write_text('{nonsense} {question}')
  with pytest.raises(UserError, match=r'unknown placeholders \{nonsense\}'):
    run(tmp_path / 'q', prompt_file=template)
  template.write_text('{ocr}')
  with pytest.raises(UserError, match="has no 'ocr'"):
    run(tmp_path / 'q', prompt_file=template)




def test_a_bad_image_is_counted_wrong_or_stops_before_the_first_question(tmp_path):
  """Never in the middle of a run."""
  data = Path(shutil.copytree(SAMPLES / 'mme', tmp_path / 'mme'))
  bad = sorted(data.rglob('*.jpg')) or sorted(data.rglob('*.png'))
  bad[0].write_bytes(bad[0].read_bytes()[:60])
  sizes = []
  model = Model(setup=SETUP, answer=lambda pairs: sizes.append(len(pairs)) or by_length(pairs))

  def ask(out, **options):
    return evaluate('mme', model, data=data, out=out,
                    options=Options(batch_size=4, progress=False, **options))

  whole = run(tmp_path / 'whole')
  result = ask(tmp_path / 'wrong')
  lines = list(map(json.loads, (tmp_path / 'wrong/predictions.jsonl').read_text().splitlines()))
  listed = [line for line in lines if 'bad_image' in line]
  assert result.n == whole.n and result.n_bad_images == len(listed) >= 1 and set(sizes) == {4}
  assert all(bad[0].name in line['bad_image'] and line['text'] == '' and line['score'] == 0
             for line in listed)
  assert any(f'{len(listed)} samples were not asked' in note for note in result.notes)
  before = list(map(json.loads, (tmp_path / 'whole/predictions.jsonl').read_text().splitlines()))
  assert [line['text'] for line in lines if 'bad_image' not in line] == [
    line['text'] for line, other in zip(before, lines) if 'bad_image' not in other]
  sizes.clear()
  with pytest.raises(UserError, match=bad[0].name):
    ask(tmp_path / 'stop', bad_images='stop')
  assert not sizes and not (tmp_path / 'stop/run.json').exists()
