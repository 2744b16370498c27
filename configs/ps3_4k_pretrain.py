"""PS3-4K pre-training: captioned regions, sigmoid contrast, supervised selection.

Command:  hrvlm convert --config configs/ps3_4k_pretrain.py --part vision/tower=SIGLIP
            --part text=SIGLIP --to weights/ps3_4k_start
          hrvlm train --config configs/ps3_4k_pretrain.py --workdir runs/ps3_4k_pretrain
            --config.data.train=IMAGES --config.data.annotations=ANNOTATIONS
            --config.data.tokenizer=SIGLIP
          (SIGLIP: google/siglip-so400m-patch14-384; IMAGES, ANNOTATIONS: tar shards of the
          original, or without annotations the records of `hrvlm curate`. The argument `script` is
          the published batch of 256, `siglip2` the SigLIP2 tower: `:script,siglip2`.)
Hardware: 128 x A100 80 GB (16 nodes), batch 4096; the script 8 GPUs, batch 256.
Time:     not published, not run here.
Expected: in the paper's MLLM, 1512 pixels, 44 % of the patches: recall of ground-truth patches
          91.2 % top-down, 87.4 % bottom-up, 43.7 % at random (1.5K model).
"""

from hrvlm_jax.systems.ps3 import recipes as ps3
from hrvlm_jax.systems.ps3.config import RELEASED
from hrvlm_jax.training import recipes


def get_config(argument='released'):
  batch, _, tower = argument.partition(',')
  return recipes.config(RELEASED[f'ps3_4k_{tower or "siglip"}'], ps3.run('4k', batch=batch))
