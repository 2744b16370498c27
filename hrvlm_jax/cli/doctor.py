"""`hrvlm doctor`: is this machine and installation fit to work, and if not, what to do.

`hrvlm doctor CHECKPOINT` reads a checkpoint (or all of a work directory) against its checksums.
"""

import dataclasses
import importlib.metadata
import os
import pathlib
import platform
import re
import shutil
import tempfile
import time

from hrvlm_jax import __version__
from hrvlm_jax.cli.arguments import Parser
from hrvlm_jax.cli.main import cache_folder
from hrvlm_jax.core import installed, machine as cpu

_PACKAGE = installed.NAME


@dataclasses.dataclass(frozen=True)
class Finding:
  """One line of the report.

  Attributes:
    status: 'ok', 'none' (an optional thing is absent) or 'problem'.
    name: what was looked at.
    found: what was found.
    advice: what to do about a problem, or how to get an optional thing.
  """

  status: str
  name: str
  found: str
  advice: str = ''


def main(argv: list[str]) -> int:
  """Checks versions, devices, memory, speed, optional parts and the cache, or every file of a
  checkpoint. Exit status 1 when there is a problem.
  """
  parser = Parser('doctor', main.__doc__)
  parser.add_argument('checkpoint', nargs='?', metavar='CHECKPOINT',
                      help='a checkpoint or a work directory: all its files are read')
  arguments = parser.parse(argv)
  if arguments.checkpoint is not None:
    findings = checkpoints(arguments.checkpoint)
  else:
    findings = [*packages(), *devices(), *machine(), *speed(), *extras(), cache()]
  width = max(len(finding.name) for finding in findings)
  for finding in findings:
    advice = f'  -> {finding.advice}' if finding.advice else ''
    print(f'{finding.status:<7}  {finding.name:<{width}}  {finding.found}{advice}')
  problems = sum(finding.status == 'problem' for finding in findings)
  print('no problem found' if not problems else
        f'{problems} problem{"s" * (problems > 1)} found; see the advice after ->')
  return 1 if problems else 0


def checkpoints(place: str) -> list[Finding]:
  """One line per checkpoint that is whole, one per file that is damaged.

  Raises:
    UserError: no checkpoint there.
  """
  from hrvlm_jax.checkpoint import layout, manifest

  root = layout.to_path(place)
  own = (layout.beside(root) / layout.MARKER).exists()
  steps = [] if own else layout.steps(root)
  findings = []
  for folder in [root / layout.STEPS / str(step) for step in steps] or [root]:
    clock = time.perf_counter()
    bad = manifest.damaged(folder)
    findings += [Finding('problem', str(folder), text) for text in bad]
    if bad:
      findings[-1] = dataclasses.replace(findings[-1], advice=manifest.advice(folder))
      continue
    files = manifest.Manifest(layout.resolve(folder)).files
    if not files:
      findings.append(Finding('none', str(folder), 'has no manifest.json: nothing to check it '
                              'by (written by an earlier release)'))
      continue
    size = sum(size for size, _ in files.values())
    findings.append(Finding('ok', str(folder), f'{len(files)} files, {size / 2**20:.1f} MiB read '
                            f'in {time.perf_counter() - clock:.1f} s: all as written'))
  return findings


def packages() -> list[Finding]:
  """Python and every required package, held against the tested versions."""
  findings = [Finding('ok', 'hrvlm_jax', __version__),
              Finding('ok', 'python', platform.python_version())]
  try:
    required = importlib.metadata.requires(_PACKAGE) or []
  except importlib.metadata.PackageNotFoundError:
    return [*findings, Finding('problem', _PACKAGE, 'not installed as a package',
                               'pip install -e . in the source folder')]
  for requirement in required:
    if 'extra ==' in requirement:
      continue
    name, bounds = re.match(r'([\w.-]+)(?:\[.*?\])?\s*\(?([^;)]*)', requirement).groups()
    try:
      version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      findings.append(Finding('problem', name, 'absent', f"pip install '{name}{bounds}'"))
      continue
    fits = within(version, bounds)
    findings.append(Finding('ok' if fits else 'problem', name, version,
                            '' if fits else f"tested with {bounds}; pip install '{name}{bounds}'"))
  return findings


def within(version: str, bounds: str) -> bool:
  """Whether a version lies within bounds such as `>=0.10,<0.13`.

  Pre-release marks are ignored; other comparisons than >=, < and == are taken as fulfilled.
  """
  numbers = lambda text: [int(n) for n in re.findall(r'\d+', text.split('+')[0])[:4]]
  for bound in filter(None, (part.strip() for part in bounds.split(','))):
    sign, limit = re.match(r'([<>=!~]+)\s*(.*)', bound).groups()
    have, want = numbers(version), numbers(limit)
    length = max(len(have), len(want))
    have += [0] * (length - len(have))
    want += [0] * (length - len(want))
    if (sign == '>=' and have < want) or (sign == '<' and have >= want) or (
        sign == '==' and have != want):
      return False
  return True


def devices() -> list[Finding]:
  """What JAX computes on, and whether a GPU or TPU stands unused."""
  try:
    import jax

    found = jax.devices()
  except Exception as error:  # noqa: BLE001 - whatever keeps JAX from starting is the finding
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return [Finding('problem', 'devices', f'JAX does not start: {lines[0][:200]}',
                    'see the message; JAX_PLATFORMS=cpu uses the CPU alone')]
  platform_name = found[0].platform
  kinds = ', '.join(sorted({device.device_kind for device in found}))
  findings = [Finding('ok', 'devices', f'{len(found)} x {platform_name} ({kinds})')]
  wanted = os.environ.get('JAX_PLATFORMS', '')
  if platform_name == 'cpu' and not wanted:
    if shutil.which('nvidia-smi'):
      findings.append(Finding('problem', 'gpu', 'an NVIDIA driver is here, JAX uses the CPU',
                              installed.add('cuda')))
    elif list(pathlib.Path('/dev').glob('accel*')):
      findings.append(Finding('problem', 'tpu', 'a TPU is here, JAX uses the CPU',
                              installed.add('tpu')))
  memory = getattr(found[0], 'memory_stats', lambda: None)()
  if memory and 'bytes_limit' in memory:
    findings.append(Finding('ok', 'device memory', f'{memory["bytes_limit"] / 2**30:.1f} GiB each'))
  return findings


def machine() -> list[Finding]:
  """Cores and memory that this process may use."""
  total = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  for limit in ('/sys/fs/cgroup/memory.max', '/sys/fs/cgroup/memory/memory.limit_in_bytes'):
    path = pathlib.Path(limit)
    if path.exists() and (text := path.read_text().strip()).isdigit():
      total = min(total, int(text))
  gib = total / 2**30
  enough = gib >= 4
  return [Finding('ok', 'cpu', cpu.here().title), Finding('ok', 'cores', str(cpu.cores())),
          Finding('ok' if enough else 'problem', 'memory', f'{gib:.1f} GiB',
                  '' if enough else 'quickstart and the tests need about 4 GiB')]


def speed() -> list[Finding]:
  """What the CPU multiplies and moves in a second, and how long the quickstart takes with it."""
  try:
    from hrvlm_jax.lab import speed as measured

    found = measured.measure()
  except Exception as error:  # noqa: BLE001 - JAX without a CPU, or none: said by `devices`
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return [Finding('none', 'speed', f'of the CPU not measured: {lines[0][:200]}')]
  m, k, n = measured.SHAPE
  return [
    Finding('ok', 'products', f'{found.gflops:.0f} GFLOP/s in float32 ({m} x {k} x {n})'),
    Finding('ok', 'bandwidth', f'{found.bandwidth:.1f} GB/s of memory read and written'),
    Finding('ok', 'quickstart', f'takes {measured.words(found.gflops)} here while nothing else '
            'runs, after installation')]


def extras() -> list[Finding]:
  """Optional packages and what they are for."""
  optional = {
      'torch': ('torch', 'pickled weights and side-by-side checks'),
      'transformers': ('torch', 'side-by-side checks'),
      'fastapi': ('serve', 'hrvlm serve'),
      'gradio': ('page', 'the page of hrvlm serve'),
      'libtpu': ('tpu', 'TPUs, and hrvlm plan for them'),
      'gcsfs': ('tpu', 'work directories in buckets'),
      'xprof': ('profile', 'opening profiles'),
      'wandb': ('wandb', 'logging to Weights & Biases'),
      'pytest': ('test', 'the test suite'),
  }
  findings = []
  for name, (extra, purpose) in optional.items():
    try:
      findings.append(Finding('ok', name, importlib.metadata.version(name)))
    except importlib.metadata.PackageNotFoundError:
      findings.append(Finding('none', name, f'absent; for {purpose}', installed.add(extra)))
  return findings


def cache() -> Finding:
  """Whether the cache folder can be written, and how much space is left there."""
  folder = cache_folder()
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder):
      free = shutil.disk_usage(folder).free / 2**30
  except OSError as error:
    return Finding('problem', 'cache', f'{folder}: {error.strerror}',
                   'set HRVLM_CACHE to a folder that you may write to')
  if free < 1:
    return Finding('problem', 'cache', f'{folder}, {free:.1f} GiB free', 'free some disk space')
  return Finding('ok', 'cache', f'{folder}, {free:.0f} GiB free')
