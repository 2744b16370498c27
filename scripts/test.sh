#!/usr/bin/env bash
# Makes .venv with the test extras (first run only) and runs the first level of tests on CPU: every
# contract and one representative per family. test_full.sh has the second level, part by part.
#
#   ./scripts/test.sh                    the whole level
#   ./scripts/test.sh -m fast            the subset of a commit, under two minutes
#   ./scripts/test.sh tests/core -x      any pytest arguments
#   HRVLM_TEST_WORKERS=0 ./scripts/test.sh    in one process (for a debugger)
#
# The suite itself uses no network. Tests marked gpu, tpu, peers or gcloud are skipped where the
# thing they need is absent; nothing else is ever skipped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh

# 2.13.0 is the version the parity tests ran with; its CPU build is enough.
ensure_env test torch==2.13.0

exec .venv/bin/python -m pytest -n "${HRVLM_TEST_WORKERS:-2}" --dist loadfile "$@"
