#!/usr/bin/env bash
# Prepares one TPU VM: packages, environment, a free chip, a check. Run by launch.sh on every worker,
# from the directory of the source; safe to repeat (a marker named by a hash skips what is done).
#
#   worker_setup.sh [--python 3.12] [--extra tpu] [--bucket gs://b/run]
set -euo pipefail

PYTHON=3.12 EXTRA=tpu BUCKET=''
while [ $# -gt 0 ]; do
  case $1 in
    --python) PYTHON=$2 ;;
    --extra) EXTRA=$2 ;;
    --bucket) BUCKET=$2 ;;
    *) printf 'worker_setup.sh: unknown option %s\n' "$1" >&2 && exit 2 ;;
  esac
  shift 2
done
VENV=${HRVLM_VENV:-$HOME/hrvlm-venv}
RUNS=${HRVLM_RUNS:-$HOME/runs}

step() { printf 'setup %s: %s\n' "$(hostname)" "$*"; }

fail() {
  printf 'setup %s: FAILED at: %s\n' "$(hostname)" "$*" >&2
  exit 1
}

# again TRIES COMMAND...: network and the package lock fail now and then.
again() {
  local tries=$1 n=1
  shift
  until "$@"; do
    [ "$n" -lt "$tries" ] || return 1
    n=$((n + 1))
    sleep $((5 * n))
  done
}

free_apt() {
  # The image's own upgrades hold the package lock for minutes after the first boot.
  sudo systemctl stop unattended-upgrades apt-daily.timer apt-daily-upgrade.timer >/dev/null 2>&1 || true
}

install_uv() {
  export PATH="$HOME/.local/bin:$PATH"
  command -v uv >/dev/null && return 0
  if ! python3 -m pip --version >/dev/null 2>&1; then
    again 5 sudo apt-get update -qq || return 1
    again 5 sudo apt-get install -y -qq python3-pip lsof || return 1
  fi
  again 3 timeout 600 python3 -m pip install --user --quiet --disable-pip-version-check uv
}

install_package() {
  local -a constraint
  constraint=()
  [ ! -f requirements.lock ] || constraint=(--constraint requirements.lock)
  # The images bring Python 3.10; uv fetches the version asked for.
  [ -x "$VENV/bin/python" ] || again 3 timeout 900 uv venv --quiet --python "$PYTHON" "$VENV" || return 1
  VIRTUAL_ENV=$VENV again 3 timeout 1800 uv pip install --quiet ${constraint[@]+"${constraint[@]}"} \
    --editable ".[$EXTRA]"
}

set_environment() {
  local line
  # Reads from storage that hang are given up after a minute below 1 kB/s.
  for line in TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS=60 TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES=1024; do
    grep -qxF "$line" /etc/environment 2>/dev/null || printf '%s\n' "$line" | sudo tee -a /etc/environment >/dev/null
  done
}

live_job() {
  local directory pid
  for directory in "$RUNS"/*/; do
    [ -f "$directory/pid" ] && [ ! -f "$directory/exit_code" ] || continue
    pid=$(cat "$directory/pid")
    ! kill -0 "$pid" 2>/dev/null || return 0
  done
  return 1
}

free_chip() {
  local holders
  # v4 and before: /dev/accel*; v5 and later: /dev/vfio/*.
  holders=$(sudo lsof -t /dev/accel* /dev/vfio/* 2>/dev/null | sort -u | tr '\n' ' ') || true
  if [ -n "${holders// /}" ]; then
    step "ending processes that hold the chip: $holders"
    # shellcheck disable=SC2086 # a list of process ids
    sudo kill -9 $holders || true
  fi
  sudo rm -f /tmp/libtpu_lockfile
}

digest() { cat requirements.lock pyproject.toml "$0" 2>/dev/null | cksum | tr ' ' '-'; }

MARKER=$HOME/.hrvlm/setup.$EXTRA.$PYTHON.$(digest)
mkdir -p "$HOME/.hrvlm"
chmod 700 "$HOME/.hrvlm"
export PATH="$HOME/.local/bin:$PATH"
if [ -f "$MARKER" ]; then
  step 'packages are installed already'
else
  free_apt
  step 'installing uv'
  install_uv || fail 'installing uv (is there a way to the package index? internal addresses need Cloud NAT)'
  step "installing the package with Python $PYTHON and extra $EXTRA"
  install_package || fail 'installing the package (see above; internal addresses need Cloud NAT)'
  set_environment || fail '/etc/environment'
  : >"$MARKER"
fi
if live_job; then
  step 'a job is running here: the chip is left alone, no check'
  exit 0
fi
free_chip
step 'checking'
timeout 900 "$VENV/bin/python" -m hrvlm_jax.cli doctor || fail 'the check (hrvlm doctor)'
if [ -n "$BUCKET" ]; then
  # The machine's own account must be able to write, not only that of the laptop.
  printf 'write test\n' >"$HOME/.hrvlm/write_test"
  again 3 gcloud storage cp "$HOME/.hrvlm/write_test" "$BUCKET/.write_test.$(hostname)" ||
    fail "writing to $BUCKET (give the machine's service account roles/storage.objectAdmin)"
fi
step 'ready'
