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

# Sets STEP: the newest checkpoint, -1 if there is none. Workers report local ones in their status.
newest_step() {
  local line found directory
  directory=$(job_workdir)
  STEP=-1
  case $directory in
    gs://*)
      ask '' gcloud storage ls "$directory/checkpoints/" ${PROJECT_FLAG[@]+"${PROJECT_FLAG[@]}"} || true
      while IFS= read -r line; do
        line=${line%/}
        found=${line##*/}
        case $found in '' | *[!0-9]*) continue ;; esac
        [ "$found" -le "$STEP" ] || STEP=$found
      done <<<"$ANSWER"
      ;;
    *)
      for line in ${STATUS[@]+"${STATUS[@]}"}; do
        found=$(field step "$line")
        case $found in '' | *[!0-9]*) continue ;; esac
        [ "$found" -le "$STEP" ] || STEP=$found
      done
      ;;
  esac
}

# Sets VERDICT from STATUS: running, success, preempted, failed or unreachable. A preempted host makes
# the others crash, so preemption is looked for first; exit code 0 with a marker is preemption too.
judge() {
  local line state ok=1 failed=0 lost=0 preempted=0
  for line in "${STATUS[@]}"; do
    state=$(field state "$line")
    [ "$(field marker "$line")" != PREEMPTED ] || preempted=1
    [ "$(field preempted "$line")" != TRUE ] || preempted=1
    [ "$state" = success ] || ok=0
    case $state in
      failed | dead | none) failed=1 ;;
      unreachable) lost=1 ;;
    esac
  done
  if [ "$preempted" = 1 ]; then
    VERDICT=preempted
  elif [ "$failed" = 1 ]; then
    VERDICT=failed
  elif [ "$lost" = 1 ]; then
    VERDICT=unreachable
  elif [ "$ok" = 1 ]; then
    VERDICT=success
  else
    VERDICT=running
  fi
}

# Are all nodes still ours? Sets MACHINES to ready, lost or unknown.
check_machines() {
  local node
  MACHINES=ready
  backend state ACTIVE
  case $STATE in
    ACTIVE) ;;
    UNKNOWN) MACHINES=unknown && return 0 ;;
    *) MACHINES=lost && return 0 ;;
  esac
  for node in "${NODES[@]}"; do
    backend node_state "$node"
    case $STATE in
      READY) ;;
      UNKNOWN) MACHINES=unknown ;;
      *) MACHINES=lost && return 0 ;;
    esac
  done
}

# Watches the running job. Sets VERDICT to success, preempted or failed.
watch_job() {
  local unreachable=0 before='' line now
  while :; do
    nap "$OPT_POLL"
    check_machines
    if [ "$MACHINES" = lost ]; then
      VERDICT=preempted
      return 0
    fi
    # When gcloud itself does not answer (a laptop without network), nothing is known: keep waiting.
    [ "$MACHINES" = ready ] || continue
    collect_status
    judge
    now=''
    for line in "${STATUS[@]}"; do now+="$(cut -d' ' -f2 <<<"$line")=$(field state "$line") "; done
    [ "$now" = "$before" ] || note "workers: $now"
    before=$now
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
  [ -n "$first" ] || return 0
  note "worker $first failed first; the last 50 lines of its log:"
  last_lines "$first" 50 | tee "$SCRATCH/last_lines"
  if grep -q -e 'already in use by process' -e 'libtpu_lockfile' "$SCRATCH/last_lines"; then
    note 'another process holds the TPU: run scripts/launch.sh stop and start again.'
  fi
}

# Machines, set-up and start; returns the exit codes of those functions. Machines that already run
# this very job (babysit was interrupted and started again) are left alone and only watched.
bring_up() {
  WORKERS=()
  EXISTED=0 SENT=0
  create || return "$?"
  await_active || return "$?"
  find_nodes || return "$EX_PREEMPTED"
  if [ "$EXISTED" = 1 ] && ! dry_run; then
    collect_status
    judge
    if [ "$VERDICT" = running ] || [ "$VERDICT" = success ]; then
      note "run $OPT_RUN_NAME is there already: watching it."
      [ -z "$OPT_BUCKET" ] && [ ! -f "$SNAPSHOT" ] || REUSE_SOURCE=1
      return 0
    fi
  fi
  setup || return "$?"
  REUSE_SOURCE=1
  run_job --force || return "$?"
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
  STATUS=()
  while :; do
    code=0
    bring_up || code=$?
    if dry_run; then
      return "$code"
    fi
    if [ "$code" -eq "$EX_SETUP" ]; then
      check_machines
      [ "$MACHINES" != lost ] || code=$EX_PREEMPTED
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
        note "giving up; the machines are kept. Delete them with: $(delete_hint)"
        return "$EX_TRAINING"
      fi
      nap "$((10 * failures))"
      run_job --force || code=$?
      if [ "$code" -ne 0 ]; then
        check_machines
        [ "$MACHINES" = lost ] || return "$code"
        VERDICT=preempted
      fi
    done
    if [ "$VERDICT" = success ]; then
      note 'all workers ended with exit code 0.'
      if [ "$OPT_KEEP" = 0 ]; then
        remove || return "$?"
      fi
      return 0
    fi
    preemptions=$((preemptions + 1))
    note "preemption $preemptions (of at most $OPT_MAX_RETRIES): deleting what is left and asking again."
    if [ "$preemptions" -gt "$OPT_MAX_RETRIES" ]; then
      remove || true
      return "$EX_PREEMPTED"
    fi
    remove || return "$?"
  done
}
