"""Text token by token: the pieces make the whole, whatever the tokenizer; stop strings cut it."""

import pathlib
import random

import pytest

from hrvlm_jax.language.prompt import tokenizer_of
from hrvlm_jax.language.tokenizer import load_tokenizer
from hrvlm_jax.serving.spelling import Spelling

GOLDENS = pathlib.Path(__file__).parents[1] / 'goldens'
TEXTS = ('Yes.', '  two  spaces \n\n and an end \n', 'é漢字 \U0001f600 done', '', '\n', 'a' * 40,
         'The sign says "stop".\nThe car is red. ')


def spell(spelling, ids):
  pieces = []
  for token in ids:
    pieces.append(spelling.add(token))
    if spelling.stopped:
      break
  pieces.append(spelling.finish())
  assert ''.join(pieces) == spelling.text
  return pieces


@pytest.mark.parametrize('name', ['byte', 'llava_hr/data', 'vila_hd/text'])
def test_pieces_make_the_text_of_all_tokens(name):
  tokenizer = tokenizer_of('byte') if name == 'byte' else load_tokenizer(GOLDENS / name)
  for text in TEXTS:
    ids = tokenizer.encode(text, bos=False)
    pieces = spell(Spelling(tokenizer), ids)
    assert ''.join(pieces) == tokenizer.decode(ids).strip() == text.strip()
    assert not any('\ufffd' in piece for piece in pieces)
  rng = random.Random(0)
  for _ in range(300):  # tokens that are no text at all
    ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(24))]
    hidden = tuple(ids[:1])
    whole = tokenizer.decode([i for i in ids if i not in hidden]).strip()
    assert ''.join(spell(Spelling(tokenizer, hidden), ids)) == whole


def test_text_ends_before_the_first_stop_string_and_shows_no_part_of_it():
  tokenizer = tokenizer_of('byte')
  rng = random.Random(1)
  for _ in range(500):
    text = ''.join(rng.choice('ab \n') for _ in range(rng.randrange(20)))
    stops = [''.join(rng.choice('ab \n') for _ in range(rng.randrange(1, 4)))
             for _ in range(rng.randrange(1, 3))]
    spelling = Spelling(tokenizer, stops=stops)
    # Token by token the string that is complete first ends the text.
    seen = next((text[:n] for n in range(len(text) + 1) if any(s in text[:n] for s in stops)), None)
    cut = text if seen is None else seen[:min(seen.find(s) for s in stops if s in seen)]
    assert ''.join(spell(spelling, tokenizer.encode(text))) == cut.strip(), (text, stops)
    assert spelling.stopped == (seen is not None)
