"""Pheye's main table: cross-attention in every 4th or 2nd layer, 448 or 672 pixels, stage 1.

Command:  hrvlm sweep --config configs/ablations/pheye_variants.py --out runs/pheye_variants
          hrvlm train --config configs/ablations/pheye_variants.py:x4_448 --workdir runs/x4_448
Hardware: not published; 8 x 80 GB.
Time:     not published, not run here.
Expected: `ROWS` (VQAv2 test-dev, NoCaps, TextVQA, TextCaps after all three stages; the original's
          README). `x4_448_code` freezes the first LoRA set as the original's code does; it has no
          numbers of its own.
"""

from hrvlm_jax.training.recipe import evaluate, words

# Row: (words of the recipe, numbers of the paper).
ROWS = {
  'x4_448': ('x4_448,paper', (75.2, 110.1, 45.9, 106.4)),
  'x4_672': ('x4_672,paper', (75.5, 110.8, 49.2, 111.9)),
  'x2_448': ('x2_448,paper', (76.0, 111.8, 47.3, 108.9)),
  'x2_672': ('x2_672,paper', (76.4, 110.5, 50.5, 115.9)),
  'x4_448_code': ('x4_448,code', None),
}


def get_config(argument=''):
  """The recipe of Pheye's first stage."""
  row, = words(argument, ROWS)
  return evaluate(f'pheye:{ROWS[row][0]},stage1')
