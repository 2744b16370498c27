"""Pheye, Table 1: cross-attention in every 4th or 2nd layer, 448 or 672 pixels.
pheye_table1.py:ROW[,STAGE]

Command:  hrvlm sweep --config configs/ablations/pheye_table1.py --list
          hrvlm sweep --config configs/ablations/pheye_table1.py --data BENCHMARKS
            --out runs/pheye_table1
Hardware: not published; 8 x 80 GB.
Time:     not published, not run here.
Expected: `ROWS` (VQAv2 test-dev, NoCaps, TextVQA, TextCaps, DOCCI; the original's README, which has
          no DOCCI). The paper's captions are scored by CIDEr with the PTB tokeniser: score the
          answers again with `hrvlm eval --benchmark nocaps_ptb --predictions FILE` for those.

`x2_672_224` is the table's last row: the best model, its images scaled to 224 x 224 pixels first;
its numbers were not at hand. `x4_448_code` freezes the first LoRA set as the original's code does;
it has no numbers of its own.
"""

from hrvlm_jax.lab.tables import Table, Tested
from hrvlm_jax.training.recipe import evaluate, words

STAGES = ('stage1', 'stage2', 'stage3')
# Row: (words of the recipe, numbers of the paper).
ROWS = {
  'x4_448': ('x4_448,paper', (75.2, 110.1, 45.9, 106.4, None)),
  'x4_672': ('x4_672,paper', (75.5, 110.8, 49.2, 111.9, None)),
  'x2_448': ('x2_448,paper', (76.0, 111.8, 47.3, 108.9, None)),
  'x2_672': ('x2_672,paper', (76.4, 110.5, 50.5, 115.9, None)),
  'x2_672_224': ('x2_672,paper', None),
  'x4_448_code': ('x4_448,code', None),
}
TABLE = Table(
  stages=STAGES, benchmarks=('vqav2', 'nocaps', 'textvqa', 'textcaps', 'docci'),
  parts=('vision/tower=DFN5B_CLIP_H', 'language=PHI_1_5_SLIMORCA'),
  tested={'x2_672_224': Tested(model='x2_672', knobs={'shrink': {'side': 224}})})


def get_config(argument=''):
  """The run config of a row's stage, by default the last."""
  row, stage = words(argument, ROWS, STAGES[::-1])
  config = evaluate(f'pheye:{ROWS[row][0]},{stage}')
  if stage != 'stage1':
    before = STAGES[STAGES.index(stage) - 1]
    config.training.init_from = f'runs/pheye_table1/{row}/{before}'
  return config
