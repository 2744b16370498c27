"""MC-LLaVA-3B: everything learns.

Command:  hrvlm train --config configs/mc_llava_3b_full.py --workdir runs/mc_llava_3b_full
          (`--config.training.init_from=weights/mc_llava_3b` goes on from the released checkpoint,
          as the original's script does)
Hardware: 8 x 80 GB (open: not published; ZeRO stage 3 there, `--config.mesh.fsdp=8` here).
Time:     not published, not run here.
Expected: TextVQA 50.9, GQA 59.5, VQAv2 76.72, VizWiz 32.68 (the released model's card).
Open:     learning rate, batch size, epochs, warm-up and clipping (systems/mc_llava/recipes.py); the
          original draws 0 or 1 level of crops per example, here it is 1.
"""

from hrvlm_jax.systems.mc_llava import recipes as mc_llava
from hrvlm_jax.training import recipes


def get_config():
  return recipes.config(mc_llava.model('full'), mc_llava.run('full'))
