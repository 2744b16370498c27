"""Pheye's main table: cross-attention in every 4th or 2nd layer, 448 or 672 pixels, stage 1.

Command:  hrvlm sweep --config configs/ablations/pheye_variants.py --out runs/pheye_variants
          hrvlm train --config configs/ablations/pheye_variants.py:x4_448 --workdir runs/x4_448
Hardware: not published; 8 x 80 GB with `--config.mesh.data=8`.
Time:     not published, not run here.
Expected: `ROWS` (VQAv2 test-dev, NoCaps, TextVQA, TextCaps after all three stages; the original's
          README). `x4_448_code` freezes the first LoRA set as the original's code does; it has no
          numbers of its own.
"""

from hrvlm_jax.systems.pheye import recipes as pheye
from hrvlm_jax.training import recipes

# Row: (released model and whether its first LoRA set trains, numbers of the paper).
ROWS = {
  'x4_448': (('pheye_x4_448', True), (75.2, 110.1, 45.9, 106.4)),
  'x4_672': (('pheye_x4_672', True), (75.5, 110.8, 49.2, 111.9)),
  'x2_448': (('pheye_x2_448', True), (76.0, 111.8, 47.3, 108.9)),
  'x2_672': (('pheye_x2_672', True), (76.4, 110.5, 50.5, 115.9)),
  'x4_448_code': (('pheye_x4_448', False), None),
}


def get_config(row='x4_448'):
  if row not in ROWS:
    raise ValueError(f'pheye_variants.py:{row} is unknown; known: {sorted(ROWS)}')
  name, first = ROWS[row][0]
  return recipes.config(pheye.model(name, train_first_adapter=first),
                        pheye.run(name, 1, train_first_adapter=first))
