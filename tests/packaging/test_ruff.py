"""The whole repository passes the linter as configured in pyproject.toml."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_ruff():
  run = subprocess.run(
      [sys.executable, '-m', 'ruff', 'check', '--no-cache', '--output-format', 'concise', '.'],
      cwd=ROOT, capture_output=True, text=True)
  assert run.returncode == 0, run.stdout + run.stderr
