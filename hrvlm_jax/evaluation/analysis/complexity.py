"""Pheye's complexity analysis (section 2.2): equations (1) to (4) and the numbers made of them.

The paper counts multiplications per layer and counts attention once as D * N^2, although q.k and
probs.v cost D * N^2 each. `convention='paper'` does the same; 'exact' counts both, all tokens the
code processes (class tokens included) and the LoRA branches. Symbols: N tokens of one large ViT, P
sub-images, N' tokens of each, D width, Nt text tokens, Ni image tokens, I cross-attention interval.
"""

import dataclasses
from typing import Literal

Convention = Literal['paper', 'exact']


def attention_products(convention: Convention) -> int:
  """How often a convention counts the products of size D * N * M in attention."""
  if convention not in ('paper', 'exact'):
    raise ValueError(f"convention: expected 'paper' or 'exact', got {convention!r}")
  return 1 if convention == 'paper' else 2


def vit_layer(n: int, d: int, *, convention: Convention = 'paper') -> int:
  """Equation (1): multiplications of one ViT layer, 4ND^2 + DN^2 + 8ND^2."""
  return 12 * n * d**2 + attention_products(convention) * d * n**2


def sub_image_tokens(n: int, p: int) -> int:
  """N' of equation (2) as the paper defines it: (N - 1) / (P - 1) + 1, class token included.

  Raises:
    ValueError: N - 1 is not a multiple of P - 1.
  """
  if (n - 1) % (p - 1):
    raise ValueError(f'N - 1 = {n - 1} is not a multiple of P - 1 = {p - 1}')
  return (n - 1) // (p - 1) + 1


def pheye_encoder_layer(p: int, n_sub: int, d: int, *, convention: Convention = 'paper') -> int:
  """Equation (2): multiplications of one layer over P sub-images of N' tokens each."""
  return p * vit_layer(n_sub, d, convention=convention)


def lora_layer(tokens: int, d: int, rank: int, *, mlp: int | None = None) -> int:
  """Multiplications of LoRA branches on q, k, v, out, fc1 and fc2 of one layer."""
  mlp = 4 * d if mlp is None else mlp
  return tokens * rank * (4 * 2 * d + 2 * (d + mlp))


def pheye_encoder_layer_exact(p: int, n_sub: int, d: int, *, rank_global: int = 8,
                              rank_local: int = 16) -> int:
  """What one layer of Pheye's encoder multiplies: both attention products and the LoRA branches."""
  lora = lora_layer(n_sub, d, rank_global) + lora_layer((p - 1) * n_sub, d, rank_local)
  return pheye_encoder_layer(p, n_sub, d, convention='exact') + lora


def llava_lm_layer(nt: int, ni: int, d: int, *, convention: Convention = 'paper') -> int:
  """Equation (3): one layer of a language model that reads image tokens in its prompt."""
  return vit_layer(nt + ni, d, convention=convention)


@dataclasses.dataclass(frozen=True)
class PheyeLM:
  """Pieces of equation (4); all but `base` belong to one cross-attention block.

  Attributes:
    base: the decoder layer on text alone. keys_values: of the image tokens. queries_out: W_Q, W_O.
    attention: text queries against image keys. feed_forward: of the block. interval: I.
  """

  base: int
  keys_values: int
  queries_out: int
  attention: int
  feed_forward: int
  interval: int

  @property
  def total(self) -> float:
    """Average multiplications per decoder layer."""
    block = self.keys_values + self.queries_out + self.attention + self.feed_forward
    return self.base + block / self.interval


def pheye_lm_layer(nt: int, ni: int, d: int, d_vit: int, interval: int, *,
                   convention: Convention = 'paper') -> PheyeLM:
  """Equation (4): average cost per decoder layer with a cross-attention block every `interval`."""
  return PheyeLM(
      base=vit_layer(nt, d, convention=convention), keys_values=2 * ni * d_vit * d,
      queries_out=2 * nt * d**2, attention=attention_products(convention) * d * nt * ni,
      feed_forward=8 * nt * d**2, interval=interval)


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of the comparison: our number, the paper's, and whether they agree."""

  quantity: str
  value: float
  paper: float | None
  agrees: bool | None
  remark: str = ''


def table() -> list[Row]:
  """Every number of the paper's analysis, recomputed, and the honest ones beside it.

  `agrees` compares after rounding to the digits the paper prints; None where it prints nothing.
  """
  d, d_vit, nt = 2048, 1280, 65
  large = vit_layer(2305, d_vit)
  llava = llava_lm_layer(nt, 2305, d)
  lm = lambda ni, interval, **k: pheye_lm_layer(nt, ni, d, d_vit, interval, **k).total

  def row(quantity, value, paper=None, digits=1, remark=''):
    return Row(quantity, value, paper, None if paper is None else round(value, digits) == paper,
               remark)

  exact_llava = llava_lm_layer(nt, 2570, d, convention='exact')
  return [
      row('(1), N = 2305, D = 1280', large),
      row("(2), N' = 257, P = 10", pheye_encoder_layer(10, 257, d_vit)),
      row("(1) / (2), N' = 257", large / pheye_encoder_layer(10, 257, d_vit), 1.02, 2,
          'not reproduced: 1.01 with the class token'),
      row("(1) / (2), N' = 256", large / pheye_encoder_layer(10, 256, d_vit), 1.02, 2,
          'the quoted number leaves the class token of the sub-images out'),
      row("(1) / (2), N = 2304, N' = 256",
          vit_layer(2304, d_vit) / pheye_encoder_layer(10, 256, d_vit), 1.02, 2,
          'no class token on either side'),
      row("(1) / (2), N' = 2570 as the text says", large / pheye_encoder_layer(10, 2570, d_vit),
          1.02, 2, "2570 is the total P N', not N'"),
      row("(1) / (2), N' = 2570 without the factor P", large / vit_layer(2570, d_vit), 1.02, 2,
          'one ViT on all tokens of all sub-images'),
      row("(1) / (2) at 448: N = 1025, P = 5, N' = 257",
          vit_layer(1025, d_vit) / pheye_encoder_layer(5, 257, d_vit),
          remark='tiling costs more than one large ViT'),
      row('(3), Nt = 65, Ni = 2305', llava),
      row('(4), I = 2', lm(2305, 2)),
      row('(3) / (4), I = 2', llava / lm(2305, 2), 12.1),
      row('(4), I = 4', lm(2305, 4)),
      row('(3) / (4), I = 4', llava / lm(2305, 4), 18.5),
      row('(3) / (4), I = 2, Ni = 2305 and 2570', llava / lm(2570, 2),
          remark='Pheye has 2570 image tokens at 672'),
      row('(3) / (4), I = 4, Ni = 2305 and 2570', llava / lm(2570, 4)),
      row('(3) / (4), I = 2, Ni = 2570 on both sides', llava_lm_layer(nt, 2570, d) / lm(2570, 2)),
      row('(3) / (4), I = 4, Ni = 2570 on both sides', llava_lm_layer(nt, 2570, d) / lm(2570, 4)),
      row("exact (1) / (2) with LoRA, N = 2305, N' = 257",
          vit_layer(2305, d_vit, convention='exact') / pheye_encoder_layer_exact(10, 257, d_vit),
          remark='both attention products, class tokens, LoRA branches'),
      row('exact (3) / (4), I = 2, Ni = 2305 and 2570',
          llava_lm_layer(nt, 2305, d, convention='exact') / lm(2570, 2, convention='exact'),
          remark='both attention products, real token counts'),
      row('exact (3) / (4), I = 4, Ni = 2305 and 2570',
          llava_lm_layer(nt, 2305, d, convention='exact') / lm(2570, 4, convention='exact')),
      row('exact (3) / (4), I = 2, Ni = 2570 on both sides',
          exact_llava / lm(2570, 2, convention='exact')),
      row('exact (3) / (4), I = 4, Ni = 2570 on both sides',
          exact_llava / lm(2570, 4, convention='exact')),
  ]
