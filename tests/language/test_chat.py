import pytest

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.language.chat import (
  ASSISTANT,
  TEMPLATES,
  USER,
  Dialogue,
  Message,
  get_template,
  question,
  render,
  rendered_text,
)
from tests.language.released import parse

TALK = [Message(USER, '<image>\nWhere?'), Message(ASSISTANT, 'Here.'), Message(USER, 'Why?'),
        Message(ASSISTANT, ' So ')]


def text(name, messages, **options):
  return rendered_text(render(get_template(name), messages, **options))


def test_texts():
  assert text('mc_llava', TALK[:1], generation=True) == (
    '<|im_start|>user\n<image>\nWhere?<|im_end|>\n<|im_start|>assistant\n')
  assert text('mc_llava_train', TALK[:2]) == (
    '<|im_start|>user\n<image>\nWhere?<|im_end|><|im_start|>assistant\nHere.<|im_end|>')
  assert text('mc_llava', TALK[:3], generation=True, system='S.') == (
    '<|im_start|>system\nS.<|im_end|>\n<|im_start|>user\n<image>\nWhere?<|im_end|>\n'
    '<|im_start|>assistant\nHere.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n'
    '<|im_start|>assistant\n')
  assert text('vicuna_v1', TALK, system='S.') == (
    'S. USER: <image>\nWhere? ASSISTANT: Here.</s>USER: Why? ASSISTANT:  So </s>')
  assert text('vicuna_v1', TALK[:3], generation=True).endswith('</s>USER: Why? ASSISTANT:')
  assert text('plain', TALK[:2]) == '<image>Here.\n'
  assert text('vila_qwen2', TALK, system='') == (
    '<|im_start|>system\n<|im_end|>\n<|im_start|>user\n<image>\nWhere?<|im_end|>\n'
    '<|im_start|>assistant\nHere.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n'
    '<|im_start|>assistant\nSo<|im_end|>\n')
  assert text('pheye', [Message(USER, 'Read.')], generation=True).endswith(
    'as you can.\n\nInstruction: Read.\nOutput:')


@pytest.mark.parametrize('name', TEMPLATES)
def test_trained_segments_are_the_answers(name):
  template = get_template(name)
  talk = TALK[:2] if template.first_turn_only else TALK
  trained = [segment for segment in render(template, talk) if segment.trained]
  assert [segment.message for segment in trained] == list(range(1, len(talk), 2))
  for segment in trained:
    assert talk[segment.message].text.strip() in segment.text


@pytest.mark.parametrize('name', TEMPLATES)
def test_a_prompt_is_the_beginning_of_the_training_text(name):
  template = get_template(name)
  whole, prompt = text(name, TALK[:2]), text(name, TALK[:1], generation=True)
  assert whole.startswith(prompt)
  assert not any(segment.trained for segment in render(template, TALK[:1], generation=True))


@pytest.mark.parametrize('name', sorted(
  name for name, template in TEMPLATES.items() if not template.drop_question))
def test_parse_is_the_inverse(name):
  template = get_template(name)
  talk = TALK[:2] if template.first_turn_only else TALK
  for generation, messages in ((False, talk), (True, talk[:-1])):
    rendered = text(name, messages, generation=generation)
    system, found = parse(template, rendered)
    assert text(name, found, system=system, generation=generation) == rendered
    assert [m.text.strip() for m in found] == [m.text.strip() for m in messages]
  with pytest.raises(UserError, match='not of the template'):
    parse(template, 'nothing of the kind')


def test_turns_with_images_of_their_own():
  template = get_template('vicuna_v1')
  spoken = Dialogue((TALK[0], TALK[1], Message(USER, 'And <image> these?')), (1, 0, 2))
  assert [m.text for m in spoken.written(template)] == [
    '<image>\nWhere?', 'Here.', '<image>\n<image>\nAnd  these?']
  assert spoken.plain is None and Dialogue(TALK[:1], (1,)).plain == TALK[0].text
  with pytest.raises(UserError, match='the last message is an answer'):
    Dialogue(tuple(TALK[:2]), (1, 0))
  with pytest.raises(UserError, match='0 for an answer'):
    Dialogue(tuple(TALK[:3]), (1, 1, 0))
  with pytest.raises(UserError, match='the template plain has no system text'):
    render(get_template('plain'), TALK[:1], system='S.', generation=True)


def test_question():
  template = get_template('mc_llava')
  assert question(template, ' What? <image>', 2).text == '<image>\n<image>\nWhat?'
  assert question(get_template('pheye'), 'What?', 1).text == 'What?'
  assert question(get_template('plain'), '', 1).text == '<image>'
  with pytest.raises(UserError, match='question is empty'):
    question(template, ' <image>\n')


@pytest.mark.parametrize('messages, generation, words', [
  ([], False, 'empty'),
  (TALK[1:], False, 'message 0 comes from'),
  ([TALK[0], TALK[2]], False, 'message 1 comes from'),
  (TALK[:1], False, 'without an answer'),
  (TALK[:2], True, 'expected a question'),
])
def test_wrong_order(messages, generation, words):
  with pytest.raises(UserError, match=words):
    render(get_template('mc_llava'), messages, generation=generation)


def test_unknown_and_too_long():
  with pytest.raises(UserError, match='nearest known: vicuna_v1'):
    get_template('vicuna')
  with pytest.raises(UserError, match='one question and one answer'):
    render(get_template('plain'), TALK)
