"""`python -m hrvlm_jax.cli`, for places where the console script is not on the path."""

import sys

from hrvlm_jax.cli.main import main

sys.exit(main())
