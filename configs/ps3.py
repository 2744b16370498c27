"""PS3 pre-training. configs/ps3.py:SIZE[,BATCH][,TOWER][,CHIPS]

Captioned regions, sigmoid contrast, supervised selection.

1_5k, 4k: images up to 1512 or 3780 pixels. released: the batch the models were made with; script:
that of the published script. siglip, siglip2, cradio_v2_l: the trunk. CHIPS: a key of `CHIPS`. The
first of each where it is left out.

Command:  hrvlm convert --config configs/ps3.py:4k --part vision/tower=SIGLIP --part text=SIGLIP
            --to weights/ps3_4k_start
          hrvlm train --config configs/ps3.py:4k --workdir runs/ps3_4k_pretrain
            --config.data.train=IMAGES --config.data.tokenizer=SIGLIP
            --config.training.objective.annotations=ANNOTATIONS
          (SIGLIP: google/siglip-so400m-patch14-384; IMAGES, ANNOTATIONS: tar shards of the
          original, or without annotations the records of `hrvlm curate`)
Hardware: 128 x A100 80 GB (16 nodes), batch 4096; the script 8 GPUs, batch 256.
Time:     not published, not run here.
Expected: in the paper's MLLM, 1512 pixels, 44 % of the patches: recall of ground-truth patches
          91.2 % top-down, 87.4 % bottom-up, 43.7 % at random (1.5K model).
Source:   `NVlabs/PS3: train/scripts/ps3_{1.5k,4k}_siglip.sh, train/README.md,
          train/src/open_clip_train/{main,params,scheduler}.py`. One stage for both sizes: every
          parameter trains at one learning rate, AdamW, 75 epochs of a million samples, no gradient
          clipping. The original computes in float16 with loss scaling; here in bfloat16 with
          float32 masters. The paper's own table of hyper-parameters was not at hand; these are the
          scripts'.
"""

from ml_collections import ConfigDict

from hrvlm_jax.training.recipe import words

# Sides of the scales in pixels, as multiples of the trunk's.
SIZES = {'1_5k': (1, 2, 4), '4k': (1, 2, 4, 10)}
# 75 epochs of 1,000,000 samples, an epoch rounded up to whole batches of each of the original's 4
# loader workers: 245 -> 248 batches of 4096, 3907 -> 3908 of 256.
BATCHES = {
  'released': dict(batch_size=4096, steps=75 * 248),
  'script': dict(batch_size=256, steps=75 * 3908),
}
SIGLIP = dict(  # SO400M
  vision=dict(image_size=378, patch_size=14, channels=3, width=1152, depth=27, heads=16,
              mlp_width=4304, activation='gelu', norm_eps=1e-6),
  select_layers=(0, 9, 18, 26), adapter=None, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
C_RADIO = dict(  # C-RADIO-v2-L: a 256 x 256 table of positions, cropped, and no final norm
  vision=dict(image_size=384, patch_size=16, channels=3, width=1024, depth=24, heads=16,
              mlp_width=4096, activation='gelu', norm_eps=1e-6, position='crop',
              position_grid=256, post_norm=False),
  select_layers=(0, 7, 14, 23), adapter=dict(hidden=1520, out=1152, depth=3),
  mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))
# The trunk; vocabulary, activation and padding id of the text tower, width of the prompt it makes.
TOWERS = {
  'siglip': (SIGLIP, dict(vocab_size=32000, activation='gelu', pad=1, prompt_width=1152)),
  'siglip2': (SIGLIP, dict(vocab_size=256000, activation='gelu_tanh', pad=0, prompt_width=1152)),
  'cradio_v2_l': (C_RADIO, dict(vocab_size=32000, activation='gelu', pad=1, prompt_width=1024)),
}
CHIPS = {
  'gpu:128': dict(mesh=dict(data=-1, fsdp=8, sequence=1, tensor=1, dcn_data=1)),  # fsdp: a node
  # Shards of 16 rows and more of a width of 1152; smaller ones are summed whole (docs/plans.md).
  'v5e:16x16': dict(mesh=dict(data=8, fsdp=32, sequence=1, tensor=1, dcn_data=1)),
}
# Not decayed by the original: leaves of one dimension or none, and names with bn, ln, bias or
# logit_scale. Here layers lie stacked, so the leaves are named. Tables, residuals and the pool's
# probe are decayed.
NOT_DECAYED = r'(.*/)?(bias|scale|weight|prior_prompt|logit_scale|logit_bias)'
# What SigLIP has not: it starts fresh.
NEW = (r'vision/(selection|residual|adapter)/.*', r'text/prompt_head/.*')


def get_config(argument=''):
  size, batch, tower, chips = words(argument, SIZES, BATCHES, TOWERS, CHIPS)
  (trunk, text), numbers = TOWERS[tower], BATCHES[batch]
  config = ConfigDict()
  config.seed = 0
  config.mesh = CHIPS[chips]['mesh']

  config.model = dict(
    system='ps3', image_token=None, text=None,
    encoder=dict(
      scales=tuple(n * trunk['vision']['image_size'] for n in SIZES[size]), max_select=2560,
      budgets=None, residual=True, cosine_scale=5.0, quirks='reference', looks_at_once=False,
      low_context=True, look=dict(looks=1, tokens=None, first_scales=None, smooth=False),
      saliency=dict(width=512, out=512, depth=3, kernel=28, input_size=1512),
      pool=dict(width=1152, heads=16, mlp_width=4304),
      text=dict(context=64, width=1152, depth=27, heads=16, mlp_width=4304, out=1152,
                norm_eps=1e-6, **text),
      **trunk))

  config.data = dict(train='ps3_images', tokenizer='siglip_tokenizer')

  config.training = dict(
    steps=numbers['steps'], batch_size=numbers['batch_size'], accumulate=1,
    objective=dict(
      name='ps3_pretrain', annotations='ps3_annotations',
      regions=dict(global_share=0.25, boxes_per_sample=1, rows_per_image=1, crop_area=(0.9, 1.0),
                   crop_ratio=(3 / 4, 4 / 3), clean=True),
      contrast=dict(prior_weight=1.0, posterior_weight=1.0, select_target=True, pool_target=True,
                    intra_image=False, chunk=1024)),
    dtype='bfloat16', remat='layers', attention='auto',
    groups=(dict(pattern=NOT_DECAYED, decay=False), dict(pattern='.*')),
    optimizer=dict(
      name='adamw', learning_rate=5e-6, schedule='cosine', warmup=1500, warmup_from=1,
      b1=0.9, b2=0.95, eps=1e-8, weight_decay=3e-4, clip_norm=None),
    log_every=100, checkpoint_every=1000, init_from=f'weights/ps3_{size}_start', init_allow=NEW)
  return config
