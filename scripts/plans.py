#!/usr/bin/env python
"""Compiles the published recipes for TPU slices and writes docs/plans.md.

    python scripts/plans.py                    all cases (libtpu: pip install -e '.[tpu]')
    python scripts/plans.py --only llava_hr    cases whose name contains the word
    python scripts/plans.py --missing          cases without a report of this command, or whose
                                               compilation took more than five minutes of CPU time
    python scripts/plans.py --table            writes the page from the reports that are there

Each case is one `hrvlm plan` command; its report is kept as docs/plans/NAME.json, its program as
docs/plans/programs/NAME.txt.xz, and what later ones must not exceed in docs/plans/bounds.json.
"""

import argparse
import json
import pathlib
import re
import shlex
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
REPORTS = ROOT / 'docs' / 'plans'
GIB = 1 << 30

# Name of the report -> arguments of `hrvlm plan`; mesh and micro-batches are the recipe's for these
# chips. The global batch is the published one.
CASES = {
  'llava_hr_7b_stage2_v5e_16x16': '--config configs/llava_hr.py:7b,stage2,v5e:16x16 '
  '--topology v5e:16x16 --length 2048',
  'llava_hr_7b_stage2_v5p_4x4x4': '--config configs/llava_hr.py:7b,stage2,v5p:4x4x4 '
  '--topology v5p:4x4x4 --length 2048',
  'llava_hr_7b_stage2_v6e_16x16': '--config configs/llava_hr.py:7b,stage2,v6e:16x16 '
  '--topology v6e:16x16 --length 2048',
  'llava_hr_7b_stage2_2xv5e_16x16': '--config configs/llava_hr.py:7b,stage2,2xv5e:16x16 '
  '--topology v5e:16x16 --slices 2 --length 2048',
  'vila_hd_8b_4k_v5e_16x16': '--config configs/vila_hd.py:4k,sft,v5e:16x16 '
  '--topology v5e:16x16 --image 3780x3780',
  'vila_hd_8b_4k_v5p_4x4x4': '--config configs/vila_hd.py:4k,sft,v5p:4x4x4 '
  '--topology v5p:4x4x4 --image 3780x3780',
  'vila_hd_8b_4k_v6e_16x16': '--config configs/vila_hd.py:4k,sft,v6e:16x16 '
  '--topology v6e:16x16 --image 3780x3780',
  'vila_hd_8b_4k_2xv5e_16x16': '--config configs/vila_hd.py:4k,sft,2xv5e:16x16 '
  '--topology v5e:16x16 --slices 2 --image 3780x3780',
  'mc_llava_3b_v5e_8x8': '--config configs/mc_llava.py:full,one_view,v5e:8x8 --topology v5e:8x8',
  'mc_llava_3b_crops_8_v5e_8x8': '--config configs/mc_llava.py:full,crops_8,v5e:8x8 '
  '--topology v5e:8x8 --config.training.remat=attention',
  'pheye_x2_672_v5e_4x4': '--config configs/pheye.py:x2_672,stage2,v5e:4x4 '
  '--topology v5e:4x4 --image 672x672',
  'ps3_4k_v5e_16x16': '--config configs/ps3.py:4k,v5e:16x16 --topology v5e:16x16',
}


# Seconds a step that were asked for, by the reader's optimistic time.
MARKS = {
  'llava_hr_7b_stage2_v5e_16x16': 0.50, 'llava_hr_7b_stage2_v5p_4x4x4': 0.70,
  'mc_llava_3b_v5e_8x8': 0.70, 'pheye_x2_672_v5e_4x4': 1.8, 'ps3_4k_v5e_16x16': 2.3,
  'vila_hd_8b_4k_v5e_16x16': 22, 'vila_hd_8b_4k_v5p_4x4x4': 31}
# What was tried where one is missed.
TRIED = {
  'llava_hr_7b_stage2_v5e_16x16': 'Tried: recomputation of all but '
  'products 0.534 s; windowed einsum on or off, no difference; asynchronous reductions, no '
  'difference. The gradient of the output layer is summed whole (0.019 s), depthwise kernels take '
  '0.038 s, sums over tensor 0.031 s, reduce-scatters of gradients 0.079 s.',
  'llava_hr_7b_stage2_v5p_4x4x4': 'Tried: recomputation of layers, scores in memory: 0.98 s; '
  'asynchronous reductions beside gathers 0.001 s less. Reduce-scatters of gradients stay '
  'synchronous whatever the options.',
  'mc_llava_3b_v5e_8x8': 'Tried: fsdp over all 64 chips, where gradients are summed whole: 1.31 s '
  'with the scores in memory. Dropout takes 0.044 s, the weight of the output layer is gathered '
  'for every chunk of the loss (0.041 s) and its gradient summed whole (0.019 s).',
  'pheye_x2_672_v5e_4x4': 'Tried: windowed einsum, 0.75 s more; recomputation of all but products '
  'needs 43 GiB.',
  'ps3_4k_v5e_16x16': 'Tried: data=2 fsdp=128, whose shards of 9 rows are summed whole. The '
  'attention kernel takes 1.2 s, 0.32 s of it a second forward pass: to keep its result as well '
  'took 17.0 GiB in a prototype.',
  'vila_hd_8b_4k_v5e_16x16': 'Tried: fsdp=64 tensor=4 58.4 s with the scores in memory; '
  'recomputation of whole layers 29.4 s. The vocabulary of 151651 divides by nothing: the output '
  'layer is gathered and its gradient summed for every chunk of the loss.',
  'vila_hd_8b_4k_v5p_4x4x4': 'Tried: fsdp over all 64 chips 65.1 s with the scores in memory; '
  'recomputation of whole layers 36.3 s. The output layer as on v5e.'}

TEXT = """# Plans

Written by `python scripts/plans.py`; do not edit. Each row is the real step of a recipe, compiled
ahead of time for chips that were not there, at the compiler's full effort and stopped before it
generates code. `hrvlm plan` reads the scheduled program in the order of its schedule: what a step
takes, and what it takes it for. It is a model, calibrated on products and memory-bound kernels;
nothing was measured on a chip. Times go from the reader's own, optimistic number to a likely one,
which takes 1.2 times as long. Memory is the compiler's own for what lies there at the peak, and
0.4 GiB that the program's code is allowed.

`hrvlm plan --explain` prints the same account by source function and the ten dearest places with
file and line; `--explain FILE --chip v5e` does so for a program that is stored as text.
`--costs FILE` takes constants that `hrvlm bench tpu_calibrate` measured on a machine with chips.

On which smallest slice of v5e, v5p and v6e each release answers: [answering.md](answering.md), by
`hrvlm plan --step answer`.

`hrvlm plan --search` goes in stages: every mesh with recomputation of whole layers, the best two
with the other policies, the best of all with half and twice the micro-batches. What cannot be cut
or cannot fit by arithmetic (state, gradients, what layers keep) is not compiled.

## Steps

"today" is what the program of these recipes took before, read by the same reader (below). "beyond
products" is the share of the step that is not in matrix products outside of attention.

{steps}
{missing}
By class, seconds of the optimistic time:

{accounts}

## Marks that are missed

{missed}

## Options of the compiler

Of `hrvlm_jax/parallel/compiler.json`, for training and plans alike. Counted with the reader, on
one program each.

{options}

## What these plans said before

The older `hrvlm plan` was a roofline: products at 75 % of the peak, with all messages, memory
traffic and element-wise work hidden behind them. Its seconds and MFU below were never near the
truth. "read" is the scheduled program of the same recipes (commit 6103b18, compiled again at
d302382, stored in docs/plans/before/) by today's reader; attention had its scores in memory on
every mesh.

{before}

## Assumed

{assumed}

```
{commands}
```
"""


def run(name: str, arguments: str) -> bool:
  """Runs one case; returns whether it gave a report."""
  REPORTS.mkdir(parents=True, exist_ok=True)
  out = REPORTS / f'{name}.json'
  command = [sys.executable, '-m', 'hrvlm_jax.cli', 'plan', *shlex.split(arguments)]
  print('+ hrvlm plan', arguments, flush=True)
  program = REPORTS / 'programs' / f'{name}.txt.xz'
  program.parent.mkdir(exist_ok=True)
  done = subprocess.run([*command, '--json', str(out), '--program', str(program),
                         '--timeout', '3600'], cwd=ROOT)
  if done.returncode not in (0, 1) or not out.exists():
    return False
  report = json.loads(out.read_text()) | {'command': f'hrvlm plan {arguments}'}
  out.write_text(json.dumps(report, indent=2) + '\n')
  return True


def bounds(reports: dict[str, dict]) -> dict[str, dict]:
  """What tests allow each step: 2 % more than it takes."""
  return {name: {
    'seconds': round(1.02 * r['step']['seconds'], 4),
    'synchronous_bytes': int(1.02 * r['account']['synchronous_bytes']),
    'attention_share': round(
      1.02 * r['account']['groups'].get('attention', {'share': 0.0})['share'], 4)}
    for name, r in reports.items()}


def kept() -> tuple[dict[str, dict], dict[str, dict]]:
  """(reports by name in the order of the cases, what stood before)."""
  found = {path.stem: json.loads(path.read_text()) for path in sorted(REPORTS.glob('*.json'))}
  before = json.loads((REPORTS / 'before' / 'steps.json').read_text())
  return {name: found[name] for name in CASES if name in found}, before


def is_missing(name: str) -> bool:
  """Whether a case has no report worth keeping."""
  path = REPORTS / f'{name}.json'
  if not path.exists():
    return True
  report = json.loads(path.read_text())
  # On a busy machine the CPU time is the better measure of what free cores would need.
  seconds = min(report['compile_seconds'], report.get('compile_cpu_seconds', float('inf')))
  return report['command'] != f'hrvlm plan {CASES[name]}' or seconds > 300


def page(reports: dict[str, dict], before: dict[str, dict]) -> str:
  """docs/plans.md; `before`: docs/plans/before/steps.json."""
  absent = [name for name in CASES if name not in reports]
  missing = f'\nNo report yet: {", ".join(absent)}.\n' if absent else ''
  assumed = {text for r in reports.values() for text in r['step']['assumptions']}
  return TEXT.format(
    steps=_table(_steps(reports, before)), accounts=_table(_accounts(reports)), missing=missing,
    before=_table(_before(before)), missed='\n'.join(_missed(reports)) or 'None.',
    options=_table(_options()), assumed='\n'.join(f'- {text}' for text in sorted(assumed)),
    commands='\n'.join(r['command'] for r in reports.values()))


def _table(rows: list[list[str]]) -> str:
  head, *body = rows
  return '\n'.join('| ' + ' | '.join(row) + ' |' for row in [head, ['---'] * len(head), *body])


def _mesh(report: dict) -> str:
  return ' '.join(f'{axis}={n}' for axis, n in report['mesh'].items() if n > 1)


def _range(step: dict) -> str:
  return f'{_number(step["seconds"])} to {_number(step["likely_seconds"])}'


def _number(seconds: float) -> str:
  return f'{seconds:.2f}' if seconds < 10 else f'{seconds:.1f}'


def _steps(reports, before) -> list[list[str]]:
  rows = [['step', 'chips', 'mesh', 'remat', 'batch (parts)', 'memory GiB', 'today s', 'at most s',
           'now s', 'MFU', 'beyond products', 'messages that block GB', 'compiled CPU s']]
  for name, r in reports.items():
    memory, step, account = r['memory'], r['step'], r['account']
    old = before.get(name)
    mark = MARKS.get(name)
    remat, parts = (re.search(pattern, ' '.join(r['notes'])) for pattern in (
      r'remat (\w+)', r' in (\d+) part'))
    met = '' if mark is None else ' (met)' if step['seconds'] <= mark else ' (missed)'
    slices = f'{r["slices"]} x ' if r['slices'] > 1 else ''
    rows.append([
      name, f'{r["chips"]} ({slices}{r["topology"]})', _mesh(r), remat.group(1),
      f'{r["examples"]} ({parts.group(1)})',
      f'{memory["bytes_per_device"]["total"] / GIB:.1f} of {memory["usable_bytes"] / GIB:.4g}',
      _number(old['seconds']) if old else '', f'{mark:g}{met}' if mark else '', _range(step),
      f'{step["mfu"]:.0%} to {step["likely_mfu"]:.0%}', f'{account["beyond_products"]:.0%}',
      f'{account["synchronous_bytes"] / 1e9:.1f}', f'{r["compile_cpu_seconds"]:.0f}'])
  return rows


def _accounts(reports) -> list[list[str]]:
  groups = ['products', 'attention', 'kernels', 'element-wise', 'memory traffic', 'gathers',
            'copies', 'synchronous messages', 'exposed messages']
  rows = [['step', *groups]]
  for name, r in reports.items():
    found = r['account']['groups']
    rows.append([name, *(f'{found[g]["seconds"]:.3f}' if g in found else '' for g in groups)])
  return rows


def _before(before) -> list[list[str]]:
  rows = [['step', 'mesh', 'older plan s', 'its MFU', 'read s', 'MFU', 'products', 'attention',
           'element-wise', 'synchronous messages', 'exposed messages', 'messages that block GB']]
  for name, row in before.items():
    groups = [f'{row["groups"].get(g, 0.0):.3f}' for g in rows[0][6:-1]]
    rows.append([name, row['mesh'], _number(row['older_seconds']), f'{row["older_mfu"]:.0%}',
                 _number(row['seconds']), f'{row["mfu"]:.0%}', *groups,
                 f'{row["synchronous_bytes"] / 1e9:.1f}'])
  return rows


def _missed(reports) -> list[str]:
  """A sentence per mark that is missed: what is above the products, and what was tried."""
  lines = []
  for name, mark in MARKS.items():
    report = reports.get(name)
    if report is None or report['step']['seconds'] <= mark:
      continue
    account = report['account']
    parts = sorted(account['groups'].items(), key=lambda row: -row[1]['seconds'])
    named = ', '.join(f'{group} {_number(row["seconds"])} s' for group, row in parts
                      if row['share'] >= 0.01)
    lines.append(f'- {name}: {_number(report["step"]["seconds"])} s, at most {mark:g} s was asked '
                 f'for. {named}. {TRIED.get(name, "")}'.rstrip())
  return lines


def _options() -> list[list[str]]:
  rows = [['chip', 'option', 'value', 'why', 'counted']]
  table = json.loads((ROOT / 'hrvlm_jax' / 'parallel' / 'compiler.json').read_text())['options']
  for chip, options in table.items():
    rows += [[chip, name, str(row['value']), row['why'], row['effect']]
             for name, row in options.items()]
  return rows


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--only', default='', help='cases whose name contains this')
  parser.add_argument('--missing', action='store_true', help='only cases without a good report')
  parser.add_argument('--table', action='store_true', help='run nothing, write the page')
  arguments = parser.parse_args()
  chosen = [] if arguments.table else [
    name for name in CASES
    if arguments.only in name and (not arguments.missing or is_missing(name))]
  failed = [name for name in chosen if not run(name, CASES[name])]
  reports, before = kept()
  (ROOT / 'docs' / 'plans.md').write_text(page(reports, before))
  (REPORTS / 'bounds.json').write_text(json.dumps(bounds(reports), indent=1) + '\n')
  if failed:
    print(f'no report: {", ".join(failed)}', file=sys.stderr)
  return 1 if failed else 0


if __name__ == '__main__':
  sys.exit(main())
