"""Average normalised Levenshtein similarity (DocVQA, InfoVQA) and the edit distance under it."""

from collections.abc import Sequence


def edit_distance(a: str, b: str) -> int:
  """Levenshtein distance: insertions, deletions and substitutions cost 1."""
  if len(a) < len(b):
    a, b = b, a
  row = list(range(len(b) + 1))
  for i, letter in enumerate(a, 1):
    diagonal, row[0] = row[0], i
    for j, other in enumerate(b, 1):
      diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (letter != other))
  return row[-1]


def anls_lmms(prediction: str, references: Sequence[str]) -> float:
  """Similarity to the nearest reference; 0 when it is below 0.5.

  As lmms-eval, VLMEvalKit and Qwen-VL compute it: the distance is between normalised texts (lower
  case, single spaces), the length it is divided by is that of the texts as they came.
  """
  similarity = 1 - _nearest(prediction, references)
  return 0.0 if similarity < 0.5 else similarity


def anls_strict(prediction: str, references: Sequence[str]) -> float:
  """The challenge's own rule: already a distance of exactly 0.5 scores 0."""
  similarity = 1 - _nearest(prediction, references)
  return 0.0 if similarity <= 0.5 else similarity


def _nearest(prediction: str, references: Sequence[str]) -> float:
  if not references:
    raise ValueError('ANLS needs at least one reference answer')
  normal = lambda text: ' '.join(text.strip().lower().split())
  distances = []
  for reference in references:
    # Upper case can be longer (the German sharp s becomes two letters): the originals measure it.
    longest = max(len(reference.upper()), len(prediction.upper()))
    distance = edit_distance(normal(reference), normal(prediction)) if longest else 0
    distances.append(distance / longest if longest else 0.0)
  return min(distances)
