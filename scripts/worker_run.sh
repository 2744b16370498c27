#!/usr/bin/env bash
# Runs a job on one host of a run, detached from whoever started it. Used by launch.sh on TPU VMs and
# by `launch.sh simulate` on a laptop.
#
#   worker_run.sh start  RUN [--slice I] [--bucket gs://b/RUN] [--env-file F] [--env K=V] [--force] [--attempt A] -- CMD...
#   worker_run.sh status RUN [--slice I]    one line of KEY=VALUE words for launch.sh
#   worker_run.sh logs   RUN [--slice I] [--lines N] [--follow]
#   worker_run.sh stop   RUN [--slice I] [--grace 60]
#
# Files in ~/runs/RUN ($HRVLM_RUNS/RUN): log.WORKER, pid (leader of the job's process group),
# command, exit_code and ended (once it is over), PREEMPTED (the job said that it stopped early
# because the machine is taken away). The job finds this directory in HRVLM_RUN_DIR; it writes the
# marker there or as PREEMPTED into its --workdir.
set -euo pipefail

METADATA=${HRVLM_METADATA_URL-http://metadata.google.internal/computeMetadata/v1/instance}
EX_BUSY=9

die() {
  printf 'worker_run.sh: %s\n' "$2" >&2
  exit "$1"
}

metadata() {
  [ -n "$METADATA" ] || return 1
  curl -sf --max-time 3 -H 'Metadata-Flavor: Google' "$METADATA/$1" 2>/dev/null
}

# This host's label: the number in its slice, with the slice in front when there are several.
worker_label() {
  local number
  number=${HRVLM_WORKER:-$(metadata attributes/agent-worker-number || printf 0)}
  printf '%s%s' "${SLICE:+$SLICE.}" "$number"
}

# alive DIR [pid|supervisor]: does the job (or its supervisor) still run? Numbers are used again
# after a reboot, so the start time must match too.
alive() {
  local pid file=$1/${2:-pid}
  [ -f "$file" ] || return 1
  pid=$(cat "$file")
  kill -0 "$pid" 2>/dev/null || return 1
  case $(ps -o stat= -p "$pid" 2>/dev/null) in '' | Z*) return 1 ;; esac
  [ "$(ps -o lstart= -p "$pid" 2>/dev/null)" = "$(cat "${file}_start" 2>/dev/null)" ]
}

# remember NAME PID: what `alive` looks at.
remember() {
  ps -o lstart= -p "$2" >"$DIR/${1}_start" 2>/dev/null || true
  write "$1" "$2"
}

write() { printf '%s\n' "$2" >"$DIR/$1.part" && mv "$DIR/$1.part" "$DIR/$1"; }

# The value of --workdir in the job's command.
workdir_of() {
  local previous='' word
  for word in "$@"; do
    case $word in --workdir=*) printf '%s' "${word#--workdir=}" && return 0 ;; esac
    [ "$previous" != --workdir ] || { printf '%s' "$word" && return 0; }
    previous=$word
  done
}

# --- start -------------------------------------------------------------------------------------

start() {
  local other supervisor waited=0
  local -a detach
  [ "${#JOB[@]}" -gt 0 ] || die 2 'start needs a command after --.'
  mkdir -p "$DIR"
  # One start at a time: of two, the second must find the first one's job.
  if command -v flock >/dev/null; then
    exec 8>"$RUNS/start.lock"
    flock 8
  fi
  # The same request again: the answer to the first was lost with the connection.
  if [ -n "$ATTEMPT" ] && [ "$(cat "$DIR/attempt" 2>/dev/null)" = "$ATTEMPT" ] && [ -f "$DIR/pid" ]; then
    printf 'worker %s: started run %s, pid %s\n' "$LABEL" "$RUN" "$(cat "$DIR/pid")"
    return 0
  fi
  if [ "$FORCE" = 1 ]; then
    for other in "$RUNS"/*/; do
      ! alive "${other%/}" || end_job "${other%/}" "$GRACE"
    done
  fi
  for other in "$RUNS"/*/; do
    if alive "${other%/}"; then
      die "$EX_BUSY" "a job is already running here: run $(basename "$other"), pid $(cat "$other/pid")."
    fi
  done
  settle "$DIR"
  rm -f "$DIR/pid" "$DIR/supervisor" "$DIR/exit_code" "$DIR/ended" "$DIR/PREEMPTED" "$DIR/killed"
  write attempt "$ATTEMPT"
  detach=(nohup)
  ! command -v setsid >/dev/null || detach=(setsid)
  "${detach[@]}" bash "$0" supervise "$RUN" "${OPTIONS[@]}" -- "${JOB[@]}" \
    </dev/null >>"$DIR/supervisor.log" 2>&1 8>&- &
  supervisor=$!
  # The supervisor writes pid before anything else can be known of the job, however short it is.
  while [ ! -f "$DIR/pid" ]; do
    if ! kill -0 "$supervisor" 2>/dev/null && [ ! -f "$DIR/pid" ]; then
      tail -n 5 "$DIR/supervisor.log" >&2
      die 1 'the job did not start: its supervisor has ended; see supervisor.log.'
    fi
    if [ "$waited" -ge 600 ]; then
      tail -n 5 "$DIR/supervisor.log" >&2
      die 1 'the job did not start within 60 s; see supervisor.log.'
    fi
    waited=$((waited + 1))
    sleep 0.1
  done
  printf 'worker %s: started run %s, pid %s\n' "$LABEL" "$RUN" "$(cat "$DIR/pid")"
}

# settle DIR: waits for the supervisor of a job that is over. It lives on until it has written down
# how the job ended and has sent the log away; a second one beside it would find the lock taken, and
# the first one's last words would be read as the second one's.
settle() {
  local waited=0
  while alive "$1" supervisor; do
    if [ "$waited" -ge 300 ]; then
      kill -KILL "$(cat "$1/supervisor")" 2>/dev/null || true
    fi
    waited=$((waited + 1))
    sleep 0.1
  done
}

export_setting() { export "$1=$2"; }

load_env() {
  # shellcheck source=scripts/launch/settings.sh
  . "$(dirname "$0")/launch/settings.sh"
  [ -r "$1" ] || die 1 "--env-file: $1 cannot be read."
  each_setting "$1" export_setting
}

upload_logs() {
  [ -n "$BUCKET" ] || return 0
  tail -c 262144 "$LOG" >"$DIR/upload.$LABEL"
  gcloud storage cp "$DIR/upload.$LABEL" "$BUCKET/logs/log.$LABEL" >/dev/null 2>&1 || true
}

# A sentence for deaths that give Python no chance to say anything.
obituary() {
  case $1 in
    0) return 0 ;;
    2) printf 'The program refused to go on (exit code 2): its log ends with the reason.' ;;
    5) printf 'The program failed, or another host of the run died (exit code 5): the end of the log says which.' ;;
    134) printf 'The program was aborted (signal 6). If another host of the run died, this is how JAX ends on the others: read the log of the worker that failed first.' ;;
    137)
      [ ! -e "$DIR/killed" ] || {
        printf 'The program was asked to end, did not within its time (--grace), and was killed.'
        return 0
      }
      printf 'The program was killed (signal 9): by hand, by the out-of-memory killer, or with the machine.'
      ;;
    139) printf 'The program crashed in native code (signal 11).' ;;
    143) printf 'The program was asked to end (signal 15).' ;;
    *) printf 'The program ended with exit code %s.' "$1" ;;
  esac
}

# Holds the lock, runs the command in its own process group, writes down how it ended.
supervise() {
  local child code=0 uploader='' pair workdir
  mkdir -p "$DIR"
  if command -v flock >/dev/null; then
    exec 9>"$DIR/lock"
    flock -n 9 || die "$EX_BUSY" "another supervisor of run $RUN holds the lock."
  fi
  # What the processes of the run know and nobody else does; an --env-file may have another one.
  [ ! -r RUN_TOKEN ] || export HRVLM_RUN_TOKEN="${HRVLM_RUN_TOKEN:-$(cat RUN_TOKEN)}"
  [ -z "$ENV_FILE" ] || load_env "$ENV_FILE"
  for pair in ${ENV[@]+"${ENV[@]}"}; do
    export "${pair%%=*}=${pair#*=}"
  done
  export HRVLM_RUN_DIR=$DIR HRVLM_WORKER_LABEL=$LABEL
  # A trainer that was lost with its machine leaves a lock that is stale after 90 s: waited for.
  export HRVLM_LOCK_WAIT=${HRVLM_LOCK_WAIT:-120}
  [ ! -d "$VENV/bin" ] || export PATH="$VENV/bin:$PATH"
  workdir=$(workdir_of "${JOB[@]}")
  case $LABEL in
    0 | 0.0)
      # A marker of the previous attempt must not be taken for one of this attempt.
      case $workdir in
        '') ;;
        gs://*) gcloud storage rm "$workdir/PREEMPTED" >/dev/null 2>&1 || true ;;
        *) rm -f "$workdir/PREEMPTED" ;;
      esac
      ;;
  esac
  printf '%s\n' "$(printf '%q ' "${JOB[@]}")" >"$DIR/command"
  remember supervisor "$$"
  printf '=== worker %s on %s starts run %s at %s\n' "$LABEL" "$(hostname)" "$RUN" \
    "$(date -u +%Y-%m-%dT%H:%M:%SZ)" >>"$LOG"
  set -m # the job gets a process group of its own, which stop can end as a whole
  "${JOB[@]}" </dev/null >>"$LOG" 2>&1 9>&- &
  child=$!
  set +m
  remember pid "$child"
  if [ -n "$BUCKET" ]; then
    while sleep 60; do upload_logs; done 9>&- &
    uploader=$!
  fi
  wait "$child" || code=$?
  [ -z "$uploader" ] || kill "$uploader" 2>/dev/null || true
  [ "$code" -eq 0 ] || printf '=== worker %s: %s\n' "$LABEL" "$(obituary "$code")" >>"$LOG"
  if [ "$code" -eq 0 ] && [ -n "$workdir" ]; then
    case $workdir in
      gs://*) ! gcloud storage ls "$workdir/PREEMPTED" >/dev/null 2>&1 || : >"$DIR/PREEMPTED" ;;
      *) [ ! -e "$workdir/PREEMPTED" ] || : >"$DIR/PREEMPTED" ;;
    esac
  fi
  upload_logs
  write ended "$(date +%s)"
  write exit_code "$code"
}

# --- status, logs, stop ------------------------------------------------------------------------

file_age() {
  local modified
  modified=$(stat -c %Y "$1" 2>/dev/null || stat -f %m "$1" 2>/dev/null) || return 1
  printf '%s' "$(($(date +%s) - modified))"
}

# Newest checkpoint of a local working directory: its checkpoints are directories named by step.
newest_step() {
  local workdir path name best=-1
  [ -f "$DIR/command" ] || return 0
  local -a words
  eval "words=($(cat "$DIR/command"))" # written by supervise with %q
  workdir=$(workdir_of ${words[@]+"${words[@]}"})
  case $workdir in '' | gs://*) return 0 ;; esac
  for path in "$workdir"/checkpoints/*/; do
    name=$(basename "$path")
    case $name in *[!0-9]*) continue ;; esac
    [ "$name" -le "$best" ] || best=$name
  done
  [ "$best" -lt 0 ] || printf '%s' "$best"
}

status() {
  local state=none code=- marker=- ended=- pid=- age=- last='' step preempted
  # The job may have ended while its supervisor still sends the log away: that is running, too.
  if [ ! -f "$DIR/exit_code" ] && { alive "$DIR" || alive "$DIR" supervisor; }; then
    state=running
  elif [ -f "$DIR/exit_code" ]; then
    code=$(cat "$DIR/exit_code")
    ended=$(cat "$DIR/ended")
    state=failed
    [ "$code" -ne 0 ] || state=success
  elif [ -d "$DIR" ]; then
    state=dead # the machine was restarted, or the supervisor was killed as well
  fi
  [ ! -e "$DIR/PREEMPTED" ] || marker=PREEMPTED
  [ ! -f "$DIR/pid" ] || pid=$(cat "$DIR/pid")
  if [ -f "$LOG" ]; then
    age="$(file_age "$LOG")s"
    last=$(tail -n 1 "$LOG" | tr -d '\r' | cut -c1-160)
  fi
  step=$(newest_step)
  preempted=$(metadata preempted || printf FALSE)
  printf 'status %s host=%s pid=%s state=%s exit=%s ended=%s age=%s marker=%s preempted=%s step=%s last=%s\n' \
    "$LABEL" "$(hostname)" "$pid" "$state" "$code" "$ended" "$age" "$marker" "$preempted" "${step:--}" "$last"
}

logs() {
  local -a command
  [ -f "$LOG" ] || die 2 "there is no log of run $RUN on worker $LABEL."
  command=(tail -n "$LINES_WANTED")
  if [ "$FOLLOW" = 1 ]; then
    command+=(-F)
    # GNU tail can end together with the job.
    if alive "$DIR" && tail --version >/dev/null 2>&1; then
      command+=("--pid=$(cat "$DIR/pid")")
    elif ! alive "$DIR"; then
      command=(tail -n "$LINES_WANTED")
    fi
  fi
  exec "${command[@]}" "$LOG"
}

# end_job DIR GRACE: asks the whole process group to end (the trainer saves), then kills it. When it
# returns, how the job ended is written down.
end_job() {
  local pid waited=0
  pid=$(cat "$1/pid")
  kill -TERM -- "-$pid" 2>/dev/null || true
  while alive "$1"; do
    if [ "$waited" -ge $(($2 * 10)) ]; then
      : >"$1/killed"
      kill -KILL -- "-$pid" 2>/dev/null || true
    fi
    waited=$((waited + 1))
    sleep 0.1
  done
  # Workers of the data pipeline may outlive their parent.
  kill -KILL -- "-$pid" 2>/dev/null || true
  settle "$1"
}

stop() {
  if ! alive "$DIR"; then
    printf 'worker %s: nothing runs.\n' "$LABEL"
    return 0
  fi
  end_job "$DIR" "$GRACE"
  printf 'worker %s: stopped.\n' "$LABEL"
}

[ $# -ge 2 ] || die 2 'expected: worker_run.sh start|status|logs|stop RUN [options] [-- COMMAND...]'
VERB=$1 RUN=$2
shift 2
case $RUN in '' | .* | *[!A-Za-z0-9._-]*) die 2 "found run name '$RUN', expected letters, digits, dots, dashes." ;; esac
SLICE='' BUCKET='' ENV_FILE='' ATTEMPT='' FORCE=0 FOLLOW=0 LINES_WANTED=+1 GRACE=60
ENV=() JOB=() OPTIONS=(--grace 60)
while [ $# -gt 0 ]; do
  case $1 in
    --)
      shift
      JOB=("$@")
      break
      ;;
    --force) FORCE=1 ;;
    --follow) FOLLOW=1 ;;
    --slice | --bucket | --env-file | --env | --lines | --grace | --attempt)
      [ $# -ge 2 ] || die 2 "$1 needs a value."
      case $1 in
        --slice) SLICE=$2 ;;
        --bucket) BUCKET=$2 ;;
        # Relative to the home directory, where launch.sh puts the secrets.
        --env-file) case $2 in /*) ENV_FILE=$2 ;; *) ENV_FILE=$HOME/$2 ;; esac ;;
        --env) ENV+=("$2") ;;
        --lines) LINES_WANTED=$2 ;;
        --grace) GRACE=$2 ;;
        --attempt) ATTEMPT=$2 ;;
      esac
      case $1 in --lines | --attempt) ;; *) OPTIONS+=("$1" "$2") ;; esac
      shift
      ;;
    *) die 2 "unknown option $1." ;;
  esac
  shift
done
RUNS=${HRVLM_RUNS:-$HOME/runs}
DIR=$RUNS/$RUN
VENV=${HRVLM_VENV:-$HOME/hrvlm-venv}
LABEL=$(worker_label)
LOG=$DIR/log.$LABEL
case $VERB in
  start | supervise | status | logs | stop) "$VERB" ;;
  *) die 2 "unknown command $VERB." ;;
esac
