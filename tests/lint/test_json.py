"""JSON of others is read in one way: `core.json_text` (code that is copied into exports apart)."""

import pathlib
import re

import pytest

from hrvlm_jax.core import json_text

ROOT = pathlib.Path(__file__).parents[2] / 'hrvlm_jax'
ALLOWED = {'core/json_text.py'}


def test_nothing_else_reads_json():
  wrong = [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.rglob('*.py'))
           if 'interop/torch/' not in path.as_posix()
           and re.search(r'\bjson\.load(?:\(|s\((?!json\.dumps))', path.read_text())]
  assert set(wrong) == ALLOWED


@pytest.mark.parametrize('text', ['[' * 100_000, '{"a": ' * 100_000, b'\xff', '{', ''])
def test_whatever_is_wrong_is_a_value_error(text):
  with pytest.raises(ValueError):
    json_text.loads(text)
  assert json_text.loads('{"a": [1.5, null]}') == {'a': [1.5, None]}
