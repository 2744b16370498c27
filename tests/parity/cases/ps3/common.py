"""What the checks of PS3 share: the case's sizes, its runs, its selection boundaries."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hrvlm_jax.systems.ps3 import weights
from hrvlm_jax.systems.ps3.config import PoolConfig, PS3Config
from hrvlm_jax.systems.ps3.plan import Plan, make_plan
from hrvlm_jax.vision.vit import ViTConfig
from tests.parity.cases.runner import OPERATOR, WHOLE_MODEL, Case

_ACTIVATIONS = {'gelu_exact': 'gelu', 'gelu_tanh': 'gelu_tanh'}
_NOTES = {
  'config.json:seed': 'seed of the weights, which are stored',
  'config.json:topk': 'states the tie rule, which selection maps hold us to',
  'config.json:weights_prefix': 'the weight table names every tensor',
  'config.json:runs/*/torch_topk_gives_same_maps': "about torch's own tie order",
  'config.json:attn_pool/note': 'a remark',
  'config.json:final_norm_note': 'a remark',
}
GAP = 2e-5  # a distance of two probabilities, each within 1e-5


def waive_notes(case: Case) -> None:
  """Waives what no check can compare: remarks and seeds."""
  for pattern, reason in _NOTES.items():
    case.waive(pattern, reason)


def vision_config(case: Case, text=None) -> PS3Config:
  """The encoder's config from the case's sizes."""
  cfg, trunk = case.config, case.config['trunk']
  case.expect_json(('trunk', 'qkv_bias'), True)
  width, ratio = trunk['embed_dim'], trunk['mlp_ratio']
  patch, side = trunk['patch_size'], trunk['patch_grid']
  case.expect_json(('trunk', 'img_size'), trunk['img_size'])
  if trunk['img_size'] // patch != side:
    raise ValueError(f'trunk.patch_grid {side} is not img_size // patch_size')
  vision = ViTConfig(
    image_size=side * patch, patch_size=patch, width=width, depth=trunk['depth'],
    heads=trunk['num_heads'], mlp_width=int(width * ratio), norm_eps=trunk['ln_eps'],
    activation=_ACTIVATIONS[trunk['act']])
  pool = None
  if 'attn_pool' in cfg:
    spec = cfg['attn_pool']
    pool = PoolConfig(width=spec['dim'], heads=spec['num_heads'],
                      mlp_width=int(spec['dim'] * spec['mlp_ratio']))
  values = cfg['vision_config'].plain()
  base, defaults = weights.vision_from_hf(values, trunk=vision, pool=pool, text=text), (
    cfg['defaults'].plain() if 'defaults' in cfg else {})
  if values.get('radio') and values['radio_adapter_mlp_input_dim'] != width:
    raise ValueError("radio_adapter_mlp_input_dim is not the trunk's width")
  config = base
  if base.saliency is not None and 'highres_selection_input' in defaults:
    config = dataclasses.replace(config, saliency=dataclasses.replace(
      base.saliency, input_size=defaults['highres_selection_input']))
  for key, found in (('separate_pos_emb', config.residual),
                     ('highres_selection_feature', config.saliency is not None)):
    if key not in values and key in defaults and defaults[key] != found:
      raise ValueError(f'defaults.{key} is {defaults[key]}, ours is {found}')
  if 'cosine_scale' in defaults:
    config = dataclasses.replace(config, cosine_scale=defaults['cosine_scale'])
  if 'resolved_max_select_num_each_scale' in cfg:
    case.expect_json(('resolved_max_select_num_each_scale',), list(config.resolved_budgets))
  return config


def nhwc(x: np.ndarray) -> jax.Array:
  """[b c h w] -> [b h w c]."""
  return jnp.asarray(np.moveaxis(x, 1, -1))


def compiled(function):
  """`jax.jit`, with LLVM's optimisation on a CPU whatever the process was started with.

  It fuses multiplications with additions, as the original's libraries do: where a value hangs on
  the last bit of a long sum (`selection.in_order`), only that lands on the stored numbers.
  """
  options = {'xla_backend_optimization_level': '3'} if jax.default_backend() == 'cpu' else None
  return jax.jit(function, compiler_options=options)


def numbered(key: str, values) -> dict[str, Any]:
  """Values under the names key.0, key.1, ..."""
  return {f'{key}.{i}': value for i, value in enumerate(values)}


class Run:
  """One entry of `runs`: its inputs and its tensors under one prefix."""

  def __init__(self, case: Case, name: str):
    self.case, self.name = case, name
    self.spec = case.config['runs'][name]
    self.prefix = f'{name}.' if name else ''
    pixels = f'{self.prefix}pixel_values'
    self.images = nhwc(case.input(pixels if case.has(pixels) else 'pixel_values'))
    self.prompt = self._named('prompt')
    self.target = self._named('gt_selection_maps')

  def _named(self, key: str):
    return jnp.asarray(self.case.input(self.spec[key])) if key in self.spec else None

  def has(self, key: str) -> bool:
    """Whether the case holds this tensor of the run."""
    return self.case.has(self.prefix + key)

  def expect(self, key: str, value, **options) -> None:
    """Compares when the case has the tensor."""
    if self.has(key):
      self.case.expect(self.prefix + key, value, **options)

  def expect_all(self, values: dict[str, Any]) -> None:
    """Compares every value the case has a tensor for."""
    for key, value in values.items():
      exact = key.startswith(('resized', 'area_scale1', 'pool_mask_fraction'))
      self.expect(key, value, tol=OPERATOR if exact else WHOLE_MODEL)

  def json(self, key: str, value, **options) -> None:
    """Compares a leaf of the run's entry when it exists."""
    if key in self.spec:
      self.case.expect_json(('runs', self.name, key), value, **options)

  def plan(self, config: PS3Config) -> Plan:
    """The static counts of this run."""
    first = self.spec.get('only_select_first_n_scale')
    if first is not None and not isinstance(first, int):
      first = first.plain()
    looks = self.spec.get('num_look_close')
    tokens = self.spec.get('num_token_look_close')
    if looks is None and tokens is None:
      looks = 1  # pooled runs take one full look
    if 'select_each' in self.spec:  # max_select_num_each_scale, replaced at run time
      config = dataclasses.replace(config, budgets=tuple(self.spec['select_each'].plain()))
    return make_plan(*self.images.shape[1:3], config, num_looks=looks, num_tokens=tokens,
                     first_scales=first)


def boundaries(run: Run, probs, plan: Plan) -> None:
  """How clear the cuts are: at every cut that refuses a cell, the smallest nonzero distance of a
  taken or refused probability from the last one taken, and whether that one is tied."""
  gaps, tie = [], False
  batch = run.images.shape[0]
  for i, p in enumerate(probs):
    ranked = np.sort(np.asarray(p).reshape(batch, -1), axis=1)[:, ::-1]
    for b in range(batch):
      start = 0
      for look in plan.counts[b if len(plan.counts) > 1 else 0]:
        end = start + look[i]
        if start < end < ranked.shape[1]:
          last = ranked[b, end - 1]
          tie |= bool(last == ranked[b, end])
          distances = np.abs(ranked[b, start:] - last)
          gaps += [float(d) for d in distances[distances > 0]]
        start = end
  run.json('exact_tie_at_selection_boundary', tie)
  stated = run.spec.get('smallest_nonzero_probability_gap_at_boundary')
  run.json('smallest_nonzero_probability_gap_at_boundary', min(gaps, default=stated), tol=GAP)
