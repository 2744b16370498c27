"""The model code of `hrvlm export --for transformers` as a side: PyTorch, eager, sdpa.

Weights and inputs are those of the same case of ours; the tensors get the names of an export.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.harness.program import Program, read_inputs
from benchmarks.ours import vision
from hrvlm_jax.checkpoint import hf
from hrvlm_jax.checkpoint.rows import export_tensors, import_tensors
from hrvlm_jax.core.config import to_dict
from hrvlm_jax.interop import folder
from hrvlm_jax.vision.vit import ViTConfig


class Exported:
  """What these sides share; stands in front of one of `ours.vision`."""

  def towers(self) -> dict[str, ViTConfig]:
    """Vision transformers by path (see `folder.part_table`)."""
    raise NotImplementedError

  def module(self, c: Any, config: Any) -> Any:
    """The module of interop/torch.

    Args:
      c: the case's settings with attributes.
      config: what a config of transformers says of the vision transformer.
    """
    raise NotImplementedError

  def call(self, module: Any, pixels: Any) -> dict[str, Any]:
    """Named outputs of pixels [n 3 h w]."""
    return {'tokens': module(pixels)}

  def load(self) -> Program:
    """Reads the weights through both tables, and builds the program."""
    import torch
    from transformers import SiglipVisionConfig

    from hrvlm_jax.interop.torch.configuration_hrvlm import settings

    fn, table = self.model()
    params = import_tensors(hf.TensorFolder(self.folder), table, fn.abstract, what='benchmark')
    tower = next(iter(self.towers().values()))
    config = SiglipVisionConfig(**folder.vit_config(tower))
    config._attn_implementation = 'sdpa'
    module = self.module(settings(to_dict(self.config())), SimpleNamespace(
      vision_config=config, _attn_implementation='sdpa'))
    state = {name: torch.from_numpy(np.array(x)) for name, x in export_tensors(
      params, folder.part_table(fn.abstract, self.towers()))}
    del params
    missing, unexpected = module.load_state_dict(state, strict=False, assign=True)
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

    return Program(run, lambda out: {name: x.float().cpu().numpy() for name, x in out.items()})


class PS3(Exported, vision.PS3):
  """See `ours.vision.PS3`."""

  def towers(self):
    return {'tower': self.config().vision}

  def module(self, c, config):
    from hrvlm_jax.interop.torch.ps3 import PS3

    return PS3(c, config)

  def call(self, module, pixels):
    out = module.encode(pixels, looks=self.settings['looks'])
    return {'tokens': out.hidden[module.c.vision.depth - 1],
            **{f'map{number}': one for number, one in enumerate(out.maps)}}


class Siglip(Exported, vision.Siglip):
  """See `ours.vision.Siglip`."""

  def towers(self):
    return {'': self.config()}

  def module(self, c, config):
    from hrvlm_jax.interop.torch.towers import Tower

    return Tower(c, config.vision_config)


class Pheye(Exported, vision.Pheye):
  """See `ours.vision.Pheye`; the sets merged, as `merge_adapters` does."""

  def towers(self):
    return {'': self.config().tower}

  def module(self, c, config):
    from hrvlm_jax.interop.torch.vision_pheye import PheyeVision

    return PheyeVision(c, config).tower

  def call(self, module, pixels):
    if getattr(self, 'merged', None) is None:
      from hrvlm_jax.interop.torch.vision_pheye import LowRank

      self.merged = [one.merge() for one in module.modules() if isinstance(one, LowRank)]
    return {'tokens': module(pixels)}


class LlavaHR(Exported, vision.LlavaHR):
  """See `ours.vision.LlavaHR`."""

  def towers(self):
    return {'fast': self.config().fast}

  def module(self, c, config):
    from hrvlm_jax.interop.torch.vision_llava_hr import LlavaHrVision

    return LlavaHrVision(c, config)
