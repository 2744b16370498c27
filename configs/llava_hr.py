"""LLaVA-HR as published: llava_hr.py:7b_stage1, :7b_stage2, :x_13b_stage1, :x_13b_stage2.

Command:  hrvlm train --config configs/llava_hr.py:7b_stage1 --workdir runs/hr_stage1
            --config.training.init_from=<checkpoint of Vicuna, CLIP and ConvNeXt>
          hrvlm train --config configs/llava_hr.py:7b_stage2 --workdir runs/hr_stage2
            --config.training.init_from=<the same with stage 1's projector and align module>
Hardware: 8 x 80 GB; 20.7 hours for both stages of 7B on A800 (paper, Table 1).
Expected: VQAv2 81.9, TextVQA 67.1, MME 1554.9, POPE 87.6 (7B, paper, Table 1).

Stage 2 starts from the language model, CLIP and ConvNeXt again, plus stage 1's projector and align
module; its adapters are new (`init_allow`) and change nothing at first.
"""

import ml_collections

from hrvlm_jax.core.config import to_dict
from hrvlm_jax.systems.llava_hr import recipes
from hrvlm_jax.systems.llava_hr.config import RELEASED

MODELS = {
  '7b_stage1': 'llava_hr_7b_stage1', '7b_stage2': 'llava_hr_7b',
  'x_13b_stage1': 'llava_hr_x_13b_stage1', 'x_13b_stage2': 'llava_hr_x_13b',
}


def get_config(name='7b_stage2'):
  if name not in MODELS:
    raise ValueError(f'llava_hr.py:{name} is unknown; known: {sorted(MODELS)}')
  stage = name.rpartition('_')[2]
  config = ml_collections.ConfigDict(recipes.run(stage))
  config.seed = 42
  config.model = to_dict(RELEASED[MODELS[name]])
  if stage == 'stage2':
    config.training.init_allow = ('vision/adapters/.*',)
  return config
