"""COCO captions as published: PTB tokens, CIDEr, BLEU-4 and METEOR of the Java programs.

Part `captions` of the second level, which installs the extra `caption`; Java must be there.
"""

import json
import pathlib
import subprocess
import sys

import pytest

from hrvlm_jax.evaluation.metrics import bleu

SAMPLES = pathlib.Path(__file__).parent / 'samples' / 'coco'
pytestmark = pytest.mark.full('captions')


def test_meteor_orders_captions_as_a_reader_does():
  wanted = [['a cat sits on a mat', 'a cat on the mat']]
  score = lambda text: bleu.meteor([text], wanted)
  same, near, stemmed, other = map(score, (
    'a cat sits on a mat', 'a cat sits on a red mat', 'cats sitting on mats', 'two red trains'))
  assert same == pytest.approx(1.0)
  assert same > near > stemmed > other
  assert stemmed > 0.15  # stems count, unlike in BLEU
  assert other < 0.05


def test_coco_from_the_command_line(tmp_path):
  """The values are those that the programs gave for these captions, once (pycocoevalcap 1.2)."""
  answers = tmp_path / 'answers.jsonl'
  answers.write_text(''.join(json.dumps({'sample_id': i, 'text': text}) + '\n' for i, text in (
    ('1', 'a cat sits on a red mat'), ('2', 'two dogs run over the green field'))))
  done = subprocess.run(
    [sys.executable, '-m', 'hrvlm_jax.cli', 'eval', '--benchmark', 'coco_ptb', '--data', SAMPLES,
     '--predictions', answers, '--out', tmp_path / 'out'], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  (result,) = [path for path in (tmp_path / 'out').glob('*.json')
               if 'values' in json.loads(path.read_text())]
  values = json.loads(result.read_text())['values']
  assert values['cider_ptb'] == pytest.approx(234.944, abs=1e-3)
  assert values['bleu4_ptb'] == pytest.approx(33.437, abs=1e-3)
  assert values['meteor'] == pytest.approx(31.349, abs=1e-3)
