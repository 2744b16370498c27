"""Running a benchmark: batched, resumable, with a result that says what it was made from.

A result folder holds

    run.json                          what is being run; a resumed run must match it
    predictions-00000-of-00001.jsonl  raw answers, appended as they come (one file per process)
    predictions.jsonl                 all answers in the benchmark's order, with their scores
    result.json                       the score and its provenance
    report.html                       examples with pictures
    <submission>                      the server's file, where the benchmark has one

The model is a function of a list of (image, question), or of a queue of them; everything about
devices is inside it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import datetime
import functools
import json
from pathlib import Path
import time
from typing import Any, Literal

import numpy as np
from PIL import Image
from tqdm import tqdm

from hrvlm_jax.core import json_text
from hrvlm_jax.core.errors import UserError, raise_all
from hrvlm_jax.core.images import MAX_PIXELS
from hrvlm_jax.evaluation import benchmarks, prompts, provenance, records, report
from hrvlm_jax.evaluation.benchmarks.base import Benchmark, Sample, Samples
from hrvlm_jax.evaluation.metrics.choice import likelihood_choice
from hrvlm_jax.evaluation.result import Result, score_texts
from hrvlm_jax.vlm.answer import answer_all

Picture = Image.Image | tuple[Image.Image, ...] | None
AnswerFn = Callable[[list[tuple[Picture, str]]], Sequence['str | Answer']]
LikelihoodFn = Callable[[list[tuple[Picture, str, str]]], Sequence[float]]
OverlayFn = Callable[[Picture, str], Image.Image]
# (number, function that gives picture and question) of every question, how many at a time ->
# (number, answer) of those that are complete, again and again; a function's error is its answer.
QueueFn = Callable[[Iterable[tuple[int, Callable[[], tuple[Picture, str]]]], int],
                   Iterator[list[tuple[int, 'str | Answer | UserError']]]]


@dataclasses.dataclass(frozen=True)
class Answer:
  """A model's answer with what it cost; a plain string does as well.

  Attributes:
    text: decoded, without special tokens, not stripped.
    finish_reason: 'eos' or 'length' ('' when not known); 'length' counts as truncated.
    image_tokens, new_tokens: visual tokens of the prompt and generated tokens, None: not known.
  """

  text: str
  finish_reason: str = ''
  image_tokens: int | None = None
  new_tokens: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
  """The model's side of the provenance; every value must be something JSON can hold.

  Attributes:
    model: name for tables. system: chooses prompt templates. checkpoint: path or hub id.
    checkpoint_hash: see `provenance.folder_hash`. config: of the model. preprocessing: knobs of the
      image side. generation: sampling settings.
  """

  model: str
  system: str = prompts.DEFAULT
  checkpoint: str = ''
  checkpoint_hash: str = ''
  config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  preprocessing: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
  """What is evaluated, as functions; each may be absent where the benchmark does not need it.

  Attributes:
    setup: what the model is.
    answer: list of (image, question) -> as many answers. The image is a PIL image, a tuple of them,
      or None for a question without one. Always called with `batch_size` pairs (the last batch is
      filled up with repetitions whose answers are dropped), so shapes can stay fixed.
    likelihood: list of (image, question, option) -> mean token cross-entropy of each option.
    overlay: (image, question) -> picture of where the model looked, for the report's examples.
    queue: in place of `answer`: answers each question as soon as there is room, see `QueueFn`.
  """

  setup: Setup
  answer: AnswerFn | None = None
  likelihood: LikelihoodFn | None = None
  overlay: OverlayFn | None = None
  queue: QueueFn | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """How a benchmark is run.

  Attributes:
    split: default: the benchmark's first.
    prompt_file: a template to use instead of the packaged one.
    batch_size: questions at a time.
    limit: only the first samples; the result says so.
    examples: how many right and how many wrong answers the report shows.
    alpha, max_pixels: how images are opened, see `core.images.open_image`.
    bad_images: a sample whose image cannot be used is not asked and counts as 'wrong', or all
      images are decoded before the first question and one that cannot be used is a 'stop'.
    process_index, process_count: this process answers samples process_index::process_count.
    barrier: waits for all processes; called before and after the files are merged.
    together: the processes answer every batch together, each its part of it, and the first writes:
      gives them an array of the first. None: each answers samples of its own.
  """

  split: str | None = None
  prompt_file: str | Path | None = None
  batch_size: int = 8
  limit: int | None = None
  examples: int = 12
  alpha: str = 'drop'
  max_pixels: int = MAX_PIXELS
  bad_images: Literal['wrong', 'stop'] = 'wrong'
  process_index: int = 0
  process_count: int = 1
  barrier: Callable[[], None] = lambda: None
  together: Callable[[np.ndarray], np.ndarray] | None = None
  progress: bool = True

  def __post_init__(self):
    if self.batch_size < 1 or (self.limit is not None and self.limit < 1) or \
        not 0 <= self.process_index < self.process_count:
      raise UserError(
        f'batch_size {self.batch_size}, limit {self.limit}, process {self.process_index} of '
        f'{self.process_count}: expected positive numbers and an index below the count')


@dataclasses.dataclass(frozen=True)
class _Task:
  """The questions of one run, as they are asked, and all that decides their answers."""

  benchmark: Benchmark
  split: str
  samples: Samples
  questions: Mapping[str, str]
  identity: Mapping[str, Any]


def evaluate(benchmark: str | Benchmark, model: Model, *, data: str | Path, out: str | Path,
             options: Options = Options()) -> Result | None:
  """Answers every question of a benchmark, scores the answers and writes a result folder.

  A run that was killed goes on where it stopped; at most `batch_size` questions are asked again.

  Args:
    benchmark: name or object.
    data: folder with the official files. out: result folder, made if absent.

  Returns:
    The result; None on processes other than the first.

  Raises:
    UserError: unknown benchmark, bad files, images that cannot be decoded (under 'stop', all of
      them named), a result folder of another run, an answer function that returns the wrong
      number of answers.
  """
  benchmark = benchmarks.get(benchmark) if isinstance(benchmark, str) else benchmark
  reading = dict(alpha=options.alpha, max_pixels=options.max_pixels)
  ask = _ask(benchmark, model, reading)
  task = _task(benchmark, model.setup, Path(data), options)
  out, first = Path(out), options.process_index == 0
  out.mkdir(parents=True, exist_ok=True)
  if options.bad_images == 'stop':
    _decode_all(task, options)
  _claim(out, task.identity, write=first)
  _answer(task, ask, out, options)
  options.barrier()
  result = None
  if first:
    found = records.merge(out)
    result = score_texts(
      benchmark, task.split, task.samples, found, identity=task.identity,
      published=None if options.limit else benchmark.splits[task.split])
    _write_folder(out, task, found, result, examples=options.examples, reading=reading,
                  overlay=model.overlay if options.process_count == 1 else None)
  options.barrier()
  return result


def score_predictions(
  benchmark: str | Benchmark, predictions: str | Path, *, data: str | Path,
  out: str | Path | None = None, split: str | None = None,
  identity: Mapping[str, Any] | None = None,
) -> Result:
  """Scores a file of predictions, somebody else's too: lines with `sample_id` and `text`.

  A sample without a prediction counts as wrong and in `n_missing`; then no submission is written.

  Args:
    out: folder for the files that `evaluate` writes too, the shards and run.json excepted; it must
      be empty. None: nothing is written.
    identity: further facts about where the predictions come from.

  Raises:
    UserError: bad files; predictions of samples that the benchmark does not have; `out` in use.
  """
  benchmark = benchmarks.get(benchmark) if isinstance(benchmark, str) else benchmark
  split = split or benchmark.default_split
  samples = benchmark.load(data, split)
  found = records.read(predictions)
  known = {s.id for s in samples}
  extra = [number for number in found if number not in known]
  if extra:
    raise UserError(f'{predictions}: {len(extra)} predictions are of samples that {benchmark.name} '
                    f'{split} does not have, such as {", ".join(extra[:3])}')
  # How they were asked is only known where the file says so.
  questions = {s.id: found.get(s.id, {}).get('prompt', s.question) for s in samples}
  base = {'task': benchmark.name, 'split': split, 'limit': None,
          'dataset': _dataset(samples, Path(data)), 'predictions': str(predictions)}
  task = _Task(benchmark, split, samples, questions, base | dict(identity or {}))
  result = score_texts(benchmark, split, samples, found, identity=task.identity,
                       published=benchmark.splits[split])
  if out is not None:
    out = Path(out)
    if out.is_dir() and any(out.iterdir()):
      raise UserError(f'{out}: is not empty; choose another result folder')
    out.mkdir(parents=True, exist_ok=True)
    _write_folder(out, task, found, result)
  return result


def _task(benchmark: Benchmark, setup: Setup, data: Path, options: Options) -> _Task:
  """The samples of a split with their questions; the identity says what decides the answers.

  Two runs may share a folder only when it is equal.
  """
  split = options.split or benchmark.default_split
  loaded = benchmark.load(data, split)
  samples = Samples(loaded[:options.limit], loaded.files)
  template = prompts.load(benchmark.template or benchmark.name, setup.system,
                          path=options.prompt_file)
  value = {
    'task': benchmark.name, 'split': split, 'limit': options.limit,
    'dataset': _dataset(samples, data),
    'prompt_template': {'source': template.source, 'text': template.text, 'sha256': template.hash},
    'max_new_tokens': benchmark.max_new_tokens, **dataclasses.asdict(setup)}
  if options.alpha != 'drop':
    value['preprocessing'] = dict(value['preprocessing']) | {'alpha': options.alpha}
  try:
    identity = json.loads(json.dumps(value))
  except TypeError as error:
    raise UserError(f'evaluation setup: {error}; give plain numbers, texts and lists') from error
  questions = {sample.id: template.render(sample) for sample in samples}
  return _Task(benchmark, split, samples, questions, identity)


def _answer(task: _Task, ask: Callable, out: Path, options: Options) -> None:
  """Asks what no process has answered yet of this process's samples; answers go to disk as they
  come."""
  index, count = options.process_index, options.process_count
  if options.together is not None:
    index, count = 0, 1
  mine = task.samples[index::count]
  writes = options.together is None or options.process_index == 0
  with contextlib.ExitStack() as stack:
    todo = list(mine)
    if writes:
      elsewhere = _answered_by_other_layouts(out, count)
      name = records.SHARDS.format(index=index, count=count)
      file = stack.enter_context(records.PredictionsFile(out / name))
      todo = [s for s in mine if s.id not in file.done and s.id not in elsewhere]
    if options.together is not None:
      left = {sample.id for sample in todo}
      left = options.together(np.asarray([sample.id in left for sample in mine], bool))
      todo = [sample for sample, asked in zip(mine, left, strict=True) if asked]
    with tqdm(total=len(mine), desc=task.benchmark.name, unit='sample',
              initial=len(mine) - len(todo),
              disable=not options.progress or options.process_index > 0) as bar:
      began = time.monotonic()
      for answered in ask([(sample, task.questions[sample.id]) for sample in todo],
                          options.batch_size):
        seconds = round((time.monotonic() - began) / len(answered), 4)
        if writes:
          file.append([
            {'sample_id': sample.id, 'prompt': question, **fields, 'seconds': seconds,
             'process_index': options.process_index}
            for (sample, question), fields in answered])
        bar.update(len(answered))
        began = time.monotonic()


def _dataset(samples: Samples, data: Path) -> dict[str, Any]:
  """Which annotation files the samples came from. Images are not hashed."""
  return {'source': str(data), 'files': sorted({p.name for p in samples.files}),
          'sha256': provenance.files_hash(samples.files, root=data), 'n': len(samples)}


def _claim(out: Path, identity: dict, *, write: bool) -> None:
  """Notes in run.json what the folder holds, or checks that it is the same."""
  path = out / 'run.json'
  if path.exists():
    try:
      found = json_text.loads(path.read_text('utf-8'))
    except ValueError as error:
      raise UserError(f'{path}: is not JSON ({error}); choose another result folder') from error
    differing = [key for key in sorted({*found, *identity}) if found.get(key) != identity.get(key)]
    if differing:
      raise UserError(f'{out}: holds another run (it differs in {", ".join(differing)}); choose '
                      'another result folder')
  elif write:
    records.write_whole(path, json.dumps(identity, indent=2) + '\n')


def _answered_by_other_layouts(out: Path, process_count: int) -> set[str]:
  """Samples that an earlier run with another number of processes has answered."""
  done: set[str] = set()
  for path in out.glob('predictions-*-of-*.jsonl'):
    if int(path.stem.rsplit('-', 1)[1]) != process_count:
      with records.PredictionsFile(path) as file:
        done.update(file.done)
  return done


def _decode_all(task: _Task, options: Options) -> None:
  """Raises:
    UserError: images of this process's samples that cannot be used.
  """
  problems, mine = [], task.samples[options.process_index::options.process_count]
  for sample in tqdm(mine, desc='images', unit='sample', disable=not options.progress):
    try:
      pictures(sample, alpha=options.alpha, max_pixels=options.max_pixels)
    except UserError as error:
      problems.append(f'sample {sample.id}: {error}')
  raise_all(f"{task.benchmark.name}: images that cannot be used (bad_images='wrong' counts their "
            'samples as wrong)', problems)


def pictures(sample: Sample, **reading) -> Picture:
  """The decoded image of a sample, several as a tuple, None without one.

  Args:
    reading: `alpha` and `max_pixels` of `core.images.open_image`.
  """
  opened = tuple(image.open(**reading) for image in sample.images)
  return opened if len(opened) > 1 else opened[0] if opened else None


def _ask(benchmark: Benchmark, model: Model, reading: Mapping[str, Any]) -> Callable:
  """A function of (sample, question) pairs and how many are asked at a time.

  It yields lists of (pair, fields of its prediction), of every pair once. A sample whose image
  cannot be used is not asked: its text is empty and `bad_image` says why.

  Raises:
    UserError: the model lacks what the benchmark asks for.
  """
  if benchmark.likelihood:
    if model.likelihood is None:
      raise UserError(f'{benchmark.name}: needs likelihoods of the options, which this model lacks')
    answer = functools.partial(_likeliest, model.likelihood)
  elif model.queue is not None:
    return functools.partial(_in_queue, model.queue, reading)
  elif model.answer is None:
    raise UserError(f'{benchmark.name}: needs a function that answers questions')
  else:
    answer = lambda asked: [_fields(answer) for answer in model.answer(
      [(picture, question) for _, picture, question in asked])]

  def ask(asked: Sequence[tuple[Sample, str]]) -> list[dict]:
    opened, bad = {}, {}
    for number, (sample, question) in enumerate(asked):
      try:
        opened[number] = sample, pictures(sample, **reading), question
      except UserError as error:
        bad[number] = _bad(error)
    if not opened:
      return list(bad.values())
    whole = list(opened.values())  # filled up: one program serves every batch
    answers = answer(whole + whole[-1:] * (len(asked) - len(whole)))
    if len(answers) != len(asked):
      raise UserError(
        f'the answer function gave {len(answers)} answers to {len(asked)} questions')
    found = bad | dict(zip(opened, answers[:len(opened)], strict=True))
    return [found[number] for number in range(len(asked))]

  def batches(asked: Sequence[tuple[Sample, str]], size: int) -> Iterator[list]:
    for batch, answered in answer_all(ask, asked, batch_size=size):
      yield list(zip(batch, answered, strict=True))

  return batches


def _in_queue(queue: QueueFn, reading: Mapping[str, Any], asked: Sequence[tuple[Sample, str]],
              size: int) -> Iterator[list]:
  """As `_ask` says, each question as soon as there is room for it."""
  make = lambda sample, question: (pictures(sample, **reading), question)
  pairs = ((number, functools.partial(make, *pair)) for number, pair in enumerate(asked))
  for answered in queue(pairs, size):
    yield [(asked[number], _bad(answer) if isinstance(answer, UserError) else _fields(answer))
           for number, answer in answered]


def _bad(error: UserError) -> dict[str, Any]:
  return {'text': '', 'finish_reason': '', 'bad_image': str(error)}


def _likeliest(likelihood: LikelihoodFn, asked: Sequence[tuple[Sample, Picture, str]]
               ) -> list[dict]:
  """The option of the lowest loss for each question, with the losses of all."""
  triples = []
  for sample, picture, question in asked:
    triples += [(picture, question, option) for option in sample.choices]
  losses = [float(loss) for loss in likelihood(triples)]
  if len(losses) != len(triples):
    raise UserError(
      f'the likelihood function gave {len(losses)} losses for {len(triples)} options')
  rest = iter(losses)
  rows = [[next(rest) for _ in sample.choices] for sample, *_ in asked]
  return [{'text': sample.choices[likelihood_choice(row)], 'finish_reason': '', 'losses': row}
          for (sample, *_), row in zip(asked, rows)]


def _fields(answer: str | Answer) -> dict[str, Any]:
  answer = Answer(answer) if isinstance(answer, str) else answer
  if not isinstance(answer, Answer):
    raise UserError(f'the answer function gave {type(answer).__name__}, expected texts')
  return {'text': answer.text, 'finish_reason': answer.finish_reason,
          'num_image_tokens': answer.image_tokens, 'num_new_tokens': answer.new_tokens}


def _write_folder(out: Path, task: _Task, found: Mapping[str, dict], result: Result, *,
                  overlay: OverlayFn | None = None, examples: int = Options.examples,
                  reading: Mapping[str, Any] | None = None) -> None:
  """All files; result.json comes last but for the report: without it a folder is unfinished."""
  samples, benchmark = task.samples, task.benchmark
  lines = []
  for sample, score in zip(samples, result.per_sample or [None] * len(samples)):
    record = found.get(sample.id, {'text': ''})
    lines.append(json.dumps({
      'sample_id': sample.id, 'prompt': task.questions[sample.id], 'text': record['text'],
      'references': sample.answers, 'category': sample.category, 'score': score,
      'finish_reason': record.get('finish_reason', ''),
      'num_image_tokens': record.get('num_image_tokens'),
      'num_new_tokens': record.get('num_new_tokens'),
      **({'bad_image': record['bad_image']} if 'bad_image' in record else {})},
      ensure_ascii=False))
  records.write_whole(out / records.MERGED, '\n'.join(lines) + '\n')
  if benchmark.submission and not result.n_missing:
    records.write_submission(benchmark, samples, [found[s.id]['text'] for s in samples], out)
  finished = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
  value = result.to_dict() | {'finished': finished}
  records.write_whole(out / 'result.json', json.dumps(value, indent=2) + '\n')
  report.write(out / 'report.html', result, samples, found, overlay_fn=overlay,
               questions=task.questions, count=examples, reading=reading or {})
