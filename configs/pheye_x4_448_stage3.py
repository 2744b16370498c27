"""Pheye-x4-448, stage 3: academic questions and captions (676K).

Command:  hrvlm train --config configs/pheye_x4_448_stage3.py --workdir runs/pheye_x4_448_stage3
          (`configs/pheye_x4_448_stage3.py:code` freezes the first LoRA set, as the original's
          code does by accident; its paper trains both)
Hardware: not published; 8 x 80 GB with `--config.mesh.data=8`.
Time:     not published, not run here.
Expected: VQAv2 75.2, NoCaps 110.1, TextVQA 45.9, TextCaps 106.4 (original's README).
Open:     optimizer, warm-up, clipping, epochs, longest text (systems/pheye/recipes.py).
"""

from hrvlm_jax.systems.pheye import recipes as pheye
from hrvlm_jax.training import recipes


def get_config(adapters='paper'):
  first = pheye.trains_first(adapters)
  return recipes.config(pheye.model('pheye_x4_448', train_first_adapter=first),
                        pheye.run('pheye_x4_448', 3, train_first_adapter=first))
