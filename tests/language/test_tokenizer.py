import json
import pathlib
import pickle

import pytest

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.language.tokenizer import (
  ByteTokenizer,
  JsonTokenizer,
  SentencePieceTokenizer,
  load_tokenizer,
  tokenizer_from_files,
)

GOLDENS = pathlib.Path(__file__).parents[1] / 'goldens'
SPECIALS = {'<|im_end|>': 256, '<|im_start|>': 257, '<image>': 258, '<pad>': 300}
TEXTS = ['', 'plain', '<|im_start|>user\n<image>\nWo? é漢\x00<|im_end|>', '  two  spaces ',
         '<image']


@pytest.fixture(scope='module')
def byte():
  return ByteTokenizer(SPECIALS, {'eos': '<|im_end|>', 'pad': '<pad>'})


@pytest.fixture(scope='module')
def piece():
  return load_tokenizer(GOLDENS / 'llava_hr' / 'data')


@pytest.fixture(scope='module')
def qwen():
  return load_tokenizer(GOLDENS / 'vila_hd' / 'text')


def test_bytes(byte):
  assert byte.encode('<|im_start|>é') == [257, 195, 169]
  assert byte.encode_spans('é<image>a') == ([195, 169, 258, 97], [0, 0, 1, 8])
  assert byte.special('<image>') == 258
  assert (byte.eos_id, byte.pad_id, byte.bos_id) == (256, 300, None)
  assert byte.vocab_size == 301
  for text in TEXTS:
    assert byte.decode(byte.encode(text), skip_special=False) == text
  assert byte.decode([97, 256, 98, -200, 299]) == 'ab'
  assert byte.decode([195]) == '\ufffd'


def test_byte_tokenizer_saves_as_tokenizer_json(byte, tmp_path):
  byte.save(tmp_path)
  loaded = load_tokenizer(tmp_path)
  assert isinstance(loaded, JsonTokenizer)
  for text in TEXTS:
    assert loaded.encode(text) == byte.encode(text)
    assert loaded.encode_spans(text) == byte.encode_spans(text)
    assert loaded.decode(loaded.encode(text), skip_special=False) == text
  assert loaded.special_tokens == byte.special_tokens
  assert (loaded.eos_id, loaded.pad_id, loaded.vocab_size) == (256, 300, 301)


def test_transformers_reads_the_saved_byte_tokenizer(byte, tmp_path):
  import transformers

  byte.save(tmp_path)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  for text in TEXTS:
    assert theirs(text)['input_ids'] == byte.encode(text)
  assert theirs.eos_token_id == 256


def test_byte_tokenizer_refuses_bad_specials():
  with pytest.raises(ValueError, match='at least 256'):
    ByteTokenizer({'<a>': 255})
  with pytest.raises(ValueError, match='different ids'):
    ByteTokenizer({'<a>': 256, '<b>': 256})
  with pytest.raises(ValueError, match='no special tokens'):
    ByteTokenizer({'<a>': 256}, {'eos': '<b>'})


def test_legacy_sentencepiece(piece):
  assert isinstance(piece, SentencePieceTokenizer)
  assert (piece.bos_id, piece.eos_id, piece.unk_id, piece.pad_id) == (1, 2, 0, None)
  ids = piece.encode('USER: a</s>USER: a')
  end = ids.index(2)
  assert ids[0] == 1
  assert ids[1:end] == ids[end + 1:]  # a dummy prefix after </s> as at the beginning
  assert piece.encode('a', bos=False) == piece.encode('a')[1:]
  assert piece.decode(ids) == 'USER: aUSER: a'
  assert piece.decode(ids, skip_special=False) == '<s>USER: a</s>USER: a'
  assert piece.decode([-200, 10**6]) == ''


def test_sentencepiece_starts(piece):
  text = 'x é ok\n</s>y  z'
  ids, starts = piece.encode_spans(text)
  assert ids == piece.encode(text)
  assert starts[0] == 0
  assert starts == sorted(starts)
  for index, start in zip(ids[1:], starts[1:]):
    if index == 2:
      assert text[start:].startswith('</s>')
  # What comes before a character is what comes before its token.
  cut = text.index(' ok')
  before = [i for i, start in zip(ids, starts) if start < cut]
  assert piece.decode(before).rstrip() == 'x é'


def test_json_tokenizer(qwen):
  assert isinstance(qwen, JsonTokenizer)
  assert qwen.encode('<|im_end|>\n<|im_start|>assistant')[0] == qwen.special('<|im_end|>')
  ids, starts = qwen.encode_spans('a<image>b')
  assert starts == [0, 1, 8]
  assert ids[1] == qwen.special('<image>')
  assert qwen.decode(qwen.encode('Read <image>it')) == 'Read it'


@pytest.mark.parametrize('name', ['byte', 'piece', 'qwen'])
def test_pickles(name, request):
  tokenizer = request.getfixturevalue(name)
  text = 'Read the sign</s> and <|im_end|> é'
  expected = tokenizer.encode(text)
  again = pickle.loads(pickle.dumps(tokenizer))
  assert again.encode(text) == expected
  assert again.decode(expected) == tokenizer.decode(expected)
  assert again.files == tokenizer.files


def test_unknown_special_token(qwen):
  with pytest.raises(UserError, match=r"no token '<\|im_stop\|>' \(nearest special"):
    qwen.special('<|im_stop|>')


def test_absent_or_damaged(tmp_path):
  with pytest.raises(UserError, match='no such folder'):
    load_tokenizer(tmp_path / 'none')
  with pytest.raises(UserError, match='no tokenizer found; expected tokenizer.json'):
    load_tokenizer(tmp_path)
  (tmp_path / 'tokenizer.json').write_text('{')
  with pytest.raises(UserError, match='tokenizer.json: cannot be read'):
    load_tokenizer(tmp_path)
  (tmp_path / 'tokenizer.model').write_bytes(b'nonsense')
  with pytest.raises(UserError, match='not a sentencepiece model'):
    load_tokenizer(tmp_path)


def gpt2_files(**config):
  letters = {letter: index for index, letter in enumerate('abcdefghijklmnopqrstuvwxyzĠĊ')}
  vocab = letters | {'th': 28, 'Ġth': 29, 'the': 30}
  return {'vocab.json': json.dumps(vocab).encode(),
          'merges.txt': '#version: 0.2\nt h\nĠ th\nth e\n'.encode(),
          'tokenizer_config.json': json.dumps(config).encode()}


def test_vocab_and_merges():
  files = gpt2_files(tokenizer_class='CodeGenTokenizer', eos_token='<|end|>')
  files['added_tokens.json'] = json.dumps({'<|end|>': 31, '<image>': 32}).encode()
  tokenizer = tokenizer_from_files(files)
  assert tokenizer.encode('the th<image>') == [30, 29, 32]
  assert tokenizer.eos_id == 31
  assert tokenizer.decode([30, 29, 32]) == 'the th'
  qwen = tokenizer_from_files(gpt2_files(tokenizer_class='Qwen2Tokenizer'))
  assert qwen.encode('the\nth') == [30, 27, 28]


def test_added_tokens_must_fit():
  files = gpt2_files()
  files['added_tokens.json'] = json.dumps({'<|end|>': 99}).encode()
  with pytest.raises(UserError, match=r"'<\|end\|>' has id 31, expected 99"):
    tokenizer_from_files(files)


@pytest.mark.parametrize('name, content, said', [
  ('tokenizer_config.json', [{'eos_token': 'x'}], 'found list, expected an object'),
  ('tokenizer_config.json', None, 'found NoneType, expected an object'),
  ('tokenizer_config.json', {'tokenizer_class': ['Qwen2Tokenizer']}, 'tokenizer_class is list'),
  ('tokenizer_config.json', {'added_tokens_decoder': [1]}, 'added_tokens_decoder is no object'),
  ('tokenizer_config.json', {'added_tokens_decoder': {'x': {'content': 'y'}}}, 'no id with a tok'),
  ('tokenizer_config.json', {'added_tokens_decoder': {'31': {}}}, 'no id with a token that has'),
  ('added_tokens.json', {'<|end|>': '31'}, "has '31', expected an id"),
  ('added_tokens.json', ['<|end|>'], 'found list'),
  ('vocab.json', {'a': None}, '1 tokens have no id'),
  ('vocab.json', {'a': -1}, '1 tokens have no id'),
  ('merges.txt', b't h e\n', "line 1 is 't h e', expected two pieces"),
  ('merges.txt', b'th\n', 'expected two pieces'),
  ('merges.txt', b'x \xff\n', 'is not UTF-8'),
  ('merges.txt', b't zz\n', 'vocab.json and merges.txt: cannot be read'),
  ('merges.txt', b't h\nh h\n', 'vocab.json and merges.txt: cannot be read'),
])
def test_odd_files_are_sentences(name, content, said):
  files = gpt2_files()
  files[name] = content if isinstance(content, bytes) else json.dumps(content).encode()
  with pytest.raises(UserError) as error:
    tokenizer_from_files(files)
  assert said in str(error.value) and '\n' not in str(error.value)


def test_a_panic_of_rust_code_is_a_sentence(capfd):
  """A template that names a token it does not define: the library panics when it is first used."""
  values = json.loads(ByteTokenizer({'<s>': 256}).files['tokenizer.json'])
  values['post_processor'] = {
    'type': 'TemplateProcessing', 'pair': [{'Sequence': {'id': 'A', 'type_id': 0}}],
    'single': [{'SpecialToken': {'id': '<s>', 'type_id': 0}},
               {'Sequence': {'id': 'A', 'type_id': 0}}],
    'special_tokens': {}}
  with pytest.raises(UserError, match='cannot be read'):
    tokenizer_from_files({'tokenizer.json': json.dumps(values).encode()})
  assert capfd.readouterr().err == ''  # no stack of the library


def test_not_legacy_is_warned(piece):
  files = piece.files | {'tokenizer_config.json': b'{"legacy": false}'}
  with pytest.warns(UserWarning, match='legacy'):
    assert tokenizer_from_files(files).encode('a</s>a') == piece.encode('a</s>a')


def test_sentencepiece_added_tokens(piece):
  files = piece.files | {'added_tokens.json': b'{"<pad>": 416}', 'tokenizer_config.json': b'{}',
                         'special_tokens_map.json': b'{"pad_token": {"content": "<pad>"}}'}
  tokenizer = tokenizer_from_files(files)
  assert tokenizer.pad_id == 416
  assert tokenizer.vocab_size == 417
  assert tokenizer.encode('a<pad>')[-1] == 416
