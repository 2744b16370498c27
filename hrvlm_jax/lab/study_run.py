"""What `hrvlm compare` does with a study: work, list, merge, search, report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import os
import pathlib

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.lab import rates, study_kept, study_page, verdicts
from hrvlm_jax.lab.compare_config import CompareConfig
from hrvlm_jax.lab.experiment import say
from hrvlm_jax.lab.report import insert, text_table
from hrvlm_jax.lab.study import Part, Study


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
  """What a call names.

  Attributes:
    spec: the config's file. folder: of the study.
    only, tasks, seeds: work on these; empty for all.
    share: 'N/M', the Nth of M machines; None for everything.
  """

  spec: str
  folder: pathlib.Path
  only: Sequence[str] = ()
  tasks: Sequence[str] = ()
  seeds: Sequence[str] = ()
  share: str | None = None
  progress: bool = True


class StudyRun:
  """A study and the place of its kept results.

  Raises:
    UserError: seeds that are no numbers.
  """

  def __init__(self, configs: Mapping[str, CompareConfig], asked: Asked):
    self.configs, self.asked = configs, asked
    self.study = Study(configs, asked.folder, progress=asked.progress)
    self.place = rates.place_of(asked.spec)
    if wrong := [seed for seed in asked.seeds if not seed.isdigit()]:
      raise UserError(f'--seed: found {wrong[0]!r}, expected numbers with commas between')

  @functools.cached_property
  def parts(self) -> list[Part]:
    """What was asked for.

    Raises:
      UserError: names that the study has not.
    """
    asked = self.asked
    parts = self.study.parts(asked.only, asked.tasks, [int(seed) for seed in asked.seeds])
    return parts if asked.share is None else dealt(parts, asked.share)

  def work(self) -> dict[str, str]:
    """Does what is open; returns the parts that failed, with the reason."""
    return self.study.run(self.parts)

  def merge(self, folders: Sequence[str | os.PathLike]) -> None:
    """Takes over what other folders have done."""
    study_kept.merge(self.study, folders, self.parts)

  def search(self) -> int:
    """The search for learning rates; the exit status."""
    study = rates.study_of(self.configs, self.asked.folder, tasks=self.asked.tasks or ('needle',),
                           only=self.asked.only, progress=self.asked.progress)
    parts = study.parts(self.asked.only)
    rates.borrow(study, self.asked.folder, parts)
    failed = study.run(parts)
    say(f'kept: {rates.keep(study, self.place)}')
    for title, reason in failed.items():
      say(f'FAILED {title}: {reason}')
    return 1 if failed else 0

  def report(self, *, keep: bool, document: str | None) -> None:
    """What the folder has, with claims.md and pictures, in its kept/; with `keep` beside the config
    too; the page, which is made from what is beside the config."""
    own, place = study_kept.of_study(self.study), self.asked.folder / 'kept'
    study_kept.keep(own, place)
    (place / 'claims.md').write_text(study_page.markdown(
      self.configs, own, '.', rates.read(self.place)))
    study_page.pictures(self.configs, own, place)
    if keep:
      for path in study_kept.keep(own, self.place):
        say(f'kept: {path}')
    if document is not None:
      page, kept = pathlib.Path(document), study_kept.read(self.place)
      study_page.pictures(self.configs, kept, self.place)
      insert(document_text(self.configs, self.place, page), page, name='study')
    say(f'claims.md, pictures and results are in {place}')

  def against(self, results: str | os.PathLike) -> tuple[str, bool]:
    """(table of all claims of two machines, whether they agree).

    Ours are this folder's, or what is kept beside the config where the folder has none.
    """
    claims = study_page.claims_of(self.configs)
    own = study_kept.of_study(self.study)
    ran = lambda kept: {name: verdict for name, verdict in study_page.judged(claims, kept).items()
                        if verdict is not None}
    ours, theirs = ran(own or study_kept.read(self.place)), ran(study_kept.read(results))
    found = verdicts.compare(ours, theirs)
    rows = [[name, *(f'{v.difference.value:.4f} ± {v.difference.error:.4f} ({v.verdict})'
                     for v in (ours[name], theirs[name])), f'{gap:.2f}']
            for name, gap in found['apart'].items()]
    lines = [text_table(['claim', 'here', 'there', 'apart'], rows).rstrip(),
             f'{found["near"]} of {found["rows"]} rows are within 2 joint standard errors (nine of '
             f'ten wanted), the farthest {max(found["apart"].values(), default=0):.2f} (3 at most)'
             f': {"the machines agree" if found["agree"] else "they do NOT agree"}.']
    if found['missing']:
      lines.append(f'Only one of them has {", ".join(found["missing"])}.')
    return '\n'.join(lines), found['agree']

  def listed(self) -> str:
    """The table of all parts, their state and the seconds that they may take."""
    kept = study_kept.read(self.place) if self.place.is_dir() else {}
    rows, left = [], 0.0
    for part in self.parts:
      state, seconds = self.study.state(part), self.expected(part, kept)
      if state != 'done':
        left += seconds or 0.0
      rows.append([part.title, state, '?' if seconds is None else f'{seconds:.0f}'])
    done = sum(row[1] == 'done' for row in rows)
    return (text_table(['part', 'state', 'seconds'], rows)
            + f'{done} of {len(rows)} parts are done; about {left / 3600:.1f} hours of one process '
            'are left (of parts whose time is known).')

  def expected(self, part: Part, kept: Mapping) -> float | None:
    """Seconds of a part: what it took here, else elsewhere on its task, else on another."""
    here = [self.study.owner(part).read('times.json', {})]
    elsewhere = [one.read('times.json', {}) for one in self.study.comparisons()]
    same = [one['seconds'] for (task, _), one in kept.items() if task == part.task]
    others = [one['seconds'] for one in kept.values()]
    for tables in (here, same, elsewhere, others):
      known = [sum(table[step] for step in part.steps) for table in tables
               if set(part.steps) <= table.keys()]
      if known:
        return sum(known) / len(known)
    return None


def document_text(configs: Mapping[str, CompareConfig], place: pathlib.Path, page: pathlib.Path
                  ) -> str:
  """The generated part of the page, from what is kept beside the config."""
  link = os.path.relpath(place.resolve(), page.resolve().parent)
  return study_page.markdown(configs, study_kept.read(place) if place.is_dir() else {}, link,
                             rates.read(place))


def dealt(parts: Sequence[Part], share: str) -> list[Part]:
  """The parts of the Nth of M machines: whole (task, seed) pairs, so that what is compared was made
  on one machine, the largest first to whoever has the fewest parts.

  Raises:
    UserError: no such share.
  """
  number, _, count = share.partition('/')
  if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
    raise UserError(f'--parts: found {share!r}, expected N/M with N from 1 to M, such as 1/2')
  sizes: dict[str, int] = {}
  for part in parts:
    sizes[part.folder] = sizes.get(part.folder, 0) + 1
  loads, machines = [0] * int(count), {}
  for folder in sorted(sizes, key=lambda name: (-sizes[name], name)):
    machine = loads.index(min(loads))
    loads[machine] += sizes[folder]
    machines[folder] = machine
  return [part for part in parts if machines[part.folder] == int(number) - 1]
