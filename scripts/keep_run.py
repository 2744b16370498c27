"""Keeps what a test run gave as one row of a page: commit, date, versions, counts, seconds.

    python scripts/keep_run.py PAGE.md NAME JUNIT.xml [JUNIT.xml ...]

The page has a table whose first column is the name; the row of that name is replaced, or added.
Several reports, of runs of the same commit one after the other, are added up; none may hold a test
of another.
"""

import datetime
import importlib.metadata
import pathlib
import platform
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

PACKAGES = ('jax', 'flax', 'orbax-checkpoint', 'grain', 'numpy', 'torch', 'transformers', 'pillow',
            'gradio', 'mkdocs-material')


def row(name: str, *reports: str) -> str:
  """A line of the table.

  Raises:
    ValueError: one test in two reports.
  """
  roots = [ElementTree.parse(report).getroot() for report in reports]
  tests = [(case.get('classname'), case.get('name')) for root in roots
           for case in root.iter('testcase')]
  if twice := sorted({test for test in tests if tests.count(test) > 1}):
    raise ValueError(f'{reports}: in two of them: {twice}')
  suites = [suite for root in roots for suite in root.iter('testsuite')]
  count = lambda key: sum(int(float(suite.get(key) or 0)) for suite in suites)
  wrong, skipped = count('failures') + count('errors'), count('skipped')
  git = lambda *args: subprocess.run(['git', *args], capture_output=True, text=True).stdout.strip()
  # The page itself has changed when the part before this one was kept.
  changed = git('status', '--porcelain', '--untracked-files=no', '--', ':!docs')
  here = {d.name.lower() for d in importlib.metadata.distributions()}
  packages = ', '.join(f'{p} {importlib.metadata.version(p)}' for p in PACKAGES if p in here)
  return ' | '.join([
    f'| {name}', git('rev-parse', '--short', 'HEAD') + ('+changes' if changed else ''),
    datetime.datetime.now(datetime.UTC).date().isoformat(), f'Python {platform.python_version()}',
    packages, str(count('tests') - wrong - skipped), str(wrong), str(skipped),
    f'{sum(float(suite.get("time") or 0) for suite in suites):.0f} |'])


def main(page: str, name: str, *reports: str) -> None:
  """Replaces or adds the row."""
  path = pathlib.Path(page)
  lines, made = path.read_text(encoding='utf-8').splitlines(), row(name, *reports)
  old = [i for i, line in enumerate(lines) if line.startswith(f'| {name} |')]
  if old:
    lines[old[0]] = made
  else:
    last = max(i for i, line in enumerate(lines) if line.startswith('|'))
    lines.insert(last + 1, made)
  path.write_text('\n'.join(lines) + '\n', encoding='utf-8')
  print(made)


if __name__ == '__main__':
  main(*sys.argv[1:])
