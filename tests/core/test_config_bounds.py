"""Every number of a config has bounds: what cannot be meant is refused where it is read."""

import dataclasses
import math
import typing

import pytest

from hrvlm_jax.core.config import from_dict, to_dict
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.systems.fusion import FUSIONS
from hrvlm_jax.training.config import RunConfig
from hrvlm_jax.training.evaluators import EVALUATORS
from hrvlm_jax.training.objectives import OBJECTIVES
from hrvlm_jax.vlm import model as vlm
from tests.configs import acting


def parts_of(hint):
  """The types that a hint is made of."""
  yield hint
  for inner in typing.get_args(hint):
    if typing.get_origin(hint) is not typing.Literal:
      yield from parts_of(inner)


def classes():
  """Every dataclass that a run's config may hold, by name."""
  found, todo = {}, [RunConfig, ModelConfig]
  todo += [registry.get(name).config for name in registry.names()]
  todo += [FUSIONS.get(name) for name in FUSIONS.names()]
  todo += [OBJECTIVES.get(name).Options for name in OBJECTIVES.names()]
  todo += [EVALUATORS.get(name).Options for name in EVALUATORS.names()]
  while todo:
    cls = todo.pop()
    if not dataclasses.is_dataclass(cls) or cls in found.values():
      continue
    found[f'{cls.__module__}.{cls.__qualname__}'] = cls
    try:
      hints = typing.get_type_hints(cls)
    except NameError:
      hints = {}
    todo += [part for hint in hints.values() for part in parts_of(hint) if isinstance(part, type)]
  return found


def numbers(cls):
  """Its fields that hold numbers."""
  hints = typing.get_type_hints(cls)
  return [field.name for field in dataclasses.fields(cls) if field.init
          and {int, float} & set(parts_of(hints[field.name]))]


@pytest.mark.parametrize('name', sorted(classes()))
def test_numbers_have_bounds(name):
  cls = classes()[name]
  free = set(numbers(cls)) - set(getattr(cls, 'BOUNDS', {}))
  assert not free, f'{name}: BOUNDS says nothing of {sorted(free)}'


@pytest.mark.parametrize('system', registry.names())
def test_a_number_that_cannot_be_meant_is_a_sentence(system):
  values, wrong = to_dict(registry.get(system).tiny()), []
  for path, value in acting.leaves(values):
    first = value[0] if isinstance(value, list) and value else value
    if isinstance(first, bool) or not isinstance(first, int | float):
      continue
    for bad in (0, -7) if isinstance(first, int) else (math.nan, math.inf):
      changed = acting.with_value(values, path, [bad, *value[1:]] if first is not value else bad)
      try:
        from_dict(ModelConfig, changed)
      except UserError:
        continue
      except Exception as error:  # noqa: BLE001 - what is looked for
        wrong.append(f'{path} = {bad}: {error!r}')
      if bad != 0:  # some counts may be none
        wrong.append(f'{path} = {bad}: accepted')
  assert not wrong


def test_tokens_of_another_width_are_refused():
  model = registry.get('mc_llava').tiny()
  other = dataclasses.replace(model, projector=dataclasses.replace(model.projector, n_in=97))
  with pytest.raises(UserError, match='model.projector.n_in is 97, but .* have width 96'):
    vlm.build(other)
  with pytest.raises(UserError, match='model.text.width is 128, but .* have width 96'):
    vlm.build(dataclasses.replace(model, projector=None))
