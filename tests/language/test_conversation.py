"""Masks by construction against the originals' own ways, written here from their description."""

import pathlib

import numpy as np
import pytest

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.language.chat import (
  ASSISTANT,
  IMAGE,
  USER,
  Message,
  encode_prompt,
  get_template,
  prompt_end,
)
from hrvlm_jax.language.conversation import (
  SENTINEL,
  encode_conversation,
  encode_llava,
  encode_vila,
  messages_from_llava,
  prepare,
)
from hrvlm_jax.language.tokenizer import ByteTokenizer, load_tokenizer

GOLDENS = pathlib.Path(__file__).parents[1] / 'goldens'
PIECE = load_tokenizer(GOLDENS / 'llava_hr' / 'data')
QWEN = load_tokenizer(GOLDENS / 'vila_hd' / 'text')
WORDS = ('the', 'sign', 'Red', ' two', 'é', '\n', '?', '  ', 'ASSISTANT:', ' ASSISTANT: ', '</s>',
         '<unk>', 'USER:', '12')
PLAIN_WORDS = ('the', 'sign', 'Red', ' two', 'é', '\n', '?', '  ', '12', '\n\n', '.')


def talk(rng, words, turns, image):
  def text():
    return ''.join(rng.choice(words, rng.integers(1, 6)))
  messages = [Message((USER, ASSISTANT)[i % 2], text()) for i in range(2 * turns)]
  if image:
    messages[0] = Message(USER, f'{IMAGE}\n{messages[0].text}')
  return messages


def llava_ids(text, image):
  if not image:
    return PIECE.encode(text)
  parts = [PIECE.encode(part) for part in text.split(IMAGE)]
  ids = parts[0]
  for part in parts[1:]:
    ids = [*ids, SENTINEL, *part[1:]]
  return ids


def llava_reference(text, image, max_length):
  """LLaVA's walk over the rounds, tokenising each one again."""
  ids = llava_ids(text, image)
  if not image:
    ids = ids[:max_length]
  labels, cur = list(ids), 1
  labels[0] = -100
  for part in text.split('</s>'):
    pieces = part.split(' ASSISTANT: ')
    if not part or len(pieces) != 2:
      break
    masked = len(llava_ids(pieces[0] + ' ASSISTANT: ', image)) - 2
    for i in range(cur, min(cur + masked, len(labels))):
      labels[i] = -100
    cur += len(llava_ids(part, image))
  labels[cur:] = [-100] * len(labels[cur:])
  if cur < max_length and cur != sum(i != 0 for i in ids):
    labels = [-100] * len(labels)
  return ids[:max_length], labels[:max_length]


@pytest.mark.parametrize('seed', range(60))
def test_llava_masks_equal_the_walk(seed):
  rng = np.random.default_rng(seed)
  image, words = bool(rng.integers(2)), WORDS if seed % 3 == 0 else WORDS[:8]
  messages = talk(rng, words, int(rng.integers(1, 4)), image)
  for max_length in (4096, 80, 60):
    mine = encode_llava(messages, get_template('vicuna_v1'), PIECE, max_length=max_length,
                        image_id=SENTINEL if image else None)
    ids, labels = llava_reference(mine.text, image, max_length)
    assert mine.ids == ids
    assert mine.labels == labels


def test_llava_voids_ambiguous_samples():
  template = get_template('vicuna_v1')
  fine = [Message(USER, 'Is it?'), Message(ASSISTANT, 'Yes')]
  for odd in ('a ASSISTANT: b', 'a</s>b', 'a<unk>b'):
    messages = [*fine, Message(USER, odd), Message(ASSISTANT, 'No')]
    assert set(encode_llava(messages, template, PIECE).labels) == {-100}
    assert set(encode_conversation(messages, template, PIECE, image_id=None).labels) != {-100}
    short = encode_llava(messages, template, PIECE, max_length=20)
    assert len(short.ids) == len(short.labels) == 20


def vila_reference(messages, text):
  ids = QWEN.encode(text)
  for message in messages:
    if message.role == ASSISTANT:
      text = text.replace(f'assistant\n{message.text.strip()}<|im_end|>',
                          'assistant\n<vila/sentinel><|im_end|>', 1)
  template, sentinel = QWEN.encode(text), QWEN.special('<vila/sentinel>')
  keep = [i for i in range(len(template))
          if template[i] != sentinel and (i == 0 or template[i - 1] != sentinel)]
  template, labels, at = [template[i] for i in keep], [], 0
  for index in ids:
    same = at < len(template) and index == template[at]
    at += same
    labels.append(-100 if same else index)
  assert at == len(template)
  return ids, labels


@pytest.mark.parametrize('seed', range(40))
def test_vila_masks_equal_the_comparison(seed):
  rng = np.random.default_rng(seed)
  messages = talk(rng, PLAIN_WORDS, int(rng.integers(1, 4)), False)
  mine = encode_vila(messages, get_template('vila_qwen2'), QWEN, image_id=None)
  assert (mine.ids, mine.labels) == vila_reference(messages, mine.text)


def test_vila_line_breaks_in_answers():
  template = get_template('vila_qwen2')
  messages = [Message(USER, 'a'), Message(ASSISTANT, 'b\nc'), Message(USER, 'd'),
              Message(ASSISTANT, 'e')]
  clean = encode_vila(messages, template, QWEN, image_id=None, exact=False)
  trained = [i for i in clean.labels if i != -100]
  assert QWEN.decode(trained, skip_special=False) == 'b\nc<|im_end|>e<|im_end|>'
  exact = encode_vila(messages, template, QWEN, image_id=None)
  assert exact.ids == clean.ids
  assert QWEN.decode([i for i in exact.labels if i != -100], skip_special=False) == (
    'bc<|im_end|>\ne<|im_end|>')


def test_mc_llava_counts_the_header():
  tokenizer = ByteTokenizer({'<|im_end|>': 256, '<|im_start|>': 257, IMAGE: 258})
  messages = [Message(USER, f'{IMAGE}\nQ'), Message(ASSISTANT, '\n A'), Message(USER, 'R'),
              Message(ASSISTANT, 'é')]
  mine = encode_conversation(messages, get_template('mc_llava_train'), tokenizer, image_id=258)
  assert tokenizer.decode([i for i in mine.labels if i != -100], skip_special=False) == (
    '\n A<|im_end|>é<|im_end|>')
  assert 258 in mine.ids
  assert mine.cut(5).ids == mine.ids[:5]


def test_pheye_and_plain():
  messages = prepare([Message(USER, f'{IMAGE}\nRead.'), Message(ASSISTANT, 'STOP')],
                     get_template('pheye'), 1)
  tokenizer = ByteTokenizer({'<|endoftext|>': 256})
  mine = encode_conversation(messages, get_template('pheye'), tokenizer, image_id=None)
  assert tokenizer.decode([i for i in mine.labels if i != -100], skip_special=False) == (
    ' STOP<|endoftext|>')
  assert mine.text.endswith('\n\nInstruction: Read.\nOutput: STOP<|endoftext|>')
  plain = encode_llava([Message(USER, f'{IMAGE}\nRead.'), Message(ASSISTANT, 'STOP')],
                       get_template('plain'), PIECE)
  assert plain.ids[:2] == [1, SENTINEL]
  assert plain.labels == [-100, -100, *plain.ids[2:]]


def test_prompt_is_the_beginning_of_the_training_ids():
  messages = [Message(USER, f'{IMAGE}\nRead it.'), Message(ASSISTANT, 'STOP')]
  for template, tokenizer, image_id in (
      ('vicuna_v1', PIECE, SENTINEL), ('vila_qwen2', QWEN, QWEN.special(IMAGE))):
    template = get_template(template)
    whole = encode_conversation(messages, template, tokenizer, image_id=image_id)
    prompt = encode_prompt(messages[:1], template, tokenizer, image_id=image_id)
    assert whole.ids[:len(prompt.ids)] == prompt.ids
    assert set(prompt.labels) == {-100}
    first = next(i for i, label in enumerate(whole.labels) if label != -100)
    assert first == len(prompt.ids)


def test_prompt_end():
  template = get_template('vila_qwen2')
  ids = encode_prompt([Message(USER, 'Read.')], template, QWEN, image_id=None).ids
  assert QWEN.decode([ids[prompt_end(ids, template, QWEN)]]) == '.'
  assert prompt_end(ids[:5], template, QWEN) == 4


def test_prepare():
  vicuna, ask = get_template('vicuna_v1'), Message(USER, f'Describe.\n{IMAGE}')
  told = Message(ASSISTANT, 'x')
  assert prepare([told, ask, told], vicuna, 1)[0].text == f'{IMAGE}\nDescribe.'
  assert prepare([ask, told], vicuna, 0) == [ask, told]
  twice = Message(USER, f'{IMAGE} and {IMAGE}')
  assert prepare([twice, told], vicuna, 1)[0].text == f'{IMAGE}\nand'
  assert prepare([twice, told], vicuna, 2)[0].text == f'{IMAGE}\n{IMAGE}\nand'
  bare = [Message(USER, 'Describe.'), told]
  assert prepare(bare, vicuna, 2)[0].text == f'{IMAGE}\n{IMAGE}\nDescribe.'
  assert prepare(bare, vicuna, 1, insert=False) == bare
  assert prepare([ask, told], get_template('mc_llava'), 1) == [ask, told]


def test_messages_from_llava():
  good = [{'from': 'human', 'value': 'a'}, {'from': 'gpt', 'value': 'b'}]
  assert messages_from_llava(good) == [Message(USER, 'a'), Message(ASSISTANT, 'b')]
  with pytest.raises(UserError) as caught:
    messages_from_llava([{'from': 'bot', 'value': 'a'}, 7, {'from': 'gpt', 'value': None}])
  for words in ("message 0 comes from 'bot'", 'message 1 is int', 'message 2 has a value of None'):
    assert words in str(caught.value)
