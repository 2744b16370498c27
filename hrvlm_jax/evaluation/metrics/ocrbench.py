"""OCRBench: one point for each of 1000 answers that contain a reference."""

from collections.abc import Sequence

# Type of question -> part of the score it belongs to.
PARTS = {
    'Regular Text Recognition': 'recognition',
    'Irregular Text Recognition': 'recognition',
    'Artistic Text Recognition': 'recognition',
    'Handwriting Recognition': 'recognition',
    'Digit String Recognition': 'recognition',
    'Non-Semantic Text Recognition': 'recognition',
    'Scene Text-centric VQA': 'scene_vqa',
    'Doc-oriented VQA': 'doc_vqa',
    'Key Information Extraction': 'kie',
    'Handwritten Mathematical Expression Recognition': 'hmer',
}
MATH_SOURCE = 'HME100k'


def point(prediction: str, references: Sequence[str], *, source: str, fold: bool = False) -> float:
  """1 when a reference is a substring of the prediction, else 0.

  Args:
    prediction, references: raw texts. Compared in lower case, stripped, new lines as spaces;
      formulas of the source HME100k keep their case and lose all spaces.
    source: the item's `dataset_name`.
    fold: also turn full-width ASCII into ASCII, as lmms-eval does (not for formulas).
  """
  def clean(text: str) -> str:
    if source == MATH_SOURCE:
      return text.strip().replace('\n', ' ').replace(' ', '')
    text = fold_full_width(text) if fold else text
    return text.lower().strip().replace('\n', ' ')

  wanted = clean(prediction)
  return float(any(clean(reference) in wanted for reference in references))


def fold_full_width(text: str) -> str:
  """Full-width forms of ASCII characters and the ideographic space to ASCII."""
  table = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: 0x20}
  return text.translate(table)
