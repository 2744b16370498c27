"""MathVista: extraction of an answer without a language model, normalisation, comparison.

The official score lets a language model extract the answer where the response is not already in
the asked form. `extract_regex` replaces it by the last number or letter, so its accuracy is named
`mathvista_regex` and is not the published metric. Source of the rules: lupantech/MathVista:
evaluation/extract_answer.py, calculate_score.py.
"""

from collections.abc import Sequence
import re

from hrvlm_jax.evaluation.metrics.match import edit_distance


def extract_direct(response: str, *, question_type: str, answer_type: str,
                   choices: Sequence[str] = ()) -> str | None:
  """The response itself when it is a choice, an int or a float as asked; else None."""
  if question_type == 'multi_choice' and response in choices:
    return response
  for kind, convert in (('integer', int), ('float', float)):
    if answer_type == kind:
      try:
        return str(convert(response))
      except ValueError:
        return None
  return None


def extract_regex(response: str, *, question_type: str, answer_type: str,
                  choices: Sequence[str] = ()) -> str:
  """`extract_direct`, else the last letter (in brackets, or alone), number or list of it."""
  direct = extract_direct(response, question_type=question_type, answer_type=answer_type,
                          choices=choices)
  if direct is not None:
    return direct
  patterns = {'integer': r'-?\d+(?:\.\d+)?', 'float': r'-?\d*\.?\d+(?:[eE][-+]?\d+)?',
              'list': r'\[[^\[\]]*\]'}
  pattern = patterns.get(answer_type)
  if question_type == 'multi_choice':
    pattern = r'\(([A-Za-z])\)' if re.search(r'\([A-Za-z]\)', response) else r'\b([A-Z])\b'
  text = response if question_type == 'multi_choice' else response.replace(',', '') \
      if answer_type in ('integer', 'float') else response
  found = re.findall(pattern, text) if pattern else []
  return found[-1] if found else response.strip()


def normalize(extraction: str, *, question_type: str, answer_type: str, choices: Sequence[str] = (),
              precision: int | None = None) -> str | None:
  """The extraction in the form of the reference; None when it cannot have that form.

  Multiple choice: `(X)` or a letter becomes the text of the choice, anything else the nearest
  choice by edit distance. Integers and floats are rounded as the reference is.
  """
  if question_type == 'multi_choice':
    extraction = extraction.strip()
    if bracketed := re.findall(r'\(([a-zA-Z])\)', extraction):
      extraction = bracketed[0].upper()
    place = ord(extraction) - ord('A') if len(extraction) == 1 else -1
    if 0 <= place < len(choices):
      return choices[place]
    return min(choices, key=lambda choice: edit_distance(extraction, choice))
  try:
    if answer_type == 'integer':
      return str(int(float(extraction)))
    if answer_type == 'float':
      return str(round(float(extraction), 1 if precision is None else int(precision)))
  except (ValueError, OverflowError):
    return None
  return str(extraction)


def equal(prediction: str | None, reference: object) -> bool:
  """String equality after stripping."""
  return prediction is not None and prediction.strip() == str(reference).strip()
