"""Pheye-x4-672, stage 2: complex instructions (MIMIC-IT, LRV, SViT, LVIS-Instruct, 964K).

Command:  hrvlm train --config configs/pheye_x4_672_stage2.py --workdir runs/pheye_x4_672_stage2
          (`configs/pheye_x4_672_stage2.py:code` freezes the first LoRA set, as the original's
          code does by accident; its paper trains both)
Hardware: not published; 8 x 80 GB with `--config.mesh.data=8`.
Time:     not published, not run here.
Expected: published after stage 3 only.
Open:     optimizer, warm-up, clipping, epochs, longest text (systems/pheye/recipes.py).
"""

from hrvlm_jax.systems.pheye import recipes as pheye
from hrvlm_jax.training import recipes


def get_config(adapters='paper'):
  first = pheye.trains_first(adapters)
  return recipes.config(pheye.model('pheye_x4_672', train_first_adapter=first),
                        pheye.run('pheye_x4_672', 2, train_first_adapter=first))
