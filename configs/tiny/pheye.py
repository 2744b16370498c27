"""A tiny Pheye on the built-in task: global view and four tiles, read by cross-attention.

Command:  hrvlm needle --out runs/needle   (once)
          hrvlm train --config configs/tiny/pheye.py --workdir runs/tiny_pheye
Hardware: 2 CPU cores.
"""

import ml_collections

from hrvlm_jax.core.config import to_dict
from hrvlm_jax.systems.pheye.config import tiny

# Nothing is pretrained here, so that everything learns; the released models train the blocks, both
# LoRA sets, norm1, norm2 and sub_image alone. What is never read stays where it is.
GROUPS = (
  dict(pattern=r'vision/(norm3|tower/post_norm)/.*', frozen=True),
  dict(pattern=r'.*/(bias|scale)|vision/sub_image/embedding', decay=False),
  dict(pattern=r'.*'),
)


def get_config():
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.model = to_dict(tiny())
  config.data = dict(train='runs/needle/train/needle.json', lengths=(320, 384))
  config.training = dict(
    steps=200, batch_size=16, log_every=10, checkpoint_every=100, groups=GROUPS,
    optimizer=dict(learning_rate=1e-3, schedule='cosine', warmup=0.05, weight_decay=0.01))
  return config
