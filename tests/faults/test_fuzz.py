"""Every verb with hostile files and arguments: it ends well, or with a sentence and status 2.

A case is a function of its number (`tried`). The
first level runs a fixed set of them, the part `faults` twenty minutes.
"""

import collections
import contextlib
import io
import itertools
import json
import os
import pathlib
import random
import resource
import signal
import sys
import tempfile
import time
import traceback

import pytest

import hrvlm_jax
from hrvlm_jax.cli import main as cli
from tests.faults import verbs

FIRST = 150  # cases of the first level: less than a minute of one core
# Cases that once ended otherwise; the first level runs them too.
FOUND = (1195, 1381, 1754, 2041, 2327, 3304, 3578, 4004, 4856, 5592, 5709, 6113)
MINUTES = 20.0  # of the part `faults`
SECONDS = 20  # a case that takes longer was not refused: it works
MEMORY = 12 << 30  # of address space that a case may take beyond what is there
# Verbs that read files, and fast, come often; those that would train or measure, seldom.
OFTEN = {'eval': 12, 'convert': 8, 'data': 8, 'export': 3, 'ask': 4, 'doctor': 2, 'params': 3,
         'finetune': 2, 'curate': 2}
# A list that has some that are bad, and a question answered with no, end with 1.
ANSWERED = {'data', 'doctor', 'chat', 'ask', 'convert'}
# These do what was asked for, however long it takes.
LONG = {'train', 'finetune', 'tiny', 'sweep', 'compare', 'plan', 'ask', 'chat', 'encode', 'analyse',
        'data', 'convert'}
LEFT = ('.part', '.partial', '.old-', '.scratch', '.tmp')


class _Late(BaseException):
  """A case took its time."""


def tried(number: int, world: verbs.World) -> tuple[str, str | None]:
  """(verb, what is wrong with its end or None) of a case."""
  rng = random.Random(number)
  names = sorted(cli.VERBS)
  verb = (names[number] if number < len(names) else  # each once, then by weight
          rng.choices(names, [OFTEN.get(name, 1) for name in names])[0])
  with tempfile.TemporaryDirectory(prefix='case-') as folder, contextlib.chdir(folder):
    case = pathlib.Path(folder)
    argv, stdin = verbs.case_of(verb, world, case, rng)
    status, out, err = ran(argv, stdin)
    wrong = judged(verb, status, err, case)
    shown = [word if len(word) < 100 else f'{word[:100]}...' for word in argv]
    return verb, wrong and f'case {number}: hrvlm {shown}: {wrong}\n{out[-500:]}\n{err[-3000:]}'


def ran(argv, stdin: str) -> tuple[object, str, str]:
  """(status, standard output, standard error) of a command in this process."""
  out, err = io.StringIO(), io.StringIO()
  os.environ.pop('HRVLM_VERIFY', None)  # what --no-verify of the case before has set

  def late(*_):
    raise _Late

  before = signal.signal(signal.SIGALRM, late)
  signal.alarm(SECONDS)
  try:
    with (contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _stdin(stdin)):
      status = cli.main(argv)
  except SystemExit as error:
    status = error.code or 0
  except _Late:
    status = 'late'
  except BaseException:  # noqa: BLE001 - a panic of Rust code is no Exception
    status = 'traceback'
    err.write(traceback.format_exc())
  finally:
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
  return status, out.getvalue(), err.getvalue()


@contextlib.contextmanager
def _stdin(text: str):
  before, sys.stdin = sys.stdin, io.StringIO(text)
  try:
    yield
  finally:
    sys.stdin = before


def judged(verb: str, status, err: str, case: pathlib.Path) -> str | None:
  """What is wrong with the end of a command; None when it is as promised."""
  if status == 'late':
    return None if verb in LONG else f'still at work after {SECONDS} s'
  if status not in (0, 1, 2) or (status == 1 and verb not in ANSWERED):
    return f'ended with {status}'
  if status == 2:
    said = [line for line in err.splitlines() if line.startswith('hrvlm ')]
    if not said or 'Traceback' in err or len(err) > 20_000:
      return 'no sentence'
    if (case / 'out').is_dir() and verb in ('convert', 'export') and any((case / 'out').iterdir()):
      return 'the target was written'
  left = [path.name for path in case.rglob('*') if any(mark in path.name for mark in LEFT)]
  return f'left behind: {left}' if left else None


def test_verbs_end_well_or_with_a_sentence(world, once):
  run(world, (*range(FIRST), *FOUND), known=set(cli.VERBS))


@pytest.mark.full('faults')
def test_verbs_for_twenty_minutes(world, once):
  end = time.monotonic() + 60 * MINUTES
  run(world, itertools.takewhile(lambda _: time.monotonic() < end, itertools.count(FIRST)))


def run(world, numbers, known=frozenset()):
  counts, wrong = collections.Counter(), []
  for number in numbers:
    verb, message = tried(number, world)
    counts[verb] += 1
    wrong += [message] if message else []
    if len(wrong) > 20:
      break
  assert not wrong, '\n\n'.join(wrong)
  assert set(counts) >= known, known - set(counts)


@pytest.fixture
def once(world, monkeypatch, tmp_path):
  """The sound checkpoint is loaded once, so that its programs are compiled once; caches and
  environment stay this test's."""
  import jax

  load, held = hrvlm_jax.load, {}

  def loaded(what, **options):
    if str(what) != str(world.root / 'checkpoint'):
      return load(what, **options)
    key = json.dumps(options, default=repr, sort_keys=True)
    if key not in held:
      held[key] = load(what, **options)
    return held[key]

  monkeypatch.setattr(hrvlm_jax, 'load', loaded)
  for name in ('HRVLM_VERIFY', 'JAX_COMPILATION_CACHE_DIR'):
    monkeypatch.setenv(name, os.environ.get(name, ''))
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv('HRVLM_CACHE', str(tmp_path / 'cache'))
  soft, hard = resource.getrlimit(resource.RLIMIT_AS)
  statm = pathlib.Path('/proc/self/statm')
  if statm.exists():  # what asks for more memory than a machine has is told so, by malloc
    now = int(statm.read_text().split()[0]) * os.sysconf('SC_PAGE_SIZE')
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, hard))
  yield
  resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
  jax.clear_caches()
