"""VILA-HD-8B-PS3-1.5K: stages align, tower, pretrain, sft, as the argument (default sft).

Command:  hrvlm convert --config configs/vila_hd_8b_1_5k.py:align --part vision/ps3=PS3_RELEASE
            --part language=QWEN2_7B --to weights/vila_hd_8b_1_5k_start
          for stage in align tower pretrain sft; do
            hrvlm train --config configs/vila_hd_8b_1_5k.py:$stage \\
              --workdir runs/vila_hd_8b_1_5k_$stage
          done
          (`:sft,siglip2` takes another tower; known: siglip, siglip2, cradio_v2)
Hardware: not published; `hrvlm plan --config configs/vila_hd_8b_1_5k.py:sft` says what fits.
Time:     not published, not run here.
Expected: ChartQA 84.3, DocVQA 92.0, InfoVQA 67.4, OCRBench 782, V* 68.1, TextVQA 78.4
          (SigLIP, all looks; paper).
Open:     VILA-HD's own training was not released: the stages are NVILA's, the number of steps and
          the weight of the selection loss are ours (systems/vila_hd/recipes.py).
"""

from hrvlm_jax.systems.vila_hd import recipes as vila_hd
from hrvlm_jax.training import recipes


def get_config(argument='sft'):
  stage, _, tower = argument.partition(',')
  name = 'vila_hd_8b_1_5k'
  recipe = vila_hd.run(name, stage, weights=f'weights/{name}_start')
  return recipes.config(vila_hd.model(f'{name}_{tower or "siglip"}', stage), recipe)
