"""Language model and vision towers of a checkpoint beside the classes of transformers.

The classes get the original's tensors under the names that transformers gives them; only names are
paired with the help of our tables, values never pass through them. Needs the torch extra, imported
where it is used so that this module can always be imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hrvlm_jax.checkpoint.leaves import StoredParams
from hrvlm_jax.checkpoint.rows import Table, entries
from hrvlm_jax.core import paths
from hrvlm_jax.core.module import Functional
from hrvlm_jax.interop import adapters
from hrvlm_jax.interop.convert import Release
from hrvlm_jax.language import weights as language_weights
from hrvlm_jax.language.config import config_to_hf
from hrvlm_jax.language.decoder import Decoder
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.vision import weights as vision_weights
from hrvlm_jax.vision.vit import ViT, ViTConfig
from hrvlm_jax.vlm import model as vlm
from tests.parity.cases.runner import WHOLE_MODEL

Outputs = dict[str, dict[str, Any]]
_TOKENS = (2, 12)


def compare(config: ModelConfig, folder: Any, release: Release, skipped: list[str]
            ) -> Iterator[tuple[str, str, Outputs]]:
  """(part, class, outputs) of every part that transformers has; one part in memory at a time.

  Args:
    folder: the checkpoint.
    release: the original it is compared with.
    skipped: gets a sentence per part without a class.
  """
  stored = StoredParams(folder)
  names = _names(config, release)
  if config.text is not None:
    yield _language(config, stored, release, names)
  for path, tower in registry.get(config.system).backbones(config.encoder).items():
    if isinstance(tower, ViTConfig) and tower.position == 'resample' and (
        tower.class_token or tower.pool):
      yield _tower(path, tower, stored, release, names)
    else:
      skipped.append(f'{path}: transformers has no class for it')
  rest = sorted({path.split('/')[0] for path in stored.flat} - {'language', 'vision'})
  skipped += [f'{name}: transformers has no class for it' for name in rest]


def _names(config: ModelConfig, release: Release) -> dict[tuple[str, int | None], str]:
  """Name in the release of every leaf (by its first path) and layer."""
  table = registry.get(config.system).table(adapters.without_sets(config) if (
    _loose(config)) else config)
  abstract = vlm.build(config).abstract
  if _loose(config):
    abstract = paths.unflatten({p: leaf for p, leaf in paths.flatten(abstract).items()
                                if not adapters.is_adapter(p)})
  return {(entry.row.our_paths[0], entry.layer): next(
    (name for name in entry.names if name in release.tensors), entry.names[0])
    for entry in entries(table, abstract)}


def _loose(config: ModelConfig) -> bool:
  return any(not spec.name for group in adapters.lora_sets(config).values() for spec in group)


def _state(release: Release, names: Mapping[tuple[str, int | None], str], table: Table,
           abstract: Any, ours: str) -> dict[str, Any]:
  """A state dict of transformers from the release: names paired by path, values untouched."""
  import torch

  found = {}
  for entry in entries(table, abstract):
    key = (f'{ours}{entry.row.our_paths[0]}', entry.layer)
    value = np.array(release.tensors[names[key]]).astype(np.float32)
    found[entry.names[0]] = torch.from_numpy(value.reshape(entry.shape))
  return found


def _bound(fn: Functional, stored: StoredParams, prefix: str) -> Any:
  flat = {path: jnp.asarray(np.asarray(stored(prefix + path), leaf.dtype))
          for path, leaf in paths.flatten(fn.abstract).items()}
  return fn.bind(paths.unflatten(flat))


def _language(config: ModelConfig, stored: StoredParams, release: Release,
              names: Mapping[tuple[str, int | None], str]) -> tuple[str, str, Outputs]:
  import torch
  import transformers

  values = config_to_hf(config.text)
  kind = getattr(transformers, values['architectures'][0])
  reference = kind(kind.config_class(**values)).eval().float()
  plain = adapters.without_sets(config).text
  abstract = Functional(lambda rngs: Decoder(plain, rngs=rngs)).abstract
  state = _state(release, names, language_weights.table(plain), abstract, 'language/')
  for spec in config.text.lora:
    _add_adapter(state, release, spec.scale)
  _load(reference, state)
  ids = np.random.default_rng(0).integers(0, config.text.vocab_size, _TOKENS)
  with torch.no_grad():
    expected = reference(torch.tensor(ids), use_cache=False).logits.numpy()
  module = _bound(Functional(lambda rngs: Decoder(config.text, rngs=rngs)), stored, 'language/')
  run = jax.jit(lambda ids: module.logits(module(module.embed(ids), jnp.ones(ids.shape, bool))))
  return 'language', f'transformers.{kind.__name__}', {
    'logits': _difference(run(jnp.asarray(ids)), expected)}


def _add_adapter(state: dict[str, Any], release: Release, scale: float) -> None:
  """weight + scale * B @ A of every module of an adapter folder, in PyTorch."""
  import torch

  prefix = f'{adapters.FOLDER}/base_model.model.'
  for name in release.tensors:
    if not name.startswith(prefix) or '.lora_A.' not in name:
      continue
    down = torch.from_numpy(np.array(release.tensors[name]).astype(np.float32))
    up = np.array(release.tensors[name.replace('.lora_A.', '.lora_B.')]).astype(np.float32)
    module = name.removeprefix(prefix).partition('.lora_A.')[0]
    target = next(key for key in state if key.endswith('.weight') and module.endswith(
      key.removesuffix('.weight')))
    state[target] = state[target] + scale * (torch.from_numpy(up) @ down)


def _tower(path: str, tower: ViTConfig, stored: StoredParams, release: Release,
           names: Mapping[tuple[str, int | None], str]) -> tuple[str, str, Outputs]:
  import torch
  import transformers

  clip = tower.class_token
  kind = transformers.CLIPVisionModel if clip else transformers.SiglipVisionModel
  reference = kind(kind.config_class(
    image_size=tower.image_size, patch_size=tower.patch_size, hidden_size=tower.width,
    num_hidden_layers=tower.depth, num_attention_heads=tower.heads,
    intermediate_size=tower.mlp_width, num_channels=tower.channels,
    hidden_act={'gelu_tanh': 'gelu_pytorch_tanh'}.get(tower.activation, tower.activation),
    layer_norm_eps=tower.norm_eps)).eval().float()
  fn = Functional(lambda rngs: ViT(tower, rngs=rngs))
  table = (vision_weights.clip if clip else vision_weights.siglip)(tower)
  state = _state(release, names, table, fn.abstract, f'{path}/')
  nested = any(name.startswith('vision_model.') for name in reference.state_dict())
  _load(reference, {f'vision_model.{name}' if nested else name: x for name, x in state.items()})
  pixels = np.random.default_rng(1).standard_normal(
    (1, tower.image_size, tower.image_size, tower.channels), np.float32)
  with torch.no_grad():
    out = reference(torch.tensor(pixels.transpose(0, 3, 1, 2)))
  module = _bound(fn, stored, f'{path}/')
  x = jax.jit(lambda pixels: module(pixels))(jnp.asarray(pixels))
  outputs = {}
  if clip:
    outputs['last_hidden_state'] = _difference(x, out.last_hidden_state.numpy())
  else:
    normed = module.post_norm(x)
    outputs['last_hidden_state'] = _difference(normed, out.last_hidden_state.numpy())
    outputs['pooler_output'] = _difference(module.pool(normed), out.pooler_output.numpy())
  return path, f'transformers.{kind.__name__}', outputs


def _load(reference: Any, state: Mapping[str, Any]) -> None:
  """Loads all parameters; buffers keep their values, a tied output layer follows by itself."""
  missing, unexpected = reference.load_state_dict(state, strict=False)
  own = {name for name, _ in reference.named_parameters()}
  lost = sorted((set(missing) & own) | set(unexpected))
  if lost:
    raise ValueError(f'{type(reference).__name__}: no tensor for {lost[:4]}')


def _difference(found: Any, expected: np.ndarray) -> dict[str, Any]:
  difference = float(np.max(np.abs(np.asarray(found, np.float64) - expected)))
  limit = WHOLE_MODEL * max(1.0, float(np.max(np.abs(expected))))
  return {'difference': difference, 'limit': limit,
          'status': 'ok' if difference <= limit else 'different'}
