"""The same search for every model: three learning rates at two lengths, on images of its own.

A baseline that was given less care than a system proves nothing. Every model of the search is
trained with half, once and twice the comparison's learning rate, for half of its steps and for all
of them, with the first seed, and asked about images that nothing else uses. The rate that was best
at the full length (equal there: at the half) is the model's; `chosen_rates` gives a config those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import json
import pathlib
import shutil
from typing import Any

from hrvlm_jax.checkpoint.files import whole_file
from hrvlm_jax.core import json_text
from hrvlm_jax.core.config import to_dict
from hrvlm_jax.evaluation.provenance import made
from hrvlm_jax.lab.compare import Comparison, Work
from hrvlm_jax.lab.compare_config import CompareConfig
from hrvlm_jax.lab.needle import write
from hrvlm_jax.lab.report import accuracy, machine, markdown_table
from hrvlm_jax.lab.study import Part, Study
from hrvlm_jax.lab.study_kept import noted, take

FACTORS = (0.5, 1.0, 2.0)  # of the comparison's learning rate
FILE = 'search.json'
VALIDATION_SEED = 1001  # no seed of a study comes here


class RateSearch(Comparison):
  """Trains every system six times instead of once."""

  def tried(self) -> list[tuple[float, int]]:
    """(learning rate, steps) of every training."""
    c = self.config
    return [(factor * c.optimizer.learning_rate, steps) for factor in FACTORS
            for steps in (max(1, c.train_steps // 2), c.train_steps)]

  def shared(self) -> dict[str, Work]:
    """With the images that the search asks about."""
    found = super().shared()
    return found | {'data': [*found['data'], ('validation', self.write_validation)]}

  def write_validation(self) -> None:
    """As many images as the evaluation has, with a seed of their own."""
    c = self.config
    write(c.task, self.folder / 'data/validation', c.eval_images, seed=VALIDATION_SEED,
          progress=self.progress)

  def work(self, name: str) -> Work:
    """Every rate and length."""
    return [*self.adapted(name), *((f'search {name} {rate:g} {steps}', self.search, name, rate,
                                    steps) for rate, steps in self.tried())]

  def search(self, name: str, rate: float, steps: int) -> None:
    """Trains, asks, keeps the answers and not the weights."""
    run, title = self.run_config(name), f'{name} {rate:g} {steps}'
    training = dataclasses.replace(
      run.training, steps=steps,
      optimizer=dataclasses.replace(run.training.optimizer, learning_rate=rate))
    folder = self.folder / 'searches' / title.replace(' ', '-')
    self.train(dataclasses.replace(run, training=training), folder)
    self.write(f'search_{title}.json', self.answers(
      folder, self.folder / 'data/validation', batch_size=self.config.answer_batch,
      max_new_tokens=self.config.max_new_tokens))
    shutil.rmtree(folder)

  def found(self, name: str) -> dict[str, Any] | None:
    """What was tried of a system and its rate; None: not all of it was."""
    if not {part[0] for part in self.work(name)} <= set(self.read('times.json', {})):
      return None
    tried = [{'rate': rate, 'steps': steps,
              'accuracy': accuracy(self.read(f'search_{name} {rate:g} {steps}.json'))}
             for rate, steps in self.tried()]
    at = {(row['rate'], row['steps']): row['accuracy'] for row in tried}
    half, full = (self.tried()[i][1] for i in (0, 1))
    rate = max((rate for rate, _ in self.tried()), key=lambda r: (at[r, full], at[r, half]))
    return {'rate': rate, 'tried': tried}


def searched(config: CompareConfig, only: Sequence[str] = ()) -> list[str]:
  """The models of a search: those of `everywhere`, and one of every other kind of system."""
  if only:
    return list(only)
  names = list(config.everywhere)
  for name, model in config.systems.items():
    if model.system not in {config.systems[n].system for n in names}:
      names.append(name)
  return names


def study_of(configs: Mapping[str, CompareConfig], folder: pathlib.Path, *, tasks: Sequence[str],
             only: Sequence[str] = (), progress: bool = True) -> Study:
  """The search as a study of one seed in `folder`/search."""
  chosen = {}
  for task in tasks:
    config = configs[task]
    chosen[task] = dataclasses.replace(config, seeds=config.seeds[:1], claims={}, rates={},
                                       everywhere=tuple(searched(config, only)))
  return Study(chosen, folder / 'search', progress=progress, make=RateSearch)


def borrow(study: Study, folder: pathlib.Path, parts: Sequence[Part]) -> None:
  """Takes pre-training that the study around a search has done already, with equal settings."""
  for part in parts:
    if part.prepares:
      here, there = study.owner(part), folder / part.folder
      now, before = json.loads(json.dumps(to_dict(here.config))), noted(there / 'config.json')
      same = all(before.get(key) == now[key] for key in (
        'task', 'encoder', 'encoders', 'language', 'train_images', 'eval_images', 'turns', 'seed'))
      name = part.name.removeprefix('adapt ')
      if part.name.startswith('adapt '):
        same = same and all((before.get(key) or {}).get(name) == now[key][name]
                            for key in ('systems', 'adapt'))
      if same:
        times, cpu = noted(there / 'times.json'), noted(there / 'cpu_times.json')
        for step in set(part.steps) & times.keys():
          take(here, there, step, times[step], cpu.get(step, 0.0))


def keep(study: Study, place: pathlib.Path) -> pathlib.Path:
  """Adds what was found to search.json: by task, by model."""
  path = place / FILE
  kept = json_text.loads(path.read_text()) if path.exists() else {'tasks': {}}
  for task, seed, config in study.experiments():
    comparison = study.comparison(task, seed, config)
    rows = {name: found for name in config.systems
            if (found := comparison.found(name)) is not None}
    kept['tasks'][task] = kept['tasks'].get(task, {}) | rows
  kept |= {'machine': machine(), 'made': made({'tasks': kept['tasks']})}
  place.mkdir(parents=True, exist_ok=True)
  with whole_file(path) as part:
    part.write_text(json.dumps(kept, indent=1) + '\n')
  return path


def place_of(config_file: str) -> pathlib.Path:
  """Where a config's results are kept: results/NAME beside it."""
  path = pathlib.Path(config_file.partition(':')[0])
  return path.parent / 'results' / path.stem


def read(place: pathlib.Path) -> dict[str, dict[str, Any]]:
  """What `keep` wrote, by task; {} before a search."""
  path = place / FILE
  return json_text.loads(path.read_text())['tasks'] if path.exists() else {}


def chosen_rates(config_file: str, task: str) -> dict[str, float]:
  """Learning rate by model, as the search on a task found it; {} where there was none."""
  return {name: row['rate'] for name, row in read(place_of(config_file)).get(task, {}).items()}


def markdown(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
  """One table per task: accuracy by rate and length, the chosen rate at the end."""
  lines = []
  for task, rows in found.items():
    tried = [(row['rate'], row['steps']) for row in next(iter(rows.values()), {}).get('tried', ())]
    cells = [[name.replace('_', ' '), *(f'{100 * t["accuracy"]:.1f}' for t in row['tried']),
              f'{row["rate"]:g}'] for name, row in rows.items()]
    if cells:
      header = [task, *(f'{rate:g}, {steps} steps' for rate, steps in tried), 'chosen']
      lines += [*markdown_table(header, cells), '']
  return lines
