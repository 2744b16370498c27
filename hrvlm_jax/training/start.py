"""How a run gets its first parameters: random, from a checkpoint, or from the stage before it.

What changes between the two stages is said aloud: parameters that are new, left behind, resampled
or trained for the first time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import json
import math
import os
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hrvlm_jax.checkpoint import store
from hrvlm_jax.core import json_text, paths, resample
from hrvlm_jax.core.config import from_dict, to_dict
from hrvlm_jax.core.errors import UserError, raise_all, shortened
from hrvlm_jax.parallel.layout import Layout
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.training.config import Group
from hrvlm_jax.training.program import TrainProgram

Log = Callable[[str], None]


def stored_params(source: Any) -> dict[str, jax.ShapeDtypeStruct]:
  """Shape and dtype of every parameter of a checkpoint, by path."""
  return {path.removeprefix('params/'): leaf for path, leaf in store.describe(source).items()
          if not path.startswith('state/')}


def initial_params(program: TrainProgram, layout: Layout, log: Log) -> Any:
  """Random parameters, or those of `training.init_from` with the differences said aloud.

  They are made in their places: nothing is ever whole on one device.

  Raises:
    UserError: parameters missing there that `init_allow` does not name, or of another shape.
  """
  config, groups = program.config, program.groups
  wanted, places = program.state['params'], program.shardings['params']
  model, where = paths.flatten(wanted), paths.flatten(places)

  def init(names):  # what is not among them is not computed
    def made(key):
      flat = paths.flatten(program.fn.init(key))
      return {path: flat[path].astype(model[path].dtype) for path in names}

    return layout.make(made, {path: where[path] for path in names}, jax.random.key(config.seed))

  source = config.training.init_from
  if source is None:
    return paths.unflatten(init(model))
  stored = stored_params(source)
  tables = resampled_tables(stored, model)
  fresh = _check(config, source, stored, model, tables)
  _announce(source, stored, model, fresh, tables, log)
  _announce_trained(source, groups, log)
  params = init(fresh) if fresh else {}
  for path, value in store.load_leaves(source, [path for path in model if path in stored]):
    if path in tables:
      _, side, extra = tables[path]
      value = np.asarray(resample.position_table(
        jnp.asarray(value, jnp.float32), (side, side), extra=extra))
    params[path] = layout.put(np.asarray(value, model[path].dtype), where[path])
  return paths.unflatten({path: params[path] for path in model})


def resampled_tables(stored: Mapping[str, Any], wanted: Mapping[str, Any]
                     ) -> dict[str, tuple[int, int, int]]:
  """Position tables of another resolution: path -> (side there, side here, rows before the grid).

  A table is a leaf named `pos_embed` [rows width] whose rows are a square grid, with or without
  one row for the class token.
  """
  found = {}
  for path, leaf in wanted.items():
    there = stored.get(path)
    if (there is None or not path.endswith('pos_embed') or there.shape == leaf.shape
        or len(leaf.shape) != 2 or there.shape[1:] != leaf.shape[1:]):
      continue
    for extra in (0, 1):
      sides = [math.isqrt(rows - extra) for rows in (there.shape[0], leaf.shape[0])]
      if [side**2 + extra for side in sides] == [there.shape[0], leaf.shape[0]]:
        found[path] = (sides[0], sides[1], extra)
        break
  return found


def _check(config, source, stored, model, tables) -> list[str]:
  """Parameters that start fresh."""
  allowed = lambda path: any(re.fullmatch(p, path) for p in config.training.init_allow)
  fresh = sorted(p for p in model if p not in stored)
  problems = [f'{p}: missing there (training.init_allow names what may start fresh)'
              for p in fresh if not allowed(p)]
  problems += [f'{p}: {tuple(stored[p].shape)} there, {tuple(model[p].shape)} in the model'
               for p in model if p in stored and p not in tables
               and tuple(stored[p].shape) != tuple(model[p].shape)]
  raise_all(f'training.init_from={source}', problems)
  return fresh


def _announce(source, stored, model, fresh, tables, log: Log) -> None:
  if fresh:
    log(f'{len(fresh)} parameters start fresh: {shortened(fresh)}')
  unused = sorted(p for p in stored if p not in model)
  if unused:
    log(f'{len(unused)} parameters of {source} are not used: {shortened(unused)}')
  for path, (before, now, _) in tables.items():
    log(f'position table {path} is resampled from {before} x {before} to {now} x {now}')


def _announce_trained(source, groups: Mapping[str, Group], log: Log) -> None:
  """What the stage before kept frozen and this one trains, and the other way round."""
  before = store.load_config(source).get('training')
  if not isinstance(before, Mapping) or not before.get('groups'):
    return
  rules = [from_dict(Group, group) for group in before['groups']]
  frozen_before = {path: next((rule.frozen for rule in rules if re.fullmatch(rule.pattern, path)),
                              True) for path in groups}
  freed = sorted(p for p, g in groups.items() if frozen_before[p] and not g.frozen)
  stopped = sorted(p for p, g in groups.items() if g.frozen and not frozen_before[p])
  if freed:
    log(f'{len(freed)} parameters that were frozen in {source} are trained now: '
        f'{shortened(freed)}')
  if stopped:
    log(f'{len(stopped)} parameters that were trained in {source} are frozen now: '
        f'{shortened(stopped)}')


def _filled(model: Any) -> Any:
  """The model of a stored config with the settings that came later, at their defaults."""
  try:
    return json.loads(json.dumps(to_dict(from_dict(ModelConfig, model))))
  except UserError:
    return model


def check_same_model(workdir: pathlib.Path, resolved: Mapping[str, Any], *,
                     checkpoints: str | os.PathLike | None = None) -> None:
  """Refuses to go on with another model in the same work directory.

  Raises:
    UserError: the first setting that differs.
  """
  path = workdir / 'config.json'
  if not path.exists() or not store.steps(workdir if checkpoints is None else checkpoints):
    return
  try:
    before = json_text.loads(path.read_text())
  except ValueError as error:
    raise UserError(f'{path}: is no JSON ({error}); it says which model the checkpoints beside it '
                    'are of: copy it from run/config.json of one of them') from error
  there = _filled(before.get('model', {}))
  if there != resolved['model']:
    old, new = (paths.flatten(x) for x in (there, resolved['model']))
    changed = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
    raise UserError(f'{workdir}: holds a run of another model (model.{changed[0]} was '
                    f'{old.get(changed[0])!r}, is {new.get(changed[0])!r}); choose another '
                    '--workdir')
  _check_same_optimizer(workdir, before.get('training'), resolved.get('training'))


def _check_same_optimizer(workdir: pathlib.Path, before: Any, now: Any) -> None:
  """Refuses settings under which the optimizer keeps other things than the checkpoints hold.

  Raises:
    UserError: all of them.
  """
  old, new = _kept_by_optimizer(before), _kept_by_optimizer(now)
  problems = [f'training.{key} was {old[key][1]!r}, is {new[key][1]!r}'
              for key in new if key in old and old[key][0] != new[key][0]]
  if problems:
    hint = ' (clip_norm=1e9 clips nothing)' if 'clip_norm' in ' '.join(problems) else ''
    raise UserError(f'{workdir}: {"; ".join(problems)}: the optimizer would keep other things than '
                    f'its checkpoints hold. Go on with what it was{hint}, or begin anew from these '
                    f'weights: training.init_from={workdir} with another --workdir')


def _kept_by_optimizer(training: Any) -> dict[str, tuple[Any, Any]]:
  """Setting -> (what of it decides the shape of the optimizer's state, its value)."""
  if not isinstance(training, Mapping) or not isinstance(training.get('optimizer'), Mapping):
    return {}
  o, groups = training['optimizer'], training.get('groups') or ()
  found = {key: o.get(key) for key in ('name', 'clip_norm', 'weight_decay', 'ema')}
  given = {'name': found['name'], 'clip_norm': found['clip_norm'] is None,
           'ema': found['ema'] is None}
  if found['name'] != 'muon':
    given['weight_decay'] = not found['weight_decay']
  scaled = [group.get('learning_rate', 1) for group in groups
            if isinstance(group, Mapping) and not group.get('frozen')]
  return {f'optimizer.{key}': (value, found[key]) for key, value in given.items()} | {
    'groups learning_rate': (any(rate != 1 for rate in scaled), scaled)}
