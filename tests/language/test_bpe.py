"""The trained tokenizer: complete, deterministic, short on what it was trained on."""

from hrvlm_jax.language.bpe import train_bpe
from hrvlm_jax.language.tokenizer import load_tokenizer

TEXTS = ['What is written on the green sign?', 'What is written on the blue sign?'] * 4
SPECIALS = ['<pad>', '<|im_end|>']


def make():
  return train_bpe(TEXTS, vocab_size=400, specials=SPECIALS,
                   roles={'pad': '<pad>', 'eos': '<|im_end|>'})


def test_frequent_words_are_one_token_and_any_text_survives():
  tokenizer = make()
  assert len(tokenizer.encode(' green')) == 1
  for text in (TEXTS[0], 'Grüße \U0001f600 \x00', 'zebra'):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_specials_come_first_and_are_never_split():
  tokenizer = make()
  assert tokenizer.encode('a<|im_end|>')[1] == tokenizer.special('<|im_end|>') == 1
  assert (tokenizer.pad_id, tokenizer.eos_id) == (0, 1)


def test_training_is_deterministic_and_can_be_saved(tmp_path):
  first, second = make(), make()
  assert first.files == second.files
  first.save(tmp_path)
  assert load_tokenizer(tmp_path).encode(TEXTS[1]) == first.encode(TEXTS[1])
