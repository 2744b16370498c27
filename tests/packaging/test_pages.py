"""What the pages say can be typed: parsed by the real parsers here, run in `test_full.sh pages`."""

import ast
import contextlib
import io
import json
import pathlib
import re
import shlex
import textwrap

import numpy as np
from PIL import Image
import pytest

from hrvlm_jax.cli.completion import PARTS, parser_of
from hrvlm_jax.cli.examples import EXAMPLES
from hrvlm_jax.cli.main import VERBS, main
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.systems import registry
from hrvlm_jax.training import recipe, run_config
from hrvlm_jax.training.config import RunConfig
from tests import pages

ROOT = pages.ROOT
SHELLS = ('bash', 'sh', 'console')
KNOBS = ('--encoder.', '--vicrop', '--fastv', '--prune', '--shrink')
FREE = ('analyse',)  # its first word chooses a function, whose parameters are the options


def refused(words: list[str], *, whole: bool = True) -> str | None:
  """What `hrvlm` would say against the arguments before it does anything; None: nothing.

  whole: the command is one to type, not a mention, so that nothing required is missing.
  """
  words = pages.substituted(words)
  verb, rest = words[0], words[1:]
  if verb not in VERBS:
    return f'no verb {verb}'
  if verb in FREE or '--help' in rest:
    return None
  part, rest = (rest[:1], rest[1:]) if verb in PARTS else ([], rest)
  if part and part[0] not in PARTS[verb]:
    return f'no part {part[0]} of {verb}'
  if verb in PARTS and not part:
    return None
  parser = parser_of(VERBS[verb][0], part)
  if parser is None:
    return f'{verb} has no parser'
  # Knobs of a system and methods are taken before the parser.
  rest = [word for word in rest if not word.startswith(KNOBS) and word != '...']
  try:
    if not whole:
      parser._check_names(rest)
      return None
    arguments = parser.parse(rest)
    spec = getattr(arguments, 'config', None)
    if spec is not None:
      recipe.find(spec)
    if spec is not None and verb in ('train', 'plan', 'tiny'):
      run_config.load(RunConfig, spec, arguments.overrides)
  except UserError as error:
    return str(error)
  return None


def bash_of(block: pages.Block) -> str | None:
  """The block as shell; a block without a language is shell where it begins with our command."""
  if block.language in SHELLS or (not block.language and block.text.startswith(pages.OURS)):
    return block.text
  return None


def untested(block: pages.Block) -> list[str]:
  """Why a block is not tested; empty: it is."""
  where = f'{block.page}: `{block.first}`'
  if (text := bash_of(block)) is not None:
    problems = []
    for words in pages.commands(text):
      arguments = pages.own(words)
      # A simulation adds the work directory.
      if arguments is not None and (said := refused(arguments, whole='simulate' not in words)):
        problems.append(f'{block.page}: {shlex.join(words)}: {said}')
      if words[0] != 'hrvlm' and not any(
          shlex.join(words).startswith(known) for known in pages.STANDINS['others']):
        problems.append(f'{block.page}: {shlex.join(words)}: pages.toml says nothing of it')
    return problems
  kind = 'python' if block.language == 'python' or block.of('python') else 'shown'
  entry = block.of(kind)
  if entry is None:
    return [f'{where}: pages.toml names no test of it']
  if kind == 'python':
    ast.parse(textwrap.dedent(block.text))
  return []


def test_every_block_of_every_page_is_tested():
  problems, count = [], 0
  for path in pages.pages():
    for block in pages.blocks(path):
      count += 1
      problems += untested(block)
  assert not problems, '\n'.join(problems)
  assert count > 20


def test_every_command_in_the_text_has_options_that_exist():
  problems = []
  for path in [*pages.pages(), *(ROOT / 'configs').rglob('*.py')]:
    for span in pages.inline(path):
      words = shlex.split(span.replace('[', ' ').replace(']', ' '))[1:]
      if words[0] not in ('NAME', 'VERB') and (said := refused(words, whole=False)):
        problems.append(f'{path.relative_to(ROOT)}: `{span}`: {said}')
  assert not problems, '\n'.join(problems)


def test_every_header_and_every_example_can_be_typed():
  problems, count = [], 0
  for path in sorted((ROOT / 'configs').rglob('*.py')):
    for words in pages.header(path):
      count += 1
      if said := refused(words[1:]):
        problems.append(f'{path.relative_to(ROOT)}: {shlex.join(words)}: {said}')
  for verb, example in EXAMPLES.items():
    for words in pages.commands(example.replace('source <(', '').rstrip(')')):
      if said := refused(words[1:]):
        problems.append(f'hrvlm {verb} --help: {example}: {said}')
  assert not problems, '\n'.join(problems)
  assert count > 20


def test_a_page_with_an_untested_block_fails():
  """Each kind of block, planted."""
  page = ROOT / 'README.md'
  for text, words in (
      ('```python\nimport nothing\n```\n', 'names no test'),
      ('```\nsome output\n```\n', 'names no test'),
      ('```bash\nhrvlm train --config configs/tiny/pheye.py\n```\n', 'workdir'),
      ('```bash\nhrvlm train --config pheye --workdir D --config.training.stepz=2\n```\n', 'steps'),
      ('```bash\nhrvlm doctr\n```\n', 'no verb'),
      ('```bash\nhrvlm ask --checkpoint D x.png "?" && terraform apply\n```\n', 'terraform'),
      ('```bash\npython -m hrvlm_jax.cli train --config no_such --workdir D\n```\n', 'no_such')):
    [block] = pages.blocks(page, text)
    told = untested(block)
    assert told and any(words in line for line in told), (text, told)


def test_the_list_of_stand_ins_names_what_exists():
  """Tests that are named are there, and entries of blocks that have gone are none."""
  table = pages.STANDINS
  entries = [*table['python'], *table['shown']]
  named = {entry['test'] for entry in entries if 'test' in entry} | set(table['others'].values())
  named |= {run.removeprefix('test ') for run in table['runs'].values() if run.startswith('test ')}
  assert not (gone := [name for name in sorted(named) if not (ROOT / name).is_file()]), gone
  found = {(block.page, block.first) for path in pages.pages() for block in pages.blocks(path)}
  assert not (stale := [e for e in entries if (e['page'], e['first']) not in found]), stale
  spans = {span for span in pages.inline(ROOT / 'README.md') if len(span.split()) > 2}
  spans = {span for span in spans if not re.fullmatch(r'hrvlm data \w+', span)}
  bare = {'hrvlm doctor'}  # no argument, and yet a row
  assert spans | bare == set(table['runs']), (spans | bare) ^ set(table['runs'])


def test_short_snippets_run(tmp_path, monkeypatch):
  """Those with `run` in pages.toml, each in a folder of its own."""
  count = 0
  for path in pages.pages():
    for block in pages.blocks(path):
      entry = block.of('python')
      if entry is None or 'run' not in entry:
        continue
      text, count = textwrap.dedent(block.text), count + 1
      for old, new in entry['run'].items():
        assert old in text
        text = text.replace(old, new)
      folder = tmp_path / str(count)
      folder.mkdir()
      monkeypatch.chdir(folder)
      monkeypatch.setattr(registry, '_MODULES', dict(registry._MODULES))  # one of them registers
      with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(text, block.page, 'exec'), {})
  assert count == 3


@pytest.fixture(scope='module')
def journey(tmp_path_factory):
  """A folder in which README's first command was run, small, and what its other commands name."""
  folder = tmp_path_factory.mktemp('journey')
  with contextlib.chdir(folder):
    assert main(['quickstart', '--smoke']) == 0
    image = next(pathlib.Path('runs/quickstart/data/eval/images').iterdir())
    Image.open(image).save('photo.png')
    row = {'image': 'photo.png', 'question': 'What does the red sign say?', 'answer': 'K'}
    pathlib.Path('own.jsonl').write_text(json.dumps(row) + '\n')
    pathlib.Path('questions.jsonl').write_text(
      json.dumps({'image': 'photo.png', 'question': row['question']}) + '\n')
    pathlib.Path('own.py').write_text(OWN)
  return folder


OWN = """
import ml_collections
from hrvlm_jax.core.config import to_dict
from hrvlm_jax.lab import quickstart

def get_config():
  config = ml_collections.ConfigDict()
  config.model = to_dict(quickstart.model(15))
  config.data = dict(train='runs/quickstart/data/train/needle.json',
                     tokenizer='runs/quickstart/tokenizer', lengths=(192,))
  config.training = dict(steps=2, batch_size=2, log_every=1,
                         optimizer=dict(learning_rate=1e-3, warmup=0.5))
  return config
"""


@pytest.mark.full('pages')
def test_the_commands_of_the_readme_run(journey, capsys, monkeypatch):
  """The table's in its order, an export before what reads one; then those of the fenced blocks."""
  monkeypatch.chdir(journey)
  monkeypatch.setenv('HRVLM_CACHE', str(journey / 'cache'))
  runs = [run for run in pages.STANDINS['runs'].values() if not run.startswith('test ')]
  runs.sort(key=lambda run: run.startswith('hrvlm convert'))
  told = []
  for run in runs:
    words = shlex.split(run)[1:]
    try:
      status = main(words)
    except SystemExit as end:  # --help
      status = end.code or 0
    out = capsys.readouterr()
    if status != 0:
      told.append(f'{run}: status {status}: {out.err[-500:]}')
  assert not told, '\n'.join(told)
  assert json.loads((journey / 'answers.jsonl').read_text().splitlines()[0])['question']
  for name in ('out.png', 'runs/own', 'runs/sweep', 'runs/back', 'runs/scores'):
    assert (journey / name).exists(), name
  (journey / 'answers.jsonl').unlink()  # the block writes it with settings of its own
  [block] = [block for block in pages.blocks(ROOT / 'README.md')
             if block.text.startswith('hrvlm ask')]
  for words in pages.commands(block.text):
    if words[1] == 'chat':
      monkeypatch.setattr('sys.stdin', io.StringIO('What does the red sign say?\n'))
    assert main([*words[1:], *(['--max-new-tokens', '2'] if words[1] == 'ask' else [])]) == 0


@pytest.mark.full('pages')
def test_longer_snippets_run(journey, monkeypatch):
  """Those with `after` in pages.toml."""
  monkeypatch.chdir(journey)
  found = [(block, block.of('python')) for path in pages.pages() for block in pages.blocks(path)]
  found = [(block, entry['after']) for block, entry in found if entry and 'after' in entry]
  for block, values in found:
    text = textwrap.dedent(block.text)
    for old, new in values.items():
      assert old in text
      text = text.replace(old, new)
    exec(compile(text, block.page, 'exec'), {})
  assert len(found) == 2


@pytest.mark.full('pages')
def test_an_export_opens_as_the_page_says(journey, monkeypatch):
  """docs/weights.md in PyTorch: the snippet with the quickstart's model, its crops and tokens."""
  monkeypatch.chdir(journey)
  assert main(['export', '--checkpoint', 'runs/quickstart/checkpoint', '--to', 'runs/transformers',
               '--for', 'transformers']) == 0
  [block] = [block for block in pages.blocks(ROOT / 'docs/weights.md') if block.of('python')]
  image = Image.fromarray(np.zeros((80, 640, 3), np.uint8))
  messages = [{'role': 'user', 'content': [
    {'type': 'image', 'image': image}, {'type': 'text', 'text': 'What does the red sign say?'}]}]
  text = block.text.replace("{'max_crops': 20, 'num_tokens': 500}",
                            "{'max_crops': 3, 'num_tokens': 28}").replace('=64', '=2')
  names = {'FOLDER': str(journey / 'runs/transformers'), 'messages': messages}
  exec(compile(text, block.page, 'exec'), names)
  assert names['ask'] is not None and names['inputs']['input_ids'].shape[0] == 1
