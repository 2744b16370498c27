"""What a release says about the end of an answer and about repetitions: generation_config.json.

The file goes with the tokenizer, so that it is kept by conversion, training and export. Source:
`huggingface/transformers: generation/configuration_utils.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

from hrvlm_jax.checkpoint.settings import Reader
from hrvlm_jax.core import json_text
from hrvlm_jax.core.errors import UserError

FILE = 'generation_config.json'


@dataclasses.dataclass(frozen=True)
class Generation:
  """Defaults of a release.

  Attributes:
    stop_ids: ids that end an answer, beside those of the template.
    repetition_penalty, no_repeat_ngram_size: see `language.generate.Sampling`.
  """

  stop_ids: tuple[int, ...] = ()
  repetition_penalty: float = 1.0
  no_repeat_ngram_size: int = 0


def read_generation(values: Any, *, where: str = FILE) -> Generation:
  """The defaults of a generation_config.json.

  Raises:
    UserError: values that are none, all of them.
  """
  read = Reader(values, where=where)
  ends = read.values.get('eos_token_id')
  ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
  if not all(isinstance(end, int) and not isinstance(end, bool) and 0 <= end < 1 << 31
             for end in ends):
    read.bad('eos_token_id', 'an id or a list of ids')
  penalty = read.number('repetition_penalty', 1.0, above=True, null=True)
  size = read.integer('no_repeat_ngram_size', 0, least=0, most=1000, null=True)
  read.done()
  return Generation(tuple(dict.fromkeys(ends)), penalty, size)


def generation_of(files: Mapping[str, bytes]) -> Generation:
  """The defaults among the files of a tokenizer.

  Raises:
    UserError: a file that is no JSON, values that are none.
  """
  if FILE not in files:
    return Generation()
  try:
    values = json_text.loads(files[FILE])
  except (ValueError, RecursionError) as error:
    raise UserError(f'{FILE}: not valid JSON ({error})') from error
  return read_generation(values)
