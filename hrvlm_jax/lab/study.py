"""A study: claims of papers on several tasks with several seeds, one comparison for each.

The folder of a study has one of `lab.compare` per (task, seed), `needle-0/`, and its work is cut
into parts that end within minutes: the data, the encoder and the language model that all systems of
a (task, seed) share, what a system learns beside them, and each system with all that is asked of
it. A part is done once, whichever process does it; what is done is kept, so that a study that was
stopped goes on. A mistake in a part is noted and the others go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import dataclasses
import gc
import os
import pathlib
import time
import traceback

import jax

from hrvlm_jax.checkpoint.files import whole_file
from hrvlm_jax.core.errors import UserError, unknown
from hrvlm_jax.lab.compare import Comparison
from hrvlm_jax.lab.compare_config import CompareConfig, encoder_of, systems_of
from hrvlm_jax.lab.experiment import Interrupted, say
from hrvlm_jax.lab.locks import claimed, holder
from hrvlm_jax.lab.needle.kinds import TASKS
from hrvlm_jax.training import run_config

_PREPARING = ('data', 'tokenizer', 'validation', 'encoder', 'language', 'adapt')
PAUSE = 5.0  # seconds until a process that has nothing to do looks again


@dataclasses.dataclass(frozen=True)
class Part:
  """A piece of work of one (task, seed).

  Attributes:
    name: 'data', 'encoder', 'encoder NAME', 'language', 'adapt NAME', or the name of a system.
    steps: parts of the comparison that it does, which are kept one by one.
    needs: names of the parts of the same (task, seed) that must be done before.
  """

  task: str
  seed: int
  name: str
  steps: tuple[str, ...]
  needs: tuple[str, ...] = ()

  @property
  def folder(self) -> str:
    """The comparison it belongs to."""
    return f'{self.task}-{self.seed}'

  @property
  def prepares(self) -> bool:
    """Whether it is pre-training or data, not a system."""
    return self.steps[-1].partition(' ')[0] in _PREPARING

  @property
  def title(self) -> str:
    """How it is called: 'needle-0 encoder'."""
    return f'{self.folder} {self.name}'


def load(spec: str, overrides: run_config.Overrides = ()) -> dict[str, CompareConfig]:
  """The settings of a study for every task: FILE:WORDS,TASK.

  Raises:
    UserError: what a config refuses; one that names no seeds.
  """
  file, _, words = spec.partition(':')
  found = {task: run_config.load(CompareConfig, f'{file}:{",".join(filter(None, (words, task)))}',
                                 overrides) for task in TASKS}
  check(found, spec)
  return found


def check(configs: Mapping[str, CompareConfig], spec: str) -> None:
  """Refuses settings that are no study.

  Raises:
    UserError: no seeds; a task whose settings are another's; a follow-up of no claim.
  """
  claims = {name: claim for config in configs.values() for name, claim in config.claims.items()}
  for name, claim in claims.items():
    if claim.follows not in ('', *claims):
      raise UserError(f'{spec}: claims.{name} follows {claim.follows}, which is no claim')
  for task, config in configs.items():
    if not config.seeds:
      raise UserError(f'{spec}: names no seeds; a study needs config.seeds, such as (0, 1, 2)')
    if config.task.task != task:
      raise UserError(f'{spec}: with the word {task} it gives the task {config.task.task}')


def of_experiment(config: CompareConfig, task: str, seed: int) -> CompareConfig | None:
  """The comparison of one (task, seed): the claims that this task can tell and the systems that
  they need, with the first seed those of `everywhere` too; None where there are none.

  The images of seed s are drawn with 2 s, those of its evaluation with 2 s + 1: nothing that one
  seed is asked was another's example.
  """
  claims = {name: claim for name, claim in config.claims.items() if claim.task == task}
  names = {name for claim in claims.values() for name in systems_of(claim)}
  if seed == config.seeds[0]:
    names |= set(config.everywhere)
  if not names:
    return None
  names |= {a.like for name, a in config.adapt.items() if name in names and a.like}
  pick = lambda table: {name: value for name, value in table.items() if name in names}
  return dataclasses.replace(
    config, seed=2 * seed, seeds=(), everywhere=(), claims=claims, systems=pick(config.systems),
    adapt=pick(config.adapt), changes=pick(config.changes), rates=pick(config.rates))


class Study:
  """The parts of a study in one folder.

  Args:
    configs: by task, see `load`.
    make: what does the work of a (task, seed).
  """

  def __init__(self, configs: Mapping[str, CompareConfig], folder: str | os.PathLike, *,
               progress: bool = True, make: Callable[..., Comparison] = Comparison):
    self.configs, self.folder, self.progress = configs, pathlib.Path(folder), progress
    self.make = make
    self.folder.mkdir(parents=True, exist_ok=True)
    self._made: dict[str, Comparison] = {}

  def experiments(self) -> Iterator[tuple[str, int, CompareConfig]]:
    """(task, seed, settings) of every comparison, all tasks with the first seed first."""
    seeds = list(dict.fromkeys(s for config in self.configs.values() for s in config.seeds))
    for seed in seeds:
      for task, config in self.configs.items():
        if seed in config.seeds and (own := of_experiment(config, task, seed)) is not None:
          yield task, seed, own

  def comparison(self, task: str, seed: int, config: CompareConfig) -> Comparison:
    """The comparison of a (task, seed) in its folder."""
    name = f'{task}-{seed}'
    if name not in self._made:
      self._made[name] = self.make(config, self.folder / name, progress=self.progress)
    return self._made[name]

  def parts(self, only: Sequence[str] = (), tasks: Sequence[str] = (), seeds: Sequence[int] = ()
            ) -> list[Part]:
    """All parts in the order in which they are begun.

    Args:
      only: systems; () for all. tasks, seeds: likewise. The parts that these need belong to them.

    Raises:
      UserError: a name that the study has not.
    """
    found = list(self.experiments())
    for name, have, wanted in (('task', {t for t, _, _ in found}, tasks),
                               ('seed', {s for _, s, _ in found}, seeds),
                               ('system', {n for *_, c in found for n in c.systems}, only)):
      for value in wanted:
        if value not in have:
          raise UserError(unknown(value, sorted(have), what=name))
    parts = []
    for task, seed, config in found:
      if (not tasks or task in tasks) and (not seeds or seed in seeds):
        parts += parts_of(task, seed, self.comparison(task, seed, config), only)
    return parts

  def comparisons(self) -> list[Comparison]:
    """Those that were made so far."""
    return list(self._made.values())

  def owner(self, part: Part) -> Comparison:
    """The comparison of a part."""
    return self._made[part.folder]

  def done(self, part: Part) -> bool:
    """Whether all its steps are."""
    return set(part.steps) <= set(self.owner(part).read('times.json', {}))

  def lock(self, part: Part) -> pathlib.Path:
    """The file that says who does it."""
    return self.folder / 'locks' / f'{part.title}.json'

  def failure(self, part: Part) -> pathlib.Path:
    """The file that says what went wrong."""
    return self.folder / 'failed' / f'{part.title}.txt'

  def run(self, parts: Iterable[Part]) -> dict[str, str]:
    """Does what is open, beside other processes; returns the parts that failed, with the reason.

    Raises:
      Interrupted, KeyboardInterrupt: asked to stop.
    """
    left, failed, waiting = list(parts), {}, False
    while True:
      left = [part for part in left if part.title not in failed and not self.done(part)]
      for part in left:
        if lost := [n for n in part.needs if f'{part.folder} {n}' in failed]:
          failed[part.title] = f'{lost[0]} failed'
      left = [part for part in left if part.title not in failed]
      if not left:
        return failed
      if self._one(left, failed):
        waiting = False
        continue
      if not waiting:
        say(f'{len(left)} parts are left, all of which other processes work on or wait for')
      waiting = True
      time.sleep(PAUSE)

  def _one(self, left: Sequence[Part], failed: dict[str, str]) -> bool:
    """Does the first part that is free; False: none is."""
    done = {part.title for part in left}  # these are not
    for part in left:
      if any(f'{part.folder} {name}' in done for name in part.needs):
        continue
      with claimed(self.lock(part)) as mine:
        if not mine:
          continue
        if not self.done(part):  # it may have ended between the look and the claim
          self._do(part, failed, len(left))
        return True
    return False

  def _do(self, part: Part, failed: dict[str, str], left: int) -> None:
    say(f'== {part.title} ({left} parts left)')
    comparison, note = self.owner(part), self.failure(part)
    try:
      comparison.do(work_of(comparison, part.name))
      note.unlink(missing_ok=True)
    except Interrupted:
      raise
    except Exception as error:  # noqa: BLE001 - whatever it is, the other parts go on
      failed[part.title] = str(error) or type(error).__name__
      note.parent.mkdir(exist_ok=True)
      with whole_file(note) as file:
        file.write_text(''.join(traceback.format_exception(error)))
      say(f'== {part.title} FAILED: {failed[part.title]}')
    finally:
      freed()

  def state(self, part: Part) -> str:
    """'done', 'process 12 on a-machine', 'failed: ...' or 'open'."""
    if self.done(part):
      return 'done'
    if (who := holder(self.lock(part))) is not None:
      return who
    if self.failure(part).exists():
      return 'failed: ' + self.failure(part).read_text().strip().rpartition('\n')[2]
    return 'open'


def freed() -> None:
  """Gives back the programs of a part: those of a hundred models would fill the memory."""
  jax.clear_caches()
  gc.collect()


def work_of(comparison: Comparison, name: str) -> Sequence[tuple]:
  """What a part does, see `Comparison.work`."""
  shared = comparison.shared()
  if name in shared:
    return shared[name]
  if name.startswith('adapt '):
    return comparison.adapted(name.removeprefix('adapt '))
  return comparison.work(name)


def parts_of(task: str, seed: int, comparison: Comparison, only: Sequence[str] = ()
             ) -> list[Part]:
  """The parts of one comparison, what others need first."""
  config = comparison.config
  names = [name for name in config.systems if not only or name in only]
  if not names:
    return []
  made = lambda name, *needs: Part(
    task, seed, name, tuple(step[0] for step in work_of(comparison, name)), needs)
  own, adapts = {}, {}
  for name in names:
    start = encoder_of(config, config.systems[name])  # '': the shared one; None: no ViT
    encoder = [] if start is None else [f'encoder {start}'.rstrip()]
    own[name] = ['data', *encoder, *(['language'] if config.language is not None else [])]
    if name in config.adapt:
      source = config.adapt[name].like or name
      adapts[f'adapt {source}'] = encoder
      own[name].append(f'adapt {source}')
  needed = {'encoder', *(need for needs in own.values() for need in needs)}
  shared = [made(name, *(() if name == 'data' else ('data',)))
            for name in comparison.shared() if name in needed]
  return [*shared, *(made(name, *needs) for name, needs in adapts.items()),
          *(made(name, *needs) for name, needs in own.items())]
