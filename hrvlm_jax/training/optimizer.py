"""Parameter groups, the optimizer (AdamW or Muon over the trained leaves only), its schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from hrvlm_jax.core import paths
from hrvlm_jax.core.errors import UserError, nearest, raise_all
from hrvlm_jax.training.config import Group, TrainingConfig

SCHEDULES = ('cosine', 'linear', 'constant')


def groups_of(config: TrainingConfig, abstract: Mapping[str, Any]) -> dict[str, Group]:
  """The group of every parameter path.

  Raises:
    UserError: paths without a group (all listed), no trained parameter at all, or a pattern that
      names no parameter (it is misspelt, and what it should freeze would train).
  """
  flat = paths.flatten(abstract)
  rules = [(group.pattern, group) for group in config.groups]
  found = paths.match_rules(rules, flat, what='training group')
  raise_all('training.groups', unused_groups(config.groups, flat))
  raise_all('training.init_allow', unused_patterns(config.init_allow, flat))
  if all(group.frozen for group in found.values()):
    raise UserError('training.groups freezes every parameter; leave at least one group trained')
  return found


def unused_groups(groups: Sequence[Group], names: Iterable[str]) -> list[str]:
  """A sentence per group that has no parameter, though it asks for something.

  The rule for all that is left ('.*' at the end) may have none, and so may a rule that begins with
  '.*/' and freezes nothing: it says what biases and scales get, where there are any.
  """
  names, taken, problems = list(names), set(), []
  for number, group in enumerate(groups):
    hits = {name for name in names if re.fullmatch(group.pattern, name)}
    own, general = hits - taken, group.pattern.startswith('.*/') and not group.frozen
    last = group.pattern == '.*' and number == len(groups) - 1
    if not hits and not last and not general:
      problems += unused_patterns([group.pattern], names)
    elif not own and group.frozen and not last:
      problems.append(f'{group.pattern!r} freezes nothing: groups before it name all its '
                      f'{len(hits)} parameters, and the first match counts; move it up')
    taken |= hits
  return problems


def unused_patterns(patterns: Iterable[str], names: Iterable[str]) -> list[str]:
  """A sentence per pattern that matches none of the names."""
  names = list(names)
  return [f'{pattern!r} matches no parameter (nearest: {nearest(pattern, names)}; hrvlm params '
          'lists them)' for pattern in patterns
          if not any(re.fullmatch(pattern, name) for name in names)]


def split(flat: Mapping[str, Any], groups: Mapping[str, Group]) -> tuple[dict, dict]:
  """(trained, frozen) leaves of a flat parameter dict."""
  trained = {path: leaf for path, leaf in flat.items() if not groups[path].frozen}
  return trained, {path: leaf for path, leaf in flat.items() if groups[path].frozen}


def schedule(config: TrainingConfig):
  """The run's learning rate as a function of the optimizer step."""
  o = config.optimizer
  warm = int(o.warmup) if o.warmup >= 1 else warmup_steps(config.steps, o.warmup)
  return learning_rate(o.schedule, peak=o.learning_rate, total_steps=config.steps,
                       warmup_steps=min(warm, config.steps), warmup_from=o.warmup_from)


def optimizer(config: TrainingConfig, groups: Mapping[str, Group]) -> optax.GradientTransformation:
  """The optimizer over the flat dict of trained leaves.

  Order: clip the global norm, moments (float32), decoupled decay where the group decays, the
  schedule, the group's factor.
  """
  o = config.optimizer
  trained = {path: group for path, group in groups.items() if not group.frozen}
  factors = {path: group.learning_rate for path, group in trained.items()}
  parts = []
  if o.clip_norm is not None:
    parts.append(optax.clip_by_global_norm(o.clip_norm))
  decayed = {path: group.decay for path, group in trained.items()}
  if o.name == 'muon':
    parts.append(muon(schedule(config), o.weight_decay, b1=o.b1, b2=o.b2, eps=o.eps,
                      mask=decayed))
  else:
    # float32; float64 where JAX may use it, so that nothing there is ever cast down.
    parts.append(optax.scale_by_adam(b1=o.b1, b2=o.b2, eps=o.eps,
                                     mu_dtype=jnp.result_type(float)))
    if o.weight_decay:
      parts.append(optax.add_decayed_weights(o.weight_decay, mask=decayed))
    parts.append(optax.scale_by_learning_rate(schedule(config)))
  if any(factor != 1 for factor in factors.values()):
    parts.append(optax.stateless(
      lambda updates, _: {path: updates[path] * factors[path] for path in updates}))
  return optax.chain(*parts)


def muon(rate, weight_decay: float, *, b2: float, b1: float = 0.9, eps: float = 1e-8, mask=None
         ) -> optax.GradientTransformation:
  """Muon for the stacked kernels of transformer blocks, AdamW for all other leaves.

  Works on a flat dict of leaves. `consistent_rms` 0.2 gives both kinds updates of like size, so
  that one learning rate serves them.
  """
  matrix = contrib.MuonDimensionNumbers(-2, -1)

  def kinds(params):
    # In its update optax hands over placeholders, without dimensions, for leaves of the other kind.
    is_matrix = lambda path, leaf: (
      re.fullmatch(r'(.*/)?blocks/.*/kernel', path) and getattr(leaf, 'ndim', None) == 3)
    return {path: matrix if is_matrix(path, leaf) else None for path, leaf in params.items()}

  return contrib.muon(
    rate, adam_learning_rate=rate, weight_decay=weight_decay, adam_weight_decay=weight_decay,
    weight_decay_mask=mask, adam_b1=b1, adam_b2=b2, eps=eps, consistent_rms=0.2,
    muon_weight_dimension_numbers=kinds)


def frozen_summary(groups: Mapping[str, Group], abstract: Mapping[str, Any]) -> str:
  """One line: how many parameters train and how many are frozen."""
  flat = paths.flatten(abstract)
  size = lambda leaf: math.prod(leaf.shape)
  trained = sum(size(flat[p]) for p, g in groups.items() if not g.frozen)
  total = sum(map(size, flat.values()))
  return f'{trained:,} of {total:,} parameters are trained'


def describe(group: Group) -> str:
  """A group in a word, for tables."""
  if group.frozen:
    return 'frozen'
  return f'x{group.learning_rate:g}' + ('' if group.decay else ', no decay')


def learning_rate(
  kind: str, *, peak: float, total_steps: int, warmup_steps: int = 0, warmup_from: int = 0
) -> Callable[[jax.Array | int], jax.Array]:
  """Linear warm-up, then cosine or linear decay to 0 at `total_steps`, or constant.

  Args:
    warmup_from: 0: step k of the warm-up has peak * k / warmup (Hugging Face); 1: peak * (k + 1) /
      warmup (open_clip, PS3).

  Raises:
    ValueError: unknown kind, or a warm-up longer than the run.
  """
  if kind not in SCHEDULES:
    raise ValueError(f'schedule must be one of {SCHEDULES}, got {kind!r}')
  if not 0 <= warmup_steps <= total_steps:
    raise ValueError(f'warmup_steps must lie in 0..{total_steps}, got {warmup_steps}')

  def rate(step):
    step = jnp.asarray(step, jnp.float32)
    rising = peak * (step + warmup_from) / max(warmup_steps, 1)
    progress = jnp.clip((step - warmup_steps) / max(total_steps - warmup_steps, 1), 0, 1)
    if kind == 'cosine':
      falling = peak * 0.5 * (1 + jnp.cos(math.pi * progress))
    elif kind == 'linear':
      falling = peak * (1 - progress)
    else:
      falling = jnp.full_like(step, peak)
    return jnp.where(step < warmup_steps, rising, falling)

  return rate


def warmup_steps(total_steps: int, ratio: float) -> int:
  """ceil(ratio * total), as Hugging Face's trainer rounds."""
  return math.ceil(ratio * total_steps)
