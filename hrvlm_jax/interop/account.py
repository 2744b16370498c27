"""What becomes of every key and every file of a release: used, harmless, or refused by name.

`convert` prints it and keeps it in `source.json`. The tables are declared: those of the layouts
beside their weights (`System.keys`), those that many share in `checkpoint.formats`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
import dataclasses
import fnmatch
import json
import pathlib
from typing import Any

from hrvlm_jax.checkpoint import hf
from hrvlm_jax.checkpoint.formats import GENERATION, GENERIC, PREPROCESSOR, PROCESSOR, TOKENIZER
from hrvlm_jax.checkpoint.settings import Account, Harmless, Keys, account, shown
from hrvlm_jax.core.errors import UserError, shortened
from hrvlm_jax.interop.card import towers
from hrvlm_jax.language.generation import read_generation
from hrvlm_jax.language.tokenizer import FILES as TOKENIZER_FILES
from hrvlm_jax.systems.contract import ModelConfig, System

_TRAINING = 'of a training: what it needs to go on'
_OTHER_FORM = 'the same weights in another form'
# Files beside the weights that change nothing here, by their name.
HARMLESS_FILES: Mapping[str, str] = {
  **dict.fromkeys(('*.md', '*.txt', '*.rst', 'LICENSE*', 'LICENCE*', 'NOTICE*', '*.pdf', '*.html',
                   '*.png', '*.jpg', '*.jpeg', '*.gif', '*.svg', '*.webp', '*.mp4', '.git*',
                   '*.bib', 'CITATION*', '.DS_Store'), 'for people'),
  **dict.fromkeys(('*.py', '*.sh', '*.ipynb', '*.yaml', '*.yml', 'requirements*'),
                  'code and its settings are never run'),
  **dict.fromkeys(('optimizer*', 'scheduler.pt', 'rng_state*', 'scaler.pt', 'training_args.bin',
                   'trainer_state.json', 'train_results.json', 'all_results.json', 'latest',
                   'eval_results.json', 'zero_to_fp32.py', '*.log', 'events.out.*', '*.jsonl',
                   'trainer_log*'), _TRAINING),
  **dict.fromkeys(('consolidated*', 'flax_model*', 'tf_model*', '*.h5', '*.msgpack', '*.onnx',
                   '*.gguf', '*.ot', '*.pth.index.json', 'params.json', 'checkpoint.pt'),
                  _OTHER_FORM),
  'chat_template.json': "the system's own template is used",
  'manifest.json': 'sizes and checksums, see hf.check_manifest',
  'parity.json': 'a certificate of another checkpoint',
  'source.json': 'what another checkpoint was made from',
}
# Folders that hold no part of the release.
HARMLESS_FOLDERS: Mapping[str, str] = {
  **dict.fromkeys(('checkpoint-*', 'global_step*', 'runs', 'wandb', 'logs'), _TRAINING),
  **dict.fromkeys(('.git', '.cache', '__pycache__', 'assets', 'images', 'figures', 'figs', 'docs',
                   'examples', 'onnx', 'original', '.ipynb_checkpoints'),
                  'for people, or the same weights in another form'),
}
_WEIGHTS = ('*.safetensors', '*.bin', '*.pt', '*.pth', '*.index.json')
_TABLES: Mapping[str, Keys] = {
  'generation_config.json': GENERATION, 'tokenizer_config.json': TOKENIZER,
  'special_tokens_map.json': {**TOKENIZER, 'pad_token': TOKENIZER['pad_token']},
  'preprocessor_config.json': PREPROCESSOR, 'processor_config.json': PROCESSOR,
}


@dataclasses.dataclass
class Told:
  """What was found about a release so far.

  Attributes:
    lines: for people.
    problems: what is refused.
  """

  lines: list[str] = dataclasses.field(default_factory=list)
  problems: list[str] = dataclasses.field(default_factory=list)

  def add(self, name: str, found: Account) -> None:
    """The account of one file."""
    self.lines += found.lines(name)
    self.problems += [f'{name}: {problem}' for problem in found.problems]


def config_keys(values: Mapping[str, Any], system: System, config: ModelConfig | None) -> Account:
  """The account of config.json.

  A file that was written here says everything under `hrvlm`; its other keys, which the original's
  code reads, have to say the same.
  """
  if config is None or 'hrvlm' not in values:
    return account(values, system.keys)
  ours = json.loads(json.dumps(system.to_release(config)['config.json']))
  # A setting that the file does not have is one that came later.
  found = account({key: value for key, value in values.items() if key not in ours},
                  {**GENERIC, **system.keys})
  for key, value in values.items():
    if key not in ours or key == 'hrvlm':
      continue
    table = system.keys.get(key)
    if isinstance(table, Mapping):
      inner = account({key: value}, {key: table})
      found.used += inner.used
      found.harmless |= inner.harmless
      found.problems += inner.problems
    if _agrees(value, ours[key]):
      if isinstance(table, Harmless):
        found.harmless[key] = table.reason
      elif not isinstance(table, Mapping):
        found.used.append(key)
    else:
      found.problems.append(
        f"{key}: is {shown(value)}, but the settings under 'hrvlm', which decide, say "
        f"{shown(ours[key])}; change them together, or take 'hrvlm' out to follow the other keys")
  found.used += ['hrvlm'] if 'hrvlm' in values else []
  return found


def _agrees(value: Any, ours: Any) -> bool:
  """Whether a value says the same as ours; nested keys that ours lacks are free."""
  if isinstance(value, Mapping) and isinstance(ours, Mapping):
    return all(_agrees(one, ours[key]) for key, one in value.items() if key in ours)
  return value == ours


def folder(told: Told, path: pathlib.Path, *, folders: Iterable[str], config: ModelConfig,
           read: Iterable[pathlib.Path], tokenizer: Iterable[pathlib.Path],
           own: Mapping[str, Keys]) -> None:
  """Every file below the folder of a release, sub-folders with tensors included.

  Args:
    folders: sub-folders with tensors.
    read: weight files and others that were read.
    tokenizer: files that go with the checkpoint.
    own: further files with their tables, by name below the folder.
  """
  known = {file.resolve() for file in read}
  texts = {file.resolve() for file in tokenizer}
  for name in sorted(_listed(path, told, folders)):
    file = path / name
    if name == 'config.json' or file.resolve() in known:
      continue
    base = file.name
    table = own.get(name) or _TABLES.get(base)
    if table is not None:
      _table(told, name, file, table, config)
    elif base in TOKENIZER_FILES:
      if file.resolve() not in texts:
        told.lines.append(f'{name}: not used: the tokenizer is that of another folder')
    elif reason := _harmless(base, HARMLESS_FILES):
      told.lines.append(f'{name}: not used ({reason})')
    elif _is(base, _WEIGHTS) and _twin(base, known):
      told.lines.append(f'{name}: not used ({_OTHER_FORM})')
    else:
      told.problems.append(f'{name}: a file that nothing here reads; if the model does not need '
                           'it, move it out of the folder')
  names = [file.name for file in read]
  told.lines.append(f'used: {shortened(names)}')
  if texts:
    told.lines.append(f'used: {", ".join(sorted(f.name for f in tokenizer))} (tokenizer)')


def _listed(path: pathlib.Path, told: Told, folders: Iterable[str]) -> Iterable[str]:
  """Files of the folder and of its sub-folders with tensors; other folders are named."""
  for entry in path.iterdir():
    if not entry.is_dir():
      yield entry.name
    elif entry.name in folders:
      yield from (f'{entry.name}/{file.name}' for file in entry.iterdir())
    elif entry.name != 'adapter':
      if reason := _harmless(entry.name, HARMLESS_FOLDERS):
        told.lines.append(f'{entry.name}/: not used ({reason})')
      else:
        told.problems.append(f'{entry.name}/: a folder that nothing here reads; if the model does '
                             'not need it, move it out')


def _is(name: str, patterns: Iterable[str]) -> bool:
  return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _harmless(name: str, patterns: Mapping[str, str]) -> str | None:
  # Files of a tokenizer are text files too.
  if name in TOKENIZER_FILES:
    return None
  return next((why for pattern, why in patterns.items() if fnmatch.fnmatch(name, pattern)), None)


def _twin(name: str, read: Iterable[pathlib.Path]) -> bool:
  """Whether a weight file is another form of those that were read: model / pytorch_model."""
  stem = lambda text: text.replace('pytorch_model', 'model').split('.')[0].split('-')[0]
  return any(stem(file.name) == stem(name) and file.name != name for file in read)


def _table(told: Told, name: str, file: pathlib.Path, table: Keys, config: ModelConfig) -> None:
  try:
    values = hf.read_json(file)
  except UserError as error:
    told.problems.append(str(error))
    return
  if file.name == 'config.json':
    table = {**GENERIC, **table}
  told.add(name, account(values, table))
  if file.name == 'generation_config.json':
    try:
      read_generation(values, where=name)
    except UserError as error:
      told.problems.append(str(error))
  elif file.name == 'preprocessor_config.json':
    told.problems += [f'{name}: {problem}' for problem in preprocessor(values, config)]


def constants(encoder: Any, name: str) -> tuple[float, ...] | None:
  """`mean` or `std` of an encoder, also of one inside it."""
  places = [encoder]
  while places:
    place = places.pop(0)
    if hasattr(place, name):
      return tuple(getattr(place, name))
    places += [getattr(place, f.name) for f in dataclasses.fields(place)
               if dataclasses.is_dataclass(getattr(place, f.name))]
  return None


def preprocessor(values: Mapping[str, Any], config: ModelConfig) -> list[str]:
  """Colours and sizes of a picture processor that are not those of the model."""
  problems = []
  for key in ('image_mean', 'image_std', 'mean', 'std'):  # the last two: PS3
    name = key.removeprefix('image_')
    given, ours = values.get(key), constants(config.encoder, name)
    if given is None or ours is None:
      continue
    try:
      same = len(given) == len(ours) and all(
        abs(float(a) - b) < 1e-4 for a, b in zip(given, ours, strict=True))
    except (TypeError, ValueError):
      same = False
    if not same:
      problems.append(f'{key}: is {shown(given)}, the model has {shown(list(ours))}')
  known = _sides(config)
  for key in ('size', 'crop_size', 'image_size'):
    given = values.get(key)
    sides = (list(given.values()) if isinstance(given, Mapping) else
             given if isinstance(given, list) else [given])
    sides = [side for side in sides if side is not None]
    if not all(isinstance(side, (int, float)) and side in known for side in sides):
      problems.append(f'{key}: is {shown(given)}, the model has pictures of side '
                      f'{", ".join(map(str, sorted(known)))}')
  return problems


def _sides(config: ModelConfig) -> set[int]:
  """Sides in pixels of the pictures that the encoder makes."""
  found = {getattr(tower, 'image_size', None) for tower in towers(config.encoder)}
  places = [config.encoder]
  while places:
    place = places.pop(0)
    found |= {getattr(place, name, None) for name in ('image_size', 'side', 'window', 'fast_size')}
    found |= set(getattr(place, 'scales', ())) | set(getattr(place, 'sizes', ()))
    places += [getattr(place, f.name) for f in dataclasses.fields(place)
               if dataclasses.is_dataclass(getattr(place, f.name))]
  return {side for side in found if isinstance(side, int)}
