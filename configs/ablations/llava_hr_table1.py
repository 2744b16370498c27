"""LLaVA-HR, Table 1: resolution of LLaVA-HR and of LLaVA-1.5. llava_hr_table1.py:ROW[,STAGE]

Command:  hrvlm sweep --config configs/ablations/llava_hr_table1.py --list
          hrvlm sweep --config configs/ablations/llava_hr_table1.py --data BENCHMARKS
            --out runs/llava_hr_table1
Hardware: 8 x A800 80 GB (paper).
Time:     15.6 to 69.4 hours for both stages (paper, the hours of `ROWS`); not run here.
Expected: `ROWS` (VQAv2, TextVQA, MME, POPE; hours of training, GiB of memory, tokens per second on
          an A800). The paper's LLaVA-1.5 at 1022 pixels ran out of memory with its batch and was
          trained with smaller micro-batches (None for the memory). Every row is trained here; the
          table has beside the paper's memory what the planner says of stage 2 on 8 A100 of 80 GB,
          which have the memory of an A800, and how many rows a device has room for. The recipe has
          one row a device at a time; what the paper's had is not published.

LLaVA-1.5 rows are the ViT alone, its tower trained, as the paper's own trainings of it.
"""

from rows_llava_hr import STAGES, parts, recipe

from hrvlm_jax.lab.planned import Planned
from hrvlm_jax.lab.tables import Table
from hrvlm_jax.systems.llava_hr.config import LlavaHRConfig


def alone(side):
  return LlavaHRConfig(image_size=side, slow=None, adapters=None)


# Row: (encoder, numbers of the paper).
ROWS = {
  'llava_336': (alone(336), (80.44, 59.41, 1461.17, 86.2, 15.6, 28, 23.8)),
  'llava_448': (alone(448), (81.17, 62.17, 1493.12, 87.2, 19.4, 49, 19.9)),
  'llava_672': (alone(672), (81.54, 64.23, 1498.71, 87.9, 31.8, 79, 12.7)),
  'llava_1022': (alone(1022), (74.20, 37.80, 1266.90, 84.4, 69.4, None, 5.6)),
  'hr_384': (LlavaHRConfig(image_size=384), (80.47, 59.63, 1522.28, 86.3, 17.6, 34, 23.8)),
  'hr_768': (LlavaHRConfig(image_size=768), (81.80, 64.36, 1524.75, 88.0, 18.2, 38, 23.5)),
  'hr_1024': (LlavaHRConfig(image_size=1024), (81.90, 67.11, 1554.90, 87.6, 20.7, 40, 19.7)),
  'hr_1536': (LlavaHRConfig(image_size=1536), (81.82, 67.96, 1480.62, 87.7, 29.8, 52, 12.6)),
}
TABLE = Table(
  stages=STAGES, benchmarks=('vqav2', 'textvqa_ocr', 'mme', 'pope'),
  own_parts={row: parts(encoder) for row, (encoder, _) in ROWS.items()},
  further={
    'hours': 'hrvlm plan --config FILE:ROW,stage2 --topology TOPOLOGY (seconds of a step), twice',
    'GiB': 'hrvlm plan --config FILE:ROW,stage2 --topology a100:8 --effort arithmetic',
    'tokens/s': 'hrvlm bench gpu_latency (protocol of the paper: 10 tokens, batch of 1)'},
  planned=dict.fromkeys(ROWS, Planned(topology='a100:8')))


def get_config(argument=''):
  """The run config of a row's stage, by default the second."""
  return recipe('llava_hr_table1', argument, ROWS)
