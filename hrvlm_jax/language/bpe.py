"""Training a small byte-level BPE tokenizer, for models that are trained from scratch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
import json

from hrvlm_jax.language.tokenizer import JsonTokenizer


def train_bpe(
  texts: Iterable[str], *, vocab_size: int, specials: Sequence[str],
  roles: Mapping[str, str] | None = None,
) -> JsonTokenizer:
  """A GPT-2 style tokenizer learned from `texts`; frequent words become short.

  Deterministic in its arguments. All 256 bytes are in the vocabulary, so any text can be encoded.

  Args:
    vocab_size: largest number of tokens, specials included; small text collections need fewer.
    specials: tokens that are never split; they get the first ids, in this order.
    roles: 'bos', 'eos', 'pad', 'unk' -> one of the specials.
  """
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers, trainers

  native = tokenizers.Tokenizer(models.BPE())
  native.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  native.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size, special_tokens=list(specials), show_progress=False,
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
  native.train_from_iterator(texts, trainer)
  config = {'tokenizer_class': 'PreTrainedTokenizerFast',
            **{f'{role}_token': token for role, token in (roles or {}).items()}}
  return JsonTokenizer({
    'tokenizer.json': native.to_str().encode(),
    'tokenizer_config.json': json.dumps(config, indent=2).encode()})
