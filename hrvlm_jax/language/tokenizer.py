"""Tokenizers behind one interface: text to ids and back, special ids by their string.

Backends (the folder's files decide, `load_tokenizer`):

* `SentencePieceTokenizer`: `tokenizer.model`, the slow LLaMA tokenizer in its legacy behaviour
  (LLaVA-HR trained with it; huggingface/transformers: models/llama/tokenization_llama.py).
* `JsonTokenizer`: `tokenizer.json` of the `tokenizers` library, or GPT-2 style `vocab.json` with
  `merges.txt` (Phi, Qwen2), with the tokens of `added_tokens.json` on top.
* `ByteTokenizer`: every UTF-8 byte is its own id; for tiny models and tests. Saved as a
  `tokenizer.json` with the same ids, so an exported tiny model is complete.

A tokenizer keeps the bytes of its files: it can be pickled (data workers) and saved again anywhere.
The native object is made on first use. Text towers have more rules: `language/captions.py`.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping, Sequence
import contextlib
import functools
import json
import os
import pathlib
import re
import warnings

from hrvlm_jax.core.errors import UserError, nearest
from hrvlm_jax.language.tokenizer_files import (
  ROLES,
  add_tokens,
  added_tokens,
  gpt2_style,
  json_file,
  roles_of,
  sentence,
  silent,
  word,
)

# What belongs to a tokenizer in a Hugging Face folder; kept so that an export is complete.
FILES = (
  'tokenizer.json', 'tokenizer.model', 'spiece.model', 'vocab.json', 'merges.txt',
  'added_tokens.json', 'special_tokens_map.json', 'tokenizer_config.json', 'chat_template.jinja',
  'generation_config.json',
)


class Tokenizer(abc.ABC):
  """Text to token ids and back.

  Attributes:
    files: file name -> content, as `save` writes them.
    roles: 'bos', 'eos', 'pad', 'unk' -> token string, where the files name one.
  """

  def __init__(self, files: Mapping[str, bytes]):
    self.files = dict(files)
    self.roles = roles_of(self.files)

  @abc.abstractmethod
  def encode_spans(self, text: str, *, bos: bool = True) -> tuple[list[int], list[int]]:
    """Ids of a text, and for each id the index of the character at which it starts.

    Ids of a begin token start at 0. Strings of special tokens inside the text become their ids.

    Args:
      bos: put the tokenizer's own begin token in front (LLaMA has one, Phi and Qwen2 have none).
    """

  @abc.abstractmethod
  def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
    """Text of ids. Ids without a token (padded vocabulary rows, sentinels) give nothing."""

  @property
  @abc.abstractmethod
  def vocabulary(self) -> Mapping[str, int]:
    """Token string -> id, special tokens included."""

  @property
  @abc.abstractmethod
  def special_tokens(self) -> Mapping[str, int]:
    """Special token string -> id."""

  def encode(self, text: str, *, bos: bool = True) -> list[int]:
    """Ids of a text; see `encode_spans`."""
    return self.encode_spans(text, bos=bos)[0]

  @property
  def vocab_size(self) -> int:
    """Number of ids from 0 to the largest one; a model may have more rows."""
    return max(self.vocabulary.values()) + 1

  def special(self, token: str) -> int:
    """The id of a token that must exist as one id, by its string.

    Raises:
      UserError: the tokenizer has no such token.
    """
    found = self.special_tokens.get(token)
    if found is None:
      found = self.vocabulary.get(token)
    if found is None:
      hint = nearest(token, self.special_tokens)
      raise UserError(f'tokenizer: has no token {token!r} (nearest special token: {hint!r}); '
                      'use the tokenizer that belongs to the model')
    return found

  def role_id(self, role: str) -> int | None:
    """The id of 'bos', 'eos', 'pad' or 'unk', or None when the tokenizer names none."""
    if role not in ROLES:
      raise ValueError(f'role: expected one of {ROLES}, got {role!r}')
    token = self.roles.get(role)
    return None if token is None else self.special(token)

  @property
  def bos_id(self) -> int | None:
    return self.role_id('bos')

  @property
  def eos_id(self) -> int | None:
    return self.role_id('eos')

  @property
  def pad_id(self) -> int | None:
    return self.role_id('pad')

  @property
  def unk_id(self) -> int | None:
    return self.role_id('unk')

  def save(self, folder: str | os.PathLike) -> None:
    """Writes the tokenizer's files into an existing folder."""
    for name, content in self.files.items():
      (pathlib.Path(folder) / name).write_bytes(content)

  def __getstate__(self):
    # Cached properties hold native objects; they are made again where they are needed.
    return {'files': self.files, 'roles': self.roles}

  def __setstate__(self, state):
    self.__dict__.update(state)


class JsonTokenizer(Tokenizer):
  """The `tokenizers` library: byte-level BPE of Phi and Qwen2, or any `tokenizer.json`."""

  @functools.cached_property
  def _native(self):
    import tokenizers

    if 'tokenizer.json' in self.files:
      with sentence('tokenizer.json'), silent():
        native = tokenizers.Tokenizer.from_str(self.files['tokenizer.json'].decode())
    else:
      native = gpt2_style(self.files)
    native.no_padding()
    native.no_truncation()
    with sentence('tokenizer'), silent():
      add_tokens(native, self.files)
      with contextlib.suppress(Exception):  # an unknown letter is no fault; a panic passes here
        native.decode(native.encode('a', add_special_tokens=True).ids)
    return native

  def encode_spans(self, text, *, bos=True):
    with sentence('tokenizer'):
      encoding = self._native.encode(text, add_special_tokens=bos)
    return encoding.ids, [start for start, _ in encoding.offsets]

  def encode(self, text, *, bos=True):
    with sentence('tokenizer'):
      return self._native.encode(text, add_special_tokens=bos).ids

  def decode(self, ids, *, skip_special=True):
    with sentence('tokenizer'):
      return self._native.decode([i for i in map(int, ids) if i >= 0],
                                 skip_special_tokens=skip_special)

  @functools.cached_property
  def vocabulary(self):
    return self._native.get_vocab(with_added_tokens=True)

  @functools.cached_property
  def special_tokens(self):
    added = self._native.get_added_tokens_decoder()
    return {token.content: index for index, token in added.items()}


class SentencePieceTokenizer(Tokenizer):
  """Slow LLaMA tokenizer, legacy: special tokens are cut out first, then sentencepiece.

  Every stretch between special tokens gets sentencepiece's dummy space in front, the one after
  `</s>` too (so 'USER' after `</s>` is the same two pieces as at the beginning of a text).

  Args:
    files: with 'tokenizer.model' or 'spiece.model'.
    begin: put the model's begin token in front of every text; None: as the files say, default yes
      for models that have one.
  """

  def __init__(self, files: Mapping[str, bytes], *, begin: bool | None = None):
    super().__init__(files)
    config = json_file(self.files, 'tokenizer_config.json')
    if config.get('legacy') is False:
      warnings.warn(
        "tokenizer_config.json says 'legacy': false; LLaVA-HR was trained with the legacy "
        'behaviour, which is used here (it differs after </s> in conversations of several turns)',
        stacklevel=3)
    if begin is None:
      wanted = word(config, 'tokenizer_class', 'LlamaTokenizer').startswith('Llama')
      begin = bool(config.get('add_bos_token', wanted))
    self.begin = begin
    controls = {'bos': self._native.bos_id(), 'eos': self._native.eos_id(),
                'unk': self._native.unk_id(), 'pad': self._native.pad_id()}
    for role, index in controls.items():
      if index >= 0:
        self.roles.setdefault(role, self._native.id_to_piece(index))

  @functools.cached_property
  def _native(self):
    import sentencepiece

    name = next(name for name in ('tokenizer.model', 'spiece.model') if name in self.files)
    native = sentencepiece.SentencePieceProcessor()
    try:
      native.LoadFromSerializedProto(self.files[name])
    except (RuntimeError, ValueError) as error:
      raise UserError(f'{name}: is not a sentencepiece model ({error})') from error
    return native

  @functools.cached_property
  def vocabulary(self):
    native = self._native
    return {native.id_to_piece(i): i for i in range(native.vocab_size())} | self._added

  @functools.cached_property
  def _added(self) -> dict[str, int]:
    return {token: index for index, token, _ in added_tokens(self.files)}

  @functools.cached_property
  def special_tokens(self):
    native = self._native
    pieces = {native.id_to_piece(i): i for i in range(native.vocab_size())
              if native.is_control(i) or native.is_unknown(i)}
    return pieces | self._added

  @functools.cached_property
  def _splitter(self) -> re.Pattern:
    return _splitter(self.special_tokens)

  def encode_spans(self, text, *, bos=True):
    first = self._native.bos_id()
    ids, starts = ([first], [0]) if bos and self.begin and first >= 0 else ([], [])
    position = 0
    for part in self._splitter.split(text):
      if part in self.special_tokens:
        ids.append(self.special_tokens[part])
        starts.append(position)
      elif part:
        pieces = self._native.encode(part, out_type=str)
        ids += [self._native.piece_to_id(piece) for piece in pieces]
        starts += [position + start for start in self._piece_starts(part, pieces)]
      position += len(part)
    return ids, starts

  def encode(self, text, *, bos=True):
    first = self._native.bos_id()
    ids = [first] if bos and self.begin and first >= 0 else []
    for part in self._splitter.split(text):
      if part in self.special_tokens:
        ids.append(self.special_tokens[part])
      elif part:
        ids += self._native.encode(part)
    return ids

  def _piece_starts(self, text: str, pieces: Sequence[str]) -> list[int]:
    """Start characters of pieces, which concatenate to the text with one space in front."""
    owner = [0]  # byte of ' ' + text -> index of the character in text
    for index, character in enumerate(text):
      owner += [index] * len(character.encode())
    data, starts, position = (' ' + text).encode(), [], 0
    for piece in pieces:
      starts.append(owner[min(position, len(owner) - 1)])
      if re.fullmatch(r'<0x[0-9A-F]{2}>', piece) and self._native.is_byte(
          self._native.piece_to_id(piece)):
        position += 1
      else:
        position += len(piece.replace('\u2581', ' ').encode())
    if position != len(data):
      raise UserError('tokenizer.model: rewrites its input (a normalising sentencepiece model), '
                      'so the place of an answer in a conversation is not known; expected a '
                      'LLaMA style model without normalisation')
    return starts

  def decode(self, ids, *, skip_special=True):
    native, added = self._native, {index: token for token, index in self.special_tokens.items()}
    out, run = [], []
    for index in map(int, ids):
      if index in added:
        out.append(native.decode(run) if run else '')
        out.append('' if skip_special else added[index])
        run = []
      elif 0 <= index < native.vocab_size():
        run.append(index)
    out.append(native.decode(run) if run else '')
    return ''.join(out)

  def __getstate__(self):
    return super().__getstate__() | {'begin': self.begin}


class ByteTokenizer(Tokenizer):
  """Every UTF-8 byte is its own id (0..255); special tokens have the ids given.

  Args:
    specials: token string -> id, each at least 256.
    roles: 'bos', 'eos', 'pad', 'unk' -> one of the special tokens.
  """

  def __init__(self, specials: Mapping[str, int], roles: Mapping[str, str] | None = None):
    problems = [f'{token!r} has id {index}' for token, index in specials.items() if index < 256]
    if problems or len(set(specials.values())) != len(specials):
      raise ValueError('specials: expected different ids of at least 256: '
                       f'{", ".join(problems) or dict(specials)}')
    if unknown := sorted(set((roles or {}).values()) - set(specials)):
      raise ValueError(f'roles: {unknown} are no special tokens; known: {sorted(specials)}')
    self._specials = dict(specials)
    super().__init__(_byte_files(self._specials, dict(roles or {})))

  @property
  def special_tokens(self):
    return self._specials

  @functools.cached_property
  def vocabulary(self):
    return dict(zip(_byte_alphabet(), range(256), strict=True)) | self._specials

  @functools.cached_property
  def _splitter(self):
    return _splitter(self._specials)

  def encode_spans(self, text, *, bos=True):
    ids, starts, position = [], [], 0
    for part in self._splitter.split(text) if self._specials else [text]:
      if part in self._specials:
        ids.append(self._specials[part])
        starts.append(position)
      else:
        for offset, character in enumerate(part):
          data = character.encode()
          ids += data
          starts += [position + offset] * len(data)
      position += len(part)
    return ids, starts

  def decode(self, ids, *, skip_special=True):
    names = {index: token for token, index in self._specials.items()}
    out = bytearray()
    for index in map(int, ids):
      if 0 <= index < 256:
        out.append(index)
      elif index in names and not skip_special:
        out += names[index].encode()
    return out.decode(errors='replace')

  def __getstate__(self):
    return super().__getstate__() | {'_specials': self._specials}


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
  """The tokenizer of a model folder; its files decide the kind.

  A sentencepiece model wins over a `tokenizer.json` beside it: the slow tokenizer is what the
  LLaMA based originals used, and the two differ after special tokens.

  Args:
    path: a folder in Hugging Face layout.

  Raises:
    UserError: no such folder, no tokenizer in it, or files that cannot be read.
  """
  folder = pathlib.Path(path)
  if not folder.is_dir():
    raise UserError(f'{folder}: no such folder; expected one with tokenizer.json, tokenizer.model '
                    'or vocab.json and merges.txt')
  files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
  try:
    return tokenizer_from_files(files)
  except UserError as error:
    raise UserError(f'{folder}: {error}') from error


def tokenizer_from_files(files: Mapping[str, bytes]) -> Tokenizer:
  """The tokenizer held by files in memory (name -> content); see `load_tokenizer`."""
  if 'tokenizer.model' in files or 'spiece.model' in files:
    tokenizer = SentencePieceTokenizer(files)
  elif 'tokenizer.json' in files or {'vocab.json', 'merges.txt'} <= set(files):
    tokenizer = JsonTokenizer(files)
    tokenizer._native  # noqa: B018 - unreadable files should be reported here
  else:
    raise UserError('no tokenizer found; expected tokenizer.json, tokenizer.model or vocab.json '
                    'and merges.txt')
  return tokenizer


def _splitter(tokens: Iterable[str]) -> re.Pattern:
  """Splits a text at tokens and keeps them; of two that fit, the longer one."""
  return re.compile('(' + '|'.join(map(re.escape, sorted(tokens, key=len, reverse=True))) + ')')


@functools.cache
def _byte_alphabet() -> tuple[str, ...]:
  """The GPT-2 character of each byte: itself where printable, else one from 256 on."""
  shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
  hidden = [byte for byte in range(256) if byte not in shown]
  return tuple(chr(b) if b in shown else chr(256 + hidden.index(b)) for b in range(256))


def _byte_files(specials: Mapping[str, int], roles: Mapping[str, str]) -> dict[str, bytes]:
  """A `tokenizer.json` with the ids of a ByteTokenizer, and its `tokenizer_config.json`."""
  added = [
    {'id': index, 'content': token, 'single_word': False, 'lstrip': False, 'rstrip': False,
     'normalized': False, 'special': True}
    for token, index in sorted(specials.items(), key=lambda item: item[1])
  ]
  byte_level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True,
                'use_regex': False}
  # The specials stand in the vocabulary too: the library numbers added tokens itself otherwise.
  vocabulary = dict(zip(_byte_alphabet(), range(256), strict=True)) | dict(specials)
  tokenizer = {
    'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': added,
    'normalizer': None, 'pre_tokenizer': byte_level, 'post_processor': None,
    'decoder': byte_level,
    'model': {'type': 'BPE', 'dropout': None, 'unk_token': None, 'continuing_subword_prefix': None,
              'end_of_word_suffix': None, 'fuse_unk': False, 'byte_fallback': False,
              'ignore_merges': False, 'vocab': vocabulary, 'merges': []},
  }
  config = {'tokenizer_class': 'PreTrainedTokenizerFast',
            **{f'{role}_token': token for role, token in roles.items()}}
  return {'tokenizer.json': json.dumps(tokenizer, ensure_ascii=False).encode(),
          'tokenizer_config.json': json.dumps(config, indent=2).encode()}
