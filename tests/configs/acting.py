"""What a key of a config changes: the batch, the program of a training step, that of an answer.

`Observed` looks at a run config without computing anything: two batches as they are made on the
host, and the programs as they are traced. `leaves` lists the keys of a run's plain values,
`changed` gives candidates for another value of each.
"""

from collections.abc import Iterator, Mapping
import copy
import dataclasses
import functools
import hashlib
import itertools
import pathlib
import re
import typing
from typing import Any, Literal

import jax
import numpy as np
from PIL import Image

from hrvlm_jax.core import paths
from hrvlm_jax.core.config import field_types
from hrvlm_jax.core.module import Functional
from hrvlm_jax.lab.needle import NeedleConfig
from hrvlm_jax.lab.needle.regions import write_regions
from hrvlm_jax.parallel.mesh import single_device_mesh
from hrvlm_jax.planning.programs import serve_program
from hrvlm_jax.systems import registry
from hrvlm_jax.training.batches import make_batches
from hrvlm_jax.training.config import RunConfig
from hrvlm_jax.training.program import assemble
from hrvlm_jax.vlm import model as vlm

Values = dict[str, Any]
LENGTH, IMAGE = 384, (160, 120)  # places of a row, width and height of its picture


def leaves(values: Any, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
  """(path, value) of every key that holds no further keys; lists of mappings are entered."""
  if isinstance(values, Mapping) and values:
    for key, value in values.items():
      yield from leaves(value, (*path, key))
  elif isinstance(values, list | tuple) and values and all(isinstance(v, Mapping) for v in values):
    for number, value in enumerate(values):
      yield from leaves(value, (*path, number))
  else:
    yield path, values


def with_value(values: Values, path: tuple, value: Any) -> Values:
  """A copy with one other value."""
  values = copy.deepcopy(values)
  at = values
  for key in path[:-1]:
    at = at[key]
  at[path[-1]] = value
  return values


def words_of(config: Any, path: tuple) -> tuple[str, ...]:
  """The words that a key may say, where its type lists them."""
  hint = None
  for key in path:
    if dataclasses.is_dataclass(config):
      named = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
      hint, config = field_types(type(config), named)[key], named[key]
    else:
      hint, config = None, config[key]
  parts = [hint, *typing.get_args(hint)]
  return tuple(itertools.chain.from_iterable(
    typing.get_args(part) for part in parts if typing.get_origin(part) is Literal))


@dataclasses.dataclass(frozen=True)
class Change:
  """Another value of a key that needs further ones.

  Attributes:
    value: of the key.
    setup: values by path ('*' stands for the key's own config), or functions of the folder of data
      that give them, which make room for it; set on both sides of the comparison.
    joint: values that must change with it.
  """

  value: Any
  setup: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  joint: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def applied(values: Values, path: tuple, other: Any, data: pathlib.Path) -> tuple[Values, Values]:
  """The plain values to compare: without and with the other value.

  A width is the width of several parts: those of its own value change with it.
  """
  if callable(other):
    other = other(data)
  if not isinstance(other, Change):
    widths = _widths(values, path) if path[-1] in WIDTHS else {}
    other = Change(other, joint=dict.fromkeys(widths, other))
  own = '.'.join(map(str, path[:-1]))
  place = lambda name: _keys(name.replace('*', own))
  before = values
  for name, value in other.setup.items():
    before = with_value(before, place(name), value(data) if callable(value) else value)
  after = with_value(before, path, other.value)
  for name, value in other.joint.items():
    after = with_value(after, place(name), value)
  return before, after


WIDTHS = ('width', 'n_in', 'n_out', 'out', 'prompt_width')


def _widths(values: Values, path: tuple) -> list[str]:
  """The other widths of the model that have the value of this one."""
  value = dict(leaves(values))[path]
  return ['.'.join(map(str, other)) for other, found in leaves(values['model'], ('model',))
          if other != path and other[-1] in WIDTHS and found == value]


def _keys(name: str) -> tuple:
  return tuple(int(key) if key.isdigit() else key for key in name.split('.'))


def other_rows(data: pathlib.Path) -> str:
  """Another file of rows."""
  return str(data / 'other.json')


def other_images(data: pathlib.Path) -> str:
  """A folder of other pictures of the same names."""
  return str(data / 'others')


def tokenizer(data: pathlib.Path) -> str:
  """A folder with a tokenizer."""
  return str(data / 'words')


def regions(data: pathlib.Path) -> Values:
  """Settings of data for PS3's pre-training."""
  folder = data / 'regions'
  if not folder.exists():
    write_regions(NeedleConfig.square(), folder, 8, seed=0, progress=False)
  return {'train': str(folder), 'images': None}


def changed(value: Any, words: tuple[str, ...]) -> list[Any]:
  """Other values of a key that need no further change: numbers near by, other words."""
  if words:
    return [word for word in words if word != value]
  if isinstance(value, bool):
    return [not value]
  if isinstance(value, int):
    return [2 * value, value + 1, value - 1, value // 2]
  if isinstance(value, float):
    return [0.5 * value, 1.5 * value, 0.25] if value else [0.25, 0.5]
  if isinstance(value, list | tuple) and value and all(
      isinstance(v, int | float) and not isinstance(v, bool) for v in value):
    return [[*value[:-1], changed(value[-1], ())[n]] for n in range(2)]
  return []


def digest(*parts: bytes) -> str:
  """A name of some content."""
  found = hashlib.sha256()
  for part in parts:
    found.update(part)
  return found.hexdigest()


class Observed:
  """The observable sides of a run config, each found when it is asked for."""

  SIDES = ('batch', 'start', 'step', 'answer')

  def __init__(self, run: RunConfig):
    self.run = run

  @functools.cache  # noqa: B019 - few of them, and short-lived
  def batch(self) -> str:
    """The first three batches, and what was counted on the way."""
    batches = make_batches(self.run)
    parts = []
    for _ in range(3):
      for name, leaf in sorted(paths.flatten(next(batches)).items()):
        leaf = np.ascontiguousarray(leaf)
        parts += [name.encode(), str((leaf.shape, leaf.dtype)).encode(), leaf.tobytes()]
    return digest(repr(sorted(batches.counts.items())).encode(), *parts)

  @functools.cache  # noqa: B019
  def start(self) -> str:
    """The traced initialisation of the parameters."""
    return traced(vlm.build(self.run.model).init, jax.random.key(0))

  @functools.cache  # noqa: B019
  def step(self) -> str:
    """The traced step of training, with its constants and the shapes of its state."""
    program = assemble(self.run, single_device_mesh())
    shapes = program.batch(length=LENGTH, image=IMAGE).arrays
    return traced(program.step, program.state, shapes)

  @functools.cache  # noqa: B019
  def answer(self) -> str:
    """The traced prefill and a step of decoding; without a language model, the encoder."""
    model = self.run.model
    if model.text is None:
      system = registry.get(model.system)
      fn = Functional(lambda rngs: system.encoder(model.encoder, rngs=rngs))
      views = system.views([Image.new('RGB', IMAGE)], model.encoder)
      return traced(lambda params, batch: fn.bind(params)(batch), fn.abstract,
                    system.batch([views], model.encoder))
    programs = [serve_program(single_device_mesh(), config=self.run, what=what, length=LENGTH,
                              image=IMAGE, new_tokens=4) for what in ('prefill', 'decode')]
    return digest(*(traced(p.fn, *p.args).encode() for p in programs))


def traced(fn: Any, *arguments: Any) -> str:
  """A name of a traced program: its text without addresses, and the bits of its constants."""
  closed = jax.make_jaxpr(fn)(*arguments)
  text = re.sub(r'0x[0-9a-f]+', '0x', str(closed.jaxpr))
  bits = [np.asarray(leaf).tobytes() for leaf in closed.consts
          if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
  return digest(text.encode(), *bits)
