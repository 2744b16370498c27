"""A tiny PS3: region records instead of conversations, and a measurement by budget."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import os
import pathlib
from typing import Any

from hrvlm_jax.checkpoint import store
from hrvlm_jax.lab import tiny
from hrvlm_jax.lab.experiment import say, write_tokenizer
from hrvlm_jax.lab.needle import plan
from hrvlm_jax.lab.needle.regions import probes, regions, write_regions
from hrvlm_jax.lab.report import figure
from hrvlm_jax.language.captions import canonicalize
from hrvlm_jax.language.prompt import tokenizer_of
from hrvlm_jax.systems.ps3.recall import measure
from hrvlm_jax.systems.ps3.text import tokenizer
from hrvlm_jax.training.config import RunConfig
from hrvlm_jax.vlm import model as vlm

# Paper 2503.19903, patch selection at 1512 pixels: recall of ground-truth patches at 44 %.
PAPER = {'share': 0.44, 'random': 0.437, 'bottom_up': 0.874, 'top_down': 0.912}
SHARES = (0.01, 0.02, 0.06, 0.12, 0.2, 0.44, 1.0)
SPECIALS = ('<pad>', '<end>')  # ids 0 and 1, as the text tower expects


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preparation(tiny.Preparation):
  """What a tiny PS3 needs before it trains; `eval_images` are measured, with seed 1."""

  eval_images: int = 400

  def write_data(self, run: RunConfig, progress: bool) -> None:
    """Region records."""
    say(f'region records: {run.data.train}')
    write_regions(self.task, run.data.train, self.train_images, seed=0, progress=progress)

  def write_tokenizer(self, run: RunConfig) -> None:
    """With the words of the captions."""
    texts = [canonicalize(caption) for index in range(500)
             for caption in regions(plan(self.task, 0, index)).captions]
    write_tokenizer(run.data.tokenizer, texts, vocab_size=run.model.encoder.text.vocab_size,
                    specials=SPECIALS, pad='<pad>', eos='<end>', bos='<end>')

  def result(self, workdir: str | os.PathLike, run: RunConfig) -> dict[str, Any]:
    """Scores by way and budget, beside the paper's, and the line of the config's header."""
    encoder = run.model.encoder
    fn = vlm.build(run.model)
    params = store.load_params(workdir, fn.abstract)
    tokenize = tokenizer(tokenizer_of(run.data.tokenizer), encoder.text)
    found = measure(
      fn, params, probes(self.task, encoder, tokenize, seed=1, images=self.eval_images),
      encoder=encoder, shares=SHARES)
    values = self.described(workdir, run) | {
      'images': self.eval_images, 'paper_recall': PAPER,
      'scores': [dataclasses.asdict(score) for score in found]}
    whole = next(s for s in found if (s.way, s.share) == ('top_down', SHARES[-1]))
    return values | {'accuracy': whole.accuracy, 'summary': summary(values)}

  def plot(self, values: Mapping[str, Any], path: pathlib.Path) -> None:
    """Recall and accuracy by budget, one line per way, the paper's recall beside them."""
    colours = {'top_down': 'tab:red', 'bottom_up': 'tab:blue', 'random': 'tab:grey'}
    with figure(path, 1, 2, size=(9, 3.6)) as axes:
      for axis, key in zip(axes, ('recall', 'accuracy'), strict=True):
        for way, colour in colours.items():
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
      axes[0].figure.suptitle(
        f'Tiny PS3, {values["images"]} held-out images of the built-in task')


def summary(values: Mapping[str, Any]) -> str:
  """Recall at the paper's share, and the letters read where every patch is."""
  at = {(s['way'], s['share']): s for s in values['scores']}
  recall = ', '.join(f'{way.replace("_", "-")} {at[way, PAPER["share"]]["recall"]:.1%}'
                     for way in ('top_down', 'bottom_up', 'random'))
  return (f'recall at 44 %: {recall}; read {at["top_down", SHARES[-1]]["accuracy"]:.1%}, '
          f'{values["steps"]} steps.')
