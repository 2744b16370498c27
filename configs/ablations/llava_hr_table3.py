"""LLaVA-HR, Table 3: the parts of mixture-of-resolution adaptation. llava_hr_table3.py:ROW[,STAGE]

Command:  hrvlm sweep --config configs/ablations/llava_hr_table3.py --list
          hrvlm sweep --config configs/ablations/llava_hr_table3.py --data BENCHMARKS
            --out runs/llava_hr_table3
Hardware: 8 x A800 80 GB (paper, Table 1, for the full model).
Time:     18.2 hours for both stages at 768 pixels (paper, Table 1); not run here.
Expected: `ROWS` (7B, 768 pixels; VQAv2, TextVQA, MME, POPE). `default` is the first row of every
block; `gate_vector` and `paper` are not in the table: the paper's equation 4 has one gate per
channel where the released code has one per image.

Open in the paper and chosen here (systems/llava_hr/README.md): which ViT-G, what low-to-high
injects where, what the final concatenation concatenates, f_h as convolution and f_l as MLP.
"""

import dataclasses

from rows_llava_hr import STAGES, parts, recipe

from hrvlm_jax.lab.tables import Table
from hrvlm_jax.systems.llava_hr.config import PAPER_ADAPTERS, AdapterConfig, LlavaHRConfig
from hrvlm_jax.vision.convnext import CONVNEXT_XXL
from hrvlm_jax.vision.vit import CLIP_L_336

# OpenCLIP's ViT-g/14 (40 layers: a multiple of 4); the paper names no checkpoint.
CLIP_G = dataclasses.replace(
  CLIP_L_336, image_size=224, width=1408, depth=40, heads=16, mlp_width=6144, activation='gelu')


def mra(**adapter):
  return LlavaHRConfig(image_size=768, adapters=AdapterConfig(**adapter))


# Row: (encoder, numbers of the paper).
ROWS = {
  'default': (mra(), (81.8, 64.4, 1524.8, 88.0)),
  'fast_none': (LlavaHRConfig(image_size=768, fast=None, adapters=None),
                (80.3, 64.6, 1415.9, 86.6)),
  'fast_vit_g': (LlavaHRConfig(image_size=768, fast=CLIP_G), (81.7, 65.3, 1469.7, 87.9)),
  'slow_none': (LlavaHRConfig(image_size=336, slow=None, adapters=None),
                (80.4, 59.4, 1461.2, 86.2)),
  'slow_convnext_xxl': (LlavaHRConfig(image_size=768, slow=CONVNEXT_XXL),
                        (82.3, 66.5, 1479.2, 87.9)),
  'direction_low_to_high': (mra(direction='low_to_high'), (81.0, 62.8, 1463.5, 87.3)),
  'fusion_concat': (LlavaHRConfig(image_size=768, fusion='concat'), (81.7, 64.7, 1508.8, 87.3)),
  'struct_conv_conv': (mra(slow_map='conv', fast_map='conv'), (81.6, 64.6, 1499.0, 87.7)),
  'struct_conv_mlp': (mra(slow_map='conv', fast_map='mlp'), (81.5, 64.2, 1517.9, 87.6)),
  'gate_sigmoid': (mra(gate='sigmoid'), (81.7, 64.3, 1567.9, 86.9)),
  'gate_hsigmoid': (mra(gate='hsigmoid'), (81.6, 64.4, 1525.9, 87.8)),
  'gate_vector': (mra(gate_width='vector'), None),
  'paper': (LlavaHRConfig(image_size=768, adapters=PAPER_ADAPTERS), None),
}

TABLE = Table(
  stages=STAGES, benchmarks=('vqav2', 'textvqa_ocr', 'mme', 'pope'),
  own_parts={row: parts(encoder) for row, (encoder, _) in ROWS.items()})


def get_config(argument=''):
  """The run config of a row's stage, by default the second."""
  return recipe('llava_hr_table3', argument, ROWS)
