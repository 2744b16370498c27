import dataclasses

import numpy as np
import pytest

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.language.chat import ASSISTANT, USER, Message, get_template
from hrvlm_jax.language.conversation import with_system
from hrvlm_jax.language.prompt import Text, choose_bucket, expand, pad_batch, tokenizer_of
from tests.language.released import merge_rows


def test_expand():
  out = expand([5, -200, 6, -200], [-100, -100, 6, -100], -200, [2, 1], after=[9])
  assert out['tokens'].tolist() == [5, 0, 0, 9, 6, 0, 9]
  assert out['visual_index'].tolist() == [-1, 0, 1, -1, -1, 2, -1]
  assert out['labels'].tolist() == [-100, -100, -100, -100, 6, -100, -100]
  assert all(value.dtype == np.int32 for value in out.values())
  text = expand([5, 6], None, -200, [])
  assert text['labels'].tolist() == [-100, -100]
  with pytest.raises(UserError, match='1 image placeholders, but 2 images'):
    expand([-200], None, -200, [1, 1])
  with pytest.raises(ValueError, match='labels'):
    expand([1, 2], [1], -200, [])


def test_pad_batch():
  rows = [expand([5, -200, 6], [-100, -100, 6], -200, [2]), expand([7], [7], -200, [])]
  right = pad_batch(rows, 5)
  assert right['tokens'].tolist() == [[5, 0, 0, 6, 0], [7, 0, 0, 0, 0]]
  assert right['visual_index'].tolist() == [[-1, 0, 1, -1, -1], [-1] * 5]
  assert right['valid'].tolist() == [[True] * 4 + [False], [True] + [False] * 4]
  assert right['labels'].tolist() == [[-100, -100, -100, 6, -100], [7] + [-100] * 4]
  left = pad_batch(rows, 5, 'left')
  for key, value in left.items():
    np.testing.assert_array_equal(value[0], np.roll(right[key][0], 1))
    np.testing.assert_array_equal(value[1], np.roll(right[key][1], 4))
  with pytest.raises(UserError, match='limited to 3, found row 0: 4'):
    pad_batch(rows, 3)
  assert pad_batch(rows, 3, truncate=True)['tokens'].tolist() == [[5, 0, 0], [7, 0, 0]]
  with pytest.raises(ValueError, match='side'):
    pad_batch(rows, 5, 'middle')


def test_choose_bucket():
  assert choose_bucket(5, [8, 4]) == 8
  assert choose_bucket(4, [8, 4]) == 4
  with pytest.raises(UserError, match='longer than the largest bucket 8'):
    choose_bucket(9, [4, 8])


@pytest.mark.parametrize('side', ['left', 'right'])
def test_merge_rows_agrees_with_expand(side):
  """Valid slots of rows with unequal images hold the same in both ways, whatever the padding."""
  rows = [[5, 9, 6, 9], [7, 9], [8, 8, 8]]
  width, ids, mask = 5, [], []
  for row in rows:
    pad = [0] * (width - len(row))
    ids.append(row + pad if side == 'right' else pad + row)
    mask.append([1] * len(row) + pad if side == 'right' else pad + [1] * len(row))
  ids, mask = np.array(ids), np.array(mask, bool)
  for pad_id in (-1, 0):
    merged = merge_rows(ids, mask, np.where(mask, ids, -100), 9, tokens_per_image=3, images=3,
                        pad_id=pad_id)
    assert merged['tokens'].shape == (3, 5 + 2 * 2)
    seen = 0
    for r, row in enumerate(rows):
      images = row.count(9)
      mine = expand(row, row, 9, [3] * images)
      valid = merged['valid'][r]
      assert merged['tokens'][r][valid].tolist() == mine['tokens'].tolist()
      assert merged['labels'][r][valid].tolist() == mine['labels'].tolist()
      visual = mine['visual_index']
      assert merged['visual_index'][r][valid].tolist() == np.where(
        visual >= 0, visual + 3 * seen, -1).tolist()
      assert merged['positions'][r][valid].tolist() == list(range(valid.sum()))
      seen += images
  with pytest.raises(UserError, match='3 image placeholders, but 2 images'):
    merge_rows(ids, mask, ids, 9, tokens_per_image=3, images=2)


def test_half_a_character_of_a_question_is_refused():
  """A lone surrogate, as an argument of a command line that was cut inside an emoji."""
  text = Text(tokenizer=tokenizer_of('byte'), chat='vicuna_v1', image_token=None)
  assert len(text.prompt('What? \U0001f600', [])['tokens'])
  with pytest.raises(UserError, match='half a character'):
    text.prompt('What? \ud83d', [])


def test_the_system_text_of_a_row():
  """In place of the template's, or before the question; asked under as it was learned."""
  talk = [Message(USER, 'What?'), Message(ASSISTANT, 'This.')]
  text = lambda chat: Text(tokenizer=tokenizer_of('byte'), chat=chat, image_token=None)
  told = {
    'vicuna_v1': 'Short. USER: What? ASSISTANT: This.</s>',
    'pheye': 'Short.\n\nInstruction: What?\nOutput: This.<|endoftext|>',
    'vila_qwen2': '<|im_start|>system\nShort.<|im_end|>\n<|im_start|>user\nWhat?<|im_end|>\n'
                  '<|im_start|>assistant\nThis.<|im_end|>\n',
    'mc_llava': '<|im_start|>system\nShort.<|im_end|><|im_start|>user\nWhat?<|im_end|>'
                '<|im_start|>assistant\nThis.<|im_end|>',
  }
  for chat, whole in told.items():
    model = text(chat)
    encoded = model.encode(talk, 0, system='Short.')
    assert encoded.text == whole, chat
    answer = [chr(i) for i in encoded.labels if 0 <= i < 256]
    assert 'This.' in ''.join(answer) and 'Short' not in ''.join(answer)
    asked = model.asked('What?', 0, 'Short.')
    prompt = model.prompt(asked, [])['tokens'].tolist()
    read = ''.join(chr(i) for i in prompt if i < 256)
    assert 'Short.' in read and read.count('What?') == 1
    assert model.asked('What?', 1, None) == 'What?' and model.encode(talk, 0).text != whole
  bare = dataclasses.replace(get_template('pheye'), system_format='')
  assert with_system(talk, bare, 'Short.') == ([Message(USER, 'Short.\nWhat?'), talk[1]], None)
