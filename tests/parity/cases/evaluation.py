"""Golden checks of the scorers (kind `eval_scorers`)."""

from __future__ import annotations

from hrvlm_jax.evaluation.benchmarks.vqa import prompt_to_question
from hrvlm_jax.evaluation.metrics import choice, match, vqa, yesno
from tests.parity.cases.runner import Case, check

FILE = 'scorers.json'


@check('llava_hr', 'eval_scorers')
def eval_scorers(case: Case) -> None:
  """Answer normalisers, soft accuracies, parsers and summary lines against the original scorers."""
  data = case.json(FILE)
  pairs = {
    'evalai_processor': lambda text: vqa.vqa_normalize(text, variant='m4c'),
    'gqa_post': match.clean_gqa,
    'textvqa_prompt_to_question': prompt_to_question,
  }
  for section, function in pairs.items():
    for i, (text, _) in enumerate(data.get(section, ())):
      case.expect_json((section, i, 1), function(text), file=FILE)
  scores = {
    'textvqa': ('score', vqa.accuracy_m4c),
    'okvqa_vqa_eval': ('score_percent', lambda text, answers: round(
      100 * vqa.accuracy_llava_hr_okvqa(text, answers), 2)),
    'ocrvqa': ('score', match.em_ocrvqa),
  }
  for section, (key, function) in scores.items():
    for i, row in enumerate(data.get(section, ())):
      answers = row['gt'] if isinstance(row['gt'], str) else row['gt'].plain()
      case.expect_json((section, i, key), function(row['pred'], answers), file=FILE, tol=1e-9)
  if 'pope' in data:
    _pope(case, data['pope'])
  if 'scienceqa' in data:
    _scienceqa(case, data['scienceqa'])


def _pope(case: Case, data) -> None:
  items = data['items']
  parsed = [yesno.pope_llava(item['text']) for item in items]
  for i, answer in enumerate(parsed):
    case.expect_json(('pope', 'items', i, 'parsed'), answer, file=FILE)
  counts = yesno.binary(parsed, [item['label'] for item in items])
  path = ('pope', 'summary_f1_acc_prec_rec_yes')
  case.expect_json(path, yesno.pope_summary(counts), file=FILE)


def _scienceqa(case: Case, data) -> None:
  problems, predictions = data['problems'], data['predictions']
  right, with_image = [], []
  for number, problem in problems.items():
    answer = predictions.get(number)
    letter = choice.sqa_llava(answer['text']) if answer else None
    choices = problem['choices'].plain()
    index = choice.sqa_index(letter, len(choices))
    case.expect_json(('scienceqa', 'results', number), index, file=FILE)
    right.append(index == problem['answer'])
    # The original tells questions with an image by the prompt, so unanswered ones do not count.
    if answer and '<image>' in answer['prompt']:
      with_image.append(right[-1])
  accuracy = 100 * sum(right) / len(right)
  case.expect_json(('scienceqa', 'acc'), accuracy, file=FILE, tol=1e-9)
  line = choice.sqa_summary(right, with_image)
  case.expect_json(('scienceqa', 'stdout'), line, file=FILE)
