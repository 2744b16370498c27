"""VILA-HD-8B-PS3: two resolutions, four stages. configs/vila_hd.py:SIZE,STAGE[,TOWER][,CHIPS]

1_5k, 4k: PS3 up to 1512 or 3780 pixels. align, tower, pretrain, sft: see `STAGES`. siglip,
siglip2, cradio_v2 (1_5k alone): PS3's trunk. CHIPS: a key of `CHIPS`. The first of each where it is
left out.

Command:  hrvlm convert --config configs/vila_hd.py:4k,align --part vision/ps3=PS3_RELEASE
            --part language=QWEN2_7B --to weights/vila_hd_8b_4k_start
          for stage in align tower pretrain sft; do
            hrvlm train --config configs/vila_hd.py:4k,$stage --workdir runs/vila_hd_8b_4k_$stage
          done
Hardware: not published; `hrvlm plan --config configs/vila_hd.py:4k,sft,v5e:16x16 --topology
          v5e:16x16 --image 3780x3780` says what a step takes there.
Time:     not published, not run here.
Expected: SigLIP, all looks (paper):
          1_5k: ChartQA 84.3, DocVQA 92.0, InfoVQA 67.4, OCRBench 782, V* 68.1, TextVQA 78.4
          4k:   ChartQA 84.3, DocVQA 91.7, InfoVQA 65.3, OCRBench 774, V* 71.2, 4KPro 72.6
Source:   VILA-HD's own training script and data were not released. The stages are those of the
          public NVILA scripts it builds on (`NVlabs/VILA: scripts/NVILA/*.sh`): AdamW with betas
          0.9 and 0.999, cosine, 3 % warm-up, no weight decay, bfloat16, one epoch, 8192 ids.
Open:     everything that is VILA-HD's own: the number of steps, the weight of the selection loss
          (1.0 here; its flag's default is 0), whether ground-truth boxes steer the selection (they
          do here), which stages train the selection.
"""

from ml_collections import ConfigDict

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.training.recipe import words

# Never read here: PS3's own pooling and final norm, the prompt of saliency-guided selection.
UNREAD = r'vision/ps3/(pool_head/.*|tower/(post_norm|pool)/.*|selection/prior_prompt)'
PARTS = {
  'projector': 'vision/projector/.*',
  'tower': r'vision/ps3/(tower|residual|adapter)/.*',
  'language': 'language/.*',
  'selection': r'vision/(prompt_head|ps3/selection)/.*',
}
# Batch and clipping of the NVILA scripts.
STAGES = {
  'align': dict(
    trains=('projector',), learning_rate=1e-3, batch_size=512, clip_norm=1.0, steps=1000,
    start='weights/vila_hd_8b_{}_start', fresh=('vision/(projector|prompt_head)/.*', UNREAD)),
  'tower': dict(
    trains=('projector', 'tower'), learning_rate=2e-5, batch_size=1024, clip_norm=5.0, steps=2000,
    start='runs/vila_hd_8b_{}_align', fresh=()),
  'pretrain': dict(
    trains=('projector', 'language'), learning_rate=2e-5, batch_size=1024, clip_norm=1.0,
    steps=10_000, start='runs/vila_hd_8b_{}_tower', fresh=()),
  'sft': dict(
    trains=('projector', 'tower', 'language', 'selection'), learning_rate=1.5e-5, batch_size=1024,
    clip_norm=5.0, steps=10_000, start='runs/vila_hd_8b_{}_pretrain', fresh=()),
}
# Sides of the scales in pixels, as multiples of the trunk's.
SIZES = {'1_5k': (1, 2, 4), '4k': (1, 2, 4, 10)}
SIGLIP = dict(  # SO400M; SigLIP and SigLIP2 differ in their weights alone
  vision=dict(image_size=378, patch_size=14, channels=3, width=1152, depth=27, heads=16,
              mlp_width=4304, activation='gelu', norm_eps=1e-6),
  select_layers=(0, 9, 18, 26), adapter=None, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
C_RADIO = dict(  # C-RADIO-v2-L: a 256 x 256 table of positions, cropped, and no final norm
  vision=dict(image_size=384, patch_size=16, channels=3, width=1024, depth=24, heads=16,
              mlp_width=4096, activation='gelu', norm_eps=1e-6, position='crop',
              position_grid=256, post_norm=False),
  select_layers=(0, 7, 14, 23), adapter=dict(hidden=1520, out=1152, depth=3),
  mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))
TOWERS = {'siglip': SIGLIP, 'siglip2': SIGLIP, 'cradio_v2': C_RADIO}
CHIPS = {
  'gpu:64': dict(rows=64, mesh=dict(data=-1, fsdp=16, sequence=1, tensor=1, dcn_data=1)),
  'v5e:16x16': dict(rows=128, remat='attention',
                    mesh=dict(data=1, fsdp=128, sequence=1, tensor=2, dcn_data=1)),
  '2xv5e:16x16': dict(rows=256, remat='attention',
                      mesh=dict(data=1, fsdp=128, sequence=1, tensor=2, dcn_data=2)),
  'v5p:4x4x4': dict(rows=256, remat='attention',
                    mesh=dict(data=2, fsdp=32, sequence=1, tensor=1, dcn_data=1)),
  'v6e:16x16': dict(rows=128, remat='attention',
                    mesh=dict(data=1, fsdp=128, sequence=1, tensor=2, dcn_data=1)),
}  # rows: of a micro-batch


def get_config(argument=''):
  size, stage, tower, chips = words(argument, SIZES, STAGES, TOWERS, CHIPS)
  numbers, machine, trunk = STAGES[stage], CHIPS[chips], TOWERS[tower]
  if (size, tower) == ('4k', 'cradio_v2'):
    raise UserError('cradio_v2 was published for 1_5k alone')
  selects = 'selection' in numbers['trains']
  config = ConfigDict()
  config.seed = 0
  config.mesh = machine['mesh']

  config.model = dict(
    system='vila_hd', chat='vila_qwen2', image_token='<image>', after_image='\n',
    encoder=dict(
      width=3584, projector='mlp_downsample', prompt_head='mlp', positions=True, select_layer=-2,
      mode='after_prompt', looks=6, tokens=None, budgets=None, smooth=False, dynamic_aspect='off',
      select_target=selects,  # ground-truth boxes steer the selection
      tower=dict(
        scales=tuple(n * trunk['vision']['image_size'] for n in SIZES[size]), max_select=2560,
        budgets=None, residual=True, cosine_scale=5.0, quirks='reference', looks_at_once=False,
        low_context=True, text=None,
        saliency=dict(width=512, out=512, depth=3, kernel=28, input_size=1512),
        pool=dict(width=1152, heads=16, mlp_width=4304), **trunk)),
    fusion=dict(kind='two_pass', selection_weight=1.0 if selects else 0.0),
    text=dict(  # Qwen2-7B
      family='qwen2', vocab_size=151651, width=3584, depth=28, heads=28, kv_heads=4, head_dim=128,
      mlp_width=18944, activation='silu', norm='rmsnorm', norm_eps=1e-6, parallel_block=False,
      gated_mlp=True, rotary_dim=128, rope_theta=1e6, max_positions=32768, qkv_bias=True,
      residual_dropout=0.0, init_std=0.02, pad_vocab_to=512))

  config.data = dict(
    train=f'data/vila_hd_{stage}.json', tokenizer='weights/qwen2-vl-7b-instruct',
    lengths=(2048, 3072, 4096, 6144, 8192), max_length=8192, too_long='cut_row', boxes=selects,
    exif='apply')

  config.training = dict(
    steps=numbers['steps'], batch_size=numbers['batch_size'],
    accumulate=numbers['batch_size'] // machine['rows'], objective='two_pass',
    loss_average='micro_batch', dtype='bfloat16', frozen_dtype='bfloat16',
    remat=machine.get('remat', 'layers'),
    attention='auto',
    groups=(dict(pattern=UNREAD, frozen=True),
            *(dict(pattern=PARTS[part], decay=False) for part in numbers['trains']),
            dict(pattern='.*', frozen=True)),
    optimizer=dict(
      name='adamw', learning_rate=numbers['learning_rate'], schedule='cosine', warmup=0.03,
      b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, clip_norm=numbers['clip_norm']),
    init_from=numbers['start'].format(size), init_allow=numbers['fresh'])
  return config
