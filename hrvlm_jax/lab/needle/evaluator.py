"""The evaluator `needle`: the score of the built-in task inside a run, by size of the sign."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

from hrvlm_jax.lab.report import accuracy_by_size
from hrvlm_jax.training.answers import Answers, AnswersOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeedleOptions(AnswersOptions):
  """See `AnswersOptions`; accuracy is given by size, too."""

  name: str = 'needle'


class Needle(Answers):
  """Answers to the built-in task."""

  Options = NeedleOptions

  def values(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """<label>_accuracy, and where rows say how large their sign is, that of each third."""
    found = super().values(rows)
    if all('relative_area' in row['extra'] for row in rows):
      sizes = accuracy_by_size([
        {'area': row['extra']['relative_area'], 'correct': row['score'] == 1} for row in rows])
      found |= {f'{self.options.label}_accuracy_{size}': value for size, value in sizes.items()}
    return found
