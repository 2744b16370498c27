"""What of a study is kept: answers, costs and analyses of every (task, seed), without the models.

One JSON per (task, seed), enough to judge all claims again. Parts of another machine's folder of
the same study are taken over by `merge`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import json
import os
import pathlib
import shutil
from typing import Any

import numpy as np

from hrvlm_jax.checkpoint import store
from hrvlm_jax.checkpoint.files import whole_file
from hrvlm_jax.core import json_text
from hrvlm_jax.core.config import to_dict
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.evaluation.provenance import made
from hrvlm_jax.lab.claims import ANALYSES
from hrvlm_jax.lab.compare import JOINING, Comparison, changes, encoder_folder
from hrvlm_jax.lab.experiment import Experiment, say
from hrvlm_jax.lab.report import machine
from hrvlm_jax.lab.study import Part, Study
from hrvlm_jax.lab.verdicts import Observed

# Of a step's first word: where its results lie, with {} for the rest of its name.
_PLACES = {
  'data': ('data/train', 'data/eval'), 'tokenizer': ('tokenizer',),
  'language': ('language',), 'adapt': ('adapted/{}',), 'train': ('runs/{}',),
  'answer': ('answers_{}.json',), 'measure': ('cost_{}.json',),
  **{name: (f'{name}_{{}}.json',) for name in ANALYSES}}


def of_comparison(comparison: Comparison, seed: int) -> dict[str, Any] | None:
  """What of a (task, seed) is kept; None where nothing was answered yet.

  Numbers per question are one string: '0110' for answers, thousandths with spaces between for
  analyses, millionths of the canvas for areas.
  """
  times, busy = (comparison.read(name, {}) for name in ('times.json', 'cpu_times.json'))
  config = comparison.config
  own = comparison.parts()
  words = [step.partition(' ') for step in times if step in own]
  keys = lambda word: sorted(key for first, _, key in words if first == word)
  if not keys('answer'):
    return None
  rows = {key: comparison.read(f'answers_{key}.json') for key in keys('answer')}
  numbers = lambda values, unit: ' '.join(str(round(v / unit)) for v in values)
  return {
    'task': config.task.task, 'seed': seed, 'chance': config.task.chance,
    'steps': config.train_steps, 'encoder_steps': config.encoder.steps,
    'encoder_accuracy': _accuracy(comparison.folder / 'encoder'),
    'language_accuracy': _accuracy(comparison.folder / 'language'),
    'areas': numbers([row['area'] for row in next(iter(rows.values()))], 1e-6),
    'right': {key: ''.join(str(int(row['correct'])) for row in found)
              for key, found in rows.items()},
    'costs': {key: comparison.read(f'cost_{key}.json') for key in keys('measure')},
    **{name: {key: numbers(comparison.read(f'{name}_{key}.json'), 1e-3) for key in keys(name)}
       for name in ANALYSES if keys(name)},
    'seconds': {step: round(spent, 1) for step, spent in sorted(times.items()) if step in own},
    'cpu_seconds': round(sum(spent for step, spent in busy.items() if step in own), 1),
    'machine': machine(), 'made': made(to_dict(config))}


def _accuracy(checkpoint: pathlib.Path) -> float | None:
  return store.load_config(checkpoint).get('accuracy') if checkpoint.exists() else None


def of_study(study: Study) -> dict[tuple[str, int], dict[str, Any]]:
  """`of_comparison` of every (task, seed) that has answers."""
  found = {(task, seed): of_comparison(study.comparison(task, seed, config), seed)
           for task, seed, config in study.experiments()}
  return {key: value for key, value in found.items() if value is not None}


def keep(found: Mapping[tuple[str, int], Mapping[str, Any]], place: pathlib.Path
         ) -> list[pathlib.Path]:
  """Writes TASK-SEED.json of everything that `of_study` found; returns the files.

  A kept result with answers that the new one lacks stays, and that is said.
  """
  place.mkdir(parents=True, exist_ok=True)
  written, old = [], read(place)
  for (task, seed), value in found.items():
    path = place / f'{task}-{seed}.json'
    if lost := sorted(old.get((task, seed), value)['right'].keys() - value['right'].keys()):
      say(f'{path}: stays as it is; it has answers that are not here ({", ".join(lost)}). Merge '
          'the folders first, or remove it')
      continue
    with whole_file(path) as part:
      part.write_text(json.dumps(value, indent=1) + '\n')
    written.append(path)
  return written


def read(place: str | os.PathLike) -> dict[tuple[str, int], dict[str, Any]]:
  """What `keep` wrote, by (task, seed).

  Raises:
    UserError: no such folder.
  """
  place = pathlib.Path(place)
  if not place.is_dir():
    raise UserError(f'{place}: is no folder; expected one with TASK-SEED.json, as --keep writes it')
  found = {}
  for path in sorted(place.glob('*-*.json')):
    kept = json_text.loads(path.read_text())
    found[kept['task'], kept['seed']] = kept
  return found


def observed(kept: Mapping[str, Any]) -> Observed:
  """A kept (task, seed) as `verdicts` reads it."""
  numbers = lambda text, unit: (np.array(text.split(), np.float64) * unit).tolist()
  values = {name: {key: numbers(text, 1e-3) for key, text in kept[name].items()}
            for name in ANALYSES if name in kept}
  right = {key: [int(bit) for bit in bits] for key, bits in kept['right'].items()}
  return Observed(numbers(kept['areas'], 1e-6), {'accuracy': right, **values}, kept['costs'])


def places(step: str) -> list[str]:
  """Where in a comparison's folder the results of a step lie."""
  word, _, rest = step.partition(' ')
  if word == 'encoder':
    return [encoder_folder(rest)]
  return [place.format(rest) for place in _PLACES[word]]


def merge(study: Study, others: Sequence[str | os.PathLike], parts: Sequence[Part]) -> list[str]:
  """Brings what other folders of the same study have done into this one; says what, in sentences.

  A system's part is taken whole: answers belong to the weights that gave them. What both have done
  stays as it is here.

  Raises:
    UserError: a folder that holds another study; nothing is taken from it.
  """
  said = []
  for other in map(pathlib.Path, others):
    _same_study(study, other, parts)
    taken, twice = [], []
    for part in parts:
      here, there = study.owner(part), other / part.folder
      times = noted(there / 'times.json')
      begun = set(part.steps) & set(here.read('times.json', {}))
      if not part.prepares:
        # Only the training makes it ours: a pre-training of the same name is a part of its own.
        begun = {step for step in begun if not step.startswith('adapt ')}
      steps = [step for step in part.steps if step in times]
      if begun:
        twice += [part.title] if steps else []
        continue
      for step in steps:
        take(here, there, step, times[step], noted(there / 'cpu_times.json').get(step, 0.0))
      taken += [part.title] if steps else []
    said.append(f'{other}: took {len(taken)} parts' + (f' ({", ".join(taken)})' if taken else ''))
    if twice:
      said.append(f'{other}: {len(twice)} parts were done here too and stay as they are here '
                  f'({", ".join(twice)})')
  for line in said:
    say(line)
  return said


def forget(folder: str | os.PathLike, names: Sequence[str]) -> list[str]:
  """Removes what a study's folder has of systems whose settings changed, so that they are trained
  anew; returns the steps, with their (task, seed).

  Only their own: what systems share stays. Call it before a `Study` of the folder is made, which
  would refuse other settings.

  Raises:
    UserError: the folder has nothing of one of them.
  """
  gone, known = [], set()
  for config in sorted(pathlib.Path(folder).glob('*-*/config.json')):
    place, settings = config.parent, noted(config)
    known |= set(names) & settings['systems'].keys()
    for key in JOINING:
      settings[key] = {name: value for name, value in settings.get(key, {}).items()
                       if name not in names or key in ('claims', 'encoders')}
    experiment = Experiment(place)
    steps = [step for step in experiment.times if _system(step) in names]
    experiment.write('config.json', settings)
    experiment.forget(steps)
    for path in (place / name for step in steps for name in places(step)):
      shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for name in names:  # a training that was stopped on its way
      shutil.rmtree(place / 'runs' / name, ignore_errors=True)
    gone += [f'{place.name} {step}' for step in steps]
  if wrong := sorted(set(names) - known):
    raise UserError(f'{folder}: has nothing of {", ".join(wrong)}')
  return gone


def _system(step: str) -> str | None:
  """The system that a step is of; None: it is shared."""
  word, _, rest = step.partition(' ')
  return None if word in ('data', 'tokenizer', 'encoder', 'language') else rest.partition('[')[0]


def noted(path: pathlib.Path) -> dict[str, Any]:
  """What a JSON file of a comparison's folder says; {} without one."""
  return json_text.loads(path.read_text()) if path.exists() else {}


def _same_study(study: Study, other: pathlib.Path, parts: Sequence[Part]) -> None:
  folders = {part.folder: study.owner(part) for part in parts}
  there = {name: noted(other / name / 'config.json') for name in folders}
  if not any(there.values()):
    raise UserError(f'{other}: holds none of {", ".join(folders)}; expected a folder that hrvlm '
                    'compare made with the same config')
  for name, comparison in folders.items():
    if there[name]:
      now = json.loads(json.dumps(to_dict(comparison.config)))
      if changed := changes(there[name], now):
        raise UserError(f'{other}/{name}: holds another comparison ({", ".join(changed)} differ); '
                        "its parts cannot be merged with this config's")


def take(here: Comparison, there: pathlib.Path, step: str, seconds: float, cpu: float) -> None:
  """Copies the results of a step that is not done here, then notes it."""
  if step in here.read('times.json', {}):
    return
  for name in places(step):
    source, target = there / name, here.folder / name
    if not source.exists():
      if name.endswith('.json'):
        raise UserError(f'{source}: is missing, though {there}/times.json says that {step!r} is '
                        'done; that folder was damaged')
      continue  # weights may have been left on the other machine
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f'.{target.name}.{os.getpid()}.tmp')
    if source.is_dir():
      shutil.rmtree(temporary, ignore_errors=True)
      shutil.copytree(source, temporary)
      shutil.rmtree(target, ignore_errors=True)
    else:
      shutil.copyfile(source, temporary)
    temporary.replace(target)
  here.note(step, seconds, cpu)
