"""`hrvlm quickstart`: see `lab.quickstart`."""

from collections.abc import Sequence

from hrvlm_jax.cli import ask
from hrvlm_jax.cli.arguments import Parser, read_seed


def main(argv: Sequence[str]) -> int:
  """Trains, compares, asks and exports a tiny model on the built-in task; run again, it goes on."""
  parser = Parser('quickstart', main.__doc__)
  parser.add_argument('--out', default='runs/quickstart', help='folder of everything')
  parser.add_argument('--seed', type=read_seed, default=0)
  parser.add_argument('--smoke', action='store_true', help='a few steps of everything (a test)')
  args = parser.parse(argv)

  from hrvlm_jax.lab import quickstart

  made = quickstart.config(smoke=args.smoke, seed=args.seed)
  journey = quickstart.Quickstart(made, args.out, photographs=4 if args.smoke else 200)
  if not (args.smoke or journey.times):
    print(estimate(), flush=True)
  results = journey.run()
  image, record = journey.example()
  question = ['--checkpoint', f'{args.out}/checkpoint', str(image), record['question']]
  print(f'$ hrvlm ask {" ".join(question[:3])} "{record["question"]}"', flush=True)
  ask.main(question)
  print(f'(the sign says {record["answer"]})')
  print(f'everything is in {args.out}: '
        + ', '.join(f'{name} {share:.1%}' for name, share in results['accuracy'].items()))
  return 0


def estimate() -> str:
  """How long everything takes on this machine, from what its CPU multiplies in a second."""
  from hrvlm_jax.core import machine
  from hrvlm_jax.lab import speed

  gflops = speed.products()
  return (f'{speed.words(gflops)} on this machine ({machine.here().title}; products at '
          f'{gflops:.0f} GFLOP/s) while nothing else runs; stopped, it goes on where it was')
