"""The four systems and three baselines on 3840 x 2160 images, with encoders of real widths.

The ViT has SigLIP SO400M's width, heads and patches (24 blocks instead of 27, because LLaVA-HR's
adapters divide it in quarters), LLaVA-HR's second path is ConvNeXt-L. Sides are those of the
published models: views of 378 pixels, PS3's scales up to 3780, ten tiles a side for Pheye and
AnyRes. What is scaled down, so that training fits one GPU of 80 GB, is the language model.

Command:  hrvlm compare --config configs/compare/needle_4k.py --out runs/compare_4k
Hardware: one GPU with 80 GB.
Expected: table.txt, plot.png and results.json in the folder. Not run so far: no such machine was at
          hand, and that every model fits 80 GB is not shown; a test builds them abstractly and
          bounds their parameters.
"""

import dataclasses

import ml_collections

from hrvlm_jax.core.config import to_dict
from hrvlm_jax.core.layers import LoRA
from hrvlm_jax.lab.needle import NeedleConfig
from hrvlm_jax.language import config as language
from hrvlm_jax.systems.baselines.anyres import AnyResConfig
from hrvlm_jax.systems.baselines.s2 import S2Config
from hrvlm_jax.systems.baselines.single_view import SingleViewConfig
from hrvlm_jax.systems.contract import ModelConfig, ProjectorConfig
from hrvlm_jax.systems.fusion import CrossAttentionFusion, TwoPassFusion
from hrvlm_jax.systems.llava_hr.config import LlavaHRConfig
from hrvlm_jax.systems.mc_llava.encoder import MCLlavaConfig
from hrvlm_jax.systems.pheye.config import PheyeConfig
from hrvlm_jax.systems.ps3.config import PS3Config
from hrvlm_jax.systems.vila_hd.config import VilaHDConfig
from hrvlm_jax.vision.convnext import CONVNEXT_L
from hrvlm_jax.vision.vit import ViTConfig

HALF = (0.5, 0.5, 0.5)
VISION = ViTConfig(image_size=378, patch_size=14, width=1152, depth=24, heads=16, mlp_width=4304)
# SigLIP's width, a quarter of the depth of a 7B model.
TEXT = language.qwen2(vocab_size=1024, width=1152, depth=8, heads=18, kv_heads=2, mlp_width=4608,
                      max_positions=16384)


def model(system, encoder, width=None, **options):
  """A model whose tokens of `width` go through a projector; None: the encoder has its own."""
  projector = None if width is None else ProjectorConfig(n_in=width, n_out=TEXT.width)
  return ModelConfig(system=system, encoder=encoder, text=TEXT, projector=projector, **options)


def systems():
  """Models by the name they have in the table."""
  common = dict(vision=VISION, layer=-1, mean=HALF, std=HALF)
  lora = lambda name, rank: LoRA(rank=rank, alpha=2.0 * rank, name=name)
  pheye = PheyeConfig(vision=VISION, level=10, first=lora('first', 8), second=lora('second', 16),
                      sub_image_rows=101, mean=HALF, std=HALF)
  # 3456 = 27 * 4 * 32: the ConvNeXt's grid is four times the ViT's.
  llava_hr = LlavaHRConfig(image_size=3456, fast=VISION, fast_size=378, slow=CONVNEXT_L, mean=HALF,
                           std=HALF)
  vila_hd = VilaHDConfig(tower=PS3Config(vision=VISION, scales=(378, 756, 1512, 3780),
                                         select_layers=(0, 8, 16, 23)),
                         width=TEXT.width, looks=6)
  s2 = S2Config(sizes=(378, 1512, 3780), output=1, fit='squash', projector='mlp_downsample',
                width=TEXT.width, **common)
  return {
    'single_view': model('single_view', SingleViewConfig(fit='squash', **common), VISION.width),
    'mc_llava': model('mc_llava', MCLlavaConfig(vision=VISION, max_crops=105, num_tokens=1456,
                                                window=384), VISION.width),
    'pheye': model('pheye', pheye, image_token=None,
                   fusion=CrossAttentionFusion(width=VISION.width, interval=4)),
    'llava_hr': model('llava_hr', llava_hr, llava_hr.width),
    'vila_hd': model('vila_hd', vila_hd, fusion=TwoPassFusion(selection_weight=1.0),
                     chat='vila_qwen2', after_image='\n'),
    'anyres': model('anyres', AnyResConfig(pinpoints=((3780, 2268), (2268, 3780)),
                                           projector='mlp_downsample', width=TEXT.width,
                                           **common)),
    's2': model('s2', s2),
  }


def get_config():
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.task = dataclasses.asdict(NeedleConfig.four_k(length=1, relative_area=(5e-5, 4e-4),
                                                       ask=('colour',)))
  config.encoder = dict(vision=to_dict(VISION), window=378, last_tokens=14, steps=10_000)
  config.adapt = {'llava_hr': dict(steps=5000, batch_size=4), 'vila_hd': dict(steps=5000,
                                                                             batch_size=4)}
  config.systems = {name: to_dict(made) for name, made in systems().items()}
  config.optimizer = dict(name='adamw', learning_rate=2e-4, warmup=0.03, weight_decay=0.01)
  config.train_images = 20_000
  config.eval_images = 1000
  config.train_steps = 5000
  config.batch_size = 8
  config.accumulate = 8
  config.dtype = 'bfloat16'
  config.remat = 'layers'
  config.turns = 3
  config.lengths = (1024, 2048, 4096, 6144, 16384)
  config.answer_batch = 1
  config.latency_answers = 20
  return config
