"""Tiny models of all systems with odd sizes, by name."""

import dataclasses
import functools

from hrvlm_jax.language import config as language
from hrvlm_jax.systems.baselines import reduced
from hrvlm_jax.systems.baselines.anyres import AnyResConfig
from hrvlm_jax.systems.baselines.s2 import S2Config
from hrvlm_jax.systems.baselines.s2_dynamic import DynamicS2Config
from hrvlm_jax.systems.baselines.single_view import SingleViewConfig
from hrvlm_jax.systems.baselines.tiling import TilingConfig
from hrvlm_jax.systems.contract import ModelConfig, ProjectorConfig
from hrvlm_jax.systems.fusion import CrossAttentionFusion, TwoPassFusion
from hrvlm_jax.systems.llava_hr.config import AdapterConfig, LlavaHRConfig
from hrvlm_jax.systems.mc_llava.encoder import MCLlavaConfig
from hrvlm_jax.systems.pheye.config import PheyeConfig, model as pheye
from hrvlm_jax.systems.ps3.config import (
  LookConfig,
  PoolConfig,
  PS3Config,
  SaliencyConfig,
  TextConfig,
)
from hrvlm_jax.systems.vila_hd.config import VilaHDConfig
from hrvlm_jax.vision.convnext import ConvNeXtConfig
from hrvlm_jax.vision.vit import ViTConfig

SIGLIP = ViTConfig(image_size=38, patch_size=7, width=60, depth=3, heads=4, mlp_width=100,
                   pool='map')
CLIP = ViTConfig(image_size=47, patch_size=8, width=52, depth=4, heads=4, mlp_width=90,
                 activation='quick_gelu', norm_eps=1e-5, class_token=True, patch_bias=False,
                 pre_norm=True)
CONVNEXT = ConvNeXtConfig(depths=(1, 1, 2, 1), widths=(12, 20, 28, 36), norm_eps=1e-6, classes=3,
                          head_width=10)
PHI = language.phi(vocab_size=271, width=72, depth=3, heads=3, mlp_width=90, rotary_factor=0.5,
                   max_positions=512)
LLAMA = language.llama(vocab_size=269, width=72, depth=2, heads=6, kv_heads=3, mlp_width=90,
                       max_positions=512, norm_eps=1e-6, rope_linear_factor=2.0)
QWEN2 = language.qwen2(vocab_size=267, width=72, depth=2, heads=6, kv_heads=2, mlp_width=90,
                       max_positions=512, tie_embeddings=True)


def _model(system, encoder, text, width=None, **options):
  projector = None if width is None else ProjectorConfig(n_in=width, n_out=text.width)
  return ModelConfig(system=system, encoder=encoder, text=text, projector=projector, **options)


# Sides of 256 pixels give ViT and ConvNeXt grids that fit: 8 x 8 both, with a ViT of 64 pixels.
_DUAL = LlavaHRConfig(image_size=256, fast=CLIP, slow=CONVNEXT, fast_size=64)
_hr = functools.partial(_model, 'llava_hr', text=LLAMA, width=CLIP.width, chat='vicuna_v1')


def _switched(**adapter):
  return _hr(dataclasses.replace(_DUAL, adapters=AdapterConfig(**adapter)))


TOWER = dataclasses.replace(SIGLIP, image_size=35, pool=None, activation='gelu')
PS3 = PS3Config(
  vision=TOWER, scales=(35, 70, 140), select_layers=(0, 2), max_select=21,
  saliency=SaliencyConfig(width=20, out=12, depth=2, kernel=9, input_size=120),
  pool=PoolConfig(width=60, heads=4, mlp_width=70))
PS3_ALONE = ModelConfig(system='ps3', text=None, image_token=None, encoder=dataclasses.replace(
  PS3, text=TextConfig(vocab_size=271, context=9, width=44, depth=2, heads=4, mlp_width=50, out=60,
                       prompt_width=60)))


def _hd(tower=PS3, **options):
  encoder = VilaHDConfig(tower=tower, width=72, **options)
  return _model('vila_hd', encoder, QWEN2, fusion=TwoPassFusion(), chat='vila_qwen2',
                after_image='\n')


def _reduced(step, base='single_view'):
  inner = MODELS[base]
  encoder = reduced.ReducedConfig(inner=inner.system, encoder=inner.encoder, step=step)
  return _model('reduced', encoder, inner.text, encoder.width, chat=inner.chat)


MODELS = {
  'mc_llava': _model('mc_llava', MCLlavaConfig(
    vision=SIGLIP, max_crops=9, num_tokens=24, window=40, growth=4, view_buckets=(1, 5, 10, 17)),
    PHI, SIGLIP.width),
  'mc_llava/qwen2': _model('mc_llava', MCLlavaConfig(
    vision=SIGLIP, max_crops=4, num_tokens=23, window=40, growth=4, quirks='reference',
    view_buckets=(1, 5, 10, 17)), QWEN2, SIGLIP.width, chat='vila_qwen2', after_image='\n'),
  'llava_hr': _hr(_DUAL),
  'llava_hr/paper': _switched(gate_width='vector', gate_input='mapped', gate='sigmoid'),
  'llava_hr/low_to_high': _switched(direction='low_to_high', slow_map='conv', fast_map='mlp',
                                    gate='hsigmoid'),
  'llava_hr/stage_1': _hr(dataclasses.replace(_DUAL, adapters=None, aspect='square')),
  'llava_hr/concat': _model('llava_hr', dataclasses.replace(_DUAL, fusion='concat', fast_size=128),
                            LLAMA, CLIP.width + CONVNEXT.widths[-1], chat='vicuna_v1'),
  'llava_hr/vit': _hr(LlavaHRConfig(image_size=50, fast=CLIP, slow=None, adapters=None)),
  'llava_hr/average': _hr(LlavaHRConfig(image_size=73, fast=CLIP, slow=None, adapters=None,
                                        reduce='average')),
  'llava_hr/queries': _hr(LlavaHRConfig(image_size=47, fast=CLIP, slow=None, adapters=None,
                                        reduce='queries', queries=7)),
  'llava_hr/convnext': _model('llava_hr', LlavaHRConfig(
    image_size=97, fast=None, slow=CONVNEXT, adapters=None), LLAMA, CONVNEXT.widths[-1],
    chat='vicuna_v1'),
  'pheye': pheye(PheyeConfig(vision=CLIP, level=2), dataclasses.replace(PHI, depth=4), interval=2),
  'pheye/3': pheye(PheyeConfig(vision=CLIP, level=3, first=None), LLAMA, interval=1, from_layer=1,
                   reduce=2),
  'ps3': _model('ps3', dataclasses.replace(PS3, look=LookConfig(looks=2, smooth=True)), PHI,
                SIGLIP.width),
  'vila_hd': _hd(looks=2),
  'vila_hd/saliency': _hd(looks='all', mode='after_image', prompt_head=None, positions=False,
                          select_layer=-1),
  'vila_hd/no_context': _hd(dataclasses.replace(PS3, low_context=False, saliency=None,
                                                residual=False), tokens=30, budgets=(9, 11),
                            prompt_head='linear', projector='mlp_downsample_3x3_fix'),
  'vila_hd/low': _hd(looks=0),
  'single_view': _model('single_view', SingleViewConfig(vision=CLIP), LLAMA, CLIP.width,
                        chat='vicuna_v1'),
  'single_view/siglip': _model('single_view', SingleViewConfig(
    vision=SIGLIP, layer=-1, fit='crop'), QWEN2, SIGLIP.width, chat='vila_qwen2',
    after_image='\n'),
  'single_view/squash': _model('single_view', SingleViewConfig(
    vision=SIGLIP, layer=-1, fit='squash', last_tokens=11), PHI, SIGLIP.width),
  'anyres': _model('anyres', AnyResConfig(
    vision=CLIP, pinpoints=((47, 94), (94, 47), (94, 94), (141, 47)), width=72), LLAMA,
    chat='vicuna_v1'),
  'anyres/siglip': _model('anyres', AnyResConfig(
    vision=dataclasses.replace(SIGLIP, pool=None), layer=-3, width=72,
    pinpoints=((76, 38), (38, 76), (76, 76), (38, 114))), QWEN2, chat='vila_qwen2',
    after_image='\n'),
  'anyres/phi': _model('anyres', AnyResConfig(
    vision=SIGLIP, layer=-1, pinpoints=((38, 76), (76, 38)), width=72), PHI),
  'anyres/spatial': _model('anyres', AnyResConfig(
    vision=SIGLIP, layer=-1, pinpoints=((38, 76), (76, 38)), width=72, merge='spatial',
    projector='mlp_downsample'), PHI),
  'tiling': _model('tiling', TilingConfig(
    vision=SIGLIP, max_tiles=6, width=72, projector='mlp_downsample_3x3_s2'), QWEN2,
    chat='vila_qwen2'),
  's2': _model('s2', S2Config(vision=CLIP, sizes=(47, 94)), LLAMA, 2 * CLIP.width,
               chat='vicuna_v1'),
  's2/crop': _model('s2', S2Config(
    vision=SIGLIP, sizes=(38, 76, 114), output=-1, fit='crop', projector='mlp_downsample',
    width=72), PHI),
  's2_dynamic': _model('s2_dynamic', DynamicS2Config(
    vision=SIGLIP, scales=(38, 76), max_tiles=6, width=72), QWEN2, chat='vila_qwen2'),
}
MODELS |= {
  'reduced/pool': _reduced(reduced.Pool(factor=2)),
  'reduced/perceiver': _reduced(reduced.Perceiver(queries=5, depth=2, heads=3, head_dim=10,
                                                  activation='squared_relu'), 'mc_llava'),
  'reduced/single_layer': _reduced(reduced.SingleLayer(queries=9, width=48, heads=4), 's2'),
  'reduced/tome': _reduced(reduced.ToMe(keep=7), 'llava_hr'),
  'reduced/visionzip': _reduced(reduced.VisionZip(dominant=6, contextual=3)),
  # Any encoder with cross-attention.
  'mc_llava/cross_attention': dataclasses.replace(
    MODELS['mc_llava'], projector=None, image_token=None, chat='pheye',
    fusion=CrossAttentionFusion(width=SIGLIP.width, interval=2)),
}
# For which transformers has the class.
NATIVE = {'single_view': 'LlavaForConditionalGeneration',
          'single_view/siglip': 'LlavaForConditionalGeneration',
          'anyres': 'LlavaNextForConditionalGeneration',
          'anyres/siglip': 'LlavaNextForConditionalGeneration'}
FIRST = ('mc_llava', 'llava_hr', 'pheye', 'vila_hd')  # those of the first level
# One of every system, of the forms that run other code, and all kinds of fusion: for what depends
# on how a model is called and not on its settings.
SYSTEMS = [name for name in MODELS if '/' not in name] + [
  'anyres/phi', 'llava_hr/concat', 'llava_hr/low_to_high', 'pheye/3', 'vila_hd/no_context',
  'reduced/pool', 'reduced/perceiver', 'reduced/tome', 'mc_llava/cross_attention']
