"""NoCaps, TextCaps, DOCCI, COCO: captions scored by CIDEr, those of COCO by BLEU-4 too.

The headline is `cider_simple` (built-in tokens). Numbers in papers are `cider_ptb`: the benchmarks
`nocaps_ptb`, `textcaps_ptb`, `docci_ptb` and `coco_ptb`, which need the extra `caption` and Java;
`coco_ptb` has METEOR as well.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import importlib.util
from pathlib import Path
import shutil

from hrvlm_jax.core import installed
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.evaluation.benchmarks.base import (
    Benchmark,
    Collector,
    Sample,
    Samples,
    Scores,
    Submission,
    first_image,
    read_json_lines,
)
from hrvlm_jax.evaluation.benchmarks.scoring import by_category, percent
from hrvlm_jax.evaluation.metrics import bleu, cider


def _nocaps(folder: Path, split: str) -> Samples:
  c = Collector('nocaps', folder)
  path = c.find('nocaps_val_4500_captions.json' if split == 'val'
                else 'nocaps_test_image_info.json')
  captions: dict[int, list[str]] = {}
  if split == 'val':
    for where, row in c.listed(path, 'annotations'):
      number, text = c.get(row, 'image_id', where, int), c.get(row, 'caption', where)
      captions.setdefault(number, []).append(text or '')
  for where, row, number, name in c.each(c.listed(path, 'images'), id=int, file_name=str):
    answers = tuple(captions.get(number, ())) if split == 'val' else None
    picture = first_image(folder / 'images' / name, folder / split / name)
    c.add(_caption(str(number), picture, answers, category=str(row.get('domain', '')),
                   image_id=number), where)
  return c.finish()


def _textcaps(folder: Path, split: str) -> Samples:
  c = Collector('textcaps', folder)
  path = c.find(f'TextCaps_0.1_{split}.json')
  seen: dict[str, tuple] = {}
  for where, _, image, found in c.each(
      c.listed(path, 'data'), image_id=str, reference_strs=None if split == 'test' else list):
    references = None if found is None else tuple(map(str, found))
    if image in seen:  # the file repeats an image once for each of its captions
      if seen[image] != references:
        c.problems.append(f'{where}: image {image} comes again with other reference captions')
      continue
    seen[image] = references
    picture = first_image(*(folder / n / f'{image}.jpg'
                            for n in ('train_images', 'test_images', 'images')))
    c.add(_caption(image, picture, references, image_id=image), where)
  return c.finish()


def _docci(folder: Path, split: str) -> Samples:
  c = Collector('docci', folder)
  path = c.find('docci_descriptions.jsonlines')
  for where, _, part, name, text, number in c.each(
      read_json_lines(path, c.problems), split=str, image_file=str, description=str,
      example_id=str):
    if part == split:
      picture = first_image(folder / 'images' / name)
      c.add(_caption(number, picture, (text,), image_id=number), where)
  return c.finish()


def _coco(folder: Path, split: str) -> Samples:
  c = Collector('coco', folder)
  path = c.find(f'captions_{split}.json', f'annotations/captions_{split}.json')
  captions: dict[int, list[str]] = {}
  for where, row in c.listed(path, 'annotations'):
    number, text = c.get(row, 'image_id', where, int), c.get(row, 'caption', where)
    captions.setdefault(number, []).append(text or '')
  for where, _, number, name in c.each(c.listed(path, 'images'), id=int, file_name=str):
    if number not in captions:
      c.problems.append(f'{where}: image {number} has no caption in {path.name}')
      continue
    picture = first_image(folder / split / name, folder / 'images' / name)
    c.add(_caption(str(number), picture, tuple(captions[number]), image_id=number), where)
  return c.finish()


def _caption(number, picture, answers, *, category: str = '', image_id) -> Sample:
  # A caption has no question of its own; the template holds the whole instruction.
  return Sample(number, (picture,), 'Describe the image.', answers, category=category,
                meta={'image_id': image_id})


Tokenizer = Callable[[Sequence[str]], list[list[str]]]


def score_captions(samples: Sequence[Sample], texts: Sequence[str], *, name: str,
                   tokenize: Tokenizer) -> Scores:
  """CIDEr-D times 100 under `name`, over all samples (document frequencies from all of them)."""
  flat = [caption.replace('\n', ' ') for sample in samples for caption in sample.answers]
  words = iter(tokenize(flat))
  references = [[next(words) for _ in sample.answers] for sample in samples]
  scores = cider.cider_d(tokenize([text.replace('\n', ' ') for text in texts]), references)
  note = f'CIDEr over {len(samples)} images; it is not comparable with CIDEr over another set'
  return Scores(name, {name: percent(scores)}, by_category=by_category(samples, scores),
                per_sample=[min(1.0, score) for score in scores], units=scores, notes=(note,))


def score_simple(samples: Sequence[Sample], texts: Sequence[str]) -> Scores:
  """`cider_simple`: built-in tokens."""
  tokenize = lambda captions: [cider.simple_tokens(caption) for caption in captions]
  return score_captions(samples, texts, name='cider_simple', tokenize=tokenize)


def score_ptb(samples: Sequence[Sample], texts: Sequence[str]) -> Scores:
  """`cider_ptb`: the published CIDEr (needs pycocoevalcap and Java)."""
  return score_captions(samples, texts, name='cider_ptb',
                        tokenize=lambda captions: cider.ptb_tokens(captions))


def score_coco(samples: Sequence[Sample], texts: Sequence[str], *, ptb: bool = False) -> Scores:
  """CIDEr, BLEU-4 (both times 100) and, with the PTB tokeniser, METEOR."""
  tokenize = cider.ptb_tokens if ptb else lambda captions: list(map(cider.simple_tokens, captions))
  mark = 'ptb' if ptb else 'simple'
  scores = score_captions(samples, texts, name=f'cider_{mark}', tokenize=tokenize)
  flat = [caption.replace('\n', ' ') for sample in samples for caption in sample.answers]
  words = iter(tokenize(flat))
  references = [[next(words) for _ in sample.answers] for sample in samples]
  found = tokenize([text.replace('\n', ' ') for text in texts])
  values = {**scores.values, f'bleu4_{mark}': 100 * bleu.bleu_4(found, references)}
  if ptb:
    values['meteor'] = 100 * bleu.meteor(
      list(map(' '.join, found)), [list(map(' '.join, each)) for each in references])
  return dataclasses.replace(scores, values=values)


def with_ptb(benchmark: Benchmark) -> Benchmark:
  """The benchmark under the name `<name>_ptb`, scored by `cider_ptb`.

  Raises:
    UserError: pycocoevalcap or Java is missing; said before anything is generated.
  """
  missing = [what for what, found in (
      (f'the package pycocoevalcap ({installed.add("caption")})',
       importlib.util.find_spec('pycocoevalcap')), ('Java', shutil.which('java'))) if not found]
  if missing:
    raise UserError(f'{benchmark.name}_ptb needs {" and ".join(missing)}; {benchmark.name} is '
                    'scored by cider_simple without')
  score = functools.partial(score_coco, ptb=True) if benchmark.name == 'coco' else score_ptb
  return dataclasses.replace(benchmark, name=f'{benchmark.name}_ptb', template=benchmark.name,
                             score=score)


def _submission(samples: Sequence[Sample], texts: Sequence[str]) -> list[dict]:
  return [{'image_id': sample.meta['image_id'], 'caption': text.strip()}
          for sample, text in zip(samples, texts)]


BENCHMARKS = (
    Benchmark(
        'nocaps', 'NoCaps, CIDEr', 'nocaps_val_4500_captions.json and images/',
        {'val': 4500, 'test': 10600}, _nocaps, score_simple, max_new_tokens=64,
        submission=Submission('nocaps_submission.json', _submission)),
    Benchmark(
        'textcaps', 'TextCaps 0.1, CIDEr',
        'TextCaps_0.1_val.json or TextCaps_0.1_test.json and train_images/ or test_images/',
        {'val': 3166, 'test': 3289}, _textcaps, score_simple, max_new_tokens=64,
        submission=Submission('textcaps_submission.json', _submission)),
    Benchmark(
        'docci', 'DOCCI, CIDEr with one reference', 'docci_descriptions.jsonlines and images/',
        {'test': 5000, 'qual_test': 100, 'train': 9647}, _docci, score_simple, max_new_tokens=512),
    Benchmark(
        'coco', 'COCO captions, CIDEr and BLEU-4',
        'captions_val2017.json or captions_val2014.json and the images of that split',
        {'val2017': 5000, 'val2014': 40504}, _coco, score_coco, max_new_tokens=64,
        submission=Submission('captions_coco_results.json', _submission)),
)
