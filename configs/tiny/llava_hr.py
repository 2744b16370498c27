"""A tiny LLaVA-HR: a ViT on 64 pixels, a ConvNeXt on 256, adapters between.

Command:  hrvlm tiny --config configs/tiny/llava_hr.py
          (writes the task, the ConvNeXt and the language model under runs/tiny, then trains; after
          that also hrvlm train --config configs/tiny/llava_hr.py --workdir DIR)
Hardware: 2 CPU cores.
Result:   loss 0.390, accuracy 45.6% (chance 4.3%), 500 steps.
"""

import dataclasses

from hrvlm_jax.lab import tiny
from hrvlm_jax.lab.needle import NeedleConfig
from hrvlm_jax.lab.scenes import SceneConfig
from hrvlm_jax.lab.symbols import SymbolsConfig
from hrvlm_jax.language import config as language
from hrvlm_jax.systems.llava_hr.config import LlavaHRConfig, model
from hrvlm_jax.vision.convnext import ConvNeXtConfig
from hrvlm_jax.vision.vit import ViTConfig

# The ConvNeXt learned to read beforehand, which takes it a thousand steps, and stays as it is: most
# of a step's time would go into it. What is never read stays where it is, too.
GROUPS = (
  dict(pattern=r'vision/slow/.*|vision/fast/(post_norm/.*|class_token)', frozen=True),
  dict(pattern=r'.*/(bias|scale)|vision/fast/pos_embed', decay=False),
  dict(pattern=r'.*'),
)
FAST = ViTConfig(image_size=40, patch_size=8, width=96, depth=4, heads=4, mlp_width=192,
                 activation='quick_gelu', norm_eps=1e-5, class_token=True, patch_bias=False,
                 pre_norm=True)
SLOW = ConvNeXtConfig(depths=(1, 1, 2, 1), widths=(24, 48, 96, 192), classes=3)
TEXT = language.llama(vocab_size=tiny.VOCABULARY, width=128, depth=2, heads=4, mlp_width=384,
                      max_positions=512, init_std=0.09)
# 8 x 8 cells on both paths: where they differ, cells of two signs are averaged into one.
MODEL = model(LlavaHRConfig(image_size=256, fast_size=64, fast=FAST, slow=SLOW), TEXT)


def get_config(builtin='needle'):
  return tiny.config(
    'llava_hr', MODEL, builtin=builtin, lengths=(128, 160, 192), groups=GROUPS, steps=500,
    batch_size=16, eval_every=500, checkpoint_every=100,
    train_fresh=(r'(?!vision/slow/|language/).*', r'vision/slow/head/.*'))


def preparation(builtin='needle'):
  task = NeedleConfig.square(builtin)
  # Crops of 96 pixels at the scale of the whole image.
  scenes = SceneConfig(needle=task, encoder=MODEL.encoder, steps=1000, batch_size=40, window=60)
  # It answers from lists of signs before it sees one, as real language models do.
  symbols = SymbolsConfig(needle=dataclasses.replace(task, turns=3), text=MODEL.text, steps=1000,
                          slots=(MODEL.encoder.tokens,), batch_size=16)
  return tiny.Preparation(task=task, towers={'vision': scenes, 'language': symbols})
