"""The model code of `hrvlm export --for transformers` as a side: PyTorch, eager, sdpa.

Weights and inputs are those of the same case of ours, written once more under the names of an
export. The process that is measured reads them as a user's does: PyTorch and transformers, no JAX.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
import json
import pathlib
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.harness.case import Options
from benchmarks.harness.program import Program, read_inputs

EXPORT = 'export'  # folder of the tensors under an export's names


class Exported(abc.ABC):
  """What these sides share.

  Attributes:
    side: the class of `ours.vision` whose weights and inputs these are.
    tower: path of the vision transformer among the parameters, '' for all of them.
  """

  side = ''
  tower = ''

  def __init__(self, settings: Mapping[str, Any], folder: pathlib.Path, options: Options):
    self.settings, self.folder, self.options = settings, pathlib.Path(folder), options

  @abc.abstractmethod
  def vit(self, config: Any) -> Any:
    """The vision transformer of a configuration of ours."""

  @abc.abstractmethod
  def module(self, c: Any, config: Any) -> Any:
    """The module of interop/torch.

    Args:
      c: the case's settings with attributes.
      config: what a config of transformers says of the vision transformer.
    """

  def call(self, module: Any, pixels: Any) -> dict[str, Any]:
    """Named outputs of pixels [n 3 h w]."""
    return {'tokens': module(pixels)}

  def prepare(self) -> dict[str, int]:
    """Writes the folder of our side, and the export's beside it; this process has JAX."""
    from benchmarks.ours import vision
    from hrvlm_jax.checkpoint import hf
    from hrvlm_jax.checkpoint.rows import export_tensors, import_tensors
    from hrvlm_jax.core.config import to_dict
    from hrvlm_jax.interop import folder

    ours = getattr(vision, self.side)(self.settings, self.folder, self.options)
    found, (fn, table), config = ours.prepare(), ours.model(), ours.config()
    params = import_tensors(hf.TensorFolder(self.folder), table, fn.abstract, what='benchmark')
    vit, target = self.vit(config), self.folder / EXPORT
    target.mkdir(exist_ok=True)
    hf.write_weights(target, export_tensors(
      params, folder.part_table(fn.abstract, {self.tower: vit})))
    (target / 'config.json').write_text(json.dumps(
      {'model': to_dict(config), 'vision_config': folder.vit_config(vit)}))
    return found

  def load(self) -> Program:
    """Reads the export, and builds the program."""
    import torch
    from transformers import SiglipVisionConfig

    from benchmarks.peers.common import tensors
    from hrvlm_jax.interop.torch.configuration_hrvlm import settings

    values = json.loads((self.folder / EXPORT / 'config.json').read_text())
    config = SiglipVisionConfig(**values['vision_config'])
    config._attn_implementation = 'sdpa'
    module = self.module(settings(values['model']), SimpleNamespace(
      vision_config=config, _attn_implementation='sdpa'))
    missing, unexpected = module.load_state_dict(tensors(self.folder / EXPORT), strict=False,
                                                 assign=True)
    if missing or unexpected:
      raise ValueError(f'missing {missing[:9]}, unexpected {unexpected[:9]}')
    kind = getattr(torch, self.options.dtype)
    module = module.to(self.options.device, kind).eval().requires_grad_(False)
    pixels = read_inputs(self.folder)['images'].transpose(0, 3, 1, 2)
    pixels = torch.from_numpy(np.ascontiguousarray(pixels)).to(self.options.device, kind)

    def run():
      with torch.no_grad():
        out = self.call(module, pixels)
      if self.options.device == 'cuda':
        torch.cuda.synchronize()
      return out

    return Program(run, lambda out: {name: x.float().cpu().numpy() for name, x in out.items()},
                   after=lambda: {'jax_loaded': 'jax' in sys.modules})


class PS3(Exported):
  """See `ours.vision.PS3`."""

  side, tower = 'PS3', 'tower'

  def vit(self, config):
    return config.vision

  def module(self, c, config):
    from hrvlm_jax.interop.torch.ps3 import PS3

    return PS3(c, config)

  def call(self, module, pixels):
    out = module.encode(pixels, looks=self.settings['looks'])
    return {'tokens': out.hidden[module.c.vision.depth - 1],
            **{f'map{number}': one for number, one in enumerate(out.maps)}}


class Siglip(Exported):
  """See `ours.vision.Siglip`."""

  side = 'Siglip'

  def vit(self, config):
    return config

  def module(self, c, config):
    from hrvlm_jax.interop.torch.towers import Tower

    return Tower(c, config.vision_config)


class Pheye(Exported):
  """See `ours.vision.Pheye`; the sets merged, as `merge_adapters` does."""

  side = 'Pheye'

  def vit(self, config):
    return config.tower

  def module(self, c, config):
    from hrvlm_jax.interop.torch.vision_pheye import PheyeVision

    return PheyeVision(c, config).tower

  def call(self, module, pixels):
    if getattr(self, 'merged', None) is None:
      from hrvlm_jax.interop.torch.vision_pheye import LowRank

      self.merged = [one.merge() for one in module.modules() if isinstance(one, LowRank)]
    return {'tokens': module(pixels)}


class LlavaHR(Exported):
  """See `ours.vision.LlavaHR`."""

  side, tower = 'LlavaHR', 'fast'

  def vit(self, config):
    return config.fast

  def module(self, c, config):
    from hrvlm_jax.interop.torch.vision_llava_hr import LlavaHrVision

    return LlavaHrVision(c, config)
