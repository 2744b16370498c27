"""LLaVA-HR-7B, stage 2: everything learns on 665K conversations.

Command:  hrvlm train --config configs/llava_hr_7b_stage2.py --workdir runs/llava_hr_7b_stage2
Hardware: 8 x A800 80 GB.
Time:     20.7 hours for both stages (paper, Table 1); not run here.
Expected: VQAv2 81.9, TextVQA 67.1, MME 1554.9, POPE 87.6 (paper, Tables 4 and 5).

Stage 1 froze the language model, CLIP and ConvNeXt, so that its checkpoint holds what the original
starts from again. The adapters are new and change nothing at first.
"""

from hrvlm_jax.systems.llava_hr import recipes as llava_hr
from hrvlm_jax.systems.llava_hr.config import RELEASED
from hrvlm_jax.training import recipes


def get_config():
  return recipes.config(RELEASED['llava_hr_7b'], llava_hr.run('stage2'), seed=42,
                        init_from='runs/llava_hr_7b_stage1',
                        init_allow=('vision/adapters/.*',))
