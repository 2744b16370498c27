"""What the PyTorch sides share: weights, forms of running, outputs."""

from __future__ import annotations

from collections.abc import Callable
import json
import pathlib
from typing import Any

import numpy as np
from safetensors.torch import load_file
import torch

from benchmarks.harness.case import Options
from benchmarks.harness.program import Program


def tensors(folder: str | pathlib.Path) -> dict[str, torch.Tensor]:
  """All tensors of a folder by name."""
  folder = pathlib.Path(folder)
  index = folder / 'model.safetensors.index.json'
  if not index.exists():
    return load_file(folder / 'model.safetensors')
  found = {}
  for name in sorted(set(json.loads(index.read_text())['weight_map'].values())):
    found |= load_file(folder / name)
  return found


def sizes(folder: str | pathlib.Path) -> dict[str, Any]:
  """The sizes our side wrote (its config dataclass as JSON)."""
  return json.loads((pathlib.Path(folder) / 'config.json').read_text())


def fill(module: torch.nn.Module, state: dict[str, torch.Tensor], *, prefix: str = '',
         unused: tuple[str, ...] = ()) -> None:
  """Takes the tensors whose names begin with `prefix` out of `state` into `module`.

  Raises:
    ValueError: parameters of the module without a tensor, except those that begin with `unused`.
  """
  own = {name.removeprefix(prefix): state.pop(name)
         for name in list(state) if name.startswith(prefix)}
  missing, unexpected = module.load_state_dict(own, strict=False, assign=True)
  known = {name for name, _ in module.named_parameters()}
  problems = [f'missing {n}' for n in missing if n in known and not n.startswith(unused)]
  problems += [f'unexpected {n}' for n in unexpected]
  if problems:
    raise ValueError(f'{type(module).__name__}: {", ".join(problems[:20])}')


def place(module: torch.nn.Module, options: Options) -> torch.nn.Module:
  """On the device, in the dtype, for inference; in the form `onednn` with its linear layers."""
  module = module.to(options.device, getattr(torch, options.dtype)).eval().requires_grad_(False)
  return by_onednn(module) if options.variant.split('-')[0] == 'onednn' else module


class Packed(torch.nn.Module):
  """A linear layer whose product oneDNN computes, from a weight packed once.

  In float32 PyTorch multiplies through MKL; oneDNN takes the CPU's best kernels whoever made it.
  """

  def __init__(self, linear: torch.nn.Linear):
    super().__init__()
    # Others read its dtype and shape; one number stands for all, so that none is held twice.
    self.weight = torch.nn.Parameter(
      linear.weight.new_zeros(1).expand(linear.weight.shape), requires_grad=False)
    self.bias = linear.bias
    self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, 'none', [], '')


def by_onednn(module: torch.nn.Module) -> torch.nn.Module:
  """Puts `Packed` in the place of every linear layer, in place."""
  for parent in list(module.modules()):
    for name, child in list(parent.named_children()):
      # A subclass may be read by others as a weight (multi-head attention's own projection).
      if type(child) is torch.nn.Linear:
        setattr(parent, name, Packed(child))
  return module


def to_tensor(array: np.ndarray, options: Options, *, order=None) -> torch.Tensor:
  """A float array on the device, axes permuted (NHWC -> NCHW: (0, 3, 1, 2))."""
  x = torch.from_numpy(array)
  if order is not None:
    x = x.permute(order).contiguous()
  return x.to(options.device, getattr(torch, options.dtype))


def in_form(call: Callable, options: Options) -> Callable:
  """`call` as the variant says: eager; compiled; compiled with the search for the best kernels."""
  form = options.variant.split('-')[0]
  if form in ('eager', 'onednn'):
    return call
  import torch._inductor.config as inductor

  inductor.freezing = options.device == 'cpu'  # weights become constants of the program
  return torch.compile(call, mode=compile_mode(form), dynamic=False)


def compile_mode(form: str) -> str | None:
  """torch.compile's mode in a form."""
  return 'max-autotune' if form == 'autotune' else None


def program(call: Callable, *arguments, options: Options, grad: bool = False) -> Program:
  """The usual program; `call(*arguments)` returns named tensors."""
  call = in_form(call, options)

  def run():
    with torch.set_grad_enabled(grad):
      result = call(*arguments)
    if options.device == 'cuda':
      torch.cuda.synchronize()
    return result

  return Program(run, lambda result: {
    name: x.detach().float().cpu().numpy() for name, x in result.items()})
