"""LLaVA-HR, Table 2: which encoder reads the image. llava_hr_table2.py:ROW[,STAGE]

Command:  hrvlm sweep --config configs/ablations/llava_hr_table2.py --list
          hrvlm sweep --config configs/ablations/llava_hr_table2.py --data BENCHMARKS
            --out runs/llava_hr_table2
Hardware: 8 x A800 80 GB (paper, Table 1, for the full model).
Time:     18.2 hours for both stages at 768 pixels (paper, Table 1); not run here.
Expected: `ROWS` (7B, about 760 pixels; VQAv2, TextVQA, MME, POPE, tokens per second on an A800).

The paper gives no sizes for the rows without adapters: 756 pixels for the ViT alone, windows of
2 x 2 and 144 queries are our choices (systems/llava_hr/README.md).
"""

from rows_llava_hr import STAGES, parts, recipe

from hrvlm_jax.lab.tables import Table
from hrvlm_jax.systems.llava_hr.config import LlavaHRConfig

CLIP = dict(image_size=756, slow=None, adapters=None)

# Row: (encoder, numbers of the paper).
ROWS = {
  'mra': (LlavaHRConfig(image_size=768), (81.8, 64.4, 1524.8, 88.0, 23.5)),
  'clip': (LlavaHRConfig(**CLIP), (81.0, 63.2, 1436.1, 87.6, 10.7)),
  'convnext': (LlavaHRConfig(image_size=768, fast=None, adapters=None),
               (80.3, 64.6, 1415.9, 86.6, 23.7)),
  'clip_resampler': (LlavaHRConfig(**CLIP, reduce='queries', queries=144),
                     (79.8, 58.9, 1403.8, 85.8, 27.6)),
  'clip_average': (LlavaHRConfig(**CLIP, reduce='average', reduce_factor=2),
                   (80.6, 59.6, 1480.6, 86.5, 23.9)),
}
TABLE = Table(
  stages=STAGES, benchmarks=('vqav2', 'textvqa_ocr', 'mme', 'pope'),
  own_parts={row: parts(encoder) for row, (encoder, _) in ROWS.items()},
  further={'tokens/s': 'hrvlm bench gpu_latency (protocol of the paper: 10 tokens, batch of 1)'})


def get_config(argument=''):
  """The run config of a row's stage, by default the second."""
  return recipe('llava_hr_table2', argument, ROWS)
