"""Every verb of the command line with one of its inputs made hostile: (argv, standard input)."""

import dataclasses
import json
import pathlib
import random
import shutil

from PIL import Image

from hrvlm_jax.checkpoint import store
from hrvlm_jax.cli import completion, main as cli
from hrvlm_jax.core.config import to_dict
from hrvlm_jax.evaluation import benchmarks
from hrvlm_jax.evaluation.benchmarks.own import metrics
from hrvlm_jax.interop.export import export
from hrvlm_jax.language.prompt import tokenizer_of
from hrvlm_jax.systems import registry
from tests.faults import hostile
from tests.interop import releases

SAMPLES = pathlib.Path(__file__).parents[1] / 'evaluation' / 'samples'
# Options that write beside the working directory, open ports for good, or ask other machines.
KEPT = {'--docs', '--keep', '--document', '--machine', '--note', '--help', '--version', '--urls',
        '--coordinator', '--num-processes', '--process-id', '--distributed', '--peer-python',
        '--config', '--host', '--revision', '--timeout', '--photographs'}
CONFIG = """
import json, pathlib, ml_collections
def get_config():
  values = json.loads(pathlib.Path(__file__).with_suffix('.json').read_text())
  return ml_collections.ConfigDict(values)
"""


@dataclasses.dataclass(frozen=True)
class World:
  """Right inputs: `root` holds checkpoint/, release/NAME/, export/, train.json, photo.png, and the
  values of a run config in run.json."""

  root: pathlib.Path
  answers: bool = False  # cases may go on to compile a model


def made(root: pathlib.Path) -> World:
  """The right inputs (`verbs.World`)."""
  config = registry.get('mc_llava').tiny()
  files = {f'tokenizer/{name}': data for name, data in tokenizer_of('byte').files.items()}
  store.save_params(root / 'checkpoint', releases.random_params(config),
                    {'model': to_dict(config)}, extra_files=files)
  export(root / 'checkpoint', root / 'export')
  for name in ('mc_llava', 'single_view', 'pheye'):
    tiny = registry.get(name).tiny()
    releases.write_release(root / 'release' / name, tiny, releases.random_tensors(
      name, releases.KINDS['float32']))
  Image.new('RGB', (90, 60), 'teal').save(root / 'photo.png')
  turns = [{'from': 'human', 'value': '<image>\nWhat?'}, {'from': 'gpt', 'value': 'STOP'}]
  rows = [{'id': str(n), 'image': 'photo.png', 'conversations': turns} for n in range(4)]
  (root / 'train.json').write_text(json.dumps(rows))
  (root / 'run.json').write_text(json.dumps({
    'model': json.loads(json.dumps(to_dict(config))),
    'data': {'train': 'train.json', 'lengths': [128], 'tokenizer': 'byte'},
    'training': {'steps': 1, 'batch_size': 2, 'log_every': 1, 'mfu': False,
                 'optimizer': {'learning_rate': 1e-3}}}))
  return World(root)


def copied(source: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
  """A folder of hard links, or a file: nothing is written into it, files are replaced."""
  if source.is_dir():
    shutil.copytree(source, target, copy_function=lambda a, b: pathlib.Path(b).hardlink_to(a))
  else:
    target.write_bytes(source.read_bytes())
  return target


def spoilt(path: pathlib.Path, rng: random.Random) -> None:
  """Makes one file of a folder (or the file) hostile."""
  files = [path] if path.is_file() else sorted(f for f in path.rglob('*') if f.is_file())
  small = [f for f in files if f.suffix in ('.json', '.jsonl', '.tsv', '.txt', '.safetensors')]
  if not files:
    return
  file = rng.choice(small if small and rng.random() < 0.8 else files)
  data = file.read_bytes()
  file.unlink()
  act = rng.random()
  if act < 0.04:
    return  # it is gone
  if act < 0.07:
    return file.mkdir()
  if act < 0.1:
    return file.symlink_to('nowhere')
  if file.suffix == '.safetensors' and len(data) > 8 and act < 0.9:
    data = hostile.safetensors(data, rng)
  elif file.suffix in ('.tsv', '.jsonl', '.txt') and act < 0.9:
    data = hostile.table(data.decode(errors='replace'), rng)
  elif file.suffix in ('.png', '.jpg'):
    data = hostile.picture(rng)
  elif file.suffix == '.json' and act < 0.95:
    try:
      data = hostile.as_json(hostile.changed(json.loads(data), rng), rng)
    except ValueError:
      data = hostile.flipped(data, rng)
  else:
    data = hostile.flipped(data, rng)
  file.write_bytes(data)


def options(verb: str, rng: random.Random, *, most: int = 2) -> list[str]:
  """Options of a verb, read from its own parser, with odd values."""
  parser = completion.parser_of(cli.VERBS[verb][0])
  actions = [action for action in (parser._actions if parser else ())
             if action.option_strings and action.option_strings[-1] not in KEPT
             and not action.required]
  found = []
  for action in rng.sample(actions, min(len(actions), rng.randrange(most + 1))):
    found.append(action.option_strings[-1])
    if action.nargs != 0:
      chosen = list(action.choices or ()) if rng.random() < 0.5 else []
      found.append(str(rng.choice(chosen or hostile.WORDS)))
  return found


def overrides(rng: random.Random, values: dict) -> list[str]:
  """`--config.KEY=VALUE` of one or two keys."""
  found = []
  for path in rng.sample(list(hostile.places(values)), rng.choice((1, 1, 2))):
    key = '.'.join(map(str, path))
    value = rng.choice(hostile.ODD + hostile.WORDS)
    found.append(f'--config.{key}={value}')
  return found


def run_config(world: World, case: pathlib.Path, rng: random.Random) -> list[str]:
  """`--config FILE` of a run, in the file or on the command line with something odd."""
  values = json.loads((world.root / 'run.json').read_text())
  (case / 'run.py').write_text(CONFIG)
  extra = []
  if rng.random() < 0.5:
    extra = overrides(rng, values)
  else:
    values = hostile.changed(values, rng)
  (case / 'run.json').write_text(json.dumps(values))
  copied(world.root / 'photo.png', case / 'photo.png')
  copied(world.root / 'train.json', case / 'train.json')
  if rng.random() < 0.2:
    spoilt(case / 'train.json', rng)
  return ['--config', 'run.py', *extra]


def one_of(world: World, name: str, case: pathlib.Path, rng: random.Random) -> str:
  """A copy of an input, spoilt."""
  path = copied(world.root / name, case / pathlib.Path(name).name)
  spoilt(path, rng)
  return str(path.relative_to(case))


def question(rng: random.Random) -> str:
  return rng.choice(('What?',) * 8 + ('half \udcff', '\x00', 'a' * 300, '<image>', ''))


def asking(world: World, case: pathlib.Path, rng: random.Random) -> list[str]:
  """`--checkpoint` and an image: one of them hostile, where a model may be compiled none."""
  (case / 'a.png').write_bytes(hostile.picture(rng))
  sound = world.answers or rng.random() < 0.5
  checkpoint = str(world.root / 'checkpoint') if sound else one_of(world, 'checkpoint', case, rng)
  few = ['--max-new-tokens', rng.choice(('1', '1', '1', '0', '-1', '2000000000', 'x'))]
  return ['--checkpoint', checkpoint, *few, *options('ask', rng), 'a.png', question(rng)]


def evaluated(world: World, case: pathlib.Path, rng: random.Random) -> list[str]:
  """Answers to a benchmark whose files are spoilt, or spoilt answers."""
  name = rng.choice(sorted(set(benchmarks.known()) | {'own'}))
  (case / 'answers.jsonl').write_text('')  # all samples are then scored as answered with nothing
  if name == 'own':
    data = copied(world.root / 'train.json', case / 'train.json')
    copied(world.root / 'photo.png', case / 'photo.png')
    extra = ['--metric', rng.choice(metrics())]
  else:
    source = next((SAMPLES / n for n in (name, name.removesuffix('_ptb'), name.split('_')[0])
                   if (SAMPLES / n).is_dir()), SAMPLES / 'mme')
    data, extra = copied(source, case / 'data'), []
  if rng.random() < 0.1:
    (case / 'answers.jsonl').write_text('{"sample_id": "0", "text": "A"}\n')
    data = case / 'answers.jsonl'
  spoilt(data, rng)
  source = 'train.json' if name == 'own' else 'data'
  return ['--benchmark', name, '--data', source, '--predictions', 'answers.jsonl', '--out',
          'out', *extra, *(options('eval', rng, most=1) if rng.random() < 0.2 else [])]


def data(world: World, case: pathlib.Path, rng: random.Random) -> list[str]:
  action = rng.choice(('check', 'check', 'build', 'show'))
  if action == 'show':
    return [action, *run_config(world, case, rng), '--rows', '1', '--out', 'o.png']
  copied(world.root / 'photo.png', case / 'photo.png')
  file = copied(world.root / 'train.json', case / rng.choice(('a.json', 'a.jsonl', 'a.parquet',
                                                              'a.mixture.json', 'a.tsv')))
  rows = json.loads(file.read_text())
  if file.suffix == '.jsonl':
    file.write_text('\n'.join(map(json.dumps, rows)) + '\n')
  elif file.name == 'a.mixture.json':
    copied(world.root / 'train.json', case / 'train.json')
    file.write_text(json.dumps({'parts': [{'path': 'train.json', 'weight': 1.0}]}))
  spoilt(file, rng)
  extra = ['--out', 'out'] if action == 'build' else []
  return [action, file.name, '--quiet', *extra]


def converted(world: World, case: pathlib.Path, rng: random.Random) -> list[str]:
  name = rng.choice(sorted(p.name for p in (world.root / 'release').iterdir()))
  return ['--from', one_of(world, f'release/{name}', case, rng), '--to', 'out',
          *options('convert', rng, most=1)]


def case_of(verb: str, world: World, case: pathlib.Path, rng: random.Random
            ) -> tuple[list[str], str]:
  """(argv, standard input) of one case; its files lie in the folder `case`."""
  stdin = ''
  if verb in ('ask', 'chat'):
    argv = asking(world, case, rng)
    if verb == 'chat':
      argv = [word for word in argv[:4] if word] + ['a.png']
      stdin = '\n'.join(rng.choice((question(rng), '/image a.png', '/overlay', '/x', '/image "'))
                        for _ in range(2))
  elif verb == 'encode':
    argv = asking(world, case, rng)
    argv = [*argv[:2], 'a.png', '--overlay', rng.choice(('o.png', 'o.txt', 'no/o.png'))]
  elif verb == 'eval':
    argv = evaluated(world, case, rng)
  elif verb == 'data':
    argv = data(world, case, rng)
  elif verb == 'convert':
    argv = converted(world, case, rng)
  elif verb == 'export':
    argv = ['--checkpoint', one_of(world, 'checkpoint', case, rng), '--to', 'out',
            *options(verb, rng, most=1)]
  elif verb == 'doctor':
    argv = [one_of(world, 'checkpoint', case, rng)]
  elif verb == 'params':
    argv = (run_config(world, case, rng) if rng.random() < 0.5 else
            ['--checkpoint', one_of(world, 'checkpoint', case, rng), *options(verb, rng)])
  elif verb == 'serve':  # never one that could listen
    argv = [rng.choice(('none', 'a b', '', '/dev/null')), *options(verb, rng)]
  elif verb == 'push':
    argv = [one_of(world, 'export', case, rng), rng.choice(('x', '', '../x', 'a/b/c', 'a b/c'))]
  elif verb == 'needle':
    number = lambda: rng.choice(('0', '1', '-1', 'x', '2'))
    argv = ['--train', number(), '--eval', number(), '--turns', number(), '--out', 'out',
            '--preset', 'tiny', '--seed', rng.choice(hostile.WORDS)]
  elif verb == 'curate':
    (case / 'images').mkdir()
    (case / 'images' / 'a.png').write_bytes(hostile.picture(rng))
    (case / 'c.json').write_bytes(hostile.as_json(rng.choice(hostile.ODD), rng))
    argv = ['images', '--out', 'out', '--quiet', '--config', 'c.json', *options(verb, rng, most=1)]
  elif verb == 'finetune':
    copied(world.root / 'photo.png', case / 'photo.png')
    argv = [str(world.root / 'checkpoint'), '--data', one_of(world, 'train.json', case, rng),
            '--out', 'out', '--quiet', '--epochs', rng.choice(('1', '1', *hostile.WORDS)),
            *options(verb, rng, most=1)]
  elif verb in ('train', 'tiny', 'sweep', 'compare', 'plan'):
    argv = run_config(world, case, rng) + {
      'train': ['--workdir', 'out', '--quiet'], 'tiny': ['--workdir', 'out', '--quiet'],
      'sweep': ['--out', 'out', '--quiet', '--list'], 'compare': ['--out', 'out', '--quiet'],
      'plan': ['--topology', rng.choice(hostile.WORDS)]}[verb]
  elif verb == 'quickstart':
    argv = ['--seed', rng.choice([w for w in hostile.WORDS if not w.isdigit() or len(w) > 9])]
  elif verb == 'analyse':
    argv = [rng.choice(('tokens', 'cost', 'selection', *hostile.WORDS)), *options(verb, rng)]
  elif verb == 'bench':
    argv = [rng.choice([word for word in hostile.WORDS if word.strip()]), '--dry']
  else:
    argv = [rng.choice(hostile.WORDS)]
  return [verb, *argv], stdin
