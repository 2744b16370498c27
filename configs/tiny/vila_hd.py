"""A tiny VILA-HD on the built-in task: the question says where to look.

Command:  hrvlm needle --out runs/needle   (once)
          hrvlm train --config configs/tiny/vila_hd.py --workdir runs/tiny_vila_hd
Hardware: 2 CPU cores.
"""

import ml_collections

from hrvlm_jax.core.config import to_dict
from hrvlm_jax.systems.vila_hd.config import tiny


def get_config():
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.model = to_dict(tiny())
  config.data = dict(train='runs/needle/train/needle.json', lengths=(192, 256))
  config.training = dict(
    steps=200, batch_size=16, log_every=10, checkpoint_every=100, objective='two_pass',
    optimizer=dict(learning_rate=1e-3, schedule='cosine', warmup=0.05, weight_decay=0.01))
  return config
