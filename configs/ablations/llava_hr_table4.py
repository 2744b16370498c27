"""LLaVA-HR, Tables 4 and 5: the three models on eleven benchmarks. llava_hr_table4.py:ROW[,STAGE]

Command:  hrvlm sweep --config configs/ablations/llava_hr_table4.py --list
          hrvlm sweep --config configs/ablations/llava_hr_table4.py --data BENCHMARKS
            --out runs/llava_hr_table4
Hardware: 8 x A800 80 GB (paper, Table 1, for 7B).
Time:     7B: 20.7 hours for both stages (paper, Table 1); the others: not published. Not run here.
Expected: `ROWS` (Table 4: MME, POPE, SEED, MM-Vet; Table 5: VQAv2, GQA, OKVQA, OCRVQA, ScienceQA
          images, VizWiz, TextVQA; then tokens per second of Table 4).

MM-Vet is scored by its own server: the table holds no number of ours for it.
"""

from rows_llava_hr import STAGES, parts, recipe

from hrvlm_jax.lab.tables import Table
from hrvlm_jax.systems.llava_hr.config import LlavaHRConfig
from hrvlm_jax.vision.convnext import CONVNEXT_XXL

# Row: (encoder, numbers of the paper).
ROWS = {
  '7b': (LlavaHRConfig(), (1554.9, 87.6, 64.2, 31.2, 81.9, 64.2, 58.9, 68.4, 65.1, 48.7, 67.1,
                           19.7)),
  '13b': (LlavaHRConfig(), (1540.9, 87.8, 64.5, 34.8, 82.3, 64.8, 60.7, 67.7, 68.1, 57.9, 68.1,
                            15.0)),
  'x_13b': (LlavaHRConfig(slow=CONVNEXT_XXL), (1487.3, 88.0, 65.3, 35.5, 82.6, 65.2, 61.5, 69.0,
                                              68.0, 56.6, 70.9, 12.9)),
}


def size(row):
  return row.removeprefix('x_')


TABLE = Table(
  stages=STAGES,
  benchmarks=('mme', 'pope', 'seed', 'mmvet', 'vqav2', 'gqa', 'okvqa', 'ocrvqa', 'scienceqa',
              'vizwiz', 'textvqa_ocr'),
  own_parts={row: parts(encoder, size(row)) for row, (encoder, _) in ROWS.items()},
  further={'tokens/s': 'hrvlm bench gpu_latency (protocol of the paper: 10 tokens, batch of 1)'})


def get_config(argument=''):
  """The run config of a row's stage, by default the second."""
  return recipe('llava_hr_table4', argument, ROWS, size)
