import pickle

import numpy as np
from PIL import Image
import pytest

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.data.rows import BadRow, ImageRef, Row
from hrvlm_jax.data.transforms import Text, ToBatch, ToExample, tokenizer_of
from hrvlm_jax.language.chat import ASSISTANT, USER, Message


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
