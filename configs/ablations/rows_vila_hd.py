"""What the tables of PS3 share: models around one tower, their stages and starts.

SigLIP SO400M at 378 pixels, or C-RADIO-v2-L at 384, and Qwen2-7B. A baseline starts from the tower
alone, PS3 from a release of its own.
"""

import dataclasses

from hrvlm_jax.core.config import to_dict
from hrvlm_jax.language import config as language
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.baselines.anyres import AnyResConfig
from hrvlm_jax.systems.baselines.s2 import S2Config
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.systems.fusion import TwoPassFusion
from hrvlm_jax.systems.ps3.config import SO400M, c_radio, siglip
from hrvlm_jax.systems.vila_hd.config import VilaHDConfig
from hrvlm_jax.training.recipe import evaluate, words

BENCHMARKS = ('textvqa', 'chartqa', 'docvqa', 'infovqa', 'ocrbench', 'vstar', 'realworldqa')
AVERAGE = 'mean of the seven, OCRBench divided by 10'
STAGES = ('align', 'sft')
HALF = (0.5, 0.5, 0.5)
TEXT = language.qwen2(vocab_size=151651)
CHAT = dict(text=TEXT, chat='vila_qwen2')
# The tower of a baseline and its pixels' statistics.
RADIO = c_radio((384, 768, 1536))
TOWERS = {'siglip': (SO400M, HALF, HALF), 'c_radio': (RADIO.vision, RADIO.mean, RADIO.std)}
SCALES = {'siglip': (378, 756, 1512, 3780), 'c_radio': (384, 768, 1536)}


def _baseline(tower):
  vision, mean, std = TOWERS[tower]
  return dict(vision=vision, layer=-2, projector='mlp_downsample', width=TEXT.width, mean=mean,
              std=std)


def anyres(tiles, tower='siglip'):
  """A thumbnail and tiles x tiles tiles."""
  side = tiles * TOWERS[tower][0].image_size
  return ModelConfig(system='anyres', **CHAT, encoder=AnyResConfig(
    pinpoints=((side, side),), merge='flat', **_baseline(tower)))


def s2(sizes, output=-1, tower='siglip'):
  """One tower over several sizes; with one size the single view."""
  return ModelConfig(system='s2', **CHAT, encoder=S2Config(
    sizes=sizes, output=output, fit='squash', **_baseline(tower)))


def ps3(side, patches, tower='siglip', selection_weight=None, **settings):
  """PS3 up to a side; `patches` of them selected, None: all.

  settings: further fields of the encoder, those of its tower by name.
  """
  scales = settings.pop('scales', tuple(scale for scale in SCALES[tower] if scale <= side))
  found = siglip(scales, None) if tower == 'siglip' else c_radio(scales)
  inner = {name: settings.pop(name) for name in list(settings)
           if name in {field.name for field in dataclasses.fields(found)}}
  select = dict(looks='all') if patches is None else dict(tokens=patches)
  encoder = VilaHDConfig(
    tower=dataclasses.replace(found, text=None, **inner),
    **{'select_target': patches is not None, **select, **settings})
  if selection_weight is None:
    selection_weight = 0.0 if patches is None else 1.0
  return ModelConfig(system='vila_hd', encoder=encoder, **CHAT, after_image='\n',
                     fusion=TwoPassFusion(selection_weight=selection_weight))


def parts(model):
  """The parts of the start of a row."""
  if model.system == 'vila_hd':
    return ('vision/ps3=PS3_RELEASE', 'language=QWEN2_7B')
  tower = 'SIGLIP' if model.encoder.vision == SO400M else 'C_RADIO'
  return (f'vision/tower={tower}', 'language=QWEN2_7B')


# Never read: the tower's final norm and pooling, the prompt of saliency-guided selection; where all
# patches are taken nothing learns to select.
UNREAD = 'vision/(ps3/)?(pool_head/.*|tower/(post_norm|pool)/.*|selection/prior_prompt)'
READ_BOTTOM_UP = 'vision/ps3/selection/prior_prompt'
SELECTION = 'vision/(prompt_head|ps3/selection)/.*'
# What the start of a row has not.
FRESH = 'vision/(projector|prompt_head)/.*'
TEXT_ROOM = (1024, 4096)  # places behind visual tokens that the recipe's buckets do not hold


def unread(model):
  """The pattern of what is never read, where there is such."""
  vision = getattr(model.encoder, 'vision', None)
  return (UNREAD,) if vision is None or vision.post_norm or vision.pool else ()


def recipe(table, argument, rows, default=None):
  """The run config of ROW[,STAGE] of a table: VILA-HD's stage with a row's model."""
  row, stage = words(argument, ({default: None} if default else {}) | rows, STAGES[::-1])
  model = rows[row][0]
  config = evaluate(f'vila_hd:1_5k,{stage}')
  selects = model.system == 'vila_hd' and bool(model.fusion.selection_weight)
  if stage == 'align' and model.system == 'vila_hd':  # the projector alone learns
    model = dataclasses.replace(
      model, fusion=dataclasses.replace(model.fusion, selection_weight=0.0),
      encoder=dataclasses.replace(model.encoder, select_target=False))
  config.model = to_dict(model)
  tokens = getattr(model.encoder, 'max_tokens', None) or registry.get(model.system).tokens(
    model.encoder)
  if tokens + TEXT_ROOM[0] > max(config.data.lengths):
    config.data.lengths = tuple(tokens + room for room in TEXT_ROOM)
    config.data.max_length = max(config.data.lengths)
  if model.system != 'vila_hd':
    config.training.objective = 'next_token'
  frozen = tuple(dict(pattern=pattern, frozen=True) for pattern in unread(model))
  still = frozen
  if getattr(model.encoder, 'mode', '') == 'after_image':  # saliency reads its prompt
    frozen = (dict(pattern=READ_BOTTOM_UP, decay=False), *frozen)
  if stage == 'align':
    config.training.groups = (
      *still, dict(pattern='vision/projector/.*', decay=False), dict(pattern='.*', frozen=True))
    config.training.init_from = f'weights/{table}_{row}_start'
    config.training.init_allow = (FRESH, *unread(model))
    config.data.boxes = False
    return config
  if not selects and model.system == 'vila_hd':
    frozen = (*frozen, dict(pattern=SELECTION, frozen=True))
  config.training.groups = (*frozen, dict(pattern='.*', decay=False))
  config.training.init_from = f'runs/{table}/{row}/align'
  config.data.boxes = selects
  return config
