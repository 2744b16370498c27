"""Every benchmark end to end on its made-up sample: files, prompts, answers, score, submission.

`samples/cases.json` holds the answers given and the values they must score, worked out by hand.
"""

import json
from pathlib import Path
import shutil

import pytest

from hrvlm_jax.cli.main import main
from hrvlm_jax.evaluation import benchmarks
from hrvlm_jax.evaluation.runner import Model, Options, Setup, evaluate

SAMPLES = Path(__file__).parent / 'samples'
CASES = json.loads((SAMPLES / 'cases.json').read_text('utf-8'))


def _answers(case, loaded):
  if 'answer_with' in case:  # options are shuffled: answer with the right or with another letter
    wanted, folder = case['answer_with'], SAMPLES / case['folder']
    right = {}  # V*Bench: the first option of the file, wherever it is shown
    for s in loaded:
      first = json.loads((folder / f'{s.id}.json').read_text('utf-8'))['options'][0]
      right[s.id] = 'ABCD'[s.choices.index(first)]
    return {key: letter if wanted[key] == 'right' else 'AB'[letter == 'A']
            for key, letter in right.items()}
  return case.get('answers')


@pytest.mark.parametrize('case', CASES, ids=lambda c: f'{c["benchmark"]}-{c["split"]}')
def test_sample(case, tmp_path):
  benchmark = benchmarks.get(case['benchmark'])
  folder = SAMPLES / case['folder']
  loaded = benchmark.load(folder, case['split'])
  answers = _answers(case, loaded)
  rendered = {}
  order = iter([s.id for s in loaded])

  def answer_fn(pairs):
    result = []
    for picture, question in pairs:
      number = next(order, None)
      rendered[number] = question
      sample = next(s for s in loaded if s.id == number)
      assert (picture is None) == (not sample.images)
      result.append(answers[number])
    return result

  def likelihood_fn(triples):
    return [case['losses'][option] for _, _, option in triples]

  model = Model(setup=Setup(model='made up'),
                answer=None if benchmark.likelihood else answer_fn,
                likelihood=likelihood_fn if benchmark.likelihood else None)
  result = evaluate(benchmark, model, data=folder, out=tmp_path / 'out',
                    options=Options(split=case['split'], batch_size=1, progress=False))

  for name, value in case['values'].items():
    assert result.values[name] == pytest.approx(value, abs=1e-9), name
  if 'by_category' in case:
    assert result.by_category == pytest.approx(case['by_category'])
  assert result.n_unparsed == case.get('n_unparsed', result.n_unparsed)
  assert (result.value is None) == (not case['values'])
  for number, prompt in case.get('prompt', {}).items():
    assert rendered[number] == prompt
  if 'submission' in case:
    text = (tmp_path / 'out' / benchmark.submission.filename).read_text('utf-8')
    assert (text if isinstance(case['submission'], str) else json.loads(text)) == case['submission']
  if result.value is not None:
    low, high = result.ci95
    assert low <= result.value + 1e-9 and result.value - 1e-9 <= high
  for name in ('run.json', 'result.json', 'report.html', 'predictions.jsonl'):
    assert (tmp_path / 'out' / name).is_file()


@pytest.mark.parametrize('case', CASES, ids=lambda c: f'{c["benchmark"]}-{c["split"]}')
def test_sample_through_the_verb(case, tmp_path, capsys):
  benchmark = benchmarks.get(case['benchmark'])
  loaded = benchmark.load(SAMPLES / case['folder'], case['split'])
  answers = _answers(case, loaded)
  if answers is None:  # a likelihood benchmark: the option that is least surprising
    answers = {s.id: min(s.choices, key=case['losses'].get) for s in loaded}
  lines = [json.dumps({'sample_id': number, 'text': text}) for number, text in answers.items()]
  (tmp_path / 'answers.jsonl').write_text('\n'.join(lines) + '\n', 'utf-8')
  argv = ['eval', '--benchmark', case['benchmark'], '--data', str(SAMPLES / case['folder']),
          '--out', str(tmp_path / 'out')]
  argv += ['--split', case['split']] if case['split'] else []
  assert main([*argv, '--predictions', str(tmp_path / 'answers.jsonl')]) == 0
  result = json.loads((tmp_path / 'out/result.json').read_text('utf-8'))
  assert {name: result['values'].get(name) for name in case['values']} == \
    pytest.approx(case['values'])
  assert result['n_missing'] == 0
  if 'submission' in case:
    text = (tmp_path / 'out' / benchmark.submission.filename).read_text('utf-8')
    assert (text if isinstance(case['submission'], str) else json.loads(text)) == case['submission']
  assert capsys.readouterr().out.startswith(f'{case["benchmark"]} ({result["split"]}), ')


def test_scoring_refuses_what_it_cannot_use(tmp_path, capsys):
  argv = ['eval', '--benchmark', 'chartqa', '--data', str(SAMPLES / 'chartqa'), '--out',
          str(tmp_path / 'out')]
  assert main(argv) == 2
  assert 'expected either --checkpoint (a model answers) or --predictions' in \
    capsys.readouterr().err
  path = tmp_path / 'p.jsonl'
  path.write_text('{"sample_id": "human_1", "text": "yes"}\n')
  assert main([*argv, '--predictions', str(path), '--limit', '1']) == 2
  assert '--limit: decides how a model answers' in capsys.readouterr().err
  assert not (tmp_path / 'out').exists()
  assert main([*argv, '--predictions', str(path)]) == 0
  assert '2 of 3 samples have no prediction; they count as wrong' in capsys.readouterr().out
  assert main([*argv, '--predictions', str(path)]) == 2
  assert 'is not empty; choose another result folder' in capsys.readouterr().err


def test_generated_needle_task(tmp_path):
  from hrvlm_jax.lab.needle import NeedleConfig, write
  write(NeedleConfig.tiny(turns=2), tmp_path / 'task', 3, seed=5, progress=False)
  samples = benchmarks.get('needle').load(tmp_path / 'task')
  assert len(samples) == 6 and len({s.meta['relative_area'] for s in samples}) > 1
  answers = {s.question + str(s.images[0].path): s.answers[0].lower() for s in samples}
  order = iter(samples)
  read = lambda pairs: [answers[q + str(next(order).images[0].path)] for _, q in pairs]
  result = evaluate('needle', Model(setup=Setup(model='reader'), answer=read),
                    data=tmp_path / 'task', out=tmp_path / 'out',
                    options=Options(batch_size=1, progress=False))
  assert result.value == 100 and set(result.by_category) == {'fine text', 'medium text',
                                                             'broad text'}


def test_every_benchmark_has_a_sample():
  assert {case['benchmark'] for case in CASES} == set(benchmarks.known())


def test_headline_is_among_the_checked_values():
  for case in CASES:
    if case['values']:
      loaded = benchmarks.get(case['benchmark']).load(SAMPLES / case['folder'], case['split'])
      scores = benchmarks.get(case['benchmark']).score(loaded, [''] * len(loaded))
      assert scores.metric in case['values']


def test_vstar_letters_follow_the_shuffle(tmp_path):
  """The first option of the file is right, under whatever letter it is shown."""
  for part in ('direct_attributes', 'relative_position'):
    (tmp_path / part).mkdir()
    for number in range(8):
      shutil.copy(next((SAMPLES / 'vstar').rglob('*.jpg')), tmp_path / part / f'{number}.jpg')
      (tmp_path / part / f'{number}.json').write_text(json.dumps({
        'question': 'Which?', 'options': ['right', 'b', 'c', 'd'], 'bbox': [],
        'target_object': []}))
  loaded = benchmarks.get('vstar').load(tmp_path, 'all')
  letters = [sample.answers[0] for sample in loaded]
  assert letters == ['ABCD'[sample.choices.index('right')] for sample in loaded]
  assert len(letters) == 16 and len(set(letters)) == 4
