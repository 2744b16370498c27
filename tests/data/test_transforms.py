import dataclasses
import pickle

import numpy as np
from PIL import Image
import pytest

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.data.rows import BadRow, ImageRef, Row, box_of
from hrvlm_jax.data.transforms import TextLimit, ToBatch, ToExample
from hrvlm_jax.language.chat import ASSISTANT, USER, Message
from hrvlm_jax.language.prompt import Text, tokenizer_of


def views(images, size):
  """One view per image, as many visual tokens as it is wide."""
  pixels = [np.asarray(image.resize((size, size))) for image in images]
  return {'pixels': np.stack(pixels) if pixels else np.zeros((0, size, size, 3), np.uint8),
          'tokens': np.array([image.width for image in images], np.int32)}


def batch(examples, size, *, slots=None):
  pixels = np.concatenate([example['pixels'] for example in examples])
  slots = slots or 4
  return {'pixels': np.concatenate([pixels, np.zeros((slots - len(pixels), size, size, 3))])}


@pytest.fixture
def image(tmp_path):
  Image.new('RGB', (3, 2)).save(tmp_path / 'a.png')
  return ImageRef('a.png', folder=str(tmp_path), path='a.png')


def row(*images, text='<image>\nQ'):
  return Row('r', images, (Message(USER, text), Message(ASSISTANT, 'A')), 'row 0')


def example(chat='mc_llava', **options):
  text = Text(tokenizer=tokenizer_of('byte'), chat=chat, image_token='<image>')
  return ToExample(text=text, views=views, encoder=4, **options)


def trained(values, tokenizer):
  return tokenizer.decode(values[values >= 0].tolist(), skip_special=False)


@pytest.mark.parametrize('chat, answer', [
  ('mc_llava', 'A<|im_end|>'), ('vila_qwen2', 'A<|im_end|>'), ('vicuna_v1', ' A</s>'),
])
def test_examples(image, chat, answer):
  transform = pickle.loads(pickle.dumps(example(chat)))
  out = transform(row(image))
  assert out['visual_index'][out['visual_index'] >= 0].tolist() == [0, 1, 2]
  assert trained(out['labels'], tokenizer_of('byte')) == answer
  assert out['views']['pixels'].shape == (1, 4, 4, 3)
  alone = transform(row(text='Q'))
  assert (alone['visual_index'] == -1).all()
  assert len(alone['views']['pixels']) == 0


def test_bad_examples(image):
  with pytest.raises(BadRow, match='no such file') as caught:
    example()(row(ImageRef('b.png', folder=image.folder, path='b.png')))
  assert caught.value.kind == 'missing'
  with pytest.raises(BadRow, match='longest bucket is 20') as caught:
    example(max_length=20)(row(image))
  assert caught.value.kind == 'too long'
  with pytest.raises(UserError, match='2 image placeholders, but 1 images'):
    example()(row(image, text='<image><image>Q'))


@pytest.mark.parametrize('chat, token', [('mc_llava', '<image>'), ('vicuna_v1', None)])
def test_long_texts(image, chat, token):
  """'cut_text' cuts before images take their slots, 'cut_row' after, 'refuse' counts the row."""
  two = Row('r', (image, image), (
    Message(USER, '<image>\nQ'), Message(ASSISTANT, 'A' * 30), Message(USER, '<image>\nQ'),
    Message(ASSISTANT, 'B')), 'row 0')
  text = Text(tokenizer=tokenizer_of('byte'), chat=chat, image_token=token,
              image_sentinel=None if token else -200)
  make = lambda **limit: ToExample(text=text, views=views, encoder=4,
                                   limit=TextLimit(**limit))(two)
  whole = make()
  start = int(np.flatnonzero(whole['visual_index'] == 0)[0])
  assert (whole['visual_index'] >= 0).sum() == 6
  # The first image counts one id of the text and takes three slots of the row.
  cut = make(length=start + 20)
  assert len(cut['tokens']) == start + 22
  assert cut['views']['tokens'].tolist() == [3]
  for key in ('tokens', 'labels', 'visual_index'):
    np.testing.assert_array_equal(cut[key], whole[key][:start + 22])
  row = make(length=start + 40, policy='cut_row')
  np.testing.assert_array_equal(row['visual_index'], whole['visual_index'][:start + 40])
  with pytest.raises(BadRow, match='has no answer to learn within') as caught:
    make(length=start + 2, policy='cut_row')
  assert caught.value.kind == 'no target'
  with pytest.raises(BadRow, match='ids of text, at most 20 are allowed') as caught:
    make(length=20, policy='refuse')
  assert caught.value.kind == 'too long'
  assert len(make(length=10_000, policy='refuse')['tokens']) == len(whole['tokens'])
  with pytest.raises(UserError, match='1 image placeholders, but 2 images'):
    example()(Row('r', (image, image), row_of_one(), 'row 0'))
  with pytest.raises(ValueError, match='policy'):
    TextLimit(policy='hide')


def row_of_one():
  return (Message(USER, '<image>\nQ'), Message(ASSISTANT, 'A'))


def test_batches(image):
  transform = example()
  examples = [transform(row(image)), transform(row(text='Q')), transform(row(image, image,
              text='<image><image>Q')), transform(row(text='QQ'))]
  one = ToBatch(batch=batch, encoder=4, lengths=(64, 128))(examples)
  assert one['tokens'].shape == (4, 64)
  assert one['views']['pixels'].shape == (4, 4, 4, 3)
  two = ToBatch(batch=batch, encoder=4, lengths=(64,), parts=2)(examples)
  assert two['tokens'].shape == (2, 2, 64)
  assert two['views']['pixels'].shape == (2, 4, 4, 4, 3)
  np.testing.assert_array_equal(two['tokens'].reshape(4, 64), one['tokens'])
  with pytest.raises(UserError, match='largest bucket 8'):
    ToBatch(batch=batch, encoder=4, lengths=(8,))(examples)


def test_prompts(image):
  text = example().text
  out = text.prompt('What?', [3])
  assert text.tokenizer.decode(out['tokens'].tolist()).endswith('assistant\n')
  assert text.stop_ids() == (256,)
  with pytest.raises(UserError, match='question is empty'):
    text.prompt('  ', [3])


@pytest.mark.parametrize('box', [
  'abc', [1, 2, 3], [1, [2], 3, 4], [9, 0, 1, 5], [0, float('nan'), 5, 5], [0, 0, 5, 1e30],
  [True, False, 5, 5], {'x': 1}, [None] * 4])
def test_a_box_that_is_none_is_a_bad_row(box):
  row = Row('0', (), (), 'rows.json, row 0', {'box': box})
  with pytest.raises(BadRow, match=r'rows.json, row 0: box .*: expected \[x0, y0, x1, y1\]') as bad:
    box_of(row)
  assert bad.value.kind == 'form'
  assert box_of(dataclasses.replace(row, extra={'box': [1, 2, 3, 4.5]})) == [1, 2, 3, 4.5]
  assert box_of(dataclasses.replace(row, extra={})) is None
