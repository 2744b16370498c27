# shellcheck shell=bash
# Loss of a host without a cloud: local processes stand for hosts, started by the real worker script.
#   1. an undisturbed run                        in DIR/unbroken
#   2. the same run, one host killed with -9 in mid-step; the others must end by themselves
#      (or are ended after --end-within seconds, with a sentence); all are started again and resume
#                                                in DIR/broken
#   3. both runs must have the same loss at every step.
# The job gets `--workdir DIR --coordinator localhost:PORT --num-processes N --process-id I` added to
# its command line. It must write DIR/metrics.jsonl (one object per line with "step" and "loss") and
# resume by itself when DIR has a checkpoint. Sourced by launch.sh.
# shellcheck disable=SC2034 # variables are shared with the other files

# A free port; the kernel's answer is used by nobody else for the moment.
free_port() {
  "$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])'
}

# on_host HOST RUN VERB...: the worker script as on a host with files of its own.
on_host() {
  local host=$1 verb=$2
  shift 2
  if dry_run; then
    show env "HRVLM_WORKER=$host" bash "$HERE/worker_run.sh" "$verb" simulate "$@"
    return 0
  fi
  HRVLM_METADATA_URL='' HRVLM_WORKER=$host HRVLM_RUNS=$SIM_DIR/host.$host \
    HRVLM_VENV=$SIM_DIR/none bash "$HERE/worker_run.sh" "$verb" simulate "$@"
}

start_hosts() {
  local host port
  port=$(free_port)
  for ((host = 0; host < OPT_HOSTS; host++)); do
    on_host "$host" start --env JAX_PLATFORMS=cpu --env "JAX_NUM_CPU_DEVICES=$OPT_DEVICES" \
      --env "HRVLM_HEARTBEAT_SECONDS=$SIM_HEARTBEAT" -- "${JOB[@]}" --workdir "$1" \
      --coordinator "localhost:$port" --num-processes "$OPT_HOSTS" --process-id "$host" || return "$?"
  done
}

# Sets STATUS to the hosts' lines.
host_status() {
  local host
  STATUS=()
  for ((host = 0; host < OPT_HOSTS; host++)); do
    STATUS+=("$(on_host "$host" status)")
  done
}

stop_hosts() {
  local host
  for ((host = 0; host < OPT_HOSTS; host++)); do
    on_host "$host" stop --grace 2 >/dev/null || true
  done
}

# Waits until all hosts end well; shows the log of the first one that does not.
await_hosts() {
  local what=$1
  while :; do
    host_status
    judge
    case $VERDICT in
      success) return 0 ;;
      running) sleep 0.3 ;;
      *)
        note "simulate: the $what run ended with '$VERDICT':"
        print_status >&2
        show_host_logs
        stop_hosts
        return "$EX_TRAINING"
        ;;
    esac
  done
}

show_host_logs() {
  local host
  for ((host = 0; host < OPT_HOSTS; host++)); do
    printf -- '--- log of host %s\n' "$host" >&2
    tail -n 20 "$SIM_DIR/host.$host/simulate/log.$host" >&2 || true
  done
}

newest_logged_step() {
  [ ! -f "$1/metrics.jsonl" ] ||
    sed -n 's/.*"step": *\([0-9][0-9]*\).*/\1/p' "$1/metrics.jsonl" | sort -n | tail -n 1
}

# The victim dies without warning; the others must notice.
kill_host() {
  local pid tenths=0 host state
  pid=$(cat "$SIM_DIR/host.$OPT_KILL_HOST/simulate/pid")
  kill -KILL -- "-$pid"
  note "simulate: killed host $OPT_KILL_HOST (process group $pid) after step $(newest_logged_step "$SIM_DIR/broken")."
  for ((host = 0; host < OPT_HOSTS; host++)); do
    [ "$host" -ne "$OPT_KILL_HOST" ] || continue
    while :; do
      state=$(field state "$(on_host "$host" status)")
      [ "$state" = running ] || break
      if [ "$tenths" -ge $((OPT_END_WITHIN * 10)) ]; then
        note "simulate: host $host still waits for host $OPT_KILL_HOST after $OPT_END_WITHIN s and is ended now."
        on_host "$host" stop --grace 2 >/dev/null || true
        LATE=$((LATE + 1))
        break
      fi
      tenths=$((tenths + 2))
      sleep 0.2
    done
    note "simulate: host $host has ended ($((tenths / 10)) s after the loss of host $OPT_KILL_HOST)."
    # The program itself may have died without a word; its supervisor has the last one.
    sed -n 's/^=== worker [^:]*: /simulate:   /p' "$SIM_DIR/host.$host/simulate/log.$host" | tail -n 1 >&2
  done
}

# first_new_step BEFORE NOW: the first step that was run again, whether the job went on writing at the
# end of its metrics or first dropped the lines of the steps it runs again.
first_new_step() {
  "$PYTHON" - "$1" "$2" <<'PYTHON'
import itertools
import json
import sys

before, now = (open(path).read().splitlines() for path in sys.argv[1:])
for old, new in itertools.zip_longest(before, now):
  if new is None or new == old:
    continue
  try:
    print(json.loads(new)['step'])
    break
  except (ValueError, TypeError, KeyError):  # an odd line is passed over
    continue
PYTHON
}

# The last loss written for each step of both runs, compared; prints what differs.
compare_losses() {
  "$PYTHON" - "$SIM_DIR/unbroken/metrics.jsonl" "$SIM_DIR/broken/metrics.jsonl" "$OPT_RTOL" <<'PYTHON'
import json
import sys


def losses(path):
  table = {}
  with open(path) as lines:
    for line in lines:
      try:
        row = json.loads(line)
      except ValueError:  # the line that was being written when the process was killed
        continue
      if 'loss' in row:
        table[int(row['step'])] = float(row['loss'])
  return table


whole, broken, rtol = losses(sys.argv[1]), losses(sys.argv[2]), float(sys.argv[3])
problems = [f'step {step}: only in one run' for step in sorted(set(whole) ^ set(broken))]
largest = 0.0
for step in sorted(set(whole) & set(broken)):
  difference = abs(whole[step] - broken[step]) / max(abs(whole[step]), 1e-30)
  largest = max(largest, difference)
  if not difference <= rtol:
    problems.append(f'step {step}: {whole[step]!r} undisturbed, {broken[step]!r} resumed')
if not whole:
  problems.append('the runs wrote no losses')
print(f'simulate: {len(whole)} steps, largest relative difference {largest:.3g} (allowed {rtol:g})')
for problem in problems:
  print(f'  {problem}')
sys.exit(1 if problems else 0)
PYTHON
}

# The job's own idea of where files go would fight with ours.
check_simulation() {
  local word option
  for option in HOSTS DEVICES KILL_HOST KILL_AT_STEP END_WITHIN; do
    local variable=OPT_$option
    check_number "$option" "${!variable}"
  done
  [ "$OPT_HOSTS" -ge 2 ] || die "$EX_USAGE" "--hosts: found $OPT_HOSTS, expected at least 2."
  [ "$OPT_KILL_HOST" -lt "$OPT_HOSTS" ] ||
    die "$EX_USAGE" "--kill-host: found $OPT_KILL_HOST, expected a host below $OPT_HOSTS."
  for word in "${JOB[@]}"; do
    case $word in
      --workdir | --workdir=* | --coordinator | --coordinator=* | --num-processes* | --process-id*)
        die "$EX_USAGE" "simulate adds ${word%%=*} itself; leave it out of the job."
        ;;
    esac
  done
  PYTHON=python3
  ! command -v python >/dev/null || PYTHON=python
}

simulate() {
  local before resumed tries
  check_simulation
  LATE=0
  # Peers must notice a loss well before the deadline.
  SIM_HEARTBEAT=$((OPT_END_WITHIN / 3))
  [ "$SIM_HEARTBEAT" -ge 2 ] || SIM_HEARTBEAT=2
  SIM_DIR=${OPT_WORKDIR:-$SCRATCH/simulate}
  if [ -e "$SIM_DIR/broken" ] || [ -e "$SIM_DIR/unbroken" ]; then
    die "$EX_USAGE" "--workdir: $SIM_DIR holds an earlier simulation; choose an empty directory."
  fi
  if dry_run; then
    PYTHON=: # no port is asked for
    start_hosts "$SIM_DIR/unbroken"
    show kill -KILL "host $OPT_KILL_HOST at step $OPT_KILL_AT_STEP"
    start_hosts "$SIM_DIR/broken"
    return 0
  fi
  mkdir -p "$SIM_DIR/unbroken" "$SIM_DIR/broken"
  SIM_DIR=$(cd "$SIM_DIR" && pwd)
  trap 'stop_hosts; rm -rf "$SCRATCH"' EXIT

  note "simulate: $OPT_HOSTS hosts with $OPT_DEVICES devices each, undisturbed"
  start_hosts "$SIM_DIR/unbroken" || return "$EX_SETUP"
  await_hosts undisturbed || return "$?"

  note "simulate: again, killing host $OPT_KILL_HOST at step $OPT_KILL_AT_STEP"
  start_hosts "$SIM_DIR/broken" || return "$EX_SETUP"
  # The step is looked at often, the hosts now and then: steps may be short.
  tries=0
  while :; do
    before=$(newest_logged_step "$SIM_DIR/broken")
    [ "${before:-0}" -lt "$OPT_KILL_AT_STEP" ] || break
    tries=$((tries + 1))
    if [ $((tries % 20)) -eq 0 ]; then
      host_status
      judge
      if [ "$VERDICT" != running ]; then
        note "simulate: the run ended with '$VERDICT' before step $OPT_KILL_AT_STEP."
        show_host_logs
        return "$EX_TRAINING"
      fi
    fi
    sleep 0.05
  done
  kill_host
  cp "$SIM_DIR/broken/metrics.jsonl" "$SIM_DIR/metrics.before"

  note 'simulate: starting all hosts again'
  start_hosts "$SIM_DIR/broken" || return "$EX_SETUP"
  await_hosts resumed || return "$?"
  resumed=$(first_new_step "$SIM_DIR/metrics.before" "$SIM_DIR/broken/metrics.jsonl")
  note "simulate: resumed at step ${resumed:-?}."
  if [ "${resumed:-0}" -le 1 ]; then
    note 'simulate: the run began from the start instead of resuming.'
    return "$EX_TRAINING"
  fi
  compare_losses || return "$EX_TRAINING"
  if [ "$LATE" -gt 0 ]; then
    note "simulate: $LATE host(s) did not end by themselves within $OPT_END_WITHIN s."
    return "$EX_TIMEOUT"
  fi
  note 'simulate: the interrupted run and the undisturbed run agree.'
}
