"""What a number was made from: hashes of data and checkpoint, versions, settings."""

from collections.abc import Iterable, Sequence
import datetime
import hashlib
import importlib.metadata
import json
from pathlib import Path
import platform
import subprocess
import sys
from typing import Any

import hrvlm_jax

PACKAGES = ('hrvlm-jax', 'jax', 'jaxlib', 'flax', 'numpy', 'pillow', 'tokenizers')


def file_hash(path: str | Path) -> str:
  """SHA-256 of a file's bytes."""
  digest = hashlib.sha256()
  with Path(path).open('rb') as file:
    while block := file.read(1 << 22):
      digest.update(block)
  return digest.hexdigest()


def files_hash(paths: Iterable[str | Path], *, root: str | Path) -> str:
  """SHA-256 over names (relative to `root`) and contents of files, in order of name."""
  root = Path(root)
  digest = hashlib.sha256()
  for path in sorted({Path(p) for p in paths}):
    name = path.relative_to(root) if path.is_relative_to(root) else path.name
    digest.update(f'{name}\0{file_hash(path)}\n'.encode())
  return digest.hexdigest()


def folder_hash(folder: str | Path) -> str:
  """SHA-256 of a checkpoint: a file, or every file of a folder with its relative name."""
  folder = Path(folder)
  if folder.is_file():
    return file_hash(folder)
  return files_hash((p for p in folder.rglob('*') if p.is_file()), root=folder)


def versions() -> dict[str, str]:
  """Python, the machine's kind and the packages that can change a number."""
  found = {'python': sys.version.split()[0], 'platform': platform.platform()}
  for name in PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = getattr(hrvlm_jax, '__version__', '') if name == 'hrvlm-jax' else ''
  return {name: version for name, version in found.items() if version}


def config_hash(config: Any) -> str:
  """SHA-256 of a config's values (`core.config.to_dict`, keys in order)."""
  return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()


def made(config: Any, command: Sequence[str] | None = None) -> dict[str, Any]:
  """What a result that is kept was made from: commit, config_hash, versions, date, command.

  Args:
    config: plain values of everything that decided it.
    command: default: this process's own.
  """
  return {'commit': git_commit(), 'config_hash': config_hash(config), 'versions': versions(),
          'date': datetime.datetime.now(datetime.UTC).date().isoformat(),
          'command': ' '.join(['hrvlm', *sys.argv[1:]] if command is None else command)}


def git_commit() -> str:
  """Commit of the source tree, with `+changes` when files differ from it; '' outside git."""
  here = Path(__file__).parent
  ask = lambda *args: subprocess.run(
      ['git', '-C', str(here), *args], capture_output=True, text=True, timeout=20)
  try:
    commit = ask('rev-parse', 'HEAD')
    if commit.returncode:
      return ''
    dirty = ask('status', '--porcelain', '--untracked-files=no', '--', str(here.parent))
    return commit.stdout.strip() + ('+changes' if dirty.stdout.strip() else '')
  except (OSError, subprocess.TimeoutExpired):
    return ''
