"""Pheye, Table 4 (appendix B.1): three ways from a ViT to GPT-2. pheye_table4.py:ROW

Command:  hrvlm sweep --config configs/ablations/pheye_table4.py --list
          hrvlm sweep --config configs/ablations/pheye_table4.py --data BENCHMARKS
            --out runs/pheye_table4
Hardware: not published.
Time:     not published, not run here.
Expected: `ROWS` (COCO captions of the validation split: CIDEr, BLEU-4, METEOR); the table's numbers
          were not at hand. The text: training the ViT helps every row, all tokens beat the class
          token, cross-attention beats both, also those with a trained ViT.
Source:   appendix B.1: CLIP ViT-B/32 and GPT-2 base, which stays frozen; AdamW, 5 epochs of COCO's
          training captions, batch 64, learning rate 1e-4 for the connector and 1e-5 for the ViT.
Open:     schedule (constant here), weight decay (torch's default), which layer of the ViT is read
          (the last one's output), heads of the cross-attention (of 64 channels), and its class
          token, which only the first row reads here.

cls: one class token through a linear map (FROMAGe). all: all tokens through one (LLaVA). cross:
cross-attention between self-attention and MLP of every layer (SmallCap), of GPT-2's width. `_vit`:
the ViT is trained too.
"""

from ml_collections import ConfigDict

from hrvlm_jax.core.config import to_dict
from hrvlm_jax.lab.tables import Table
from hrvlm_jax.language import config as language
from hrvlm_jax.systems.baselines.single_view import SingleViewConfig
from hrvlm_jax.systems.contract import ModelConfig, ProjectorConfig
from hrvlm_jax.systems.fusion import CrossAttentionFusion
from hrvlm_jax.training.recipe import words
from hrvlm_jax.vision.vit import ViTConfig

CLIP_B_32 = ViTConfig(
  image_size=224, patch_size=32, width=768, depth=12, heads=12, mlp_width=3072,
  activation='quick_gelu', norm_eps=1e-5, class_token=True, patch_bias=False, pre_norm=True)
TEXT = language.gpt2()
LINEAR = ProjectorConfig(n_in=768, n_out=768, kind='linear')


def model(class_only=False, **settings):
  encoder = SingleViewConfig(vision=CLIP_B_32, layer=-1, fit='crop', class_only=class_only)
  return ModelConfig(system='single_view', encoder=encoder, text=TEXT, **settings)


PREFIX = dict(projector=LINEAR, chat='this_image_shows')
CROSS = dict(fusion=CrossAttentionFusion(width=768, interval=1, inside=True),
             chat='this_image_shows_beside', image_token=None)
# Row: (model, numbers of the paper).
ROWS = {
  'cls': (model(class_only=True, **PREFIX), None),
  'cls_vit': (model(class_only=True, **PREFIX), None),
  'all': (model(**PREFIX), None),
  'all_vit': (model(**PREFIX), None),
  'cross': (model(**CROSS), None),
  'cross_vit': (model(**CROSS), None),
}
TABLE = Table(benchmarks=('coco',),
              further={'BLEU-4': 'bleu4_simple in eval/coco/result.json (coco_ptb: bleu4_ptb)',
                       'METEOR': 'hrvlm eval --benchmark coco_ptb --predictions FILE'},
              parts=('vision/tower=CLIP_B_32', 'language=GPT2'))
CONNECTOR = 'projector/.*|fusion/.*'
PAIRS = 5 * 118_287  # captions of COCO's training split


def get_config(argument=''):
  """The run config of a row."""
  row, = words(argument, ROWS)
  config = ConfigDict()
  config.seed = 0
  config.model = to_dict(ROWS[row][0])
  config.data = dict(train='data/coco_train2017_captions.json', tokenizer='weights/gpt2',
                     lengths=(64, 128, 256), exif='ignore')
  trained = [dict(pattern=CONNECTOR)]
  if row.endswith('_vit'):
    trained.append(dict(pattern='vision/tower/(?!post_norm).*', learning_rate=0.1))
  config.training = dict(
    steps=5 * PAIRS // 64, batch_size=64, dtype='bfloat16', frozen_dtype='bfloat16',
    groups=(*trained, dict(pattern='.*', frozen=True)),
    optimizer=dict(name='adamw', learning_rate=1e-4, schedule='constant', weight_decay=0.01,
                   clip_norm=None),
    init_from='weights/pheye_table4_' + ('cross' if 'cross' in row else 'prefix') + '_start',
    init_allow=(CONNECTOR,))
  return config
