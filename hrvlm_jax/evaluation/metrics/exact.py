"""Exact and relaxed match."""

from collections.abc import Sequence


def clean_gqa(text: str) -> str:
  """LLaVA's clean-up of an answer before GQA's own evaluation: final periods off, lower case.

  Source: luogen1996/LLaVA-HR: scripts/convert_gqa_for_eval.py.
  """
  return text.rstrip('.').lower()


def em_gqa(prediction: str, reference: str) -> float:
  """1 when the cleaned prediction equals the answer as it stands in the file."""
  return float(clean_gqa(prediction) == reference)


def em_ocrvqa(prediction: str, references: str | Sequence[str]) -> float:
  """1 when a reference equals the prediction, both stripped and in lower case.

  Source: luogen1996/LLaVA-HR: llava_hr/eval/m4c_evaluator.py.
  """
  references = [references] if isinstance(references, str) else references
  wanted = prediction.strip().lower()
  return float(any(wanted == reference.strip().lower() for reference in references))


def em_realworldqa(prediction: str, reference: str) -> float:
  """1 when both are equal in lower case, stripped, without final periods (lmms-eval's rule)."""
  clean = lambda text: text.lower().strip().rstrip('.')
  return float(clean(prediction) == clean(reference))


def em_relaxed(prediction: str, reference: str) -> float:
  """ChartQA's relaxed accuracy: numbers within 5 % of the reference, other text equal.

  A number is what Python's float() reads, a final % divides by 100; `1,000` is no number. A
  reference of zero is compared as text. Text is compared in lower case and not stripped.
  """
  found, wanted = _number(prediction), _number(reference)
  if found is not None and wanted:
    return float(abs(found - wanted) / abs(wanted) <= 0.05)
  return float(prediction.lower() == reference.lower())


def em_relaxed_strict(prediction: str, reference: str) -> float:
  """`em_relaxed` after taking white space, a final period, `$` and `,` off both sides.

  Not the published metric; it tells formatting faults from wrong numbers.
  """
  clean = lambda text: text.strip().rstrip('.').replace('$', '').replace(',', '').strip()
  return em_relaxed(clean(prediction), clean(reference))


def _number(text: str) -> float | None:
  try:
    return float(text.rstrip('%')) / 100 if text.endswith('%') else float(text)
  except ValueError:
    return None
