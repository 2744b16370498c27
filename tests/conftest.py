"""Settings of the whole suite: CPU, exact matrix products, no network, and no hidden skips."""

import contextlib
import gc
import importlib.util
import os
import pathlib
import shutil
import socket

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Set before anything imports JAX; tests that start processes hand them on.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('JAX_DEFAULT_MATMUL_PRECISION', 'highest')
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(ROOT / '.cache' / 'jax'))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.5')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '0')
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('TRANSFORMERS_OFFLINE', '1')
os.environ.setdefault('HF_MODULES_CACHE', str(ROOT / '.cache' / 'hf_modules'))
os.environ.setdefault('MPLBACKEND', 'Agg')

# Much of the suite's time goes into LLVM optimising programs that run once. Without it, and without
# the emitters that build fused loops through MLIR, they compute the same operations (measured on
# one training: a quarter, and then a third less CPU time).
for flag in ('--xla_backend_optimization_level=0', '--xla_cpu_use_fusion_emitters=false'):
  flags = os.environ.get('XLA_FLAGS', '')
  if flag.partition('=')[0] not in flags:
    os.environ['XLA_FLAGS'] = f'{flags} {flag}'.strip()

import pytest  # noqa: E402

# The only reasons for which a test may be skipped. A skip of any other kind is a failure
# (tests/packaging/test_skips.py).
SKIP_MARKS = ('gpu', 'tpu', 'peers', 'gcloud', 'libtpu')


# What runs in under two minutes on two cores and touches every room: `pytest -m fast`, before each
# commit. Folders and files below tests/.
FAST = (
  'test_house.py', 'lint', 'packaging/test_ruff.py', 'packaging/test_levels.py', 'core',
  'vision/test_vit.py', 'language/test_tokenizer.py', 'language/test_conversation.py',
  'language/test_chat.py', 'language/test_prompt.py', 'language/test_bpe.py',
  'data/test_transforms.py', 'data/test_sources.py', 'data/test_packing.py', 'data/test_order.py',
  'data/test_checks.py', 'checkpoint/test_hf.py', 'checkpoint/test_rows.py', 'evaluation/metrics',
  'evaluation/test_samples.py', 'evaluation/test_bad_files.py', 'evaluation/test_runner.py',
  'cli/test_main.py', 'cli/test_arguments.py',
)


def pytest_addoption(parser):
  parser.addoption('--full', metavar='PART',
                   help='the tests marked full(PART) and no others (scripts/test_full.sh)')


MEMORY = 3 << 29  # of one worker, in bytes, before compiled programs are dropped


def resident() -> int:
  """Bytes of this process in memory; 0 where the system does not say."""
  statm = pathlib.Path('/proc/self/statm')
  return int(statm.read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE') if statm.exists() else 0


@pytest.fixture(autouse=True, scope='module')
def bounded_memory():
  """A worker compiles thousands of programs and JAX keeps them all: they go when they are many.

  The C library keeps what is freed, in pieces between what is still held, until it is told to give
  whole pages back.
  """
  yield
  if resident() > MEMORY:
    import ctypes

    import jax
    jax.clear_caches()
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # another C library has no such call
      ctypes.CDLL(None).malloc_trim(0)


def _missing(mark: str) -> str | None:
  """Why tests with `mark` cannot run here, or None when they can."""
  if mark in ('gpu', 'tpu'):
    import jax

    if all(device.platform != mark for device in jax.devices()):
      return f'no {mark.upper()} here'
  if mark == 'libtpu' and importlib.util.find_spec('libtpu') is None:
    return 'libtpu, the compiler for TPUs, is not installed'
  if mark == 'peers' and not os.environ.get('HRVLM_PEERS'):
    return 'HRVLM_PEERS names no folder of other projects'
  if mark == 'gcloud' and not (os.environ.get('HRVLM_GCLOUD') and shutil.which('gcloud')):
    return 'HRVLM_GCLOUD is not set or gcloud is absent'
  return None


def pytest_collection_modifyitems(config, items):
  part, kept, left = config.getoption('--full'), [], []
  for item in items:
    mark = item.get_closest_marker('full')
    (kept if part == (mark and mark.args[0]) else left).append(item)
    place = item.path.relative_to(ROOT / 'tests').as_posix()
    if any(place == name or place.startswith(f'{name}/') for name in FAST):
      item.add_marker(pytest.mark.fast)
  if left:
    items[:] = kept
    config.hook.pytest_deselected(items=left)
  reasons: dict[str, str | None] = {}
  for item in items:
    for mark in SKIP_MARKS:
      if item.get_closest_marker(mark) is None:
        continue
      if mark not in reasons:
        reasons[mark] = _missing(mark)
      if reasons[mark]:
        item.add_marker(pytest.mark.skip(reason=f'{mark}: {reasons[mark]}'))


def pytest_collection_finish(session):
  """What was imported stays until the end: collections of garbage need not look through it.

  Half a million objects, a third of a second each time that a pipeline ends.
  """
  del session
  gc.freeze()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
  del call
  outcome = yield
  report = outcome.get_result()
  if report.skipped and not any(item.get_closest_marker(mark) for mark in SKIP_MARKS):
    reason = getattr(report, 'wasxfail', None) or report.longrepr
    report.outcome = 'failed'
    report.longrepr = f'skipped without one of the marks {SKIP_MARKS}: {reason}'
    if hasattr(report, 'wasxfail'):
      del report.wasxfail


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report(collector):
  outcome = yield
  report = outcome.get_result()
  if report.outcome == 'skipped':
    report.outcome = 'failed'
    report.longrepr = f'{collector.nodeid} skipped as a whole: {report.longrepr}'


_connect = socket.socket.connect


def _local_connect(self, address):
  host = address[0] if isinstance(address, tuple) else 'localhost'
  if host not in ('localhost', '127.0.0.1', '::1'):
    raise OSError(f'the test suite uses no network, but something asked for {host}')
  return _connect(self, address)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
  """A test that reaches for the network fails at once, and says for which host."""
  monkeypatch.setattr(socket.socket, 'connect', _local_connect)


@pytest.fixture
def port():
  """A free port whose successor is free, too."""
  for _ in range(100):
    with socket.socket() as first:
      first.bind(('localhost', 0))
      number = first.getsockname()[1]
      with socket.socket() as second:
        try:
          second.bind(('localhost', number + 1))
        except OSError:
          continue
        return number
  raise AssertionError('no two free ports in a row')
