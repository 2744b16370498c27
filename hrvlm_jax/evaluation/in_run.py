"""The evaluator `benchmark`: any benchmark of `evaluation`, inside a training run.

    training.evaluators = ({'name': 'benchmark', 'benchmark': 'textvqa', 'data': 'TEXTVQA',
                            'every': 2000, 'samples': 500, 'label': 'textvqa'},)
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time
from typing import Any

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.execution import Execution
from hrvlm_jax.evaluation import benchmarks, prompts
from hrvlm_jax.evaluation.benchmarks.base import Samples
from hrvlm_jax.evaluation.metrics.match import anls_strict
from hrvlm_jax.evaluation.result import score_texts
from hrvlm_jax.evaluation.runner import pictures
from hrvlm_jax.language.prompt import tokenizer_of
from hrvlm_jax.parallel import distributed
from hrvlm_jax.training.evaluators import Evaluator, EvaluatorOptions
from hrvlm_jax.vlm import model as vlm
from hrvlm_jax.vlm.answer import Answerer
from hrvlm_jax.vlm.answer_mesh import answer_over_mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkOptions(EvaluatorOptions):
  """Which benchmark.

  Attributes:
    benchmark: its name (`hrvlm eval --list`).
    data: folder with its official files.
    split: None: its first one.
    samples: only the first ones; None: all.
    batch_size: questions at a time.
  """

  name: str = 'benchmark'
  benchmark: str
  data: str
  split: str | None = None
  samples: int | None = None
  batch_size: int = 8


class BenchmarkEvaluator(Evaluator):
  """Answers and scores of a benchmark; the first process writes `answers.jsonl`."""

  Options = BenchmarkOptions

  def prepare(self, run: Any, *, layout: Any, workdir: pathlib.Path) -> None:
    """See `Evaluator.prepare`.

    Raises:
      UserError: an unknown benchmark, bad files, or one that is not scored from answers.
    """
    o = self.options
    self.benchmark = benchmarks.get(o.benchmark)
    if self.benchmark.likelihood or self.benchmark.score is None:
      raise UserError(f'training.evaluators: {o.benchmark} is not scored from answers alone; run '
                      '`hrvlm eval` on the checkpoints')
    self.split = o.split or self.benchmark.default_split
    loaded = self.benchmark.load(o.data, self.split)
    self.samples = Samples(loaded[:o.samples], loaded.files)
    template = prompts.load(self.benchmark.template or self.benchmark.name, run.model.system)
    self.questions = [template.render(sample) for sample in self.samples]
    self.run_config, self.layout, self.workdir = run, layout, workdir
    self._answerer: Answerer | None = None

  def run(self, params: Any, step: int) -> dict[str, float]:
    """<label>_<metric> of every metric of the benchmark, and <label>_seconds."""
    clock, o, config = time.perf_counter(), self.options, self.run_config
    if self._answerer is None:
      self._answerer = Answerer(config.model, params, tokenizer_of(config.data.tokenizer),
                                ex=Execution(mesh=self.layout.mesh), exif='ignore')
    else:
      self._answerer.generator.params = vlm.unroll(config.model, params)
    texts = answer_over_mesh(self._answerer, len(self.samples), self._item, batch_size=o.batch_size,
                       layout=self.layout, max_new_tokens=self.benchmark.max_new_tokens)
    found = {sample.id: {'text': text} for sample, text in zip(self.samples, texts, strict=True)}
    result = score_texts(self.benchmark, self.split, self.samples, found, identity={})
    if distributed.is_main():
      folder = self.folder(self.workdir, step)
      folder.mkdir(parents=True, exist_ok=True)
      rows = [{'id': sample.id, 'prompt': question, 'expected': sample.answers, 'answer': text}
              for sample, question, text in zip(self.samples, self.questions, texts, strict=True)]
      (folder / 'answers.jsonl').write_text(
        ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows))
    values = {f'{o.label}_{name}': value for name, value in result.values.items()}
    return values | {f'{o.label}_seconds': time.perf_counter() - clock}

  def _item(self, number: int):
    self.beat()
    picture = pictures(self.samples[number])
    images = picture if isinstance(picture, tuple) else () if picture is None else (picture,)
    return images, self.questions[number]


def anls(answer: str, reference: str) -> float:
  """ANLS against one reference, as a metric of the evaluator `answers`."""
  return anls_strict(answer, [reference])
