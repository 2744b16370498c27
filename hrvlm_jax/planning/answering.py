"""On which smallest slice a model answers: by arithmetic, for every release.

    python -m hrvlm_jax.planning.answering        docs/answering.md

Parameters are counted exactly, by the rules they are laid by (`vlm.where`); the cache, the prompt
and one layer at work are estimated. `hrvlm plan --step decode` compiles the step itself.
"""

from __future__ import annotations

from collections.abc import Iterator
import pathlib
import sys

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.parallel import fitting
from hrvlm_jax.parallel.fitting import Choice
from hrvlm_jax.parallel.topology import Topology, parse
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.vlm import laid, where

# Slices that can be asked for, smallest first.
SLICES = {
  'v5e': ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16'),
  'v5p': ('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4'),
  'v6e': ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16'),
}


def answers_on(config: ModelConfig, topology: Topology, *, rows: int = 1, new_tokens: int = 128,
               beams: int = 1, dtype: str = 'bfloat16', mesh=None) -> Choice:
  """The smallest mesh of a topology on which a model answers, or what a named one needs.

  Args:
    mesh: a `MeshConfig`; None: the smallest that fits.

  Raises:
    UserError: no mesh of the topology can cut the model.
  """
  choice = where.chosen(
    config, laid.held(config, dtype), topology.devices,
    int(topology.chip.hbm_bytes * fitting.USABLE), slices=topology.slices, mesh=mesh, rows=rows,
    new_tokens=new_tokens, beams=beams, dtype=dtype)
  if choice is None:
    raise UserError(f'no mesh of {topology.name} can cut {config.system}')
  return choice


def smallest_slice(config: ModelConfig, chip: str, **options) -> tuple[Topology, Choice] | None:
  """The smallest slice of a kind of chip on which a model answers; None where none does."""
  for shape in SLICES[chip]:
    topology = parse(f'{chip}:{shape}')
    choice = answers_on(config, topology, **options)
    if choice.fits:
      return topology, choice
  return None


def describe(config: ModelConfig, topologies: tuple[str, ...] = (), *, slices: int = 1, mesh=None,
             **options) -> tuple[list[str], bool]:
  """Lines for people, and whether it fits: on the topologies (so many equal slices of each), or on
  the smallest slices."""
  lines = ['BY ARITHMETIC, nothing was compiled: parameters are exact, the rest is estimated']
  fits = True
  for text in topologies:
    topology = parse(text, slices=slices)
    choice = answers_on(config, topology, mesh=mesh, **options)
    lines.append(f'{topology.name}: mesh {fitting.axes_of(choice.mesh)}, {choice.verdict}: '
                 f'{choice.words}')
    fits &= choice.need.total <= choice.limit
  for chip in () if topologies else SLICES:
    found = smallest_slice(config, chip, **options)
    if found is None:
      lines.append(f'{chip}: on no slice of up to {SLICES[chip][-1]} chips')
      continue
    topology, choice = found
    lines.append(f'{chip}: {topology.name} ({topology.chips} chips), mesh '
                 f'{fitting.axes_of(choice.mesh)}: {choice.words}')
  return lines, fits


def releases() -> Iterator[tuple[str, ModelConfig]]:
  """Every released model that answers questions, by name."""
  for system in sorted(registry.names()):
    for name, config in registry.get(system).released.items():
      if config.text is not None:
        yield name, config


def page() -> str:
  """docs/answering.md."""
  rows = []
  for name, config in releases():
    cells = []
    for chip in SLICES:
      found = smallest_slice(config, chip)
      cells.append('none' if found is None else
                   f'{found[0].name.partition(":")[2]} ({fitting.axes_of(found[1].mesh)}; '
                   f'{fitting.size(found[1].need.total)})')
    rows.append(f'| {name} | {config.system} | {" | ".join(cells)} |')
  table = '\n'.join(rows)
  return f"""# Where the releases answer

Written by `python -m hrvlm_jax.planning.answering`; do not edit. The smallest slice on which a
release answers one question about one image (bfloat16, 128 new tokens), the mesh, and what a device
then holds. BY ARITHMETIC: parameters are exact; cache, prompt and one layer at work are estimated,
and a quarter of a device stays free. `hrvlm plan --release NAME --step answer` prints the same for
a release, with `--config RECIPE` for any recipe; `--step prefill` or `decode` with `--topology`
compiles the step itself. `hrvlm ask --mesh` and `hrvlm eval --mesh` take the mesh.

| release | system | {" | ".join(SLICES)} |
| --- | --- | {" | ".join("---" for _ in SLICES)} |
{table}
"""


if __name__ == '__main__':
  (pathlib.Path(__file__).parents[2] / 'docs' / 'answering.md').write_text(page())
  sys.exit(0)
