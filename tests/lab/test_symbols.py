"""Pre-training of the language model on symbols: what a batch holds, that the loss falls."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from hrvlm_jax.lab import symbols
from hrvlm_jax.lab.needle import NeedleConfig
from hrvlm_jax.lab.pretrain import pretrain
from hrvlm_jax.language import config as language
from hrvlm_jax.language.prompt import Text, tokenizer_of

TEXT = language.phi(vocab_size=264, width=16, depth=1, heads=2, mlp_width=16, max_positions=512)
WRITING = tuple(Text(tokenizer=tokenizer_of('byte'), chat=chat, image_token='<image>')
                for chat in ('mc_llava', 'vila_qwen2'))
CONFIG = symbols.SymbolsConfig(needle=NeedleConfig.tiny(turns=2), text=TEXT, steps=20, slots=(9,),
                               spread=2, batch_size=4, lengths=(256,), warmup=2,
                               learning_rate=1e-2, writing=WRITING)


def test_every_question_can_be_answered_from_the_symbols():
  batch = CONFIG.draw(0)
  assert batch['colours'].shape == (4, 9) and batch['visual_index'].max() == 8
  np.testing.assert_array_equal(batch['colours'] >= 0, batch['letters'] >= 0)
  tokenizer = WRITING[0].tokenizer
  for row in range(4):
    shown = {(CONFIG.needle.colours[c], CONFIG.needle.alphabet[letter])
             for c, letter in zip(batch['colours'][row], batch['letters'][row]) if c >= 0}
    assert 3 <= len(shown) <= 4  # every sign, in one place or two
    text = tokenizer.decode(batch['tokens'][row][batch['valid'][row]].tolist())
    answers = tokenizer.decode(batch['labels'][row][batch['labels'][row] >= 0].tolist())
    asked = [colour for colour in CONFIG.needle.colours if f'the {colour} sign' in text]
    assert len(asked) == 2
    letters = {letter for colour, letter in shown if colour in asked}
    assert letters <= set(answers)


def test_only_whole_answers_to_questions_are_counted():
  """A description has most of the words, and every answer an end of its turn."""
  labels = np.array([[-100, 5, 1, -100, -100, 6, 1, -100, 7, 8, 9, 1],
                     [-100, -100, 5, 1, -100, 6, 1, -100, 7, 1, -100, -100]])
  answer = symbols.answers(labels, turns=2)
  assert answer.tolist() == [[-1, 0, 0, -1, -1, 1, 1, -1, -1, -1, -1, -1],
                             [-1, -1, 0, 0, -1, 1, 1, -1, -1, -1, -1, -1]]

  class Reader:
    """Says 5 for 6 in row 0, and a wrong end behind the last answer of row 1."""

    def __call__(self, batch, key):
      said = jnp.asarray(labels).at[0, 5].set(5).at[1, 9].set(4)
      return jax.nn.one_hot(jnp.roll(said, -1, axis=1), 10)

    def logits(self, hidden):
      return hidden

  head = dataclasses.replace(CONFIG, needle=NeedleConfig.tiny(turns=2))
  _, read = head.loss(Reader(), {'labels': jnp.asarray(labels), 'answer': jnp.asarray(answer)},
                      None)
  assert float(read) == 3 / 4
  asked = CONFIG.draw(0)
  assert {tuple(sorted(set(row))) for row in asked['answer'].tolist()} == {(-1, 0, 1)}
  assert ((asked['answer'] >= 0) <= (asked['labels'] >= 0)).all()


def test_where_the_first_question_steers_rows_have_one_question():
  counts = [int((CONFIG.draw(step)['labels'] >= 0).sum()) for step in (0, 1)]
  assert counts[0] == 2 * counts[1]


def test_the_loss_falls_and_the_decoder_comes_back():
  losses = []
  language, accuracy = pretrain(dataclasses.replace(CONFIG, writing=WRITING[:1]),
                                report=lambda _, loss, __: losses.append(loss))
  assert {path.split('/')[0] for path in language} >= {'blocks', 'norm'} and 0 <= accuracy <= 1
  assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])
