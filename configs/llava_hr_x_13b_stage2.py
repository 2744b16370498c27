"""LLaVA-HR-X-13B, stage 2: everything learns on 665K conversations.

Command:  hrvlm train --config configs/llava_hr_x_13b_stage2.py --workdir runs/llava_hr_x_13b_stage2
Hardware: 8 x 80 GB.
Time:     not published; not run here.
Expected: VQAv2 82.6, TextVQA 70.9, MME 1487.3, POPE 88.0 (paper, Tables 4 and 5).

Stage 1 froze the language model, CLIP and ConvNeXt, so that its checkpoint holds what the original
starts from again. The adapters are new and change nothing at first.
"""

from hrvlm_jax.systems.llava_hr import recipes as llava_hr
from hrvlm_jax.systems.llava_hr.config import RELEASED
from hrvlm_jax.training import recipes


def get_config():
  return recipes.config(RELEASED['llava_hr_x_13b'], llava_hr.run('stage2'), seed=42,
                        init_from='runs/llava_hr_x_13b_stage1',
                        init_allow=('vision/adapters/.*',))
