"""A tiny LLaVA-HR on the built-in task: a ViT on 64 pixels, a ConvNeXt on 256, adapters between.

Command:  hrvlm needle --out runs/needle   (once)
          hrvlm train --config configs/tiny/llava_hr.py --workdir runs/tiny_llava_hr
Hardware: 2 CPU cores.
"""

import ml_collections

from hrvlm_jax.core.config import to_dict
from hrvlm_jax.systems.llava_hr.config import tiny

# Nothing is pretrained here, so that everything learns. What is never read stays where it is.
GROUPS = (
  dict(pattern=r'vision/(slow/head|fast/post_norm)/.*|vision/fast/class_token', frozen=True),
  dict(pattern=r'.*/(bias|scale|layer_scale)|vision/fast/pos_embed', decay=False),
  dict(pattern=r'.*'),
)


def get_config():
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.model = to_dict(tiny())
  config.data = dict(train='runs/needle/train/needle.json', lengths=(320, 384, 448))
  config.training = dict(
    steps=200, batch_size=16, log_every=10, checkpoint_every=100, groups=GROUPS,
    optimizer=dict(learning_rate=1e-3, schedule='cosine', warmup=0.05, weight_decay=0.01))
  return config
