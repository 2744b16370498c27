"""PS3, Table 4: PS3's selection beside ToMe, FastV and VisionZip. vila_hd_table4.py:ROW[,STAGE]

Command:  hrvlm sweep --config configs/ablations/vila_hd_table4.py --list
          hrvlm sweep --config configs/ablations/vila_hd_table4.py --data BENCHMARKS
            --out runs/vila_hd_table4
          hrvlm eval --checkpoint VILA_HD --benchmark textvqa,chartqa --data BENCHMARKS
            --out runs/tome_50 --encoder.looks=all --prune.method=tome --prune.keep=0.5
          (the last one: a row without training)
Hardware: not published; `hrvlm plan --config configs/ablations/vila_hd_table4.py:full_1512`.
Time:     not published, not run here.
Expected: `ROWS` (TextVQA, ChartQA, DocVQA, InfoVQA, OCRBench, V*, RealWorldQA, average; seconds of
          the ViT, of the language model, on hardware that is not named). A name ends in the share
          of the visual tokens that is kept.

Two models are trained, VILA-HD at 1512 and at 3780 pixels; every other row tests one of them. What
the paper leaves open of the three methods is said in vlm/prune.py. At 3780 pixels the full model
and the methods behind it ran out of memory in the language model; the planner says what one answer
of the full model takes of an A100 of 80 GB (of the methods it knows nothing).
"""

from rows_vila_hd import AVERAGE, BENCHMARKS, parts, ps3

from hrvlm_jax.lab.planned import Planned
from hrvlm_jax.lab.tables import Table, Tested
from hrvlm_jax.training.recipe import evaluate, words

ALL = {'looks': 'all', 'tokens': None}
STAGES = ('align', 'tower', 'pretrain', 'sft')
SIZES = {'1512': '1_5k', '3780': '4k'}
SEVEN = (None,) * 8

# Row: (None, numbers of the paper).
ROWS = {
  'full_1512': (None, (78.6, 84.1, 92.2, 68.1, 787, 67.9, 69.8, 77.1, 0.286, 0.375)),
  'tome_1512_50': (None, (74.1, 70.2, 59.7, 47.3, 622, 66.8, 67.2, 63.9, 0.286, 0.260)),
  'fastv_1512_50': (None, (78.2, 81.2, 90.0, 60.4, 769, 66.2, 69.0, 74.6, 0.286, 0.264)),
  'visionzip_1512_50': (None, (75.2, 77.2, 79.8, 55.7, 722, 64.0, 67.1, 70.2, 0.286, 0.260)),
  'ps3_1512_50': (None, (77.7, 83.4, 89.8, 60.8, 774, 67.9, 69.1, 75.2, 0.167, 0.260)),
  'tome_1512_25': (None, (72.5, 65.5, 51.7, 42.8, 611, 62.2, 63.4, 59.9, 0.286, 0.180)),
  'fastv_1512_25': (None, (76.1, 66.3, 78.1, 49.5, 651, 64.6, 65.2, 66.6, 0.286, 0.185)),
  'visionzip_1512_25': (None, (74.6, 76.0, 72.8, 51.5, 694, 62.7, 64.6, 67.4, 0.286, 0.180)),
  'ps3_1512_25': (None, (76.8, 80.4, 84.4, 54.6, 738, 65.7, 67.8, 71.9, 0.096, 0.180)),
  'full_3780': (None, (*SEVEN, 1.812, None)),
  'tome_3780_20': (None, (*SEVEN, 1.812, None)),
  'fastv_3780_20': (None, (*SEVEN, 1.812, None)),
  'visionzip_3780_20': (None, (*SEVEN, 1.812, None)),
  'ps3_3780_20': (None, (77.8, 83.9, 91.6, 65.0, 773, 72.8, 70.1, 76.9, 0.417, 0.383)),
}


def tested(row):
  """How a row answers: the model of its size, with its method."""
  method, side, *share = row.split('_')
  model = 'full_1512' if side == '1512' else 'ps3_3780_20'
  knobs = {'encoder': ALL}
  if method == 'ps3':
    patches = sum((int(side) // n // 14) ** 2 for n in ((1, 2) if side == '1512' else (1, 2.5, 5)))
    knobs = {'encoder': {'tokens': round(int(share[0]) / 100 * patches)}}
  elif method == 'fastv':
    knobs['fastv'] = {'layer': 2, 'ratio': 1 - int(share[0]) / 100}
  elif method != 'full':
    knobs['prune'] = {'method': method, 'keep': int(share[0]) / 100}
  return Tested(model=None if row == model else model, knobs=knobs)


TABLE = Table(
  stages=STAGES, benchmarks=BENCHMARKS,
  further={'average': AVERAGE, 'ViT s': 'hrvlm bench gpu_latency (the encoder)',
           'LLM s': 'hrvlm bench gpu_latency (prefill)'},
  parts=parts(ps3(1512, None)), tested={row: tested(row) for row in ROWS},
  left_out={row: "the paper's ran out of memory in the language model" for row in (
    'full_3780', 'tome_3780_20', 'fastv_3780_20', 'visionzip_3780_20')},
  planned={'full_3780': Planned(topology='a100:1', step='answer')})


def get_config(argument=''):
  """The run config of a row's stage: VILA-HD's own recipe, by default its last stage."""
  row, stage = words(argument, ROWS, STAGES[::-1])
  side = row.split('_')[1]
  model = 'full_1512' if side == '1512' else 'ps3_3780_20'
  config = evaluate(f'vila_hd:{SIZES[side]},{stage}')
  before = STAGES[:STAGES.index(stage)]
  config.training.init_from = (f'runs/vila_hd_table4/{model}/{before[-1]}' if before else
                               f'weights/vila_hd_table4_{model}_start')
  return config
