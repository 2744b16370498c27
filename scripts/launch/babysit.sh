# shellcheck shell=bash
# Keeps a run going until it succeeds. Two counters, because one is not enough: machines taken away
# (preemption) cost nothing but time and may happen --max-retries times; a program that crashes on
# healthy machines is stopped after three times in a row without a new checkpoint.
# Sourced by launch.sh.
# shellcheck disable=SC2034,SC2153 # variables are shared with the other files

# The working directory that the job's own command line names.
job_workdir() {
  local i
  for ((i = 0; i < ${#JOB[@]}; i++)); do
    case ${JOB[i]} in
      --workdir=*) printf '%s' "${JOB[i]#--workdir=}" && return 0 ;;
      --workdir) printf '%s' "${JOB[i + 1]:-}" && return 0 ;;
    esac
  done
}

# The bucket's list of checkpoints in ANSWER; fails only when the bucket did not answer.
list_checkpoints() {
  ask '' gcloud storage ls "$1/checkpoints/" ${PROJECT_FLAG[@]+"${PROJECT_FLAG[@]}"} && return 0
  passing "$COMPLAINT" && return "$EX_USAGE"
  ANSWER='' # there are none yet
}

# Sets STEP: the newest checkpoint, -1 if there is none. Workers report local ones in their status.
# A bucket that does not answer leaves STEP as it was.
newest_step() {
  local line found directory best=-1
  directory=$(job_workdir)
  case $directory in
    gs://*)
      patiently known list_checkpoints "$directory" || return 0
      while IFS= read -r line; do
        line=${line%/}
        found=${line##*/}
        case $found in '' | *[!0-9]*) continue ;; esac
        [ "$found" -le "$best" ] || best=$found
      done <<<"$ANSWER"
      ;;
    *)
      for line in ${STATUS[@]+"${STATUS[@]}"}; do
        found=$(field step "$line")
        case $found in '' | *[!0-9]*) continue ;; esac
        [ "$found" -le "$best" ] || best=$found
      done
      ;;
  esac
  STEP=$best
}

# Sets VERDICT from STATUS: running, success, preempted, failed, unreachable or unknown (gcloud did not
# answer for a host, or none of several hosts could be reached: the fault may be on this side). A preempted host makes
# the others crash, so preemption is looked for first; exit code 0 with a marker is preemption too.
judge() {
  local line state ok=1 failed=0 lost=0 preempted=0 unknown=0 heard=0
  for line in "${STATUS[@]}"; do
    state=$(field state "$line")
    [ "$(field marker "$line")" != PREEMPTED ] || preempted=1
    [ "$(field preempted "$line")" != TRUE ] || preempted=1
    [ "$state" = success ] || ok=0
    case $state in
      failed | dead | none) failed=1 ;;
      unreachable) lost=1 && continue ;;
      unknown) unknown=1 && continue ;;
    esac
    heard=1
  done
  if [ "$preempted" = 1 ]; then
    VERDICT=preempted
  elif [ "$failed" = 1 ]; then
    VERDICT=failed
  elif [ "$lost" = 1 ] && [ "$heard" = 1 ]; then
    VERDICT=unreachable
  elif [ "$lost" = 1 ] || [ "$unknown" = 1 ]; then
    VERDICT=unknown
  elif [ "$ok" = 1 ]; then
    VERDICT=success
  else
    VERDICT=running
  fi
}

# Are all nodes still ours? Sets MACHINES to ready, lost or unknown. Lost is only what the cloud says is
# gone or going; a node that is repaired or starts again comes back.
check_machines() {
  local node
  MACHINES=ready
  backend state ACTIVE
  case $STATE in
    ACTIVE) ;;
    SUSPENDING | SUSPENDED | DELETING | FAILED | MISSING) MACHINES=lost && return 0 ;;
    *) MACHINES=unknown && return 0 ;;
  esac
  for node in "${NODES[@]}"; do
    backend node_state "$node"
    case $STATE in
      READY) ;;
      PREEMPTED | TERMINATED | STOPPING | STOPPED | DELETING | HIDING | HIDDEN | SUSPENDING | SUSPENDED | MISSING)
        MACHINES=lost && return 0
        ;;
      *) MACHINES=unknown ;;
    esac
  done
}

# Have the logs of all hosts been left alone for --stall? Other programs than ours may print little, and
# of several hosts mostly the first one speaks: the youngest log counts.
stands_still() {
  local line age limit
  limit=$(seconds "$OPT_STALL")
  [ "$limit" -gt 0 ] || return 1
  for line in "${STATUS[@]}"; do
    age=$(field age "$line")
    age=${age%s}
    case $age in '' | *[!0-9]*) return 1 ;; esac
    [ "$age" -ge "$limit" ] || return 1
  done
}

# Watches the running job. Sets VERDICT to success, preempted, failed or silent (no host answers).
watch_job() {
  local unreachable=0 before='' line now silent=0 deaf=0
  while :; do
    nap "$OPT_POLL"
    check_machines
    if [ "$MACHINES" = lost ]; then
      VERDICT=preempted
      return 0
    fi
    # When gcloud itself does not answer (a laptop without network), nothing is known: keep waiting.
    if [ "$MACHINES" = ready ]; then
      collect_status
      judge
    fi
    if [ "$MACHINES" != ready ] || [ "$VERDICT" = unknown ]; then
      [ $((silent % 20)) -ne 0 ] ||
        note "no answer about the machines ($STATE; ${COMPLAINT:-no words}): the run is left alone, looking again."
      silent=$((silent + 1))
      case $MACHINES${STATUS[*]} in *state=unknown*) ;; ready*) deaf=$((deaf + OPT_POLL)) ;; esac
      if [ "$deaf" -ge "$(seconds "$OPT_PATIENCE")" ]; then
        note "the cloud calls the machines READY, and no host has answered for $OPT_PATIENCE (--patience)."
        VERDICT=silent
        return 0
      fi
      continue
    fi
    silent=0 deaf=0
    now=''
    for line in "${STATUS[@]}"; do now+="$(cut -d' ' -f2 <<<"$line")=$(field state "$line") "; done
    [ "$now" = "$before" ] || note "workers: $now"
    before=$now
    if [ "$VERDICT" = running ] && stands_still; then
      note "no host has written to its log for $OPT_STALL (--stall): the job stands still and counts as failed."
      VERDICT=failed
      return 0
    fi
    case $VERDICT in
      success | preempted) return 0 ;;
      failed)
        # The API takes a while to say that a machine was taken: look once more before blaming the job.
        nap "$OPT_POLL"
        check_machines
        case $MACHINES in
          ready) return 0 ;;
          lost) VERDICT=preempted && return 0 ;;
        esac
        ;;
      unreachable)
        unreachable=$((unreachable + 1))
        if [ "$unreachable" -ge 5 ]; then
          note 'a host has not answered for five looks: treated as lost.'
          VERDICT=preempted
          return 0
        fi
        ;;
      *) unreachable=0 ;;
    esac
  done
}

# The worker that failed first, and the end of its log: the others mostly die of its death.
show_failure() {
  local line first='' earliest='' ended
  for line in "${STATUS[@]}"; do
    case $(field state "$line") in failed | dead) ;; *) continue ;; esac
    ended=$(field ended "$line")
    case $ended in '' | *[!0-9]*) ended=9999999999 ;; esac
    if [ -z "$earliest" ] || [ "$ended" -lt "$earliest" ]; then
      earliest=$ended
      first=$(cut -d' ' -f2 <<<"$line")
    fi
  done
  if [ -n "$first" ]; then
    note "worker $first failed first; the last 50 lines of its log:"
  elif [ "${#STATUS[@]}" -gt 0 ]; then
    first=$(cut -d' ' -f2 <<<"${STATUS[0]}") # all stand still
    note "the last 50 lines of the log of worker $first:"
  else
    return 0
  fi
  last_lines "$first" 50 | tee "$SCRATCH/last_lines"
  if grep -q -e 'already in use by process' -e 'libtpu_lockfile' "$SCRATCH/last_lines"; then
    note 'another process holds the TPU: run scripts/launch.sh stop and start again.'
  fi
}

# on_machines COMMAND...: EX_PREEMPTED when it fails because the cloud says that the machines are gone.
# COMPLAINT stays that of the command.
on_machines() {
  local code=0 complaint
  "$@" || code=$?
  if [ "$code" -ne 0 ] && ! dry_run; then
    complaint=$COMPLAINT
    check_machines
    COMPLAINT=$complaint
    [ "$MACHINES" != lost ] || code=$EX_PREEMPTED
  fi
  return "$code"
}

count_hosts() { find_nodes || return "$EX_SETUP"; }

# What runs on machines that were there already? Fails while that is not known: a job must not be
# started over one that runs.
look() {
  collect_status
  judge
  case $VERDICT in
    unknown) return "$EX_SETUP" ;;
    unreachable)
      case "${STATUS[*]}" in *state=running*) VERDICT=running ;; *) return "$EX_SETUP" ;; esac
      ;;
  esac
}

# Starts the job. Asked again, it is the same request (worker_run.sh start --attempt).
start_job() {
  ATTEMPT=$(date +%s).$$.$RANDOM
  patiently known on_machines run_job --force
}

# Machines, set-up and start; returns the exit codes of those functions. Machines that already run
# this very job (babysit was interrupted and started again) are left alone and only watched.
bring_up() {
  WORKERS=()
  EXISTED=0 SENT=0
  patiently known create || return "$?"
  await_active || return "$?"
  patiently any on_machines count_hosts || return "$?"
  if [ "$EXISTED" = 1 ] && ! dry_run; then
    patiently any on_machines look || return "$?"
    if [ "$VERDICT" = running ] || [ "$VERDICT" = success ]; then
      note "run $OPT_RUN_NAME is there already: watching it."
      [ -z "$OPT_BUCKET" ] && [ ! -f "$SNAPSHOT" ] || REUSE_SOURCE=1
      return 0
    fi
  fi
  patiently any on_machines setup || return "$?"
  REUSE_SOURCE=1
  start_job || return "$?"
}

# Another zone, if there is one, after a stock-out.
next_zone() {
  local i
  for ((i = 0; i < ${#ZONES[@]}; i++)); do
    if [ "${ZONES[i]}" = "$ZONE" ]; then
      ZONE=${ZONES[(i + 1) % ${#ZONES[@]}]}
      break
    fi
  done
  [ "${#ZONES[@]}" -eq 1 ] || note "trying zone $ZONE next (the bucket may lie elsewhere)."
}

babysit() {
  local preemptions=0 failures=0 stockouts=0 delay=60 code began=-1
  STATUS=() STEP=-1
  while :; do
    code=0
    bring_up || code=$?
    if dry_run; then
      return "$code"
    fi
    case $code in
      0) ;;
      "$EX_STOCKOUT")
        if [ "$(classify "$COMPLAINT$ANSWER")" = quota ]; then
          return "$code" # waiting does not raise a quota
        fi
        stockouts=$((stockouts + 1))
        if [ "$stockouts" -gt "$OPT_MAX_RETRIES" ]; then
          note "no capacity after $stockouts tries."
          return "$EX_STOCKOUT"
        fi
        note "stock-out $stockouts: waiting $delay s."
        # A request that failed keeps its name in the zone that is left.
        [ "${#ZONES[@]}" -eq 1 ] || [ "$STATE" != FAILED ] || remove || true
        nap "$delay"
        delay=$(grow "$delay" 200 900)
        next_zone
        continue
        ;;
      "$EX_PREEMPTED") VERDICT=preempted ;;
      *) return "$code" ;;
    esac
    while [ "$code" -eq 0 ]; do
      stockouts=0 delay=60
      newest_step
      began=$STEP
      watch_job
      if [ "$VERDICT" != failed ]; then
        break
      fi
      newest_step
      if [ "$STEP" -gt "$began" ]; then
        failures=1
      else
        failures=$((failures + 1))
      fi
      note "the job failed on healthy machines ($failures in a row without a new checkpoint; newest: $STEP)."
      show_failure
      stop_job >/dev/null || true
      if [ "$failures" -ge 3 ]; then
        note 'giving up; the machines are kept.'
        return "$EX_TRAINING"
      fi
      nap "$((10 * failures))"
      start_job || code=$?
      case $code in
        0) ;;
        "$EX_PREEMPTED") VERDICT=preempted ;;
        *) return "$code" ;;
      esac
    done
    if [ "$VERDICT" = silent ]; then
      return "$EX_TIMEOUT"
    fi
    if [ "$VERDICT" = success ]; then
      note 'all workers ended with exit code 0.'
      if [ "$OPT_KEEP" = 0 ]; then
        patiently known remove || return "$?"
      else
        note "the machines are kept and cost money. Delete them with: $(delete_hint)"
      fi
      return 0
    fi
    preemptions=$((preemptions + 1))
    note "preemption $preemptions (of at most $OPT_MAX_RETRIES): deleting what is left and asking again."
    if [ "$preemptions" -gt "$OPT_MAX_RETRIES" ]; then
      patiently known remove || true
      return "$EX_PREEMPTED"
    fi
    patiently known remove || return "$?"
  done
}
