"""The two published training stages as data, for `configs/`.

Source: `luogen1996/LLaVA-HR: scripts/v1_5/pretrain_llava_hr.sh, train_eval_llava_hr.sh`. Both
stages: AdamW without weight decay, cosine schedule, 3 % warm-up, gradient norm 1, bfloat16, one
epoch. Texts are cut at `model_max_length` ids, an image counting one; stage 2 groups micro-batches
of 8 on 8 devices by length and modality. The original's loss is the mean over one device's
micro-batch, averaged over devices and accumulation steps: `loss_average='micro_batch'` with as many
micro-batches as the original has; 'tokens' with fewer is faster and weighs every target alike.
"""

from __future__ import annotations

from typing import Any

from hrvlm_jax.systems.llava_hr.config import TRAINABLE

STAGES = ('stage1', 'stage2')
_NUMBERS = {
  'stage1': dict(steps=2181, batch_size=256, accumulate=8, learning_rate=1e-3,
                 train='blip_laion_cc_sbu_558k.json', lengths=(640, 768, 1024, 2624),
                 max_length=2048),
  'stage2': dict(steps=5198, batch_size=128, accumulate=16, learning_rate=2e-5,
                 train='llava_v1_5_mix665k.json', lengths=(1280, 1536, 2048, 3072, 3584),
                 max_length=2496, order='grouped', group=(8, 8)),
}


# Never read: the ConvNeXt's classifier, CLIP's final norm.
UNREAD = r'vision/(slow/head|fast/post_norm)/.*'
# An ablation starts from the towers and the language model; what joins them is its own.
FRESH_IN_ABLATIONS = (r'projector/.*', r'vision/(adapters|align|resampler)/.*', UNREAD)


def run(stage: str) -> dict[str, Any]:
  """The `data` and `training` sections of a run config.

  Raises:
    ValueError: unknown stage.
  """
  if stage not in STAGES:
    raise ValueError(f'stage must be one of {STAGES}, got {stage!r}')
  numbers = _NUMBERS[stage]
  groups = [dict(pattern=UNREAD, frozen=True),
            *(dict(pattern=pattern, decay=False, frozen=not on)
              for pattern, on in TRAINABLE[stage])]
  return {
    'data': dict(
      train=numbers['train'], tokenizer='vicuna-7b-v1.5', lengths=numbers['lengths'],
      max_length=numbers['max_length'], order=numbers.get('order', 'uniform'),
      group=numbers.get('group'), exif='ignore'),
    'training': dict(
      steps=numbers['steps'], batch_size=numbers['batch_size'], accumulate=numbers['accumulate'],
      groups=groups, dtype='bfloat16', frozen_dtype='bfloat16', remat='layers', attention='auto',
      loss_average='micro_batch',
      optimizer=dict(learning_rate=numbers['learning_rate'], schedule='cosine', warmup=0.03,
                     weight_decay=0.0, clip_norm=1.0)),
  }
