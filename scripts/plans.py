#!/usr/bin/env python
"""Compiles the published recipes for TPU slices and writes docs/plans.md.

    python scripts/plans.py                    all cases (libtpu: pip install 'hrvlm-jax[tpu]')
    python scripts/plans.py --only llava_hr    cases whose name contains the word
    python scripts/plans.py --missing          cases without a report of this command, or whose
                                               compilation took more than five minutes of CPU time
    python scripts/plans.py --table            writes the page from the reports that are there

Each case is one `hrvlm plan` command; its report is kept as docs/plans/NAME.json.
"""

import argparse
import json
import pathlib
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
  'vila_hd_8b_4k_v5e_16x16': '--config configs/vila_hd.py:4k,sft,v5e:16x16 '
  '--topology v5e:16x16 --image 3780x3780',
  'vila_hd_8b_4k_v5p_4x4x4': '--config configs/vila_hd.py:4k,sft,v5p:4x4x4 '
  '--topology v5p:4x4x4 --image 3780x3780',
  'mc_llava_3b_v5e_8x8': '--config configs/mc_llava.py:full,one_view,v5e:8x8 --topology v5e:8x8',
  'pheye_x2_672_v5e_4x4': '--config configs/pheye.py:x2_672,stage2,v5e:4x4 '
  '--topology v5e:4x4 --image 672x672',
  'ps3_4k_v5e_16x16': '--config configs/ps3.py:4k,v5e:16x16 --topology v5e:16x16',
}


def run(name: str, arguments: str) -> bool:
  """Runs one case; returns whether it gave a report."""
  REPORTS.mkdir(parents=True, exist_ok=True)
  out = REPORTS / f'{name}.json'
  command = [sys.executable, '-m', 'hrvlm_jax.cli', 'plan', *shlex.split(arguments)]
  print('+ hrvlm plan', arguments, flush=True)
  done = subprocess.run([*command, '--json', str(out), '--timeout', '3600'], cwd=ROOT)
  if done.returncode not in (0, 1) or not out.exists():
    return False
  report = json.loads(out.read_text()) | {'command': f'hrvlm plan {arguments}'}
  out.write_text(json.dumps(report, indent=2) + '\n')
  return True


def is_missing(name: str) -> bool:
  """Whether a case has no report worth keeping."""
  path = REPORTS / f'{name}.json'
  if not path.exists():
    return True
  report = json.loads(path.read_text())
  # On a busy machine the CPU time is the better measure of what free cores would need.
  seconds = min(report['compile_seconds'], report.get('compile_cpu_seconds', float('inf')))
  return report['command'] != f'hrvlm plan {CASES[name]}' or seconds > 300


def page(reports: dict[str, dict]) -> str:
  """docs/plans.md."""
  head = ['step', 'chips', 'mesh', 'batch', 'arguments', 'temporaries', 'total of HBM', 'fits',
          'step s', 'MFU', 'MFU without overlap', 'messages GB', 'compiled in s', 'CPU s',
          'effort']  # fmt: skip
  rows = [head, ['---'] * len(head)]
  for name, r in reports.items():
    memory = r['memory']['bytes_per_device']
    gib = lambda n: 'n/a' if n is None else f'{n / GIB:.1f}'
    roof = r.get('roofline')
    mesh = ' '.join(f'{axis}={n}' for axis, n in r['mesh'].items() if n > 1)
    # Without libtpu's log the number is the analysis', see `parallel.plan._as_allocated`.
    bound = '' if r['memory']['usable_bytes'] < r['memory']['hbm_bytes'] else '<= '
    total = f'{bound}{gib(memory["total"])} of {r["memory"]["usable_bytes"] / GIB:.4g}'
    sent = sum(row['bytes'] for row in r.get('collectives_per_device', {}).values()) / 1e9
    rows.append([
      name, f'{r["chips"]} ({r["topology"]})', mesh, str(r['examples']), gib(memory['arguments']),
      gib(memory.get('temporaries')), total, 'yes' if r['memory']['fits'] else 'NO',
      f'{roof["step_seconds"]:.2f}' if roof else 'n/a', f'{roof["mfu"]:.0%}' if roof else 'n/a',
      f'{roof["mfu_without_overlap"]:.0%}' if roof else 'n/a', f'{sent:.1f}',
      f'{r["compile_seconds"]:.0f}', f'{r["compile_cpu_seconds"]:.0f}', r['effort'],
    ])  # fmt: skip
  table = '\n'.join('| ' + ' | '.join(row) + ' |' for row in rows)
  assumed = {
    text for r in reports.values() for text in r.get('roofline', {}).get('assumptions', ())}
  notes = '\n'.join(f'- {text}' for text in sorted(assumed))
  absent = [name for name in CASES if name not in reports]
  missing = f'\nNo report yet: {", ".join(absent)}.\n' if absent else ''
  commands = '\n'.join(f'{r["command"]}' for r in reports.values())
  return f"""# Plans

Written by `python scripts/plans.py`; do not edit. Each row is the real step of a recipe, compiled
ahead of time for chips that were not there. Memory is the compiler's own, GiB per device; times are
predicted from the program's products and messages and were not measured. Compile times are of the
machine that ran the command, two CPU cores with nothing else to do; on a busy one the CPU time is
the better measure.

Effort: nine tenths of the compiler's usual time go into kernels, which a plan never runs. `quick`
(the default of `hrvlm plan`) spares most of it: the step and its sharding are the same, the
schedule is simpler. `--effort full` compiles as a run on the chips would. An earlier form of
LLaVA-HR's step was compiled both ways on v5e:16x16, on a busy machine: 7.64 GB a chip, 23.0 GB of
messages, 333 s with full effort; 7.35 GB, 25.2 GB, 93 s (72 s of CPU time) with quick.

`hrvlm plan --explain FILE --chip v5e` reads a scheduled program that was stored as text (such as
`compiled.as_text()`, `.gz` and `.xz` too) in the order of its schedule: time by class, by source
function, the messages, and the ten dearest places with file and line, from an optimistic to a
likely time. Its constants and what they rest on stand in `hrvlm_jax/planning/costs.json`; none was
measured on a chip. The figures below are the older roofline's: they leave out synchronous messages,
element-wise work and most memory traffic.

`hrvlm plan --search` compiles one candidate after the other: for training on 256 chips 36 (18
meshes, recomputation of layers or of all but products), less those that cannot be cut or that did
not fit with less memory. Each takes what a row below says; a tiny model on v5e:2x2 took 11 s of CPU
time.

A total with `<=` is an upper bound: gaps between temporaries are counted twice in it.

{table}
{missing}
Assumed by the predicted times:

{notes}

```
{commands}
```
"""


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
  reports = {path.stem: json.loads(path.read_text()) for path in sorted(REPORTS.glob('*.json'))}
  (ROOT / 'docs' / 'plans.md').write_text(page(reports))
  if failed:
    print(f'no report: {", ".join(failed)}', file=sys.stderr)
  return 1 if failed else 0


if __name__ == '__main__':
  sys.exit(main())
