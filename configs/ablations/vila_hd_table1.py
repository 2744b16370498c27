"""PS3, Table 1: resolution and share of selected patches, beside a single view, AnyRes and S2.
vila_hd_table1.py:ROW[,STAGE]

Command:  hrvlm sweep --config configs/ablations/vila_hd_table1.py --list
          hrvlm sweep --config configs/ablations/vila_hd_table1.py --data BENCHMARKS
            --out runs/vila_hd_table1
Hardware: not published; `hrvlm plan --config configs/ablations/vila_hd_table1.py:ps3_1512_44`. Rows
          that ran out of memory are planned, not trained: on 64 devices, as the recipe has, of
          A100 with 80 GB, on which PS3 was pre-trained.
Time:     not published, not run here.
Expected: `ROWS` (TextVQA, ChartQA, DocVQA, InfoVQA, OCRBench, V*, RealWorldQA, average). A name
          ends in the shares selected in training and, where they differ, at test.
Open:     the paper's smaller training set and its steps; the stages are `align` and `sft` of
          VILA-HD here, for the baselines without a loss of the selection. SigLIP SO400M at 378
          pixels and Qwen2-7B in all.
"""

from rows_vila_hd import AVERAGE, BENCHMARKS, STAGES, anyres, parts, ps3, recipe, s2

from hrvlm_jax.lab.planned import Planned
from hrvlm_jax.lab.tables import Table, Tested

# Row: (model, numbers of the paper). S2 with one size is the single view.
ROWS = {
  'siglip_378': (s2((378,), 0), (62.3, 56.6, 51.9, 30.7, 387, 51.8, 57.1, 49.9)),
  'anyres_756': (anyres(2), (65.3, 58.0, 60.6, 32.7, 416, 59.2, 59.1, 53.8)),
  's2_756': (s2((378, 756)), (65.9, 65.5, 63.0, 32.3, 471, 53.1, 59.6, 55.2)),
  'ps3_756_44': (ps3(756, 1280), (66.7, 62.8, 62.6, 33.1, 460, 56.3, 61.7, 55.6)),
  'ps3_756_100': (ps3(756, None), (66.8, 63.5, 64.6, 33.9, 462, 56.5, 61.7, 56.2)),
  'anyres_1512': (anyres(4), (67.4, 58.4, 67.9, 34.1, 468, 60.2, 59.0, 56.3)),
  's2_1512': (s2((378, 756, 1512)), (66.1, 71.0, 78.3, 41.1, 526, 55.2, 61.0, 60.8)),
  'ps3_1512_20': (ps3(1512, 2916), (67.3, 64.7, 66.5, 34.8, 505, 60.7, 62.6, 58.2)),
  'ps3_1512_20_44': (ps3(1512, 2916), (67.7, 65.9, 70.7, 35.7, 515, 62.0, 62.6, 59.4)),
  'ps3_1512_44': (ps3(1512, 6400), (68.4, 68.0, 74.5, 37.3, 509, 63.1, 65.0, 61.0)),
  'ps3_1512_44_100': (ps3(1512, 6400), (68.4, 68.0, 76.5, 39.4, 522, 66.7, 62.0, 61.9)),
  'ps3_1512_100': (ps3(1512, None), (69.3, 71.1, 79.4, 41.3, 534, 64.0, 63.8, 63.2)),
  'anyres_3780': (anyres(10), None),
  's2_3780': (s2((378, 756, 1512, 3780)), None),
  'ps3_3780_18': (ps3(3780, 15360), (69.8, 70.9, 79.1, 40.5, 543, 67.8, 64.7, 63.9)),
}
OUT_OF_MEMORY = ('anyres_3780', 's2_3780')
TABLE = Table(
  stages=STAGES, benchmarks=BENCHMARKS, further={'average': AVERAGE},
  own_parts={row: parts(model) for row, (model, _) in ROWS.items()},
  tested={
    'ps3_1512_20_44': Tested(model='ps3_1512_20', knobs={'encoder': {'tokens': 6400}}),
    'ps3_1512_44_100': Tested(model='ps3_1512_44',
                              knobs={'encoder': {'tokens': None, 'looks': 'all'}})},
  left_out=dict.fromkeys(OUT_OF_MEMORY, "the paper's ran out of memory"),
  planned=dict.fromkeys(OUT_OF_MEMORY, Planned(topology='a100:64')))


def get_config(argument=''):
  """The run config of a row's stage, by default the last."""
  return recipe('vila_hd_table1', argument, ROWS)
