"""LLaVA-HR-7B, LLaVA-HR-13B and LLaVA-HR-X-13B: two stages. configs/llava_hr.py:SIZE,STAGE[,CHIPS]

7b, x_13b (ConvNeXt-XXL), 13b (published as numbers alone). stage1: the projector and the align
module learn to caption (558K pairs); stage2: everything learns on 665K conversations. CHIPS: a key
of `CHIPS`. The first of each where it is left out.

Command:  hrvlm convert --config configs/llava_hr.py:7b,stage1 --part language=VICUNA_7B
            --part vision/fast=CLIP_L_336 --part vision/slow=CONVNEXT --to weights/llava_hr_7b_start
          for stage in stage1 stage2; do
            hrvlm train --config configs/llava_hr.py:7b,$stage --workdir runs/llava_hr_7b_$stage
          done
Hardware: 8 x A800 80 GB (`gpu:8`; the paper says so for 7b).
Time:     7b: 20.7 hours for both stages (paper, Table 1); the others: not published. Not run here.
Expected: after stage 2 (paper, Tables 4 and 5):
          7b:    VQAv2 81.9, TextVQA 67.1, MME 1554.9, POPE 87.6
          13b:   VQAv2 82.3, TextVQA 68.1, MME 1540.9, POPE 87.8
          x_13b: VQAv2 82.6, TextVQA 70.9, MME 1487.3, POPE 88.0
Source:   `luogen1996/LLaVA-HR: scripts/v1_5/pretrain_llava_hr.sh, train_eval_llava_hr.sh`. Both
          stages: AdamW without weight decay, cosine schedule, 3 % warm-up, gradient norm 1,
          bfloat16, one epoch. Texts are cut at `model_max_length` ids, an image counting one;
          stage 2 groups micro-batches of 8 on 8 devices by length and modality.

Stage 1 freezes the language model, CLIP and ConvNeXt, so that its checkpoint holds what the
original starts stage 2 from again. The adapters are new there and change nothing at first.

The original's loss is the mean over one device's micro-batch, averaged over devices and
accumulation steps: `loss_average='micro_batch'` with as many micro-batches as the original has;
'tokens' with fewer is faster and weighs every target alike.
"""

from ml_collections import ConfigDict

from hrvlm_jax.training.recipe import words

# Never read: the ConvNeXt's classifier, CLIP's final norm.
UNREAD = r'vision/(slow/head|fast/post_norm)/.*'
VICUNA_7B = dict(width=4096, depth=32, heads=32, kv_heads=32, mlp_width=11008)
VICUNA_13B = dict(width=5120, depth=40, heads=40, kv_heads=40, mlp_width=13824)
CONVNEXT_L = dict(depths=(3, 3, 27, 3), widths=(192, 384, 768, 1536), norm_eps=1e-6, classes=1000,
                  head_width=1536)
CONVNEXT_XXL = dict(depths=(3, 4, 30, 3), widths=(384, 768, 1536, 3072), norm_eps=1e-5,
                    classes=1000, head_width=None)
SIZES = {
  '7b': dict(language=VICUNA_7B, slow=CONVNEXT_L),
  'x_13b': dict(language=VICUNA_13B, slow=CONVNEXT_XXL),
  '13b': dict(language=VICUNA_13B, slow=CONVNEXT_L),
}
STAGES = {
  'stage1': dict(
    steps=2181, batch_size=256, accumulate=8, learning_rate=1e-3,
    train='blip_laion_cc_sbu_558k.json', lengths=(640, 768, 1024, 2624), max_length=2048,
    order='uniform', group=None, chat='plain', image_size=384, aspect='square', adapters=None,
    groups=(dict(pattern='projector/.*|vision/align/.*', decay=False),
            dict(pattern='.*', decay=False, frozen=True)),
    start='weights/llava_hr_{}_start',
    fresh=('projector/.*', 'vision/align/.*', UNREAD)),
  'stage2': dict(
    steps=5198, batch_size=128, accumulate=16, learning_rate=2e-5,
    train='llava_v1_5_mix665k.json', lengths=(1280, 1536, 2048, 3072, 3584), max_length=2496,
    order='grouped', group=(8, 8), chat='vicuna_v1', image_size=1024, aspect='pad',
    adapters=dict(direction='high_to_low', slow_map='mlp', fast_map='conv', gate='tanh',
                  gate_width='scalar', gate_input='with_skip'),
    groups=(dict(pattern='.*', decay=False),),
    start='runs/llava_hr_{}_stage1', fresh=('vision/adapters/.*',)),
}
# Every micro-batch gathers all parameters anew: where memory allows there is one. None: as many as
# the original has. remat and meshes of TPUs: docs/plans.md.
CHIPS = {
  'gpu:8': dict(accumulate=None, mesh=dict(data=1, fsdp=-1, sequence=1, tensor=1, dcn_data=1)),
  'v5e:16x16': dict(accumulate=1, remat='none',
                    mesh=dict(data=8, fsdp=16, sequence=1, tensor=2, dcn_data=1)),
  '2xv5e:16x16': dict(accumulate=1, remat='none',
                      mesh=dict(data=4, fsdp=16, sequence=1, tensor=4, dcn_data=2)),
  'v5p:4x4x4': dict(accumulate=1, remat='none',
                    mesh=dict(data=4, fsdp=16, sequence=1, tensor=1, dcn_data=1)),
  'v6e:16x16': dict(accumulate=1, remat='none',
                    mesh=dict(data=8, fsdp=16, sequence=1, tensor=2, dcn_data=1)),
}


def get_config(argument=''):
  size, stage, chips = words(argument, SIZES, STAGES, CHIPS)
  sizes, numbers, machine = SIZES[size], STAGES[stage], CHIPS[chips]
  config = ConfigDict()
  config.seed = 42
  config.mesh = machine['mesh']

  config.model = dict(
    system='llava_hr', chat=numbers['chat'], image_token='<image>',
    encoder=dict(
      image_size=numbers['image_size'], aspect=numbers['aspect'], adapters=numbers['adapters'],
      fusion='sum', fast_size=None, reduce='none', reduce_factor=2, queries=144, select_layer=-2,
      mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711),
      fast=dict(  # CLIP ViT-L/14, 336 pixels
        image_size=336, patch_size=14, channels=3, width=1024, depth=24, heads=16, mlp_width=4096,
        activation='quick_gelu', norm_eps=1e-5, class_token=True, patch_bias=False,
        pre_norm=True),
      slow=dict(channels=3, **sizes['slow'])),
    projector=dict(kind='mlp', n_in=1024, n_out=sizes['language']['width'], depth=2,
                   activation='gelu'),
    fusion=dict(kind='prefix'),
    text=dict(
      family='llama', vocab_size=32000, head_dim=128, activation='silu', norm='rmsnorm',
      norm_eps=1e-5, parallel_block=False, gated_mlp=True, rotary_dim=128, rope_theta=10000.0,
      max_positions=4096, residual_dropout=0.0, init_std=0.02, **sizes['language']))

  config.data = dict(
    train=numbers['train'], tokenizer='vicuna-7b-v1.5', lengths=numbers['lengths'],
    max_length=numbers['max_length'], order=numbers['order'], group=numbers['group'],
    exif='ignore')

  config.training = dict(
    steps=numbers['steps'], batch_size=numbers['batch_size'],
    accumulate=machine['accumulate'] or numbers['accumulate'],
    loss_average='micro_batch', dtype='bfloat16', frozen_dtype='bfloat16',
    remat=machine.get('remat', 'layers'),
    attention='auto',
    groups=(dict(pattern=UNREAD, frozen=True), *numbers['groups']),
    optimizer=dict(
      name='adamw', learning_rate=numbers['learning_rate'], schedule='cosine', warmup=0.03,
      b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, clip_norm=1.0),
    init_from=numbers['start'].format(size), init_allow=numbers['fresh'])
  return config
