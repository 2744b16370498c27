"""Runs in the peers' environment: `python ps3_peer.py FOLDER INPUTS.npz OUTPUTS.npz`.

Loads an exported folder with ps3-torch and writes what it computes. timm has no trunk as small as
the test's, so one is registered under the name that the test wrote into config.json.
"""

import functools
import json
import pathlib
import sys

import numpy as np
from ps3 import PS3TextModel, PS3VisionModel
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
import torch

FOLDER, INPUTS, OUTPUTS = map(pathlib.Path, sys.argv[1:])
TRUNK = json.loads((FOLDER / 'trunk.json').read_text())


def tiny_trunk_of_a_test(pretrained=False, **options):
  assert not pretrained
  for key in ('pretrained_cfg', 'pretrained_cfg_overlay', 'cache_dir'):
    options.pop(key, None)
  return VisionTransformer(
    **TRUNK, class_token=False, norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6),
    **options)


register_model(tiny_trunk_of_a_test)


def loaded(kind):
  model, info = kind.from_pretrained(FOLDER, output_loading_info=True)
  assert not info['missing_keys'] and not info['mismatched_keys'], info
  return model.eval()


@torch.no_grad()
def main():
  torch.manual_seed(0)
  inputs = {key: torch.tensor(value) for key, value in np.load(INPUTS).items()}
  text = loaded(PS3TextModel)(inputs['tokens'].long())
  out = {'pooled': text.pooled_output, 'prompt': text.prompt}
  vision = loaded(PS3VisionModel)
  runs = {'bottom_up': dict(num_look_close=1), 'two': dict(num_look_close=2, prompt=out['prompt']),
          'all': dict(num_look_close='all', prompt=out['prompt'])}
  for shape in ('square', 'wide'):
    for name, options in runs.items():
      found = vision(inputs[shape], **options)
      out[f'{shape}.{name}.last'] = found.last_hidden_state
      out[f'{shape}.{name}.penultimate'] = found.hidden_states[-2]
      for i, maps in enumerate(found.selection_maps):
        out[f'{shape}.{name}.map{i}'] = maps
  np.savez(OUTPUTS, **{key: value.float().numpy() for key, value in out.items()})


main()
