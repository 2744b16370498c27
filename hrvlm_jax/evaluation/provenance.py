"""What a number was made from: hashes of data and checkpoint, versions, settings."""

from collections.abc import Iterable
import hashlib
import importlib.metadata
from pathlib import Path
import platform
import subprocess
import sys

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
