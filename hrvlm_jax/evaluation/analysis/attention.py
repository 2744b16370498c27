"""How much cross-attention goes to the global view (Pheye, appendix C, Figure 4).

Axis letters: l cross-attention layers, h heads, t text positions, m image tokens, n images.
"""

from collections.abc import Sequence

from jaxtyping import Float
import numpy as np

from hrvlm_jax.evaluation.analysis.sizes import TERTILES, tertiles

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
