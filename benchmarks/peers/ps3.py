"""ps3-torch, the published package."""

from __future__ import annotations

from typing import Any

from benchmarks.harness.case import Options
from benchmarks.harness.program import Program, read_inputs
from benchmarks.peers.common import fill, place, program, sizes, tensors, to_tensor

TRUNK = 'hrvlm_trunk'


def register_trunk(vision: dict[str, Any]) -> None:
  """Makes a SigLIP trunk of these sizes known to timm under `TRUNK`."""
  from timm.models import register_model
  from timm.models.vision_transformer import VisionTransformer

  def hrvlm_trunk(pretrained=False, **options):
    for name in ('pretrained_cfg', 'pretrained_cfg_overlay', 'cache_dir', 'features_only'):
      options.pop(name, None)
    return VisionTransformer(**(dict(
      patch_size=vision['patch_size'], embed_dim=vision['width'], depth=vision['depth'],
      num_heads=vision['heads'], class_token=False, global_pool='map', num_classes=0,
      mlp_ratio=(vision['mlp_width'] + 0.5) / vision['width']) | options))

  register_model(hrvlm_trunk)


def vision_model(ours: dict[str, Any]):
  """`PS3VisionModel` of our config's sizes."""
  from ps3 import PS3VisionConfig, PS3VisionModel

  vision = ours['vision']
  register_trunk(vision)
  return PS3VisionModel(PS3VisionConfig(
    model_name=TRUNK, hidden_size=vision['width'], pool='map', pretrained=False,
    img_size=vision['image_size'], ps3_scales=ours['scales'],
    select_based_on_layer=ours['select_layers'], max_select_num=sum(ours['budgets']),
    max_select_num_each_scale=ours['budgets'],
    highres_selection_module_hidden_dim=ours['saliency']['width'],
    highres_selection_module_out_dim=ours['saliency']['out'],
    highres_selection_module_depth=ours['saliency']['depth'],
    highres_selection_module_kernel_size=ours['saliency']['kernel']))


def encode(settings, folder, options: Options) -> Program:
  """One image, `looks` looks; settings as `ours.vision.PS3`."""
  model = vision_model(sizes(folder))
  fill(model.vision_model, tensors(folder))
  model = place(model, options)
  pixels = to_tensor(read_inputs(folder)['images'], options, order=(0, 3, 1, 2))
  looks = settings['looks']

  def call(pixels):
    out = model(pixels, num_look_close=looks)
    maps = out.selection_maps or ()
    return {'tokens': out.last_hidden_state, **{f'map{i}': m for i, m in enumerate(maps)}}

  return program(call, pixels, options=options)
