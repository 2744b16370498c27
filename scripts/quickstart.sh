#!/usr/bin/env bash
# Makes .venv (first run only) and trains, compares, asks and exports a tiny model on the CPU.
#
#   ./scripts/quickstart.sh              everything goes under runs/quickstart; says first how long it
#                                        takes on this machine after installation
#   ./scripts/quickstart.sh --help       options
#
# A second run finds what is done and does not repeat it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh

ensure_env none

# A GPU or TPU is not needed, and the numbers quoted are those of the CPU.
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
exec .venv/bin/hrvlm quickstart "$@"
