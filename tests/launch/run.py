"""The smallest real run: a tiny system on eight noise images, for two hosts of a simulation.

    scripts/launch.sh simulate -- python -m hrvlm_jax.cli train --config tests/launch/run.py:DATA

DATA is a folder; what is missing there is made.
"""

import json
import pathlib

import ml_collections
import numpy as np
from PIL import Image

from hrvlm_jax.core.config import to_dict
from hrvlm_jax.systems import registry


def make_data(folder: pathlib.Path) -> None:
  """Eight images and their conversations; the JSON comes last."""
  rng = np.random.default_rng(0)
  folder.mkdir(parents=True, exist_ok=True)
  rows = []
  for i in range(8):
    name = f'{i}.png'
    Image.fromarray(rng.integers(0, 256, (40 + 8 * i, 90, 3), dtype=np.uint8)).save(folder / name)
    turns = [{'from': 'human', 'value': '<image>\nWhich number?'},
             {'from': 'gpt', 'value': f'Number {i}.'}]  # fmt: skip
    rows.append({'id': str(i), 'image': name, 'conversations': turns})
  (folder / 'train.json').write_text(json.dumps(rows))


def get_config(data: str):
  folder = pathlib.Path(data)
  if not (folder / 'train.json').exists():
    make_data(folder)
  config = ml_collections.ConfigDict()
  config.model = to_dict(registry.get('mc_llava').tiny())
  config.data = dict(train=str(folder / 'train.json'), lengths=(160,), shards=4,
                     packing=dict(window=2))  # each host makes its own part of a batch
  config.mesh = dict(data=1, fsdp=-1)
  config.training = dict(
    steps=12, batch_size=8, log_every=1, checkpoint_every=4,
    optimizer=dict(learning_rate=1e-3, warmup=0.25))
  return config
