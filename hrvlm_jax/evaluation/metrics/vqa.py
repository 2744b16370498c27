"""VQA soft accuracy in its three published forms.

Leave-one-out: for each of the n references, min(1, matches among the other n-1 / 3); the mean over
the references. With ten references and m matches: 0, 0.3, 0.6, 0.9, 1 for m = 0, 1, 2, 3, 4+.
"""

from collections.abc import Sequence

from hrvlm_jax.evaluation.metrics.normalize import (
    flatten_space,
    process_digits_articles,
    process_punctuation,
    vqa_normalize,
)


def soft_accuracy(matches: int, references: int) -> float:
  """Leave-one-out accuracy of an answer that equals `matches` of `references` answers."""
  if references < 1:
    raise ValueError('soft_accuracy needs at least one reference answer')
  matched = min(1.0, max(matches - 1, 0) / 3)
  unmatched = min(1.0, matches / 3)
  return (matches * matched + (references - matches) * unmatched) / references


def accuracy_m4c(prediction: str, references: Sequence[str]) -> float:
  """TextVQA and VizWiz; lmms-eval uses it for every VQA task.

  Source: luogen1996/LLaVA-HR: llava_hr/eval/m4c_evaluator.py (always 10 references there).
  """
  wanted = vqa_normalize(prediction, variant='m4c')
  found = sum(vqa_normalize(reference, variant='m4c') == wanted for reference in references)
  return soft_accuracy(found, len(references))


def accuracy_official(prediction: str, references: Sequence[str]) -> float:
  """VQAv2 and OKVQA by the present VQA toolkit.

  When all references are identical nothing is normalised: `Yes` then misses ten times `yes`.
  """
  prediction = flatten_space(prediction)
  references = [flatten_space(reference) for reference in references]
  if len(set(references)) > 1:
    prediction = vqa_normalize(prediction, variant='official')
    references = [vqa_normalize(reference, variant='official') for reference in references]
  return soft_accuracy(references.count(prediction), len(references))


def accuracy_llava_hr_okvqa(prediction: str, references: Sequence[str]) -> float:
  """OKVQA as LLaVA-HR scores it: an older toolkit, through LAVIS.

  The prediction is always normalised in full; references only lose punctuation, and only when they
  are not all identical; they keep capitals and articles.

  Source: luogen1996/LLaVA-HR: llava_hr/eval/vqa_eval.py.
  """
  text = process_punctuation(flatten_space(prediction))
  wanted = process_digits_articles(text)
  if len(set(references)) > 1:
    references = [process_punctuation(reference) for reference in references]
  return soft_accuracy(list(references).count(wanted), len(references))


def accuracy_min3(prediction: str, references: Sequence[str]) -> float:
  """min(1, m / 3) without leaving one out, on m4c-normalised answers.

  Not a published benchmark number: 1.0 at m = 3 where the official accuracy gives 0.9. Here to
  explain differences to reports that use it (google-research/big_vision: vqa.py).
  """
  wanted = vqa_normalize(prediction, variant='m4c')
  found = sum(vqa_normalize(reference, variant='m4c') == wanted for reference in references)
  return min(1.0, found / 3)
