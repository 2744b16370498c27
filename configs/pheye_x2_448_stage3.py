"""Pheye-x2-448, stage 3: academic questions and captions (676K).

Command:  hrvlm train --config configs/pheye_x2_448_stage3.py --workdir runs/pheye_x2_448_stage3
          (`configs/pheye_x2_448_stage3.py:code` freezes the first LoRA set, as the original's
          code does by accident; its paper trains both)
Hardware: not published; 8 x 80 GB with `--config.mesh.data=8`.
Time:     not published, not run here.
Expected: VQAv2 76.0, NoCaps 111.8, TextVQA 47.3, TextCaps 108.9 (original's README).
Open:     optimizer, warm-up, clipping, epochs, longest text (systems/pheye/recipes.py).
"""

from hrvlm_jax.systems.pheye import recipes as pheye
from hrvlm_jax.training import recipes


def get_config(adapters='paper'):
  first = pheye.trains_first(adapters)
  return recipes.config(pheye.model('pheye_x2_448', train_first_adapter=first),
                        pheye.run('pheye_x2_448', 3, train_first_adapter=first))
