"""What `hrvlm tiny` does for PS3: region records, the trunk, and the measurement by budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import os
import pathlib
from typing import Any

import numpy as np

from hrvlm_jax.checkpoint import store
from hrvlm_jax.lab import glyphs
from hrvlm_jax.lab.glyphs import GlyphConfig
from hrvlm_jax.lab.needle import NeedleConfig, plan
from hrvlm_jax.lab.needle.regions import probes, regions, write_regions
from hrvlm_jax.language.bpe import train_bpe
from hrvlm_jax.language.captions import canonicalize
from hrvlm_jax.language.prompt import tokenizer_of
from hrvlm_jax.systems.ps3.recall import measure
from hrvlm_jax.systems.ps3.text import tokenizer
from hrvlm_jax.training.metrics import read_metrics
from hrvlm_jax.vlm import model as vlm

# Paper 2503.19903, patch selection at 1512 pixels: recall of ground-truth patches at 44 %.
PAPER = {'share': 0.44, 'random': 0.437, 'bottom_up': 0.874, 'top_down': 0.912}
SHARES = (0.01, 0.02, 0.06, 0.12, 0.2, 0.44, 1.0)
SPECIALS = ('<pad>', '<end>')  # ids 0 and 1, as the text tower expects


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preparation:
  """What a tiny PS3 needs before it trains, and what is kept of its run.

  Attributes:
    task: the built-in task of the region records.
    tower: pre-training of the trunk.
    images: records of the training set.
    held_out: images that are measured, with seed 1.
  """

  task: NeedleConfig
  tower: GlyphConfig
  images: int = 4000
  held_out: int = 400

  def prepare(self, run: Any, *, say: Callable[[str], None] = print, progress: bool = True) -> None:
    """Writes the records, the tokenizer and the trunk that a run config names; skips what is there.

    Args:
      run: the `RunConfig`.
    """
    say(f'region records: {run.data.train}')
    write_regions(self.task, run.data.train, self.images, seed=0, progress=progress)
    vocabulary = pathlib.Path(run.data.tokenizer)
    if not vocabulary.exists():
      texts = [canonicalize(caption) for index in range(500)
               for caption in regions(plan(self.task, 0, index)).captions]
      vocabulary.mkdir(parents=True)
      train_bpe(texts, vocab_size=run.model.encoder.text.vocab_size, specials=SPECIALS,
                roles={'pad': '<pad>', 'eos': '<end>', 'bos': '<end>'}).save(vocabulary)
    if not pathlib.Path(run.training.init_from).exists():
      def report(step: int, loss: float, read: float) -> None:
        if step % 100 == 0 or step == self.tower.steps:
          say(f'trunk: step {step} of {self.tower.steps}, loss {loss:.3f}, letters read {read:.0%}')

      tower, accuracy = glyphs.pretrain(self.tower, report=report)
      store.save_params(run.training.init_from, {'vision': {'tower': tower}},
                        {'accuracy': accuracy})

  def result(self, workdir: str | os.PathLike, run: Any, *, seconds: float, machine: str
             ) -> dict[str, Any]:
    """Scores by way and budget, beside the paper's, and the line of the config's header."""
    encoder = run.model.encoder
    fn = vlm.build(run.model)
    params = store.load_params(workdir, fn.abstract)
    tokenize = tokenizer(tokenizer_of(run.data.tokenizer), encoder.text)
    scores = measure(fn, params, probes(self.task, encoder, tokenize, seed=1, images=self.held_out),
                     encoder=encoder, shares=SHARES)
    losses = [row['loss'] for row in read_metrics(workdir)
              if 'loss' in row and row['step'] > run.training.steps - 50]
    values = {
      'system': run.model.system, 'loss': round(float(np.mean(losses)), 4),
      'steps': run.training.steps, 'batch_size': run.training.batch_size,
      'images': self.held_out, 'chance': round(self.task.chance, 4), 'seconds': round(seconds),
      'machine': machine, 'paper_recall': PAPER,
      'scores': [dataclasses.asdict(score) for score in scores]}
    whole = next(s for s in scores if (s.way, s.share) == ('top_down', SHARES[-1]))
    return values | {'accuracy': whole.accuracy, 'summary': summary(values)}


  def plot(self, values: Mapping[str, Any], path: str | os.PathLike) -> None:
    """See the function of this name."""
    plot(values, path)


def summary(values: Mapping[str, Any]) -> str:
  """Recall at the paper's share, and the letters read where every patch is."""
  at = {(s['way'], s['share']): s for s in values['scores']}
  recall = ', '.join(f'{way.replace("_", "-")} {at[way, PAPER["share"]]["recall"]:.1%}'
                     for way in ('top_down', 'bottom_up', 'random'))
  return (f'recall at 44 %: {recall}; read {at["top_down", SHARES[-1]]["accuracy"]:.1%}, '
          f'{values["steps"]} steps.')


def plot(values: Mapping[str, Any], path: str | os.PathLike) -> None:
  """Recall and accuracy by budget, one line per way, the paper's recall beside them."""
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
  ways: Sequence[tuple[str, str]] = (('top_down', 'tab:red'), ('bottom_up', 'tab:blue'),
                                     ('random', 'tab:grey'))
  for axis, key in zip(axes, ('recall', 'accuracy'), strict=True):
    for way, colour in ways:
      mine = [s for s in values['scores'] if s['way'] == way]
      axis.plot([s['share'] for s in mine], [s[key] for s in mine], 'o-', color=colour,
                label=way.replace('_', '-'))
      if key == 'recall':
        axis.plot(values['paper_recall']['share'], values['paper_recall'][way], '*', ms=12,
                  color=colour, markeredgecolor='black')
    axis.set_xlabel('share of the high-resolution patches')
    axis.set_ylim(0, 1.02)
    axis.grid(alpha=0.3)
  axes[0].set_ylabel('recall of patches in the box')
  axes[0].plot([], [], 'k*', ms=12, fillstyle='none', label='paper (1.5K model)')
  axes[0].legend(loc='lower right')
  axes[1].set_ylabel('letters read')
  axes[1].axhline(values['chance'], color='black', lw=0.8, ls=':')
  figure.suptitle(f'Tiny PS3, {values["images"]} held-out images of the built-in task')
  figure.savefig(path, dpi=110)
  plt.close(figure)
