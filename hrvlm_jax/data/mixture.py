"""Mixtures of data sets, each with its own prompt format and turn sampling; published ones as data.

A mixture (`mix`) is a Grain dataset of rows. One epoch takes a fixed number of rows from every
part; which ones rotates from epoch to epoch, so that over time every row of a part comes equally
often.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses

import grain
import numpy as np

from hrvlm_jax.core.errors import UserError, raise_all, unknown
from hrvlm_jax.data.order import Shuffle, dataset, derived_seed
from hrvlm_jax.data.rows import BadRow, Fields, Row, Source
from hrvlm_jax.language.chat import ASSISTANT, IMAGE, USER, Message


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptFormat:
  """How the questions of one data set are asked.

  Attributes:
    suffix: put behind every question (response-formatting prompts).
    turns: how many random question-answer pairs of a row are used; None: all.
    each: every one of these pairs is an example of its own, so that an epoch of the data set has
      `turns` examples of a row (one that has fewer pairs gives them again). Otherwise they are the
      turns of one conversation.
    prompts: one of these, drawn at random, replaces every question (captioning).
  """

  suffix: str = ''
  turns: int | None = None
  each: bool = False
  prompts: tuple[str, ...] = ()

  def __post_init__(self):
    if self.turns is not None and self.turns < 1:
      raise ValueError(f'turns: expected at least 1 or None, got {self.turns}')
    if self.each and self.turns is None:
      raise ValueError('each: needs the number of pairs of a row that are examples (turns)')

  def apply(self, row: Row, rng: np.random.Generator) -> Row:
    """The row as it is asked; pairs keep their order.

    Image placeholders leave the text when turns are dropped or questions replaced; templates put
    them in front of the first question (`conversation.prepare`).

    Raises:
      BadRow: turns should be drawn from messages that are no pairs.
    """
    messages = list(row.messages)
    if self.turns is not None or self.prompts:
      pairs = pairs_of(row)
      if self.turns is not None and self.turns < len(pairs):
        kept = sorted(rng.choice(len(pairs), self.turns, replace=False).tolist())
        pairs = [pairs[i] for i in kept]
      asked = [str(rng.choice(self.prompts)) if self.prompts else _plain(pair[0].text)
               for pair in pairs]
      messages = [m for text, pair in zip(asked, pairs, strict=True)
                  for m in (Message(USER, text), pair[1])]
    if self.suffix:
      messages = [Message(m.role, m.text + self.suffix) if m.role == USER else m for m in messages]
    return dataclasses.replace(row, messages=tuple(messages))


def pairs_of(row: Row) -> list[list[Message]]:
  """The questions of a row, each with its answer; an answer in front is dropped.

  Raises:
    BadRow: the messages are no pairs.
  """
  messages = list(row.messages)
  if messages and messages[0].role == ASSISTANT:
    messages = messages[1:]
  roles = [m.role for m in messages]
  if not messages or roles != [USER, ASSISTANT] * (len(messages) // 2):
    raise BadRow('conversation', row.where, 'is no sequence of question-answer pairs')
  return [messages[i:i + 2] for i in range(0, len(messages), 2)]


class EachPair(grain.MapDataset):
  """So many examples of every row, each with one of its question-answer pairs.

  Index e * n + i is example i of epoch e; examples of a row stand side by side. Which pairs a row
  gives is drawn anew every epoch, without repetition while it has enough.
  """

  def __init__(self, parent: grain.MapDataset, *, number: int, seed: int):
    super().__init__(parent)
    self._number, self._seed = number, seed

  def __len__(self):
    return len(self._parent) * self._number

  def __getitem__(self, index):
    if isinstance(index, slice):
      return self.slice(index)
    place, example = divmod(index, self._number)  # of the row, over all epochs
    row = self._parent[place]
    pairs = pairs_of(row)
    order = np.random.default_rng([self._seed, place]).permutation(len(pairs))
    return dataclasses.replace(row, messages=tuple(pairs[order[example % len(pairs)]]))


def _plain(text: str) -> str:
  return text.replace(f'{IMAGE}\n', '').replace(IMAGE, '').strip()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
  """How much of one data set a mixture has.

  Attributes:
    name: of the data set.
    amount: examples per epoch; None: all, or by `weight`.
    weight: share of the epoch; either all parts of a mixture have one or none.
    format: how its questions are asked.
  """

  name: str = ''
  amount: int | None = None
  weight: float | None = None
  format: PromptFormat = PromptFormat()

  def __post_init__(self):
    if self.amount is not None and self.weight is not None:
      raise ValueError(f'{self.name}: has an amount and a weight, expected one of them')
    if (self.amount is not None and self.amount < 1) or (
        self.weight is not None and self.weight <= 0):
      raise ValueError(f'{self.name}: amount and weight must be positive')


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixturePart(Share):
  """One data set of a mixture file, and where it is; see `sources.open_mixture`.

  Attributes:
    split, fields: see `sources.open_source`.
  """

  path: str
  images: str = ''
  split: str | None = None
  fields: Fields | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureFile:
  """Content of a mixture file; see `sources.open_mixture`."""

  parts: tuple[MixturePart, ...]
  published: str = ''
  size: int | None = None
  seed: int = 0


class RowsPerEpoch(grain.transforms.DatasetSelectionMap):
  """Which row of which data set stands at an index: in every epoch so many rows of each, in turn.

  Grain's own proportions interleave the data sets endlessly and round the weights; a published
  mixture says how many rows of each an epoch has.

  Args:
    amounts: rows of each data set per epoch.
  """

  def __init__(self, amounts: Sequence[int]):
    self.amounts = tuple(amounts)
    self._ends = np.cumsum(self.amounts)

  def __len__(self):
    return int(self._ends[-1])

  def __getitem__(self, index):
    epoch, place = divmod(index, len(self))
    part = int(np.searchsorted(self._ends, place, side='right'))
    amount = self.amounts[part]
    return part, epoch * amount + place - int(self._ends[part]) + amount


def mix(shares: Sequence[Share], sources: Mapping[str, Source], *, size: int | None = None,
        seed: int = 0) -> grain.MapDataset:
  """Several data sets as one, each row in the format of its data set.

  Index e * n + i is row i of epoch e.

  Args:
    shares: what is taken of each.
    sources: the data sets by name.
    size: rows of an epoch when shares have weights; default: the sum of all lengths.
    seed: decides which rows of a data set an epoch takes, and what their formats draw.

  Raises:
    UserError: a data set is missing or empty, or only some parts have weights; all are named.
  """
  problems = [f'data set {share.name!r} is missing' for share in shares
              if share.name not in sources]
  problems += [f'data set {share.name!r} has no rows' for share in shares
               if share.name in sources and not len(sources[share.name])]
  weighted = [share.weight is not None for share in shares]
  if any(weighted) and not all(weighted):
    problems.append('some data sets have weights and some have none')
  if not shares:
    problems.append('has no data sets')
  raise_all('mixture', problems)
  found = []
  for number, share in enumerate(shares):
    rows = dataset(sources[share.name])
    if share.format.each:
      rows = EachPair(rows, number=share.format.turns, seed=derived_seed(seed, 6, number))
    found.append(rows)
  if all(weighted):
    size = sum(map(len, found)) if size is None else size
    amounts = apportion([share.weight for share in shares], size)
  else:
    amounts = [len(source) if share.amount is None else share.amount
               for share, source in zip(shares, found, strict=True)]
  parts = [
    Shuffle(rows, seed=seed + number)
    .random_map(share.format.apply, seed=derived_seed(seed, 2, number))
    for number, (share, rows) in enumerate(zip(shares, found, strict=True))]
  return grain.MapDataset.select_from_datasets(parts, RowsPerEpoch(amounts))


def apportion(weights: Sequence[float], size: int) -> list[int]:
  """Whole numbers in the ratio of the weights with sum `size` (largest remainders)."""
  exact = np.asarray(weights) / sum(weights) * size
  amounts = np.floor(exact).astype(int)
  for index in np.argsort(amounts - exact, kind='stable')[:size - amounts.sum()]:
    amounts[index] += 1
  return np.maximum(amounts, 1).tolist()


_SHORT = PromptFormat(suffix='\nAnswer the question using a single word or phrase')
_PHRASE = PromptFormat(suffix='\nAnswer the question using a single word or phrase.')
_LETTER = PromptFormat(
  suffix="\nAnswer with the option's letter from the given choices directly.")
_ONE = PromptFormat(turns=1)
_ONE_SHORT = dataclasses.replace(_SHORT, turns=1)
_TWO_SHORT = dataclasses.replace(_SHORT, turns=2, each=True)  # Pheye knows one question an example
# The paper says "ten hand-written instructions" and does not print them: these ten are ours.
_CAPTION = PromptFormat(turns=1, prompts=(
  'Describe this image in detail.',
  'Write a detailed description of the image.',
  'What can be seen in this picture? Describe everything.',
  'Give a thorough account of what the image shows.',
  'Explain the contents of this image at length.',
  'Describe the objects in the image and how they relate to each other.',
  'Write a long caption for this image.',
  'Tell me everything you see in this image.',
  'Provide a comprehensive description of the scene.',
  'Describe the picture so that someone who cannot see it can imagine it.',
))

# Published mixtures. Amounts are rows per epoch as the papers round them; None takes all.
MIXTURES: dict[str, tuple[Share, ...]] = {
  # Pheye, stage III (arXiv 2501.02584, section 3.1 and appendix A). The paper leaves open whether
  # the response prompt stands on a new line; LLaVA-1.5 puts it there.
  'pheye_stage_3': (  # amounts count examples: two of each of 83K and 72K images
    Share(name='llava', amount=158_000, format=_ONE),
    Share(name='llavar', amount=20_000, format=_ONE),
    Share(name='vqav2', amount=166_000, format=_TWO_SHORT),
    Share(name='gqa', amount=144_000, format=_TWO_SHORT),
    Share(name='okvqa', amount=9_000, format=_ONE_SHORT),
    Share(name='ocrvqa', amount=80_000, format=_ONE_SHORT),
    Share(name='textvqa', amount=35_000, format=_ONE_SHORT),
    Share(name='stvqa', amount=26_000, format=_ONE_SHORT),
    Share(name='aokvqa', amount=17_000, format=dataclasses.replace(_LETTER, turns=1)),
    Share(name='textcaps', amount=22_000, format=PromptFormat(turns=1, prompts=(
      'Generate a one-sentence caption for the provided image, incorporating textual elements '
      'visible in the image.',))),
  ),
  # Pheye, stage I: dense captions, one of ten instructions per image.
  'pheye_stage_1': (Share(name='sharegpt4v_pt', format=_CAPTION),),
  # Pheye, stage II: one random turn per sample of several turns.
  'pheye_stage_2': tuple(
    Share(name=name, format=_ONE) for name in ('mimic_it', 'lrv', 'svit', 'lvis_instruct')),
  # LLaVA-1.5 (and LLaVA-HR stage 2): one file whose questions carry their response prompts.
  'llava_1_5': (Share(name='llava_v1_5_mix665k'),),
  # The same from its ten data sets, with the prompts of arXiv 2310.03744, Table 7. Questions about
  # regions (RefCOCO, Visual Genome) are asked in two forms, which their rows bring along.
  'llava_1_5_parts': (
    Share(name='llava', amount=158_000),
    Share(name='sharegpt', amount=40_000),
    Share(name='vqav2', amount=83_000, format=_PHRASE),
    Share(name='gqa', amount=72_000, format=_PHRASE),
    Share(name='okvqa', amount=9_000, format=_PHRASE),
    Share(name='ocrvqa', amount=80_000, format=_PHRASE),
    Share(name='aokvqa', amount=66_000, format=_LETTER),
    Share(name='textcaps', amount=22_000, format=PromptFormat(
      prompts=('Provide a one-sentence caption for the provided image.',))),
    Share(name='refcoco', amount=48_000),
    Share(name='vg', amount=86_000),
  ),
  # VILA-1.5, instruction tuning (NVlabs/VILA: llava/data/registry/mixtures.yaml, vila-v1.5-sft):
  # every data set whole, its prompts in its rows; the sets of videos are left out.
  'vila_1_5_sft': tuple(Share(name=name) for name in (
    'ai2d_train_12k', 'chartqa_train_18k', 'docvqa_train_10k', 'dvqa_train_200k', 'geoqa',
    'llava_instruct', 'math', 'scienceqa', 'sharegpt4v_gpt4_100k', 'sharegpt4v_sft', 'sherlock',
    'synthdog_en', 'wit_subset', *(f'vflan_{part}' for part in (
      'image_paragraph_captioning', 'textcap', 'visual_dialog', 'clevr', 'nlvr', 'visual_mrc',
      'text_flan_1m', 'docvqa', 'gqa', 'ivqa', 'ocr_vqa', 'st_vqa', 'viquae', 'vqa_v2')))),
  # MC-LLaVA (visheratin/mc-llava: data_module.py): amounts drawn per epoch where it draws.
  'mc_llava': (
    Share(name='landmarks'),
    Share(name='street_signs', format=_ONE),
    Share(name='objects', amount=35_000, format=_ONE),
    Share(name='captions', amount=100_000),
    Share(name='questions', amount=50_000),
    Share(name='ocrvqa', format=_ONE),
    Share(name='textvqa'),
  ),
}


def published_mixture(name: str, sources: Mapping[str, Source], *, seed: int = 0
                      ) -> grain.MapDataset:
  """A mixture of `MIXTURES` over the user's copies of its data sets.

  Raises:
    UserError: unknown mixture, or data sets missing (all named).
  """
  if name not in MIXTURES:
    raise UserError(unknown(name, MIXTURES, what='mixture'))
  return mix(MIXTURES[name], sources, seed=seed)
