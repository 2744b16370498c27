"""PS3's published pre-training as data, for `configs/`.

Source: `NVlabs/PS3: train/scripts/ps3_{1.5k,4k}_siglip.sh, train/README.md,
train/src/open_clip_train/{main,params,scheduler}.py`. One stage for both sizes: every parameter
trains at one learning rate, AdamW, 75 epochs of a million samples, no gradient clipping. The
original computes in float16 with loss scaling; here in bfloat16 with float32 masters. The paper's
own table of hyper-parameters was not at hand; these are the scripts'.
"""

from __future__ import annotations

from typing import Any

EPOCHS, EPOCH_SAMPLES = 75, 1_000_000
LOADER_WORKERS = 4  # an epoch is rounded up to whole batches of every loader worker
BATCHES = {'released': 4096, 'script': 256}  # 16 x 8 A100, as the models; 8 GPUs, as the script

# Not decayed by the original: leaves of one dimension or none, and names with bn, ln, bias or
# logit_scale. Here layers lie stacked, so the leaves are named. Tables, residuals and the pool's
# probe are decayed.
NOT_DECAYED = r'(.*/)?(bias|scale|weight|prior_prompt|logit_scale|logit_bias)'
# What SigLIP has not: it starts fresh.
NEW = (r'vision/(selection|residual|adapter)/.*', r'text/prompt_head/.*')


def epoch_steps(batch_size: int) -> int:
  """Optimizer steps of an epoch of the original's loader."""
  batches = -(-EPOCH_SAMPLES // batch_size)
  return LOADER_WORKERS * -(-batches // LOADER_WORKERS)


def run(size: str, *, batch: str = 'released') -> dict[str, Any]:
  """The `data` and `training` sections of a run config.

  Args:
    size: '1_5k' or '4k'; both use the same settings.
    batch: a key of `BATCHES`.

  Raises:
    ValueError: unknown size or batch.
  """
  if size not in ('1_5k', '4k'):
    raise ValueError(f"size must be '1_5k' or '4k', got {size!r}")
  if batch not in BATCHES:
    raise ValueError(f'batch must be one of {sorted(BATCHES)}, got {batch!r}')
  rows = BATCHES[batch]
  return {
    'data': dict(
      train='ps3_images', annotations='ps3_annotations', tokenizer='siglip_tokenizer',
      regions=dict(global_share=0.25, boxes_per_sample=1, crop_area=(0.9, 1.0),
                   crop_ratio=(3 / 4, 4 / 3), clean=True)),
    'training': dict(
      steps=EPOCHS * epoch_steps(rows), batch_size=rows, objective='ps3_pretrain',
      groups=(dict(pattern=NOT_DECAYED, decay=False), dict(pattern='.*')),
      dtype='bfloat16', remat='layers', attention='auto', log_every=100, checkpoint_every=1000,
      init_from=f'weights/ps3_{size}_start', init_allow=NEW,
      optimizer=dict(name='adamw', learning_rate=5e-6, schedule='cosine', warmup=1500,
                     warmup_from=1, b1=0.9, b2=0.95, eps=1e-8, weight_decay=3e-4,
                     clip_norm=None)),
  }
