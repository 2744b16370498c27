"""PS3, Table 7: patches chosen at random, by saliency, by the question.
vila_hd_table7.py:ROW[,STAGE]

Command:  hrvlm sweep --config configs/ablations/vila_hd_table7.py --list
          hrvlm sweep --config configs/ablations/vila_hd_table7.py --data BENCHMARKS
            --out runs/vila_hd_table7
          hrvlm analyse recall --checkpoint PS3 --records RECORDS   (the column of the recall)
Hardware: not published; `hrvlm plan --config configs/ablations/vila_hd_table7.py:top_down_44`.
Time:     not published, not run here.
Expected: `ROWS` (average of the seven benchmarks, recall in percent of the patches of ground-truth
          regions). 1512 pixels; a name ends in the shares selected in training and, where they
          differ, at test.
Open:     as in vila_hd_table1.py. Bottom-up rows have no prompt head; nothing learns to select
          where patches are random or all are taken.
"""

from rows_vila_hd import AVERAGE, BENCHMARKS, STAGES, parts, ps3, recipe

from hrvlm_jax.lab.tables import Table, Tested

SHARE = 6400  # patches, 44 % of those of 756 and 1512 pixels
MODELS = {
  'random': ps3(1512, SHARE, mode='random', select_target=False, selection_weight=0.0),
  'bottom_up': ps3(1512, SHARE, mode='after_image', prompt_head=None),
  'top_down': ps3(1512, SHARE),
}
SEVEN = (None,) * 7
# Row: (model, numbers of the paper).
ROWS = {
  'top_down_44': (MODELS['top_down'], (*SEVEN, 61.0, 91.2)),
  'random_44': (MODELS['random'], (*SEVEN, 52.3, 43.7)),
  'bottom_up_44': (MODELS['bottom_up'], (*SEVEN, 59.7, 87.4)),
  'random_44_100': (MODELS['random'], (*SEVEN, 56.5, 100)),
  'bottom_up_44_100': (MODELS['bottom_up'], (*SEVEN, 61.1, 100)),
  'top_down_44_100': (MODELS['top_down'], (*SEVEN, 61.9, 100)),
  'top_down_100': (ps3(1512, None), (*SEVEN, 63.2, 100)),
}
ALL = {'tokens': None, 'looks': 'all'}
TABLE = Table(
  stages=STAGES, benchmarks=BENCHMARKS,
  further={'average': AVERAGE,
           'recall': 'hrvlm analyse recall --checkpoint PS3 --records RECORDS --shares 0.44'},
  parts=parts(MODELS['top_down']),
  tested={f'{way}_44_100': Tested(model=f'{way}_44', knobs={'encoder': ALL}) for way in MODELS})


def get_config(argument=''):
  """The run config of a row's stage, by default the last."""
  return recipe('vila_hd_table7', argument, ROWS)
