"""Pheye: four variants, three stages. configs/pheye.py:VARIANT,STAGE[,ADAPTERS][,CHIPS]

x2_448, x2_672, x4_448, x4_672: a cross-attention block in front of every 2nd or 4th layer, images
of 448 or 672 pixels. stage1: dense captions (ShareGPT4V-PT, 1,246K); stage2: complex instructions
(MIMIC-IT, LRV, SViT, LVIS-Instruct, 964K); stage3: academic questions and captions (676K). paper:
both LoRA sets train; code: the first is frozen, as the original's code does by accident. CHIPS: a
key of `CHIPS`. The first of each where it is left out.

Command:  hrvlm convert --config configs/pheye.py:x2_448,stage1 --part vision/tower=DFN5B_CLIP_H
            --part language=PHI_1_5_SLIMORCA --to weights/pheye_x2_448_start
          (configs/mixtures/pheye_stage_*.mixture.json, copied beside the data)
          for stage in stage1 stage2 stage3; do
            hrvlm train --config configs/pheye.py:x2_448,$stage --workdir runs/pheye_x2_448_$stage
          done
Hardware: not published; 8 x 80 GB (`gpu:8`), every one with the whole model.
Time:     not published, not run here.
Expected: after stage 3 (original's README):
          x2_448: VQAv2 76.0, NoCaps 111.8, TextVQA 47.3, TextCaps 108.9
          x2_672: VQAv2 76.4, NoCaps 110.5, TextVQA 50.5, TextCaps 115.9
          x4_448: VQAv2 75.2, NoCaps 110.1, TextVQA 45.9, TextCaps 106.4
          x4_672: VQAv2 75.5, NoCaps 110.8, TextVQA 49.2, TextCaps 111.9
Source:   Pheye (arXiv 2501.02584), section 3.1 and appendix A; the same for all four variants.
          Published: data, learning rates, cosine schedule, effective batch 128, what trains, the
          loss (sum over output tokens of the effective batch over their number), frozen weights in
          bfloat16.
Open:     the optimizer of the main runs (AdamW with torch's defaults here, as in the preliminary
          experiments), warm-up and clipping (none), epochs (one, which the data counts imply), the
          longest text, and LoRA dropout (0.05, as in the preliminary experiments).
"""

from ml_collections import ConfigDict

from hrvlm_jax.training.recipe import words

# Tiles per side of the enlarged image (224 pixels each); layers from one block to the next.
VARIANTS = {
  'x2_448': dict(level=2, interval=2),
  'x2_672': dict(level=3, interval=2),
  'x4_448': dict(level=2, interval=4),
  'x4_672': dict(level=3, interval=4),
}
# One epoch each. A stage starts where the one before it ended.
STAGES = {
  'stage1': dict(steps=1_246_000 // 128, learning_rate=2e-4, start='weights/pheye_{}_start'),
  'stage2': dict(steps=964_000 // 128, learning_rate=1e-4, start='runs/pheye_{}_stage1'),
  'stage3': dict(steps=676_000 // 128, learning_rate=5e-5, start='runs/pheye_{}_stage2'),
}
ADAPTERS = ('paper', 'code')
CHIPS = {
  'gpu:8': dict(accumulate=8, mesh=dict(data=-1, fsdp=1, sequence=1, tensor=1, dcn_data=1)),
  # Not fsdp over all chips: libtpu then sums gradients whole on every one (docs/plans.md).
  'v5e:4x4': dict(accumulate=1, remat='attention',
                  mesh=dict(data=2, fsdp=8, sequence=1, tensor=1, dcn_data=1)),
}
# Cross-attention blocks, norms and sub-image positions; both LoRA sets.
READ = r'fusion/.*|vision/(norm1|norm2|sub_image)/.*'
LORA = r'vision/tower/.*lora_[ab]_(first|second)'


def get_config(argument=''):
  variant, stage, adapters, chips = words(argument, VARIANTS, STAGES, ADAPTERS, CHIPS)
  sizes, numbers, machine = VARIANTS[variant], STAGES[stage], CHIPS[chips]
  # The set of the global view is frozen where its gradient is cut.
  frozen = () if adapters == 'paper' else (dict(pattern='.*_first', frozen=True),)
  config = ConfigDict()
  config.seed = 0
  config.mesh = machine['mesh']

  config.model = dict(
    system='pheye', chat='pheye', image_token=None,
    encoder=dict(
      level=sizes['level'], norm_eps=1e-5, sub_image_rows=21,
      mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711),
      # Sets of low rank on the frozen tower: of the global view, and of the tiles.
      first=dict(name='first', rank=8, alpha=16.0, dropout=0.05),
      second=dict(name='second', rank=16, alpha=32.0, dropout=0.05),
      train_first_adapter=adapters == 'paper',
      vision=dict(  # DFN5B-CLIP ViT-H/14
        image_size=224, patch_size=14, channels=3, width=1280, depth=32, heads=16, mlp_width=5120,
        activation='quick_gelu', norm_eps=1e-5, class_token=True, patch_bias=False,
        pre_norm=True)),
    fusion=dict(kind='cross_attention', width=1280, interval=sizes['interval'], from_layer=0,
                reduce=1),
    text=dict(  # Phi-1.5
      family='phi', vocab_size=51200, width=2048, depth=24, heads=32, kv_heads=32, head_dim=64,
      mlp_width=8192, activation='gelu_tanh', norm='layernorm', norm_eps=1e-5,
      parallel_block=True, gated_mlp=False, rotary_dim=32, rope_theta=10000.0, max_positions=2048,
      qkv_bias=True, out_bias=True, mlp_bias=True, head_bias=True, residual_dropout=0.0,
      init_std=0.02))

  config.data = dict(
    train=f'data/pheye_stage_{stage[-1]}.mixture.json', tokenizer='weights/phi-1_5-slimorca',
    lengths=(128, 192, 256, 384, 512), max_length=None, exif='ignore')

  config.training = dict(
    steps=numbers['steps'], batch_size=128, accumulate=machine['accumulate'],
    loss_average='tokens', dtype='bfloat16', frozen_dtype='bfloat16',
    remat=machine.get('remat', 'layers'),
    attention='auto',
    groups=(*frozen, dict(pattern=READ), dict(pattern=LORA), dict(pattern='.*', frozen=True)),
    optimizer=dict(
      name='adamw', learning_rate=numbers['learning_rate'], schedule='cosine', warmup=0.0,
      b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.01, clip_norm=None),
    init_from=numbers['start'].format(variant),
    init_allow=(READ, LORA, 'vision/norm3/.*') if stage == 'stage1' else ())
  return config
