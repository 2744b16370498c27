"""Searches a mesh, recomputation and micro-batches for a step: compiles what could fit, in stages.

All combinations would take a day. First every mesh is compiled with the recomputation that needs
least memory, then the best two with the other policies, then the best with half and twice the
micro-batches. What cannot be cut or cannot fit by arithmetic alone is never compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import dataclasses
from typing import Any

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.execution import REMAT
from hrvlm_jax.parallel.topology import GIB, Topology
from hrvlm_jax.planning import plan as planner, report as reports
from hrvlm_jax.planning.arithmetic import Least

Mesh = Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Candidate:
  """One combination. `training`: values of the config's training that it replaces."""

  mesh: Mesh
  training: tuple[tuple[str, Any], ...] = ()

  @property
  def values(self) -> dict[str, Any]:
    """What it replaces, by name."""
    return dict(self.training)

  def __str__(self) -> str:
    words = {'remat': 'remat={}', 'batch_size': 'batch={}', 'accumulate': 'in {} part(s)'}
    found = [words[name].format(value) for name, value in self.training]
    return ' '.join([reports.axes_text(self.mesh), *found])


def mesh_candidates(topology: Topology, *, largest_tensor: int = 4,
                    smallest_fsdp: int = 4) -> list[dict[str, int]]:
  """Meshes worth trying: tensor 1, 2, 4; fsdp the rest, halved step by step in favour of data."""
  devices = topology.devices // topology.slices
  found = []
  tensor = 1
  while tensor <= largest_tensor and devices % tensor == 0:
    fsdp = devices // tensor
    while fsdp >= min(smallest_fsdp, devices // tensor):
      found.append({'data': devices // tensor // fsdp, 'fsdp': fsdp, 'tensor': tensor,
                    'dcn_data': topology.slices})
      if fsdp % 2:
        break
      fsdp //= 2
    tensor *= 2
  return found


class Search:
  """One search and what it found so far.

  Attributes:
    reports: of every candidate that was looked at; one that cannot run, or need not, has the key
      `error`.
  """

  def __init__(self, target: str, options: Mapping[str, Any], topology: Topology, *,
               say: Callable[[str], None], **how: Any):
    """`how`: further arguments of `plan.plan`."""
    self._target, self._options, self._topology = target, dict(options), topology
    self._say, self._how = say, how
    self._least: Least | None = None
    self.reports: dict[Candidate, dict[str, Any]] = {}

  def best(self, meshes: list[Mesh], *, batches: tuple[int, ...] = (),
           trains: bool = True) -> dict[str, Any] | None:
    """The report with the most examples per second of what fits; None: nothing does."""
    if not trains:
      self._try(Candidate(mesh) for mesh in meshes)
      return next(iter(self._fitting()), (None, None))[1]
    training = self._options['config']['training']
    self._least = Least(self._options, self._topology)
    for batch in batches or (training['batch_size'],):
      self._try(self._candidate(mesh, 'layers', batch, training['accumulate']) for mesh in meshes)
    self._try(Candidate(found.mesh, tuple((found.values | {'remat': name}).items()))
              for found, _ in self._fitting()[:2] for name in ('none', *REMAT))
    for found, _ in self._fitting()[:1]:
      batch, parts = found.values['batch_size'], found.values['accumulate']
      self._try(Candidate(found.mesh, tuple((found.values | {'accumulate': count}).items()))
                for count in (parts * 2, parts // 2) if count and batch % count == 0)
    return next(iter(self._fitting()), (None, None))[1]

  def _fitting(self) -> list[tuple[Candidate, dict[str, Any]]]:
    good = [(c, r) for c, r in self.reports.items() if 'step' in r and r['memory']['fits']]
    return sorted(good, key=lambda pair: -pair[1]['examples_per_second'])

  @staticmethod
  def _candidate(mesh: Mesh, remat: str, batch: int, most: int) -> Candidate:
    """With the largest number of micro-batches, at most `most`, that the mesh can cut."""
    count = next((n for n in range(most, 0, -1)
                  if batch % n == 0 and batch // n % shards(mesh) == 0), most)
    return Candidate(_hashable(mesh), (('remat', remat), ('batch_size', batch),
                                       ('accumulate', count)))

  def _try(self, candidates: Iterator[Candidate]) -> None:
    """Plans those that are new and not hopeless; a line for each."""
    for candidate in candidates:
      candidate = dataclasses.replace(candidate, mesh=_hashable(candidate.mesh))
      if candidate in self.reports:
        continue
      options = self._options
      if candidate.training:
        config = options['config']
        options = options | {'config': config | {
          'training': config['training'] | candidate.values}}
      why = self._hopeless(candidate, options)
      try:
        found = {'error': why} if why else planner.plan(
          self._target, options, self._topology.name, mesh=dict(candidate.mesh),
          slices=self._topology.slices, **self._how)
      except UserError as error:
        found = {'error': str(error)}
      self.reports[candidate] = found | {'mesh': dict(candidate.mesh),
                                         'training': candidate.values}
      self._say(f'{len(self.reports)} {candidate}: {reports.verdict(found)}')

  def _hopeless(self, candidate: Candidate, options: Mapping[str, Any]) -> str | None:
    """Why a candidate need not be compiled."""
    if not candidate.training:
      return None
    values = candidate.values
    rows = values['batch_size'] // values['accumulate']
    # A free axis (-1) is left to the compilation, which knows the devices.
    if min(candidate.mesh.values()) > 0:
      if rows % shards(candidate.mesh):
        return f'{rows} rows cannot be cut over {shards(candidate.mesh)} shards (data x fsdp)'
      try:
        least, capacity = self._least.bytes(options, candidate.mesh), self._usable
      except UserError as error:
        return str(error)
      if least > capacity:
        return (f'cannot fit: at least {least / GIB:.1f} of {capacity / GIB:.1f} GiB for state, '
                'gradients and what layers keep')
    return self._kept_more(candidate)

  @property
  def _usable(self) -> int:
    return self._topology.chip.usable_bytes

  def _kept_more(self, candidate: Candidate) -> str | None:
    """What does not fit with all recomputed does not fit with less recomputed either."""
    least = Candidate(candidate.mesh, tuple((candidate.values | {'remat': 'layers'}).items()))
    tried = self.reports.get(least)
    if tried is None or least == candidate or 'error' in tried or tried['memory']['fits']:
      return None
    return 'does not fit with remat=layers either'


class _hashable(dict):
  """A mesh that can be part of a key."""

  def __hash__(self):
    return hash(tuple(sorted(self.items())))


def shards(mesh: Mesh) -> int:
  """Over how many parts a mesh cuts a micro-batch."""
  return mesh.get('data', 1) * mesh.get('fsdp', 1) * mesh.get('dcn_data', 1)
