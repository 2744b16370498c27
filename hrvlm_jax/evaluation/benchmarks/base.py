"""What a benchmark is: samples read from its official files, a prompt, a scorer, a submission file.

Readers collect every problem of their files (malformed lines, missing keys, missing images, empty
answers, duplicated ids) in a `Collector` and raise them as one `UserError`; nothing is dropped.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import dataclasses
import json
from pathlib import Path
from typing import Any

from PIL import Image

from hrvlm_jax.core import images, json_text
from hrvlm_jax.core.errors import UserError, raise_all
from hrvlm_jax.core.text import has_half
from hrvlm_jax.evaluation.metrics.letter import LETTERS

# So many problems are listed in full; the rest is counted.
MAX_LISTED = 20


@dataclasses.dataclass(frozen=True)
class ImageSource:
  """An image of a benchmark, decoded when it is needed.

  `name` is how errors and reports call it; `read` gives the bytes of the image file.
  """

  name: str
  read: Callable[[], bytes]
  path: Path | None = None

  def open(self, **reading) -> Image.Image:
    """The decoded image, in its own mode, EXIF orientation ignored as the original codes do.

    Args:
      reading: `alpha` and `max_pixels` of `core.images.open_image`.
    """
    return images.open_image(self.read(), name=self.name, **{'exif': 'ignore', **reading})


@dataclasses.dataclass(frozen=True)
class Sample:
  """One question.

  Attributes:
    id: unique within the benchmark and split.
    images: none (text only), one, or several.
    question: as in the file; the prompt template adds instructions.
    answers: references; None where the split hides its labels.
    choices: texts of multiple choice options; `answers[0]` is then the right letter.
    category: the group under which results are reported.
    prompt: replaces the benchmark's template for this sample (MathVista brings its own).
    fields: values for the template's `{hint}`, `{ocr}` and the like.
    meta: whatever the scorer or the submission file needs (numbers, boxes, original ids).
  """

  id: str
  images: tuple[ImageSource, ...]
  question: str
  answers: tuple[str, ...] | None
  choices: tuple[str, ...] = ()
  category: str = ''
  prompt: str | None = None
  fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
  meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Samples(list):
  """Samples of one split, and the `files` that they were read from (without the images)."""

  def __init__(self, samples: Iterable[Sample] = (), files: Iterable[Path] = ()):
    super().__init__(samples)
    self.files = tuple(files)


@dataclasses.dataclass
class Scores:
  """Outcome of scoring one benchmark.

  Attributes:
    metric: name of the headline number, which is `values[metric]`.
    values: every number by its full name (percent, or points where the name says so).
    by_category: category -> headline metric within it.
    per_sample: the headline's score of each sample, 0 to 1, in sample order; for reports.
    unparsed: answers that no rule could read (they count as wrong).
    units: the values whose mean (or `statistic`) is the headline; for its confidence interval.
    statistic: positions of resampled units -> headline, where it is not 100 times the mean.
    strata: labels of the units when they are to be resampled within groups of fixed size.
    notes: sentences that have to stand beside the number.
  """

  metric: str
  values: dict[str, float]
  by_category: dict[str, float] = dataclasses.field(default_factory=dict)
  per_sample: Sequence[float] = ()
  unparsed: int = 0
  units: Sequence[float] | None = None
  statistic: Callable | None = None
  strata: Sequence | None = None
  notes: tuple[str, ...] = ()

  @property
  def value(self) -> float:
    return self.values[self.metric]


Score = Callable[[Sequence[Sample], Sequence[str]], Scores]


@dataclasses.dataclass(frozen=True)
class Submission:
  """The file that an evaluation server asks for."""

  filename: str
  write: Callable[[Sequence[Sample], Sequence[str]], Any]  # -> a JSON value


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """One entry of the registry.

  Attributes:
    name: as on the command line.
    title: the benchmark's own name and what is scored.
    files: the official files it reads, in words, for help texts and errors.
    splits: split -> number of samples published for it (None: not fixed). The first is the default.
    read: (folder, split) -> samples.
    score: samples and answers (one string each, '' where missing) -> Scores; None when only a
      server or a judge can score.
    template: name of the prompt file (default: the benchmark's name).
    max_new_tokens: generation limit of the benchmark's convention.
    submission: how to write the server's file, where the benchmark has a server or a judge.
    likelihood: the answer is the option with the lowest loss, not a generated text.
  """

  name: str
  title: str
  files: str
  splits: Mapping[str, int | None]
  read: Callable[[Path, str], Samples]
  score: Score | None
  template: str = ''
  max_new_tokens: int = 16
  submission: Submission | None = None
  likelihood: bool = False

  @property
  def default_split(self) -> str:
    return next(iter(self.splits))

  def load(self, folder: str | Path, split: str | None = None) -> Samples:
    """Samples of a split.

    Raises:
      UserError: unknown split, missing or malformed files, every problem in one message.
    """
    split = split or self.default_split
    if split not in self.splits:
      raise UserError(
          f'{self.name}: unknown split {split!r}; it has {", ".join(self.splits)}')
    folder = Path(folder)
    if not folder.is_dir():
      raise UserError(f'{self.name}: no such folder {folder}; expected one with {self.files}')
    samples = self.read(folder, split)
    if not samples:
      raise UserError(f'{self.name}: no samples of split {split} in {folder}')
    return samples


class Collector:
  """Gathers samples and problems of one reader."""

  def __init__(self, benchmark: str, folder: Path):
    self.benchmark, self.folder = benchmark, folder
    self.samples: list[Sample] = []
    self.problems: list[str] = []
    self._seen: dict[str, str] = {}
    self.sources: list[Path] = []

  def find(self, *names: str, optional: bool = False) -> Path | None:
    """The first of the named files that exists in the folder (glob patterns allowed)."""
    for name in names:
      found = sorted(self.folder.glob(name)) if any(c in name for c in '*?[') \
          else [self.folder / name]
      if found and found[0].exists():
        used = found if found[0].suffix == '.parquet' else found[:1]  # shards belong together
        self.sources.extend(path for path in used if path.is_file())
        return found[0]
    if optional:
      return None
    raise UserError(f'{self.benchmark}: {self.folder} lacks {" or ".join(names)}')

  def listed(self, path: Path, key: str | None = None) -> Iterator[tuple[str, dict]]:
    """`rows` of a JSON file, or of one key of it."""
    if key is None:
      return self.rows(read_json(path), path.name)
    return self.rows(self.section(path, key), f'{path.name}:{key}')

  def each(self, rows: Iterable[tuple[str, dict]], **kinds: type | tuple | None
           ) -> Iterator[tuple]:
    """(place, row, value of each key) of the rows that have them all; a problem for any other.

    Args:
      kinds: key -> type (`get`); None: the split hides it, its value is None.
    """
    for where, row in rows:
      values = [None if kind is None else self.get(row, key, where, kind)
                for key, kind in kinds.items()]
      if all(value is not None or kind is None
             for value, kind in zip(values, kinds.values())):
        yield where, row, *values

  def section(self, path: Path, key: str) -> Any:
    """The list under one key of a JSON file.

    Raises:
      UserError: not JSON, or without that key.
    """
    value = read_json(path)
    if not isinstance(value, Mapping) or key not in value:
      raise UserError(
          f'{self.benchmark}: {path} has no top level key {key!r}; is it the right file?')
    return value[key]

  def rows(self, values: Any, where: str) -> Iterator[tuple[str, dict]]:
    """(place, row) of every element of a list or mapping that is itself a mapping."""
    items = values.items() if isinstance(values, Mapping) else enumerate(values) \
        if isinstance(values, list) else None
    if items is None:
      raise UserError(f'{self.benchmark}: {where}: found {_kind(values)}, expected a list')
    for key, row in items:
      place = f'{where}[{key}]'
      if isinstance(row, Mapping):
        yield place, dict(row)
      else:
        self.problems.append(f'{place}: found {_kind(row)}, expected a mapping')

  def get(self, row: Mapping, key: str, where: str, kind: type | tuple = str, *,
          default: Any = ...) -> Any:
    """`row[key]` of the asked type; a problem and None otherwise. Whole numbers pass as text."""
    if key not in row or row[key] is None:
      if default is not ...:
        return default
      self.problems.append(f'{where}: lacks {key!r}')
      return None
    value = row[key]
    if kind is str and isinstance(value, int) and not isinstance(value, bool):
      return str(value)
    if not isinstance(value, kind):
      names = kind if isinstance(kind, tuple) else (kind,)
      expected = ' or '.join(n.__name__ for n in names)
      self.problems.append(f'{where}: {key!r} is {_kind(value)}, expected {expected}')
      return None
    return value

  def boxes(self, values: Any, where: str) -> list[list[float]] | None:
    """Boxes of four numbers each, [] for null; None after a problem was noted."""
    values = [] if values is None else values
    if not isinstance(values, list) or not all(
        isinstance(box, list) and len(box) == 4 and all(
          isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) < 1e9 for v in box)
        for box in values):
      self.problems.append(f'{where}: found {_kind(values)}, expected a list of boxes of 4 numbers')
      return None
    return values

  def options(self, values: Any, where: str, *, answer: str | None = None,
              gaps: bool = True) -> tuple[str, ...] | None:
    """The choices of a question in the order of their letters; '' is a gap.

    An empty or absent option ('', null, NaN) keeps its letter, as VLMEvalKit's columns do: the
    options after it are called what the file calls them.

    Args:
      answer: the right letter, where the file gives one; it must be that of an option with a text.
      gaps: allowed; else every option must have a text.

    Returns:
      The texts up to the last that is none, or None after a problem was noted.
    """
    if not isinstance(values, (list, tuple)):
      self.problems.append(f'{where}: options are {_kind(values)}, expected a list of texts')
      return None
    texts = [_option(value) for value in values]
    if gaps:
      while texts and not texts[-1]:
        texts.pop()
    if not 1 <= len(texts) <= len(LETTERS) or (not gaps and '' in texts):
      self.problems.append(f'{where}: has {len(texts)} options, {texts.count("")} of them empty; '
                           f'expected 1 to {len(LETTERS)} texts')
      return None
    known = [letter for letter, text in zip(LETTERS, texts) if text]
    if answer is not None and answer not in known:
      self.problems.append(f'{where}: answer {answer!r} is not the letter of one of its options '
                           f'({", ".join(known)})')
      return None
    return tuple(texts)

  def add(self, sample: Sample, where: str) -> None:
    """Keeps a sample after the checks that all benchmarks share."""
    if not isinstance(sample.category, str):  # files have numbers and worse there
      sample = dataclasses.replace(sample, category=str(sample.category))
    if sample.id in self._seen:
      self.problems.append(
          f'{where}: id {sample.id} is a duplicate of the one at {self._seen[sample.id]}')
      return
    self._seen[sample.id] = where
    if not sample.question.strip() and sample.prompt is None:
      self.problems.append(f'{where}: the question of {sample.id} is empty')
    texts = (sample.question, sample.prompt or '', *sample.choices, *(sample.answers or ()))
    if any(has_half(text) for text in texts):
      self.problems.append(f'{where}: a text of {sample.id} holds half a character (a lone '
                           'surrogate)')
    if sample.answers is not None and not any(a.strip() for a in sample.answers):
      self.problems.append(f'{where}: {sample.id} has no reference answer (empty)')
    for image in sample.images:
      if not isinstance(image, ImageSource):
        self.problems.append(f'{where}: the image of {sample.id} is {_kind(image)}, expected the '
                             'name of a file')
      elif image.path is not None and not image.path.is_file():
        self.problems.append(f'{where}: image of {sample.id} is missing: {image.path}')
    self.samples.append(sample)

  def finish(self) -> Samples:
    """The samples, when nothing is wrong.

    Raises:
      UserError: all problems (the first 20 in full).
    """
    raise_all(f'{self.benchmark}: {self.folder}', self.problems, most=MAX_LISTED)
    return Samples(self.samples, self.sources)


def file_image(path: Path) -> ImageSource:
  """An image file on disk."""
  return ImageSource(str(path), lambda: images.read_file(path), path)


def first_image(*candidates: Path) -> ImageSource:
  """The first candidate that exists; the first of all when none does (it will be reported)."""
  return file_image(next((path for path in candidates if path.is_file()), candidates[0]))


def read_json(path: Path) -> Any:
  """A JSON file.

  Raises:
    UserError: not readable, or not JSON, with line and column.
  """
  text = read_text(path)
  try:
    return json_text.loads(text)
  except json.JSONDecodeError as error:
    raise UserError(
        f'{path}: is not JSON: {error.msg} at line {error.lineno} column {error.colno}') from error
  except (ValueError, RecursionError) as error:  # a number of 5000 digits, 10,000 brackets
    raise UserError(f'{path}: is not JSON that can be read ({error})') from error


def read_text(path: Path) -> str:
  """A text file in UTF-8, with or without a byte order mark.

  Raises:
    UserError: not readable, another encoding.
  """
  try:
    return path.read_text('utf-8-sig')
  except UnicodeDecodeError as error:
    raise UserError(f'{path}: is not UTF-8 text (byte {error.object[error.start]:#04x} at place '
                    f'{error.start}); write it anew as UTF-8: iconv -f WINDOWS-1252 -t UTF-8 '
                    '(or GBK, UTF-16, ...: whatever it is in)') from error
  except OSError as error:
    raise UserError(f'{path}: cannot be read ({error})') from error


def read_json_lines(path: Path, problems: list[str]) -> Iterator[tuple[str, dict]]:
  """(place, object) of each non-empty line; malformed lines become problems."""
  lines = read_text(path).split('\n')
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    where = f'{path.name}:{number}'
    try:
      value = json_text.loads(line)
    except (ValueError, RecursionError) as error:
      problems.append(f'{where}: is not JSON ({getattr(error, "msg", error)})')
      continue
    if isinstance(value, dict):
      yield where, value
    else:
      problems.append(f'{where}: found {_kind(value)}, expected an object')


def _option(value: Any) -> str:
  """The text of an option, '' for a gap: empty cells, null, and what pandas writes for them."""
  text = '' if value is None else str(value)
  return '' if text.strip().lower() in ('', 'nan') else text


def _kind(value: Any) -> str:
  shown = repr(value)
  shown = shown if len(shown) <= 40 else f'{shown[:37]}...'
  return f'{type(value).__name__} {shown}'
