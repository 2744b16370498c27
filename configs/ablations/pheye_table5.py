"""Pheye, Table 5 (appendix B.2): ways to read 448 pixels. pheye_table5.py:ROW[,STAGE]

Command:  hrvlm sweep --config configs/ablations/pheye_table5.py --list
          hrvlm sweep --config configs/ablations/pheye_table5.py --data BENCHMARKS
            --out runs/pheye_table5
Hardware: not published.
Time:     not published, not run here.
Expected: CIDEr on the validation split of TextCaps; the table's numbers were not at hand. The text:
          448 pixels beat 224, the two resamplers are alike, no compression is best.
Source:   appendix B.2: CLIP ViT-L/14 and GPT-2 large, both frozen; LoRA of rank 8, alpha 16,
          dropout 0.05 in every linear layer, one set for the global view and one for the tiles
          (224: one set); cross-attention as SmallCap; 257 queries of the ViT's width; LLaVAR for 1
          epoch at 1e-4, TextCaps for 3 at 2e-5, AdamW, batch 64.
Open:     schedule (cosine here), weight decay (torch's default), where Monkey's queries lie (one
          without a position, the rest 16 x 16 over the image), the prompt of the first stage (the
          second's here).
"""

import dataclasses

from ml_collections import ConfigDict

from hrvlm_jax.core.config import to_dict
from hrvlm_jax.core.layers import LoRA
from hrvlm_jax.lab.tables import Table
from hrvlm_jax.language import config as language
from hrvlm_jax.systems.baselines.reduced import Perceiver, ReducedConfig, SingleLayer
from hrvlm_jax.systems.baselines.single_view import SingleViewConfig
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.systems.fusion import CrossAttentionFusion
from hrvlm_jax.systems.pheye.config import PheyeConfig
from hrvlm_jax.training.recipe import words
from hrvlm_jax.vision.vit import ViTConfig

CLIP_L_224 = ViTConfig(
  image_size=224, patch_size=14, width=1024, depth=24, heads=16, mlp_width=4096,
  activation='quick_gelu', norm_eps=1e-5, class_token=True, patch_bias=False, pre_norm=True)
TEXT = language.RELEASED['gpt2_large']


def lora(name):
  return LoRA(rank=8, alpha=16.0, name=name, dropout=0.05)


TILES = PheyeConfig(vision=CLIP_L_224, level=2, first=lora('first'), second=lora('second'))
SMALL = SingleViewConfig(vision=dataclasses.replace(CLIP_L_224, lora=(lora(''),)), layer=-1,
                         fit='squash')


def model(system, encoder):
  return ModelConfig(
    system=system, encoder=encoder, text=TEXT, chat='this_image_shows_beside', image_token=None,
    fusion=CrossAttentionFusion(width=1024, interval=1, inside=True))


def reduced(step):
  return model('reduced', ReducedConfig(inner='pheye', encoder=TILES, step=step))


# Row: (model, numbers of the paper).
ROWS = {
  'small_224': (model('single_view', SMALL), None),
  'perceiver_448': (reduced(Perceiver(queries=257, depth=6, heads=16)), None),
  'monkey_448': (reduced(SingleLayer(queries=257)), None),
  'whole_448': (model('pheye', TILES), None),
}
STAGES = {
  'llavar': dict(train='data/llavar_finetune.json', steps=16_000 // 64, learning_rate=1e-4),
  'textcaps': dict(train='data/textcaps_train.json', steps=3 * 109_765 // 64, learning_rate=2e-5),
}
TABLE = Table(stages=tuple(STAGES), benchmarks=('textcaps',), own_parts={
  row: (f'vision/{"inner/" if m.system == "reduced" else ""}tower=CLIP_L_224',
        'language=GPT2_LARGE') for row, (m, _) in ROWS.items()})
TRAINED = (r'fusion/.*|.*lora_[ab].*|vision/resampler/.*'
           r'|vision/(inner/)?(norm1|norm2|norm3|sub_image)/.*')


def get_config(argument=''):
  """The run config of a row's stage, by default the last."""
  row, stage = words(argument, ROWS, tuple(STAGES)[::-1])
  numbers, config = STAGES[stage], ConfigDict()
  config.seed = 0
  config.model = to_dict(ROWS[row][0])
  config.data = dict(train=numbers['train'], tokenizer='weights/gpt2_large',
                     lengths=(64, 128, 256, 512), exif='ignore')
  first = stage == 'llavar'
  config.training = dict(
    steps=numbers['steps'], batch_size=64, dtype='bfloat16', frozen_dtype='bfloat16',
    groups=(dict(pattern=TRAINED), dict(pattern='.*', frozen=True)),
    optimizer=dict(name='adamw', learning_rate=numbers['learning_rate'], schedule='cosine',
                   weight_decay=0.01, clip_norm=None),
    init_from=f'weights/pheye_table5_{row}_start' if first else f'runs/pheye_table5/{row}/llavar',
    init_allow=(TRAINED,) if first else ())
  return config
