import json
import pathlib

import numpy as np
import pytest

from hrvlm_jax.language.captions import CLEANERS, CaptionTokenizer
from hrvlm_jax.language.tokenizer import ByteTokenizer

GOLDENS = pathlib.Path(__file__).parents[1] / 'goldens'


@pytest.mark.parametrize('mode', sorted(CLEANERS))
def test_cleaning(mode):
  config = json.loads((GOLDENS / 'ps3' / 'f_text_tower' / 'config.json').read_text())
  cleaned = [CLEANERS[mode](text) for text in config['clean_inputs']]
  assert cleaned == config['clean_outputs'][mode]


def test_rows():
  rows = CaptionTokenizer(ByteTokenizer({}), context_length=5, end=1, pad=0)(['A-b', 'abcdefg', ''])
  np.testing.assert_array_equal(rows, [[97, 98, 1, 0, 0], [97, 98, 99, 100, 1], [1, 0, 0, 0, 0]])
  assert rows.dtype == np.int32
  with pytest.raises(ValueError, match='clean'):
    CaptionTokenizer(ByteTokenizer({}), clean='upper')
