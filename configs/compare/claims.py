"""The papers' claims in miniature, all of them: models, and points beside the papers' numbers.

Command:  hrvlm compare --config configs/compare/claims.py --out runs/claims
Hardware: 2 CPU cores.
Expected: docs/claims.md. Every claim is told on one task, the one that can tell it: `needle` where
          a detail is all that is asked for, `relate` where the whole picture counts too (the
          low-resolution path, cache and view, and gains by size).
          Words, with commas between: `needle`, `relate` or `page`, the systems and claims of one
          task; none, all of them; `smoke`, a few steps of everything.

Systems and settings are those of needle_tiny.py and variants of them, in one file per paper:
claims_mc_llava.py, claims_pheye.py, claims_llava_hr.py, claims_ps3.py. Numbers of the papers are
those of their tables (`source` says which column); None where a table was not at hand or the
paper draws a curve. What a miniature has to do otherwise than a paper is said in `says`, `source`
or at the model.

On `needle` all systems have the decoder of two layers of needle_tiny.py, on `relate` and `page` one
of four (`fit` there). Of `relate` one kind of question is asked, `side`: a language model of this
size learns it alone, not among the others (docs/tasks.md). Pheye's cross-attention in every second
against every fourth layer is told on `relate`, as every layer (four blocks) against every second
one (two).
"""

import pathlib
import runpy

from hrvlm_jax.core.config import to_dict
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.lab.needle.kinds import TASKS
from hrvlm_jax.lab.rates import chosen_rates

FOLDER = pathlib.Path(__file__).parent
BASE = runpy.run_path(str(FOLDER / 'needle_tiny.py'))
PAPERS = [runpy.run_path(str(FOLDER / f'claims_{paper}.py'))
          for paper in ('mc_llava', 'pheye', 'llava_hr', 'ps3')]
SEEDS = (0, 1, 2)
# On every task, for the tables of docs/claims.md.
EVERYWHERE = ('single_view', 'mc_llava', 'pheye', 'llava_hr', 'vila_hd')


def merged(part):
  """What the papers' files say of one thing, by name."""
  found = {}
  for paper in PAPERS:
    made = paper[part]()
    assert not found.keys() & made.keys(), sorted(found.keys() & made.keys())
    found |= made
  return found


def systems():
  """All models by name; those of needle_tiny.py keep theirs."""
  return BASE['systems']() | merged('systems')


def claims():
  return merged('claims')


def needed(found):
  """Names of the systems that claims need."""
  return {point['system'] for claim in found.values() for point in claim['points']} | {
    claim['minus'] for claim in found.values() if claim.get('minus')}


def get_config(words='full'):
  given = set(words.split(',')) - {'full'}
  smoke = 'smoke' in given
  tasks = sorted(given - {'smoke'})
  if len(tasks) > 1 or set(tasks) - set(TASKS):
    raise UserError(f'claims.py: found the words {", ".join(tasks)}, expected one task of '
                    f'{", ".join(TASKS)}, smoke, or both')
  config = BASE['get_config'](','.join([*tasks, *(['smoke'] if smoke else [])]) or 'full')
  found = {name: claim for name, claim in claims().items() if not tasks or claim['task'] in tasks}
  wanted = set(systems()) if not tasks else needed(found) | set(EVERYWHERE)
  config.systems = {name: to_dict(made) for name, made in systems().items() if name in wanted}
  # The ViT alone at 160 pixels has 400 tokens.
  config.lengths = (*config.lengths, 512)
  encoders = merged('encoders')
  config.encoders = {name: dict(config.encoder.to_dict(), **settings)
                     for name, settings in encoders.items()}
  adapt = config.adapt.to_dict() | merged('adapt')
  for settings in adapt.values():
    if smoke and 'steps' in settings:
      settings['steps'] = 3
  # Whoever is like another needs that one's settings, its system too.
  config.adapt = {name: settings for name, settings in adapt.items() if name in wanted}
  changes = config.changes.to_dict() | merged('changes')
  config.changes = {name: settings for name, settings in changes.items() if name in wanted}
  config.claims = found
  config.seeds = SEEDS
  config.everywhere = EVERYWHERE
  # Variants train with the rate of the searched model of their kind.
  rates = {systems()[name].system: rate
           for name, rate in chosen_rates(__file__, tasks[0] if tasks else 'needle').items()}
  config.rates = {name: rates[made.system] for name, made in systems().items()
                  if name in wanted and made.system in rates}
  if tasks and tasks[0] != 'needle':  # whose conversations are longer
    BASE['fit'](config, tasks[0])
    config.lengths = (*config.lengths, 640)
    for made in config.systems.values():
      made.text.max_positions = 640
  return config
