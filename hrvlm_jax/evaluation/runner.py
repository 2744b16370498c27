"""Running a benchmark: batched, resumable, with a result that says what it was made from.

A result folder holds

    run.json                          what is being run; a resumed run must match it
    predictions-00000-of-00001.jsonl  raw answers, appended batch by batch (one file per process)
    predictions.jsonl                 all answers in the benchmark's order, with their scores
    result.json                       the score and its provenance
    report.html                       examples with pictures
    <submission>                      the server's file, where the benchmark has one

The model is a function of a list of (image, question); everything about devices is inside it.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import datetime
import json
from pathlib import Path
import time
from typing import Any

from PIL import Image
from tqdm import tqdm

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.evaluation import benchmarks, prompts, provenance, records, report, submission
from hrvlm_jax.evaluation.benchmarks.base import Benchmark, Sample, Samples
from hrvlm_jax.evaluation.metrics.choice import likelihood_choice
from hrvlm_jax.evaluation.result import Result, score_texts

Picture = Image.Image | tuple[Image.Image, ...] | None
AnswerFn = Callable[[list[tuple[Picture, str]]], Sequence['str | Answer']]
LikelihoodFn = Callable[[list[tuple[Picture, str, str]]], Sequence[float]]
OverlayFn = Callable[[Picture, str], Image.Image]


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


def evaluate(
    benchmark: str | Benchmark,
    answer_fn: AnswerFn | None,
    *,
    data: str | Path,
    out: str | Path,
    setup: Setup,
    split: str | None = None,
    prompt_file: str | Path | None = None,
    batch_size: int = 8,
    limit: int | None = None,
    likelihood_fn: LikelihoodFn | None = None,
    overlay_fn: OverlayFn | None = None,
    examples: int = 12,
    process_index: int = 0,
    process_count: int = 1,
    barrier: Callable[[], None] | None = None,
    progress: bool = True,
) -> Result | None:
  """Answers every question of a benchmark, scores the answers and writes a result folder.

  A run that was killed goes on where it stopped; at most one batch is asked again.

  Args:
    benchmark: name or object.
    answer_fn: list of (image, question) -> as many answers. The image is a PIL image, a tuple of
      them, or None for a question without one. Always called with `batch_size` pairs (the last
      batch is filled up with repetitions whose answers are dropped), so shapes can stay fixed. Not
      needed for a likelihood benchmark.
    data: folder with the official files. out: result folder, made if absent.
    setup: what the model is.
    prompt_file: a template to use instead of the packaged one.
    limit: only the first samples; the result says so.
    likelihood_fn: list of (image, question, option) -> mean token cross-entropy of each option.
    overlay_fn: (image, question) -> picture of where the model looked, for the report's examples.
    examples: how many right and how many wrong answers the report shows.
    process_index, process_count: this process answers samples process_index::process_count.
    barrier: waits for all processes; called before and after the files are merged.

  Returns:
    The result; None on processes other than the first.

  Raises:
    UserError: unknown benchmark, bad files, an image that cannot be decoded, a result folder of
      another run, an answer function that returns the wrong number of answers.
  """
  benchmark = benchmarks.get(benchmark) if isinstance(benchmark, str) else benchmark
  if benchmark.likelihood and likelihood_fn is None:
    raise UserError(f'{benchmark.name}: needs likelihoods of the options, which this model lacks')
  if not benchmark.likelihood and answer_fn is None:
    raise UserError(f'{benchmark.name}: needs a function that answers questions')
  if batch_size < 1 or (limit is not None and limit < 1) or not 0 <= process_index < process_count:
    raise UserError(f'batch_size {batch_size}, limit {limit}, process {process_index} of '
                    f'{process_count}: expected positive numbers and an index below the count')
  split = split or benchmark.default_split
  loaded = benchmark.load(data, split)
  samples = Samples(loaded[:limit], loaded.files)
  template = prompts.load(benchmark.template or benchmark.name, setup.system, path=prompt_file)
  questions = {sample.id: template.render(sample) for sample in samples}
  identity = _identity(benchmark, split, limit, samples, Path(data), template, setup)

  out = Path(out)
  out.mkdir(parents=True, exist_ok=True)
  _claim(out, identity, write=process_index == 0)
  name = records.SHARDS.format(index=process_index, count=process_count)
  ask = _ask_likelihood(likelihood_fn) if benchmark.likelihood else _ask(answer_fn, batch_size)
  elsewhere = _answered_by_other_layouts(out, process_count)
  with records.PredictionsFile(out / name) as file:
    todo = [s for s in samples[process_index::process_count]
            if s.id not in file.done and s.id not in elsewhere]
    bar = tqdm(total=len(samples[process_index::process_count]), desc=benchmark.name, unit='sample',
               initial=len(samples[process_index::process_count]) - len(todo),
               disable=not progress or process_index > 0)
    with bar:
      for start in range(0, len(todo), batch_size):
        batch = todo[start:start + batch_size]
        began = time.monotonic()
        answered = ask(batch, [questions[s.id] for s in batch])
        seconds = (time.monotonic() - began) / len(batch)
        file.append([
            {'sample_id': s.id, 'prompt': questions[s.id], **fields, 'seconds': round(seconds, 4),
             'process_index': process_index} for s, fields in zip(batch, answered)])
        bar.update(len(batch))
  if barrier:
    barrier()
  result = None
  if process_index == 0:
    found = records.merge(out)
    result = score_texts(benchmark, split, samples, found, identity=identity,
                         published=benchmark.splits[split] if limit is None else None)
    _write_folder(out, benchmark, samples, questions, found, result)
    overlay = overlay_fn if process_count == 1 else None
    report.write(out / 'report.html', result, samples, found, overlay_fn=overlay,
                 questions=questions, count=examples)
  if barrier:
    barrier()
  return result


def score_predictions(
    benchmark: str | Benchmark,
    predictions: str | Path,
    *,
    data: str | Path,
    out: str | Path | None = None,
    split: str | None = None,
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
  base = {'task': benchmark.name, 'split': split, 'limit': None,
          'dataset': _dataset(samples, Path(data)), 'predictions': str(predictions)}
  result = score_texts(benchmark, split, samples, found, identity=base | dict(identity or {}),
                       published=benchmark.splits[split])
  if out is not None:
    out = Path(out)
    if out.is_dir() and any(out.iterdir()):
      raise UserError(f'{out}: is not empty; choose another result folder')
    out.mkdir(parents=True, exist_ok=True)
    # How they were asked is only known where the file says so.
    questions = {s.id: found.get(s.id, {}).get('prompt', s.question) for s in samples}
    _write_folder(out, benchmark, samples, questions, found, result)
    report.write(out / 'report.html', result, samples, found, questions=questions)
  return result


def _identity(benchmark: Benchmark, split: str, limit: int | None, samples: Samples, data: Path,
              template: prompts.Template, setup: Setup) -> dict[str, Any]:
  """All that decides the answers; two runs may share a folder only when it is equal."""
  value = {
      'task': benchmark.name, 'split': split, 'limit': limit,
      'dataset': _dataset(samples, data),
      'prompt_template': {'source': template.source, 'text': template.text,
                          'sha256': template.hash},
      'max_new_tokens': benchmark.max_new_tokens,
      **dataclasses.asdict(setup),
  }
  try:
    return json.loads(json.dumps(value))
  except TypeError as error:
    raise UserError(f'evaluation setup: {error}; give plain numbers, texts and lists') from error


def _dataset(samples: Samples, data: Path) -> dict[str, Any]:
  """Which annotation files the samples came from. Images are not hashed."""
  return {'source': str(data), 'files': sorted({p.name for p in samples.files}),
          'sha256': provenance.files_hash(samples.files, root=data), 'n': len(samples)}


def _claim(out: Path, identity: dict, *, write: bool) -> None:
  """Notes in run.json what the folder holds, or checks that it is the same."""
  path = out / 'run.json'
  if path.exists():
    try:
      found = json.loads(path.read_text('utf-8'))
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


def pictures(sample: Sample) -> Picture:
  """The decoded image of a sample, several as a tuple, None without one."""
  opened = tuple(image.open() for image in sample.images)
  return opened if len(opened) > 1 else opened[0] if opened else None


def _ask(answer_fn: AnswerFn, batch_size: int):
  def ask(batch: list[Sample], questions: list[str]) -> list[dict]:
    pairs = [(pictures(sample), question) for sample, question in zip(batch, questions)]
    pairs += [pairs[-1]] * (batch_size - len(pairs))
    answers = list(answer_fn(pairs))
    if len(answers) != len(pairs):
      raise UserError(f'the answer function gave {len(answers)} answers to {len(pairs)} questions')
    return [_fields(answer) for answer in answers[:len(batch)]]
  return ask


def _ask_likelihood(likelihood_fn: LikelihoodFn):
  def ask(batch: list[Sample], questions: list[str]) -> list[dict]:
    opened = [pictures(sample) for sample in batch]
    triples = [(picture, question, option) for picture, question, sample
               in zip(opened, questions, batch) for option in sample.choices]
    losses = [float(loss) for loss in likelihood_fn(triples)]
    if len(losses) != len(triples):
      raise UserError(
          f'the likelihood function gave {len(losses)} losses for {len(triples)} options')
    rest = iter(losses)
    rows = [[next(rest) for _ in sample.choices] for sample in batch]
    return [{'text': sample.choices[likelihood_choice(row)], 'finish_reason': '', 'losses': row}
            for sample, row in zip(batch, rows)]
  return ask


def _fields(answer: str | Answer) -> dict[str, Any]:
  answer = Answer(answer) if isinstance(answer, str) else answer
  if not isinstance(answer, Answer):
    raise UserError(f'the answer function gave {type(answer).__name__}, expected texts')
  return {'text': answer.text, 'finish_reason': answer.finish_reason,
          'num_image_tokens': answer.image_tokens, 'num_new_tokens': answer.new_tokens}


def _write_folder(out: Path, benchmark: Benchmark, samples: Samples, questions: Mapping[str, str],
                  found: Mapping[str, dict], result: Result) -> None:
  """predictions.jsonl, the submission and, last, result.json: without it a folder is unfinished."""
  per_sample = result.per_sample or [None] * len(samples)
  lines = []
  for sample, score in zip(samples, per_sample):
    record = found.get(sample.id, {'text': ''})
    lines.append(json.dumps({
        'sample_id': sample.id, 'prompt': questions[sample.id], 'text': record['text'],
        'references': sample.answers, 'category': sample.category, 'score': score,
        'finish_reason': record.get('finish_reason', ''),
        'num_image_tokens': record.get('num_image_tokens'),
        'num_new_tokens': record.get('num_new_tokens')}, ensure_ascii=False))
  records.write_whole(out / records.MERGED, '\n'.join(lines) + '\n')
  if benchmark.submission and not result.n_missing:
    submission.write(benchmark, samples, [found[s.id]['text'] for s in samples], out)
  finished = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
  value = result.to_dict() | {'finished': finished}
  records.write_whole(out / 'result.json', json.dumps(value, indent=2) + '\n')
