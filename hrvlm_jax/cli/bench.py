"""`hrvlm bench`: see `benchmarks/README.md`; the code stands in `benchmarks/harness`."""

import json
import os
import pathlib
import sys

from hrvlm_jax.cli.arguments import Parser
from hrvlm_jax.core import machine
from hrvlm_jax.core.errors import UserError, unknown

CHECKOUT = pathlib.Path(__file__).parents[2]


def main(argv: list[str]) -> None:
  """Measures this library beside the PyTorch originals: same weights, same machine, one run."""
  if not (CHECKOUT / 'benchmarks' / 'harness').is_dir():
    raise UserError('bench: the folder benchmarks/ is not beside this installation; clone the '
                    'repository and install it there with pip install -e .')
  if str(CHECKOUT) not in sys.path:
    sys.path.insert(0, str(CHECKOUT))
  parser = Parser('bench', main.__doc__ + ' Without CASE the cases are listed. Each result goes to '
                  'benchmarks/results, from which --docs makes docs/benchmarks.md.')
  parser.add_argument('case', nargs='*', metavar='CASE', help='cases or groups of cases')
  parser.add_argument('--json', metavar='FILE', help='also write all results of this run to a file')
  parser.add_argument('--docs', action='store_true',
                      help='write docs/benchmarks.md from the results that are kept')
  parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu',
                      help='cuda: bfloat16 and fused attention on both sides')
  parser.add_argument('--rounds', type=int, help='measured calls of each side; default: the case')
  parser.add_argument('--variant', action='append', metavar='FORM',
                      help='form of the peer to try: eager, onednn, compile, autotune, each also '
                      'with +mkl (MKL told to take its best kernels); default: the case')
  parser.add_argument('--isa', choices=('avx2', 'avx512'), default='',
                      help='hold both sides to these instructions; kept as a machine of its own')
  parser.add_argument('--peer-python', metavar='PYTHON',
                      help='interpreter of the peers; default: the one scripts/peers.sh made')
  parser.add_argument('--alone', action='store_true', help='our side only; nothing is kept')
  parser.add_argument('--keep', action='store_true', help='leave the stored weights on disk')
  parser.add_argument('--dry', action='store_true', help='run once, so that everything is '
                      'compiled and cached, and keep nothing')
  parser.add_argument('--apart', action='store_true', help='one side in memory at a time')
  parser.add_argument('--one-core', action='store_true', help='for a busy machine: one core for '
                      'each side, processor time instead of wall time')
  parser.add_argument('--note', default='', help='kept with the results')
  arguments = parser.parse(argv)
  if arguments.rounds is not None and arguments.rounds < 1:
    raise UserError(f'--rounds must be at least 1, got {arguments.rounds}')

  from benchmarks.harness import docs, isa, records, runner
  from benchmarks.harness.case import Alone, find_cases

  cases = find_cases()
  if not arguments.case and not arguments.docs:
    width = max(map(len, cases))
    for case in cases.values():
      print(f'{case.name:<{width}}  {case.title}')
    return
  groups = {case.group for case in cases.values() if case.group}
  chosen = []
  for name in arguments.case:
    if name not in cases and name not in groups:
      raise UserError(f'{unknown(name, [*cases, *groups], what="case")}; hrvlm bench lists them')
    chosen += [c for c in cases.values() if name in (c.name, c.group) and c not in chosen]
  if arguments.isa and arguments.device != 'cpu':
    raise UserError('--isa holds a CPU; leave it out with --device cuda')
  cap = isa.check(arguments.isa, machine.here())
  if chosen:
    isa.capped(os.environ, cap)  # refuses an environment that chooses by itself, before any work
  settings = runner.Settings(
    device=arguments.device, rounds=1 if arguments.dry else arguments.rounds, keep=arguments.keep,
    peer_python=arguments.peer_python, ceiling=not arguments.dry, alone=arguments.alone,
    apart=arguments.apart, one_core=arguments.one_core,
    variants=tuple(arguments.variant) if arguments.variant else None, isa=cap,
    note=arguments.note)
  results = []
  backend = settings.backend
  wrong = [c.name for c in chosen if backend not in getattr(c, 'backends', (backend,))]
  if wrong:
    raise UserError(f'not measured on a {backend.upper()}: {", ".join(wrong)}; use --device')
  for case in chosen:
    if isinstance(case, Alone):
      result = runner.run_alone(case, settings)
    elif hasattr(case, 'measure'):
      result = case.measure(settings)
    else:
      result = runner.run_case(case, settings)
    results.append(result)
    print(docs.summary(result), flush=True)
    if 'written' in result:  # a case that keeps its result itself
      print(f'written: {result["written"]}')
    elif not (arguments.dry or arguments.alone):
      print(f'kept: {records.save(result).relative_to(records.ROOT)}')
  if arguments.json:
    from hrvlm_jax.checkpoint.files import whole_file

    with whole_file(arguments.json) as part:
      part.write_text(json.dumps(results, indent=1) + '\n')
  if arguments.docs:
    print(f'written: {docs.write(cases)}')
