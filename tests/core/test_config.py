"""Strict configs: one round trip, and every kind of mistake named with its key path."""

import dataclasses
import enum
from typing import Any, Literal

import ml_collections
import pytest

from hrvlm_jax.core import config, errors


class Order(enum.Enum):
  ROW = 'row'
  SCORE = 'score'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefix:
  tokens: int
  kind: Literal['prefix'] = 'prefix'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cross:
  every: int = 4
  kind: Literal['cross'] = 'cross'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
  scale: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine:
  scale: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Near:
  kind: str = 'near'
  size: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Far:
  kind: str = 'far'
  size: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
  place: Near | Far


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
  name: str
  fusion: Prefix | Cross
  schedule: Linear | Cosine = Linear()
  extra: Cross | None = None
  sizes: tuple[int, ...] = (1, 2)
  mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
  parts: tuple[Prefix, ...] = ()
  table: dict[str, Linear] = dataclasses.field(default_factory=dict)
  order: Order = Order.ROW
  limit: int | float | None = None
  flag: bool = False
  anything: Any = None

  def __post_init__(self):
    if self.flag and not self.sizes:
      raise ValueError('Model: flag needs sizes')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dynamic:
  system: str
  encoder: Any

  @classmethod
  def field_types(cls, values):
    table = {'linear': Linear, 'cross': Cross}
    if values.get('system') not in table:
      raise errors.UserError(errors.unknown(str(values.get('system')), table, what='system'))
    return {'encoder': table[values['system']]}


FULL = Model(
    name='m', fusion=Cross(every=2), schedule=Cosine(scale=2.0), extra=Cross(), sizes=(3, 4, 5),
    parts=(Prefix(tokens=1),), table={'a': Linear(scale=3.0)}, order=Order.SCORE, limit=2,
    flag=True)


def test_round_trip_of_every_kind_of_field():
  plain = config.to_dict(FULL)
  assert plain['schedule'] == {'type': 'Cosine', 'scale': 2.0}
  assert plain['sizes'] == [3, 4, 5] and plain['order'] == 'score'
  assert config.from_dict(Model, plain) == FULL
  assert config.from_dict(Model, ml_collections.ConfigDict(plain)) == FULL
  small = {'name': 'm', 'fusion': {'tokens': 3}}  # the class follows from the keys
  assert config.from_dict(Model, small).fusion == Prefix(tokens=3)
  assert isinstance(config.from_dict(Model, {**small, 'limit': 3}).limit, int)
  assert config.from_dict(Linear, {'scale': 2}) == Linear(scale=2.0)


def test_field_types_depend_on_values():
  made = config.from_dict(Dynamic, {'system': 'linear', 'encoder': {'scale': 2.0}})
  assert made.encoder == Linear(scale=2.0)
  assert config.from_dict(Dynamic, config.to_dict(made)) == made
  with pytest.raises(errors.UserError, match=r'unknown system crosss \(nearest known: cross\)'):
    config.from_dict(Dynamic, {'system': 'crosss', 'encoder': {}})


def test_union_told_apart_by_default_strings():
  assert config.from_dict(Place, {'place': {'kind': 'far'}}).place == Far()
  assert config.to_dict(Place(place=Far())) == {'place': {'kind': 'far', 'size': 1}}
  with pytest.raises(errors.UserError, match="place.kind: found 'fat' .str., expected one of"):
    config.from_dict(Place, {'place': {'kind': 'fat'}})


def test_all_problems_in_one_message():
  values = {
      'fusion': {'kind': 'cross', 'evry': 1, 'every': '2'},
      'parts': [{'tokens': True}],
      'mean': [1, 2],
      'table': {'a': {'scal': 1}},
      'order': 'rows',
      'limit': 'x',
      'flagg': True,
  }
  with pytest.raises(errors.UserError) as caught:
    config.from_dict(Model, values, path='config.model', title='run.py')
  assert str(caught.value).splitlines() == [
      'run.py: 9 problems',
      '  unknown key config.model.flagg (nearest known: flag)',
      '  missing key config.model.name',
      '  unknown key config.model.fusion.evry (nearest known: every)',
      "  config.model.fusion.every: found '2' (str), expected an integer",
      '  config.model.mean: found [1, 2] (list), expected a list of 3 values',
      '  config.model.parts[0].tokens: found True (bool), expected an integer',
      '  unknown key config.model.table.a.scal (nearest known: scale)',
      "  config.model.order: found 'rows' (str), expected one of 'row', 'score'",
      "  config.model.limit: found 'x' (str), expected an integer or a number or none",
  ]


@pytest.mark.parametrize('values, message', [
    ({'name': 'm', 'fusion': {'kind': 'prefx'}},
     "fusion.kind: found 'prefx' (str), expected one of 'prefix', 'cross'"),
    ({'name': 'm', 'fusion': {'tokens': 1}, 'schedule': {'scale': 1.0}},
     'fit 2 of the classes Linear, Cosine; set schedule.type to one of them'),
    ({'name': 'm', 'fusion': {'tokens': 1}, 'flag': True, 'sizes': []},
     'Model: flag needs sizes'),
    ({'name': 'm', 'fusion': 3}, 'fusion: found 3 (int), expected Prefix or Cross'),
    (7, 'found 7 (int), expected a mapping with the fields of Model'),
])
def test_single_problem(values, message):
  with pytest.raises(errors.UserError) as caught:
    config.from_dict(Model, values)
  assert message in str(caught.value)
  assert '\n' not in str(caught.value)


def test_nearest_always_names_one():
  assert errors.nearest('stepz', ['seed', 'steps']) == 'steps'
  assert errors.nearest('zzz', ['a', 'b']) in ('a', 'b')
  assert errors.nearest('x', []) is None
