"""What the files of a tokenizer say, checked: anything odd is a sentence that names the file.

The `tokenizers` library behind them answers odd files with bare exceptions and, now and then, with
a panic of its Rust code, which is no Exception and prints a stack of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import contextlib
import os
from typing import Any

from hrvlm_jax.core import json_text
from hrvlm_jax.core.errors import UserError

ROLES = ('bos', 'eos', 'pad', 'unk')

# Pre-tokenizer of Qwen2 (spec of the released tokenizer; GPT-2 has its own inside `tokenizers`).
_QWEN2_SPLIT = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
  r'|\s*[\r\n]+|\s+(?!\S)|\s+'
)


@contextlib.contextmanager
def silent() -> Iterator[None]:
  """Keeps what native code prints on standard error (the stack of a panic) from the terminal."""
  kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
  os.dup2(nothing, 2)
  try:
    yield
  finally:
    os.dup2(kept, 2)
    os.close(kept)
    os.close(nothing)


@contextlib.contextmanager
def sentence(what: str) -> Iterator[None]:
  """What the `tokenizers` library says about files it cannot use, as a `UserError`.

  It raises nothing narrower than Exception, and its panics are none at all (a BaseException).
  """
  try:
    yield
  except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit, NameError, AttributeError):
    raise
  except BaseException as error:
    raise UserError(f'{what}: cannot be read ({str(error)[:300]})') from error


def json_file(files: Mapping[str, bytes], name: str) -> dict:
  """The object of a JSON file; {} where there is none.

  Raises:
    UserError: no JSON, or no object.
  """
  if name not in files:
    return {}
  try:
    values = json_text.loads(files[name])
  except (ValueError, RecursionError) as error:
    raise UserError(f'{name}: not valid JSON ({error})') from error
  if not isinstance(values, dict):
    raise UserError(f'{name}: found {type(values).__name__}, expected an object')
  return values


def roles_of(files: Mapping[str, bytes]) -> dict[str, str]:
  """'bos', 'eos', 'pad', 'unk' -> token string, where the files name one."""
  roles = {}
  for name in ('special_tokens_map.json', 'tokenizer_config.json'):
    values = json_file(files, name)
    for role in ROLES:
      value = values.get(f'{role}_token')
      value = value.get('content') if isinstance(value, dict) else value
      if isinstance(value, str):
        roles[role] = value
  return roles


def added_tokens(files: Mapping[str, bytes]) -> list[tuple[int, str, bool]]:
  """(id, token, special) of added_tokens.json and of tokenizer_config.json, by id."""
  found, problems = {}, []
  for token, index in json_file(files, 'added_tokens.json').items():
    if _is_id(index) and token:
      found[index] = (token, True)
    else:
      problems.append(f'added_tokens.json: {token!r} has {index!r}, expected an id')
  decoder = json_file(files, 'tokenizer_config.json').get('added_tokens_decoder') or {}
  if not isinstance(decoder, dict):
    decoder = {}
    problems.append('tokenizer_config.json: added_tokens_decoder is no object of ids')
  for index, token in decoder.items():
    content = token.get('content') if isinstance(token, dict) else None
    if index.isdecimal() and _is_id(int(index[:12])) and isinstance(content, str) and content:
      found[int(index)] = (content, bool(token.get('special', True)))
    else:
      problems.append(f'tokenizer_config.json: added_tokens_decoder: {index[:40]!r} is no id with '
                      'a token that has a text (content)')
  if problems:
    raise UserError('; '.join(problems[:6]))
  return [(index, *found[index]) for index in sorted(found)]


def _is_id(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


def word(values: Mapping[str, Any], key: str, default: str) -> str:
  """A text of a file; left out or null is the default.

  Raises:
    UserError: something else.
  """
  value = values.get(key)
  if value is not None and not isinstance(value, str):
    raise UserError(f'tokenizer_config.json: {key} is {type(value).__name__}, expected a text')
  return default if value is None else value


def add_tokens(native, files) -> None:
  """Adds the tokens a tokenizer lacks; their ids are checked, since they go by order."""
  import tokenizers

  problems = []
  for index, token, special in added_tokens(files):
    if native.token_to_id(token) is None:
      added = tokenizers.AddedToken(token, special=special, normalized=False)
      (native.add_special_tokens if special else native.add_tokens)([added])
    if (got := native.token_to_id(token)) != index:
      problems.append(f'{token!r} has id {got}, expected {index}')
  if problems:
    raise UserError('added_tokens.json does not fit the tokenizer: ' + '; '.join(problems))


def gpt2_style(files: Mapping[str, bytes]):
  """Byte-level BPE from vocab.json and merges.txt (GPT-2, CodeGen, Phi; Qwen2 by its class)."""
  import tokenizers
  from tokenizers import decoders, models, normalizers, pre_tokenizers

  try:
    lines = files['merges.txt'].decode().splitlines()
  except UnicodeDecodeError as error:
    raise UserError(f'merges.txt: is not UTF-8 text ({error})') from error
  merges = []
  for number, line in enumerate(lines, 1):
    parts = tuple(line.split(' '))
    if line and not line.startswith('#version'):
      if len(parts) != 2 or not all(parts):
        raise UserError(f'merges.txt: line {number} is {line[:60]!r}, expected two pieces with a '
                        'space between them')
      merges.append(parts)
  vocabulary = json_file(files, 'vocab.json')
  if wrong := [token for token, index in vocabulary.items() if not _is_id(index)]:
    raise UserError(f'vocab.json: {len(wrong)} tokens have no id, the first is {wrong[0]!r}')
  with sentence('vocab.json and merges.txt'):
    native = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
  config = json_file(files, 'tokenizer_config.json')
  if word(config, 'tokenizer_class', '').startswith('Qwen2'):
    native.normalizer = normalizers.NFC()
    native.pre_tokenizer = pre_tokenizers.Sequence([
      pre_tokenizers.Split(tokenizers.Regex(_QWEN2_SPLIT), 'isolated'),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
  else:
    native.pre_tokenizer = pre_tokenizers.ByteLevel(
      add_prefix_space=bool(config.get('add_prefix_space', False)))
  native.decoder = decoders.ByteLevel()
  return native
