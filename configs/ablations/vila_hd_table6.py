"""PS3, Table 6: designs of the pre-training, of PS3, of VILA-HD. vila_hd_table6.py:ROW[,STAGE]

Command:  hrvlm convert --config configs/ablations/vila_hd_table6.py:all,align
            --part language=QWEN2_7B --to weights/vila_hd_table6_language
          hrvlm sweep --config configs/ablations/vila_hd_table6.py --list
          hrvlm sweep --config configs/ablations/vila_hd_table6.py --data BENCHMARKS
            --out runs/vila_hd_table6
Hardware: not published; `hrvlm plan --config configs/ablations/vila_hd_table6.py:all`.
Time:     not published, not run here.
Expected: the last number of `ROWS`: what the average of the seven benchmarks gains by the design
          that the row leaves out. `all` has every design.
Open:     how far each ablation was trained; 1512 pixels and 44 % of the patches here. "Multi-scale"
          is left out by one high scale instead of two; "mixing global and local contrast" by local
          captions alone; intra-image contrast is put in by two rows of an image.

Every row pre-trains a PS3, then aligns and tunes a VILA-HD on it.
"""

import dataclasses

from rows_vila_hd import AVERAGE, BENCHMARKS, ps3, recipe

from hrvlm_jax.core.config import from_dict, to_dict
from hrvlm_jax.lab.tables import Table
from hrvlm_jax.systems.ps3.config import PS3Config
from hrvlm_jax.training.recipe import evaluate, words

PATCHES = 6400
EIGHT = (None,) * 8
# Row: (VILA-HD's settings, numbers of the paper).
ROWS = {
  'all': ({}, (68.4, 68.0, 74.5, 37.3, 509, 63.1, 65.0, 61.0, None)),
  'no_target_selection': ({}, (*EIGHT, 5.1)),
  'no_target_pooling': ({}, (*EIGHT, 3.7)),
  'no_global_contrast': ({}, (*EIGHT, 1.0)),
  'intra_image_contrast': ({}, (*EIGHT, 5.3)),
  'one_scale': ({'scales': (378, 1512)}, (*EIGHT, 1.0)),
  'no_scale_position': ({'residual': False}, (*EIGHT, 0.8)),
  'no_low_context': ({'low_context': False}, (*EIGHT, 8.8)),
  'no_extra_position': ({'positions': False}, (*EIGHT, 0.8)),
}
# What the pre-training of a row does otherwise: (contrast, regions).
PRETRAIN = {
  'no_target_selection': (dict(select_target=False), {}),
  'no_target_pooling': (dict(pool_target=False), {}),
  'no_global_contrast': ({}, dict(global_share=0.0)),
  'intra_image_contrast': (dict(intra_image=True), dict(rows_per_image=2)),
}
MODELS = {row: (ps3(1512, 5132 if 'scales' in settings else PATCHES, **settings), None)
          for row, (settings, _) in ROWS.items()}
TABLE = Table(
  stages=('pretrain', 'align', 'sft'), benchmarks=BENCHMARKS,
  further={'average': AVERAGE, 'gain': 'the average of the row `all` minus that of the row'},
  parts=('vision/tower=SIGLIP', 'text=SIGLIP'), joins={'align': {'vision': 'vision/ps3'}})


def get_config(argument=''):
  """The run config of a row's stage, by default the last."""
  row, stage = words(argument, ROWS, TABLE.stages[::-1])
  if stage != 'pretrain':
    config = recipe('vila_hd_table6', f'{row},{stage}', MODELS)
    if stage == 'align':  # PS3 comes from the stage before
      config.training.init_from = 'weights/vila_hd_table6_language'
    return config
  config = evaluate('ps3:1_5k,script')
  encoder = from_dict(PS3Config, config.model.encoder.to_dict())
  own = {'scales', 'residual', 'low_context'}
  encoder = dataclasses.replace(
    encoder, **{name: value for name, value in ROWS[row][0].items() if name in own})
  config.model.encoder = to_dict(encoder)
  contrast, regions = PRETRAIN.get(row, ({}, {}))
  config.training.objective.contrast.update(contrast)
  config.training.objective.regions.update(regions)
  config.training.init_from = 'weights/vila_hd_table6_start'
  return config
