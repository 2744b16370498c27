"""LLaVA-HR-7B, stage 1: the projector and the align module learn to caption (558K pairs).

Command:  hrvlm convert --config configs/llava_hr_7b_stage1.py --part language=VICUNA_7B
            --part vision/fast=CLIP_L_336 --part vision/slow=CONVNEXT --to weights/llava_hr_7b_start
          hrvlm train --config configs/llava_hr_7b_stage1.py --workdir runs/llava_hr_7b_stage1
Hardware: 8 x A800 80 GB.
Time:     20.7 hours for both stages (paper, Table 1); not run here.
Expected: after stage 2: VQAv2 81.9, TextVQA 67.1, MME 1554.9, POPE 87.6 (paper, Tables 4 and 5).
"""

from hrvlm_jax.systems.llava_hr import recipes as llava_hr
from hrvlm_jax.systems.llava_hr.config import RELEASED
from hrvlm_jax.training import recipes


def get_config():
  return recipes.config(RELEASED['llava_hr_7b_stage1'], llava_hr.run('stage1'), seed=42,
                        init_from='weights/llava_hr_7b_start',
                        init_allow=('projector/.*', 'vision/align/.*', llava_hr.UNREAD))
