"""A tiny PS3: thumbnails of 40 pixels, patches of the image at 80 and 160 pixels where it matters.

Command:  hrvlm tiny --config configs/tiny/ps3.py
          (writes the task as region records and pre-trains the trunk under runs/tiny, trains, then
          measures recall and accuracy by budget)
Hardware: 2 CPU cores.
Result:   recall at 44 %: top-down 98.5%, bottom-up 80.2%, random 44.1%; read 90.0%, 1200 steps.
"""

import dataclasses

import ml_collections

from hrvlm_jax.core.config import to_dict
from hrvlm_jax.lab import tiny, tiny_ps3
from hrvlm_jax.lab.glyphs import GlyphConfig
from hrvlm_jax.lab.needle import NeedleConfig
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.systems.ps3.config import LookConfig, tiny_encoder

FOLDER = 'runs/tiny'
# One look takes 22 % of the 500 patches above the thumbnail; more looks read more.
ENCODER = dataclasses.replace(
  tiny_encoder(vocab_size=512, max_select=110), look=LookConfig(looks=1))
# The tower knows letters, as the released models start from SigLIP; the rest is new. All of it
# learns, as in the original: with the tower frozen, patches at positions of larger grids are read
# badly (37 % of the letters instead of 90 %), and more of them dilute the rest.
NEW = ('vision/(selection|residual|pool_head)/.*', 'text/.*', 'logit_.*')
GROUPS = (
  dict(pattern='(.*/)?(bias|scale|weight|prior_prompt|logit_scale|logit_bias)', decay=False),
  dict(pattern='.*'),
)


def task(builtin):
  return NeedleConfig.square(signs=(5, 6)) if builtin == 'needle' else NeedleConfig.square(builtin)


def get_config(builtin='needle'):
  folder = f'{FOLDER}/{tiny.named("regions", builtin)}'
  encoders = f'{FOLDER}/encoders/{tiny.named("ps3", builtin)}'
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.model = to_dict(ModelConfig(system='ps3', encoder=ENCODER, text=None, image_token=None))
  config.data = dict(train=f'{folder}/train', tokenizer=f'{folder}/tokenizer')
  config.training = dict(
    steps=1200, batch_size=48, log_every=20, checkpoint_every=1000, keep=1, eval_every=0, mfu=False,
    objective=dict(name='ps3_pretrain', regions=dict(clean=False, global_share=0.15)),
    groups=GROUPS, init_from=encoders, init_allow=NEW,
    optimizer=dict(name='muon', learning_rate=2e-3, warmup=0.05, weight_decay=0.01, b2=0.98))
  return config


def preparation(builtin='needle'):
  made = task(builtin)
  tower = GlyphConfig(needle=made, vision=ENCODER.vision, window=40, last_tokens=25, steps=1000)
  return tiny_ps3.Preparation(task=made, towers={'vision/tower': tower})
