"""`hrvlm eval` as one of several processes, which may be told to die.

    python -m tests.evaluation.together BATCHES_OR_0 ARGUMENTS OF hrvlm eval ...

With a number the process ends itself (kill -9) after so many batches.
"""

import os
import signal
import sys

from hrvlm_jax.cli import main as cli
from hrvlm_jax.evaluation import records


def main() -> int:
  after, batches = int(sys.argv[1]), 0
  if after:
    append = records.PredictionsFile.append

    def dying(self, rows):
      nonlocal batches
      append(self, rows)
      batches += 1
      if batches == after:
        os.kill(os.getpid(), signal.SIGKILL)

    records.PredictionsFile.append = dying
  return cli.main(['eval', *sys.argv[2:]])


if __name__ == '__main__':
  sys.exit(main())
