"""PS3, Table 5: two vision encoders, each with AnyRes, S2 and PS3. vila_hd_table5.py:ROW[,STAGE]

Command:  hrvlm sweep --config configs/ablations/vila_hd_table5.py --list
          hrvlm sweep --config configs/ablations/vila_hd_table5.py --data BENCHMARKS
            --out runs/vila_hd_table5
Hardware: not published; `hrvlm plan --config configs/ablations/vila_hd_table5.py:radio_ps3`.
Time:     not published, not run here.
Expected: `ROWS` (TextVQA, ChartQA, DocVQA, InfoVQA, OCRBench, V*, RealWorldQA, average); all
          high-resolution patches are selected.
Open:     as in vila_hd_table1.py.
"""

from rows_vila_hd import AVERAGE, BENCHMARKS, STAGES, anyres, parts, ps3, recipe, s2

from hrvlm_jax.lab.tables import Table

# Row: (model, numbers of the paper). S2 with one size is the single view.
ROWS = {
  'siglip': (s2((378,), 0), (62.3, 56.6, 51.9, 30.7, 387, 51.8, 57.1, 49.9)),
  'siglip_anyres': (anyres(4), (67.4, 58.4, 67.9, 34.1, 468, 60.2, 59.0, 56.3)),
  'siglip_s2': (s2((378, 756, 1512)), (66.1, 71.0, 78.3, 41.1, 526, 55.2, 61.0, 60.8)),
  'siglip_ps3': (ps3(1512, None), (69.3, 71.1, 79.4, 41.3, 534, 64.0, 63.8, 63.2)),
  'radio': (s2((384,), 0, 'c_radio'), (65.0, 58.8, 53.1, 30.9, 405, 51.5, 57.5, 51.0)),
  'radio_anyres': (anyres(4, 'c_radio'), (68.1, 62.8, 70.0, 35.8, 497, 65.9, 62.8, 59.3)),
  'radio_s2': (s2((384, 768, 1536), tower='c_radio'),
               (68.1, 72.3, 82.5, 40.4, 542, 59.7, 62.1, 62.8)),
  'radio_ps3': (ps3(1536, None, 'c_radio'), (68.4, 72.6, 83.2, 43.4, 569, 68.2, 61.5, 64.9)),
}
TABLE = Table(stages=STAGES, benchmarks=BENCHMARKS, further={'average': AVERAGE},
              own_parts={row: parts(model) for row, (model, _) in ROWS.items()})


def get_config(argument=''):
  """The run config of a row's stage, by default the last."""
  return recipe('vila_hd_table5', argument, ROWS)
