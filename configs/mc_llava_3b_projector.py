"""MC-LLaVA-3B, alignment: the projector and the coordinate MLP learn, all else is frozen.

Command:  hrvlm convert --config configs/mc_llava_3b_projector.py --part vision/tower=SIGLIP
            --part language=PHI2 --to weights/mc_llava_3b_start
          hrvlm train --config configs/mc_llava_3b_projector.py --workdir runs/mc_llava_3b_projector
Hardware: 8 x 80 GB (open: not published; ZeRO stage 3 there, `--config.mesh.fsdp=8` here).
Time:     not published, not run here.
Expected: not published; the released model has no such stage of its own.
Open:     learning rate, batch size, epochs, warm-up and clipping (systems/mc_llava/recipes.py); the
          original draws 0 or 1 level of crops per example, here it is 1.
"""

from hrvlm_jax.systems.mc_llava import recipes as mc_llava
from hrvlm_jax.training import recipes


def get_config():
  return recipes.config(mc_llava.model('projector'), mc_llava.run('projector'))
