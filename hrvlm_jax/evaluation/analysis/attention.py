"""How much cross-attention goes to the global view (Pheye, appendix C, Figure 4).

Axis letters: l cross-attention layers, h heads, t text positions, m image tokens, n images.
"""

from collections.abc import Sequence
import json

from jaxtyping import Float
import numpy as np

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.evaluation import benchmarks, prompts, records
from hrvlm_jax.evaluation.analysis.sizes import TERTILES, tertiles, text_areas
from hrvlm_jax.evaluation.runner import pictures
from hrvlm_jax.vlm.answer import Answerer

# The TextCaps prompt's length in Phi-1.5 tokens: rows from here on belong to caption tokens.
TEXTCAPS_PROMPT = 65
SUB_IMAGE_TOKENS = 257


def global_share(
    probabilities: Float[np.ndarray, '*l h t m'],
    *,
    first_row: int = TEXTCAPS_PROMPT,
    global_tokens: int = SUB_IMAGE_TOKENS,
) -> Float[np.ndarray, '*l']:
  """Attention mass on the global view, A_G, per layer; the local views get 1 - A_G.

  The mean over heads and over the rows of the generated tokens, summed over the image tokens of the
  first sub-image. The row before `first_row`, which predicts the first generated token, does not
  count, as in the paper's code. Even attention gives 0.2 at 448 (5 sub-images) and 0.1 at 672.

  Args:
    probabilities: softmaxed attention of one image, rows for prompt and answer.
    first_row: position of the first generated token.
    global_tokens: image tokens of the global view; they come first.

  Raises:
    ValueError: no generated row, fewer image tokens than the global view has, rows that do not sum
      to one.
  """
  probabilities = np.asarray(probabilities, np.float64)
  *_, rows, tokens = probabilities.shape
  if not 0 <= first_row < rows:
    raise ValueError(f'first_row {first_row}: there are {rows} rows, so none of a generated token')
  if not 0 < global_tokens <= tokens:
    raise ValueError(f'global_tokens {global_tokens}: there are {tokens} image tokens')
  chosen = probabilities[..., first_row:, :]
  if not np.allclose(chosen.sum(-1), 1, atol=1e-2):
    raise ValueError('rows of attention probabilities do not sum to 1; pass softmaxed values')
  return chosen.mean(axis=(-3, -2))[..., :global_tokens].sum(-1)


def share_by_tertile(
    shares: Float[np.ndarray, 'n l'],
    areas: Sequence[float],
) -> dict[str, Float[np.ndarray, 'l']]:
  """Mean global share per layer, separately for fine, medium and broad scene text.

  Args:
    shares: `global_share` of every image. areas: relative area of the text each caption is about.

  Raises:
    ValueError: different numbers of images, or fewer than three.
  """
  shares = np.asarray(shares, np.float64)
  if len(shares) != len(areas) or len(areas) < 3:
    raise ValueError(f'expected as many areas as images and at least 3, got {len(areas)} and '
                     f'{len(shares)}')
  groups = np.array(tertiles(areas))
  return {name: shares[groups == name].mean(axis=0) for name in TERTILES}


def run(
  *, checkpoint: str, data: str, out: str, benchmark: str = 'textcaps', boxes: str | None = None,
  split: str | None = None, limit: int | None = None, max_new_tokens: int | None = None,
) -> list[str]:
  """Share of cross-attention on the global view while a model writes its answers (Pheye, figure 4).

  Args:
    checkpoint: a model that reads images by cross-attention.
    data: folder with the benchmark's official files. out: JSON file.
    boxes: Rosetta's OCR file: the shares also by the size of the text asked for.

  Raises:
    UserError: a model without cross-attention, bad files, no answer with a token.
  """
  from hrvlm_jax.evaluation.model import EvaluatedModel

  task = benchmarks.get(benchmark)
  samples = task.load(data, split)[:limit]
  answerer = Answerer.load(checkpoint, exif='ignore')
  template = prompts.load(task.template or task.name, answerer.config.system)
  model = EvaluatedModel(answerer, max_new_tokens=max_new_tokens or task.max_new_tokens)
  shares = {}
  for sample in samples:
    picture, question = pictures(sample), template.render(sample)
    text = model.answer([(picture, question)])[0].text
    if text:
      shares[sample.id] = model.global_attention([(picture, question, text)])[0]
  if not shares:
    raise UserError(f'{checkpoint}: all {len(samples)} answers are empty; nothing attends')
  mean = np.mean(list(shares.values()), axis=0)
  value = {'n': len(shares), 'empty': len(samples) - len(shares), 'layers': mean.tolist()}
  if boxes is not None:
    areas = text_areas([s for s in samples if s.id in shares], boxes)
    value['tertiles'] = {name: group.tolist() for name, group in share_by_tertile(
      np.stack([shares[name] for name in areas]), list(areas.values())).items()}
  records.write_whole(out, json.dumps(value, indent=2) + '\n')
  return [f'layer {i}: {share:.3f} on the global view' for i, share in enumerate(mean)]
