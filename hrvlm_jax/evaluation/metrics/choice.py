"""Multiple choice: from an answer in words to a letter, and the accuracies made of letters.

`mcq_letter` is this library's own deterministic parser. The others are the parsers behind published
numbers, each under its own name. None guesses: what cannot be read is None (and counted as wrong);
`random_letter` gives the guess that some official codes make instead.
"""

from collections.abc import Mapping, Sequence
import random
import re

from hrvlm_jax.evaluation.metrics.letter import LETTERS, letters, mcq_letter, mcq_simple, only_text

__all__ = ['LETTERS', 'letters', 'mcq_letter', 'mcq_simple', 'only_text']

SCIENCEQA_LETTERS = 'ABCDE'


def sqa_llava(text: str) -> str | None:
  """ScienceQA by LLaVA: a lone letter A-E; of three or more characters the first when it is A-E;
  else the only match of `The answer is ([A-Z]).`.

  Source: luogen1996/LLaVA-HR: llava_hr/eval/eval_science_qa.py. `B.` has two characters: None.
  """
  if text in tuple(SCIENCEQA_LETTERS):
    return text
  if len(text) >= 3 and text[0] in SCIENCEQA_LETTERS:
    return text[0]
  found = re.findall(r'The answer is ([A-Z]).', text)
  return found[0] if len(found) == 1 else None


def sqa_index(letter: str | None, choices: int) -> int:
  """Index of a ScienceQA letter, -1 for None and for a letter beyond the question's choices."""
  if letter is None or letter not in SCIENCEQA_LETTERS[:choices]:
    return -1
  return SCIENCEQA_LETTERS.index(letter)


def sqa_summary(right: Sequence[bool], right_with_image: Sequence[bool]) -> str:
  """ScienceQA's line of totals, as LLaVA prints it."""
  share = lambda values: 100 * sum(values) / len(values) if values else 0.0
  return (f'Total: {len(right)}, Correct: {sum(right)}, Accuracy: {share(right):.2f}%, '
          f'IMG-Accuracy: {share(right_with_image):.2f}%')


def seed_first_char(text: str) -> str | None:
  """SEED-Bench: the first character of the stripped text (LLaVA, lmms-eval)."""
  return text.strip()[:1] or None


def seed_exact(text: str) -> str | None:
  """SEED-Bench as LLaVA-HR counts: the whole stripped text has to be the letter."""
  return text.strip() or None


def mmmu(text: str, choices: Sequence[str]) -> str | None:
  """MMMU's parser without its random guess.

  The ends lose `, . ! ? ; : '`; then letters as `(X)`, else as `X ` (also at the end of a longer
  word in capitals), else as `X.`, else, in answers of more than five words, the text of a choice.
  Of several the one that occurs last. Source: MMMU-Benchmark/MMMU: eval/eval_utils.py.
  """
  for mark in ",.!?;:'":
    text = text.strip(mark)
  text = f' {text} '
  table = dict(zip(letters(len(choices)), choices))
  for form in ('({})', '{} ', '{}.'):
    if found := [letter for letter in table if form.format(letter) in text]:
      place = '({})' if form == '({})' else ' {} '
      return max(found, key=lambda letter: text.rfind(place.format(letter)))
  if len(text.split()) > 5:
    lower = text.lower()
    if found := [letter for letter, choice in table.items()
                 if choice and choice.lower() in lower]:
      return max(found, key=lambda letter: lower.rfind(table[letter].lower()))
  return None


def mmbench_prefetch(text: str, choices: Sequence[str]) -> str | None:
  """MMBench's rules before it asks a language model: a lone letter in one of 13 dresses, else the
  only choice whose text is contained.

  Source: EvolvingLMMs-Lab/lmms-eval: lmms_eval/tasks/mmbench/mmbench_evals.py (letters A-E whatever
  the number of choices; an `A` among more than three words ends the search for bare letters).
  """
  words = text.split()
  bare = [letter for letter in 'ABCDE' if letter in words]
  if len(bare) == 1 and not ('A' in words and len(words) > 3):
    return bare[0]
  dresses = ('{}.', '{},', '{}:', '{})', '{}).', '({})', '({}).', ':{}', ':{},', ':{}.', ':{})',
             ':{}).')
  for dress in dresses:
    found = [letter for letter in 'ABCDE' if dress.format(letter) in words]
    if len(found) == 1:
      return found[0]
  return only_text(text, choices)


def random_letter(letter: str | None, choices: int, rng: random.Random) -> str:
  """The letter, or a random one where it is None: what MMMU and MMBench do themselves."""
  return letter if letter is not None else rng.choice(letters(choices))


def likelihood_choice(losses: Sequence[float]) -> int:
  """V*Bench's official way: the option with the lowest mean token cross-entropy, first on ties.

  Source: penghao-wu/vstar: vstar_bench_eval.py (option 0 of the file is the right one).
  """
  if not losses:
    raise ValueError('likelihood_choice needs the loss of at least one option')
  return min(range(len(losses)), key=lambda i: losses[i])


def circular_groups(indices: Sequence[int]) -> dict[int, list[int]]:
  """Rows of one question in MMBench's circular files: base index -> positions of its rotations."""
  groups: dict[int, list[int]] = {}
  for position, index in enumerate(indices):
    groups.setdefault(index % 1_000_000, []).append(position)
  return groups


def mean_of_means(values: Sequence[float], groups: Sequence[str]) -> float:
  """Mean over groups of the mean in each group (HR-Bench over `cycle_category`)."""
  sums: dict[str, list[float]] = {}
  for value, group in zip(values, groups):
    sums.setdefault(group, []).append(value)
  if not sums:
    return 0.0
  return sum(sum(part) / len(part) for part in sums.values()) / len(sums)


def shares(values: Sequence[float], groups: Sequence[str]) -> Mapping[str, float]:
  """Percentage in each group, in order of first appearance."""
  sums: dict[str, list[float]] = {}
  for value, group in zip(values, groups):
    sums.setdefault(group, []).append(value)
  return {group: 100 * sum(part) / len(part) for group, part in sums.items()}
