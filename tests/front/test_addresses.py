"""Images by address, options of `ask` and rows that are written out: what needs no model."""

import io

from PIL import Image
import pytest

from hrvlm_jax.cli.arguments import Parser, add_penalties, penalties_of
from hrvlm_jax.cli.questions import add_urls, urls_of
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.data.rows import Row
from hrvlm_jax.data.sources import LlavaJson
from hrvlm_jax.front import finetune, images
from hrvlm_jax.language.chat import ASSISTANT, USER, Message


def png(size):
  buffer = io.BytesIO()
  Image.new('RGB', size).save(buffer, 'PNG')
  return buffer.getvalue()


def test_addresses_only_where_they_are_allowed(server, tmp_path):
  address, asked = server({'/a.png': png((120, 90)), '/big.png': b'x' * 5000})
  with pytest.raises(UserError, match='not fetched unless they are allowed'):
    images.as_image(f'{address}/a.png')
  for private in (f'{address}/a.png', 'http://169.254.169.254/latest', 'https://[::1]/a',
                  'http://2130706433/a.png', 'https://user:word@example.com/a.png'):
    with pytest.raises(UserError, match='public internet|only ports|without a user name'):
      images.as_image(private, urls=True)
  assert not asked  # what only this machine can reach is not read because somebody named it
  with pytest.raises(UserError, match='private-urls'):
    images.as_image(f'{address}/a.png', urls=True)
  with pytest.raises(UserError, match="urls: found 'all'"):
    images.as_image(f'{address}/a.png', urls='all')
  own = {'urls': 'private'}
  assert images.as_image(f'{address}/a.png', **own).size == (120, 90)
  with pytest.raises(UserError, match='has more than 1,000 bytes'):
    images.as_image(f'{address}/big.png', max_bytes=1000, **own)
  with pytest.raises(UserError, match='answers with status 404'):
    images.as_image(f'{address}/none.png', **own)
  with pytest.raises(UserError, match='cannot be fetched'):
    images.as_image('http://localhost:9/a.png', **own)
  (tmp_path / 'a.png').write_bytes(png((120, 90)))
  with pytest.raises(UserError, match='files of the server are not read'):
    images.as_image(str(tmp_path / 'a.png'), files=False)
  with pytest.raises(UserError, match='has 120 x 90 pixels, more than 100'):
    images.as_image(Image.new('RGB', (120, 90)), max_pixels=100)


def test_options():
  parser = Parser('ask', '')
  add_penalties(parser)
  add_urls(parser)
  read = parser.parse([])
  assert penalties_of(read) == {} and urls_of(read) is False
  read = parser.parse(['--min-p', '0.1', '--repetition-penalty=1.5', '--no-repeat-ngram-size', '3',
                       '--urls'])
  assert penalties_of(read) == {
    'min_p': 0.1, 'repetition_penalty': 1.5, 'no_repeat_ngram_size': 3}
  assert urls_of(read) is True and urls_of(parser.parse(['--private-urls'])) == 'private'


def test_rows_keep_their_system_text(tmp_path):
  talk = (Message(USER, 'What?'), Message(ASSISTANT, 'This.'))
  rows = [Row('0', (), talk, system='Short.'), Row('1', (), talk)]
  finetune.write_rows({'train': rows}, tmp_path)
  found = LlavaJson(tmp_path / 'train.jsonl')
  assert [(found[i].system, found[i].messages) for i in (0, 1)] == [
    ('Short.', talk), (None, talk)]
