"""PS3, Table 12 (and Table 2's own rows): 4KPro by resolution and share of selected patches.
vila_hd_table12.py:ROW[,STAGE]

Command:  hrvlm sweep --config configs/ablations/vila_hd_table12.py --list
          hrvlm sweep --config configs/ablations/vila_hd_table12.py --data BENCHMARKS
            --out runs/vila_hd_table12
Hardware: not published; `hrvlm plan --config configs/ablations/vila_hd_table12.py:ps3_3780_18`.
Time:     not published, not run here.
Expected: `ROWS` (4KPro, seconds of an answer). Table 12's own numbers were not at hand: those here
          are Table 2's and the repository's of VILA-HD-8B, which trained on more than this table's
          models.
Open:     as in vila_hd_table1.py.
"""

from rows_vila_hd import STAGES, anyres, parts, ps3, recipe, s2

from hrvlm_jax.lab.tables import Table, Tested

# Row: (model, numbers of the paper).
ROWS = {
  'siglip_378': (s2((378,), 0), None),
  'anyres_1512': (anyres(4), None),
  's2_1512': (s2((378, 756, 1512)), None),
  'ps3_756_44': (ps3(756, 1280), None),
  'ps3_756_100': (ps3(756, None), None),
  'ps3_1512_20': (ps3(1512, 2916), None),
  'ps3_1512_20_44': (ps3(1512, 2916), None),
  'ps3_1512_44': (ps3(1512, 6400), (53.2, 0.61)),
  'ps3_1512_44_100': (ps3(1512, 6400), None),
  'ps3_1512_100': (ps3(1512, None), (59.7, 1.20)),
  'ps3_3780_18': (ps3(3780, 15360), (72.6, 1.22)),
  'ps3_3780_18_35': (ps3(3780, 15360), (74.2, 1.91)),
}
ALL = {'tokens': None, 'looks': 'all'}
TABLE = Table(
  stages=STAGES, benchmarks=('4kpro',),
  further={'seconds': 'hrvlm bench gpu_latency (an answer)'},
  own_parts={row: parts(model) for row, (model, _) in ROWS.items()},
  tested={
    'ps3_1512_20_44': Tested(model='ps3_1512_20', knobs={'encoder': {'tokens': 6400}}),
    'ps3_1512_44_100': Tested(model='ps3_1512_44', knobs={'encoder': ALL}),
    'ps3_3780_18_35': Tested(model='ps3_3780_18', knobs={'encoder': {'tokens': 30720}})})


def get_config(argument=''):
  """The run config of a row's stage, by default the last."""
  return recipe('vila_hd_table12', argument, ROWS)
