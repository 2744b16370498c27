#!/usr/bin/env bash
# The wheel in a fresh environment, used outside the checkout: what a user without the repository has.
#
#   ./scripts/test_wheel.sh            makes .matrix/wheel anew (needs the network), about 10 minutes
#   ./scripts/test_wheel.sh --keep     uses the environment that is there
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

checkout=$PWD
env=$PWD/.matrix/wheel
if [[ ${1:-} != --keep ]]; then
  rm -rf "$env"
  "${PYTHON:-python3}" -m venv "$env"
  "$env/bin/python" -m pip install --quiet --disable-pip-version-check build
  rm -rf build
  "$env/bin/python" -m build --wheel --outdir "$env/dist" .
  "$env/bin/python" -m pip install --quiet --disable-pip-version-check \
    --constraint requirements.lock "$env"/dist/*.whl
fi

outside=$(mktemp -d)
trap 'rm -rf "$outside"' EXIT
cd "$outside"
export JAX_PLATFORMS=cpu PYTHONPATH=''
hrvlm=$env/bin/hrvlm

# expect STATUS WORDS COMMAND...: the command ends so and says so.
expect() {
  local status=$1 words=$2 found=0
  shift 2
  printf '$ %s\n' "$*"
  "$@" >said 2>&1 || found=$?
  if [[ $found != "$status" ]] || ! grep -qE -- "$words" said; then
    cat said
    printf 'expected status %s and "%s", found status %s\n' "$status" "$words" "$found" >&2
    return 1
  fi
}

expect 0 'no problem found' "$hrvlm" doctor
expect 0 'by arithmetic' "$hrvlm" plan --config pheye:x2_448,stage1 --topology h100:8
expect 2 "libtpu.*pip install '.*whl\[tpu\]'" "$hrvlm" plan --config pheye:x2_448,stage1 \
  --topology v5e:4x4
expect 2 'pheye_x2_448_start: no such folder' "$hrvlm" train --config pheye:x2_448,stage1 --workdir W
[[ ! -e W ]] # a refused start leaves nothing
expect 2 'llava_v1|no such|tokenizer' "$hrvlm" train --config llava_hr:7b,stage2 --workdir W
expect 2 'clone the repository' "$hrvlm" bench
expect 0 'everything is in' "$hrvlm" quickstart --smoke

# The compiler for TPUs is an extra; then the same command plans, though no TPU is here.
"$env/bin/python" -m pip install --quiet --disable-pip-version-check \
  --constraint "$checkout/requirements.lock" "$(ls "$env"/dist/*.whl)[tpu]"
expect 0 'read from the program of the compiler|MFU' "$hrvlm" plan --config pheye:x2_448,stage1 \
  --topology v5e:4x4
printf 'the wheel does what the pages say\n'
