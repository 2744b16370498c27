#!/usr/bin/env bash
# Kills a tiny training run of every system with signal 9 at 20 random moments, also while it
# writes a checkpoint, and compares its losses and batches with those of an undisturbed run: bit for
# bit with training.deterministic=True, then within 1e-6 relative without it.
#
#   ./scripts/test_kill9.sh                          all systems, 20 kills each
#   ./scripts/test_kill9.sh --systems pheye --kills 5    options of tests/training/kill9.py
#   ./scripts/test_kill9.sh --workers 2                  with data workers
#   ./scripts/test_kill9.sh --signal TERM                SIGTERM to the process group instead
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh

ensure_env test torch==2.13.0

export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
# The lives of a run share compiled programs, also the small ones.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$PWD/.cache/jax}"
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
.venv/bin/python -m tests.training.kill9 "$@"
.venv/bin/python -m tests.training.kill9 --relaxed "$@"
