"""LLaVA-HR, Table 2: which encoder reads the image. llava_hr_table2.py:ROW

Command:  hrvlm sweep --config configs/ablations/llava_hr_table2.py --out runs/llava_hr_table2
          hrvlm train --config configs/ablations/llava_hr_table2.py:clip_average \\
            --workdir runs/clip_average
Hardware: 8 x A800 80 GB (paper, Table 1, for the full model).
Time:     18.2 hours for both stages at 768 pixels (paper, Table 1); not run here.
Expected: `ROWS` (7B, about 760 pixels; VQAv2, TextVQA, MME, POPE, tokens per second on an A800).

The paper gives no sizes for the rows without adapters: 756 pixels for the ViT alone, windows of
2 x 2 and 144 queries are our choices (systems/llava_hr/README.md).
"""

from hrvlm_jax.core.config import to_dict
from hrvlm_jax.systems.llava_hr.config import VICUNA_7B, LlavaHRConfig, model
from hrvlm_jax.training.recipe import evaluate, words

CLIP = dict(image_size=756, slow=None, adapters=None)

# Row: (encoder, numbers of the paper).
ROWS = {
  'mra': (LlavaHRConfig(image_size=768), (81.8, 64.4, 1524.8, 88.0, 23.5)),
  'clip': (LlavaHRConfig(**CLIP), (81.0, 63.2, 1436.1, 87.6, 10.7)),
  'convnext': (LlavaHRConfig(image_size=768, fast=None, adapters=None),
               (80.3, 64.6, 1415.9, 86.6, 23.7)),
  'clip_resampler': (LlavaHRConfig(**CLIP, reduce='queries', queries=144),
                     (79.8, 58.9, 1403.8, 85.8, 27.6)),
  'clip_average': (LlavaHRConfig(**CLIP, reduce='average', reduce_factor=2),
                   (80.6, 59.6, 1480.6, 86.5, 23.9)),
}


# A row starts from the towers and the language model; what joins them is its own, and the
# ConvNeXt's classifier and CLIP's final norm are never read.
FRESH = ('projector/.*', 'vision/(adapters|align|resampler)/.*',
         'vision/(slow/head|fast/post_norm)/.*')


def get_config(argument=''):
  """The recipe of LLaVA-HR's second stage with a row's model."""
  row, = words(argument, ROWS)
  config = evaluate('llava_hr:7b,stage2')
  config.model = to_dict(model(ROWS[row][0], VICUNA_7B))
  config.training.init_from = 'weights/llava_hr_7b_start'
  config.training.init_allow = FRESH
  return config
