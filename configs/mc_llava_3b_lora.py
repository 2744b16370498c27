"""MC-LLaVA-3B, LoRA on the decoder; vision tower and projector learn whole.

Command:  hrvlm convert --from MC-LLaVA-3b --to weights/mc_llava_3b
          hrvlm train --config configs/mc_llava_3b_lora.py --workdir runs/mc_llava_3b_lora
Hardware: 8 x 80 GB (open: not published; ZeRO stage 3 there, `--config.mesh.fsdp=8` here).
Time:     not published, not run here.
Expected: not published for this stage.
Open:     learning rate, batch size, epochs, warm-up and clipping (systems/mc_llava/recipes.py); the
          original draws 0 or 1 level of crops per example, here it is 1.
"""

from hrvlm_jax.systems.mc_llava import recipes as mc_llava
from hrvlm_jax.training import recipes


def get_config():
  return recipes.config(mc_llava.model('lora'), mc_llava.run('lora'))
