"""A benchmark of one's own data set."""

import json

from hrvlm_jax.evaluation.benchmarks import own


def test_the_system_text_of_a_row_stands_before_its_question(tmp_path):
  rows = [{'system': 'Be short.', 'question': 'What?', 'answer': 'This.'},
          {'system': 'Choose.', 'question': 'Which?', 'answer': 'A', 'choices': ['x', 'y']},
          {'question': 'What?', 'answer': 'This.'}]
  (tmp_path / 'own.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  first, second, third = own.read(tmp_path / 'own.jsonl', None, choices=False)
  assert first.prompt == 'Be short.\nWhat?' and third.prompt is None
  assert second.prompt.startswith('Choose.\nWhich?\nA. x\nB. y\n')
