"""A stand-in for the trainer: writes losses, keeps checkpoints, resumes, notices lost peers.

It speaks the part of the trainer's contract that the launcher relies on and nothing else: no JAX,
so that a simulation takes seconds. Peers find each other through files in the working directory.
"""

import argparse
import json
import os
import pathlib
import sys
import time


def main() -> int:
  parser = argparse.ArgumentParser()
  parser.add_argument('--steps', type=int, default=20)
  parser.add_argument('--every', type=int, default=4, help='steps between checkpoints')
  parser.add_argument('--step-seconds', type=float, default=0.1)
  parser.add_argument('--forgetful', action='store_true', help='never resume (for a test)')
  parser.add_argument(
    '--drift', action='store_true', help='lose the state at a resume (for a test)'
  )
  parser.add_argument('--deaf', action='store_true', help='never notice lost peers (for a test)')
  parser.add_argument('--workdir', type=pathlib.Path, required=True)
  parser.add_argument('--coordinator', required=True)
  parser.add_argument('--num-processes', type=int, required=True)
  parser.add_argument('--process-id', type=int, required=True)
  args = parser.parse_args()

  # The port is new at every start, so it names the attempt.
  beats = args.workdir / 'beats' / args.coordinator.split(':')[1]
  beats.mkdir(parents=True, exist_ok=True)

  def barrier(step: int) -> None:
    """Waits until all peers have come to this step; exits when one stops answering."""
    (beats / f'{args.process_id}.{step}').touch()
    # The first meeting waits for slow starts; after that silence means death.
    patience = 1000 if args.deaf else 60 if step == first else 3
    deadline = time.monotonic() + patience
    while any(not (beats / f'{p}.{step}').exists() for p in range(args.num_processes)):
      if time.monotonic() > deadline:
        print('a peer was lost', flush=True)
        os.abort()
      time.sleep(0.005)

  checkpoints = args.workdir / 'checkpoints'
  steps = sorted(int(p.name) for p in checkpoints.glob('[0-9]*')) if not args.forgetful else []
  start, value = 0, 1.0
  if steps:
    start = steps[-1]
    value = json.loads((checkpoints / str(start) / 'state').read_text())
    if args.drift:
      value += 1
    print(f'resumed from step {start}', flush=True)
  first = start + 1
  for step in range(first, args.steps + 1):
    time.sleep(args.step_seconds)
    barrier(step)
    value = value * 0.9 + 0.01 * step
    if args.process_id == 0:
      with (args.workdir / 'metrics.jsonl').open('a') as lines:
        lines.write(json.dumps({'step': step, 'loss': value}) + '\n')
      if step % args.every == 0:
        (checkpoints / str(step)).mkdir(parents=True, exist_ok=True)
        (checkpoints / str(step) / 'state').write_text(json.dumps(value))
  print('done', flush=True)
  return 0


if __name__ == '__main__':
  sys.exit(main())
