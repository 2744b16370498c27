"""PS3, Table 1: resolution and share of selected patches, beside a single view, AnyRes and S2.

Command:  hrvlm sweep --config configs/ablations/vila_hd_table1.py --out runs/vila_hd_table1
          hrvlm train --config configs/ablations/vila_hd_table1.py:ps3_1512_44 --workdir runs/ps3_44
Hardware: not published; `hrvlm plan --config configs/ablations/vila_hd_table1.py:ps3_1512_44`.
Time:     not published, not run here.
Expected: `ROWS` (TextVQA, ChartQA, DocVQA, InfoVQA, OCRBench, V*, RealWorldQA, average; rows of
          PS3 have the same share in training and at test).
Open:     the paper's smaller training set and its steps; the stage is `sft` of VILA-HD here, for
          the baselines without a loss of the selection. SigLIP SO400M at 378 pixels and Qwen2-7B
          in all.
"""

import dataclasses

from hrvlm_jax.core.config import to_dict
from hrvlm_jax.language import config as language
from hrvlm_jax.systems.baselines.anyres import AnyResConfig
from hrvlm_jax.systems.baselines.s2 import S2Config
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.systems.fusion import TwoPassFusion
from hrvlm_jax.systems.ps3.config import SO400M, siglip
from hrvlm_jax.systems.vila_hd.config import VilaHDConfig
from hrvlm_jax.training.recipe import evaluate, words

VIEW = SO400M.image_size
HALF = (0.5, 0.5, 0.5)
TEXT = language.qwen2(vocab_size=151651)
BASELINE = dict(vision=SO400M, layer=-2, projector='mlp_downsample', width=TEXT.width, mean=HALF,
                std=HALF)


def anyres(tiles):
  side = tiles * VIEW
  return ModelConfig(system='anyres', text=TEXT, chat='vila_qwen2', encoder=AnyResConfig(
    pinpoints=((side, side),), merge='flat', **BASELINE))


def s2(sizes, output=-1):
  return ModelConfig(system='s2', text=TEXT, chat='vila_qwen2', encoder=S2Config(
    sizes=sizes, output=output, fit='squash', **BASELINE))


def ps3(side, patches):
  """PS3 up to a side; `patches` of them selected, None: all."""
  scales = tuple(scale for scale in (378, 756, 1512, 3780) if scale <= side)
  select = dict(looks='all') if patches is None else dict(tokens=patches)
  encoder = VilaHDConfig(tower=dataclasses.replace(siglip(scales, None), text=None),
                         select_target=patches is not None, **select)
  weight = 0.0 if patches is None else 1.0
  return ModelConfig(system='vila_hd', encoder=encoder, text=TEXT, chat='vila_qwen2',
                     fusion=TwoPassFusion(selection_weight=weight), after_image='\n')


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
  'ps3_1512_44': (ps3(1512, 6400), (68.4, 68.0, 74.5, 37.3, 509, 63.1, 65.0, 61.0)),
  'ps3_1512_100': (ps3(1512, None), (69.3, 71.1, 79.4, 41.3, 534, 64.0, 63.8, 63.2)),
  'ps3_3780_18': (ps3(3780, 15360), (69.8, 70.9, 79.1, 40.5, 543, 67.8, 64.7, 63.9)),
}


# Never read: the tower's final norm and pooling, the prompt of saliency-guided selection; where all
# patches are taken nothing learns to select.
UNREAD = 'vision/tower/(post_norm|pool)/.*'
UNREAD_SELECTION = (
  'vision/ps3/(pool_head/.*|tower/(post_norm|pool)/.*|selection/prior_prompt)'
  '|vision/(prompt_head|ps3/selection)/.*')


def get_config(argument=''):
  """The recipe of VILA-HD's last stage with a row's model."""
  row, = words(argument, {'ps3_1512_44': None} | ROWS)
  model = ROWS[row][0]
  config = evaluate('vila_hd:1_5k,sft')
  config.model = to_dict(model)
  config.training.init_from = 'weights/vila_hd_table1_start'
  config.training.init_allow = ('vision/(projector|prompt_head)/.*',)
  if model.system != 'vila_hd':
    config.training.objective = 'next_token'
  if model.system != 'vila_hd' or not model.fusion.selection_weight:
    unread = UNREAD_SELECTION if model.system == 'vila_hd' else UNREAD
    config.training.groups = (
      dict(pattern=unread, frozen=True), dict(pattern='.*', decay=False))
    config.data.boxes = False
  return config
