"""PS3, Table 8: high-resolution alignment data, images pasted on a page.
vila_hd_table8.py:ROW[,STAGE]

Command:  hrvlm sweep --config configs/ablations/vila_hd_table8.py --list
          hrvlm sweep --config configs/ablations/vila_hd_table8.py --data BENCHMARKS
            --out runs/vila_hd_table8
Hardware: not published; `hrvlm plan --config configs/ablations/vila_hd_table8.py:with`.
Time:     not published, not run here.
Expected: `ROWS` (TextVQA, ChartQA, DocVQA, InfoVQA, OCRBench, V*, RealWorldQA, average; 1512
          pixels, all patches).
Open:     the share of images that are pasted on a page (half here), and as in vila_hd_table1.py.
"""

from rows_vila_hd import AVERAGE, BENCHMARKS, STAGES, parts, ps3, recipe

from hrvlm_jax.lab.tables import Table

MODEL = ps3(1512, None)
SHARE = 0.5
# Row: (model, numbers of the paper).
ROWS = {
  'without': (MODEL, (68.8, 71.2, 79.6, 39.6, 535, 60.9, 62.9, 62.4)),
  'with': (MODEL, (69.3, 71.1, 79.4, 41.3, 534, 64.0, 63.8, 63.2)),
}
TABLE = Table(stages=STAGES, benchmarks=BENCHMARKS, further={'average': AVERAGE},
              parts=parts(MODEL))


def get_config(argument=''):
  """The run config of a row's stage, by default the last."""
  config = recipe('vila_hd_table8', argument, ROWS)
  given = argument.split(',')
  if 'with' in given and 'align' not in given:
    config.data.background = dict(share=SHARE)
  return config
