# shellcheck shell=bash
# The job on the machines: source, set-up, start, logs, status, stop. Sourced by launch.sh.
# Layout on a worker: ~/hrvlm (source), ~/hrvlm-venv, ~/.hrvlm/env (secrets, mode 600),
# ~/runs/RUN/{log.WORKER,pid,exit_code,...} (written by scripts/worker_run.sh).
# shellcheck disable=SC2034 # variables are shared with the other files

# One short command on each worker: keys get accepted and a dead host is named before work starts.
warm_up() {
  local i w code
  if ! dry_run && command -v ssh-add >/dev/null && [ -f "$HOME/.ssh/google_compute_engine" ]; then
    ssh-add -q "$HOME/.ssh/google_compute_engine" 2>/dev/null || true
  fi
  for ((i = 0; i < ${#NODES[@]}; i++)); do
    for ((w = 0; w < WORKERS[i]; w++)); do
      code=0
      on "${NODES[i]}" "$w" true || code=$?
      if [ "$code" -ne 0 ]; then
        printf '%s\n' "$COMPLAINT" >&2
        note "worker $(label "$i" "$w") of $OPT_NAME cannot be reached (exit code $code)."
        return "$EX_SETUP"
      fi
    done
  done
}

# Can we write to the bucket, and is it near? An unwritable bucket is better found now than at the
# first checkpoint.
check_bucket() {
  local probe="$OPT_BUCKET/$OPT_RUN_NAME/.write_test" region=${ZONE%-*}
  [ -n "$OPT_BUCKET" ] || return 0
  printf 'write test\n' >"$SCRATCH/write_test"
  if ! act gcloud storage cp "$SCRATCH/write_test" "$probe" ${PROJECT_FLAG[@]+"${PROJECT_FLAG[@]}"}; then
    if passing "$COMPLAINT"; then
      note "--bucket: $OPT_BUCKET did not answer the write test; that may pass."
      return "$EX_SETUP"
    fi
    note "--bucket: $OPT_BUCKET cannot be written to: create it in region $region or ask for" \
      'roles/storage.objectAdmin on it.'
    return "$EX_USAGE"
  fi
  if ask "$region" gcloud storage buckets describe "$OPT_BUCKET" '--format=value(location)' \
    ${PROJECT_FLAG[@]+"${PROJECT_FLAG[@]}"}; then
    case $(printf '%s' "$ANSWER" | tr '[:upper:]' '[:lower:]') in
      "$region" | "${region%%-*}") ;;
      *) note "warning: $OPT_BUCKET lies in $ANSWER, the machines in $region: slower, and traffic costs." ;;
    esac
  fi
}

UNPACK='rm -rf hrvlm.new && mkdir hrvlm.new && tar -xzf src.tgz -C hrvlm.new && rm -rf hrvlm.old && { [ ! -d hrvlm ] || mv hrvlm hrvlm.old; } && mv hrvlm.new hrvlm && rm -rf hrvlm.old'

# Sends the snapshot to the bucket once; the workers take it from there (also after preemption).
upload_snapshot() {
  [ -z "$OPT_BUCKET" ] || act gcloud storage cp "$SNAPSHOT" "$OPT_BUCKET/$OPT_RUN_NAME/src.tgz" \
    ${PROJECT_FLAG[@]+"${PROJECT_FLAG[@]}"}
}

# Puts the snapshot on every worker.
distribute() {
  if [ -n "$OPT_BUCKET" ]; then
    on_all "gcloud storage cp $(quote "$OPT_BUCKET/$OPT_RUN_NAME/src.tgz") src.tgz && $UNPACK" ||
      return "$EX_SETUP"
  else
    copy_to_all "$SNAPSHOT" src.tgz || return "$EX_SETUP"
    on_all "$UNPACK" || return "$EX_SETUP"
  fi
  SENT=1
}

sync_source() {
  make_snapshot || return "$?"
  upload_snapshot || return "$EX_SETUP"
  distribute
}

# Secrets travel as a file into a directory that only the user can enter: never in a command line,
# in metadata or in the bucket.
send_secrets() {
  [ -n "$OPT_ENV_FILE" ] || return 0
  on_all 'umask 077 && mkdir -p .hrvlm && chmod 700 .hrvlm' || return "$EX_SETUP"
  copy_to_all "$OPT_ENV_FILE" .hrvlm/env || return "$EX_SETUP"
  on_all 'chmod 600 .hrvlm/env' || return "$EX_SETUP"
}

# Packages on every worker; safe to repeat. The source is sent first when it was not yet.
setup() {
  local code=0
  local -a command
  warm_up || return "$?"
  check_bucket || return "$?"
  if [ "$SENT" = 0 ]; then
    # After a loss of machines the very same source runs again, whatever was edited in the meantime.
    if [ "$REUSE_SOURCE" = 1 ]; then
      distribute || return "$?"
    else
      sync_source || return "$?"
    fi
  fi
  send_secrets || return "$?"
  command=(bash scripts/worker_setup.sh --python "$OPT_PYTHON" --extra "$OPT_EXTRA")
  [ -z "$OPT_BUCKET" ] || command+=(--bucket "$OPT_BUCKET/$OPT_RUN_NAME")
  on_all "cd hrvlm && $(quote "${command[@]}")" || code=$?
  if [ "$code" -ne 0 ]; then
    note "set-up failed on $OPT_NAME (exit code $code); the lines above say on which step." \
      'With --internal-ip the network needs Cloud NAT to reach the package index.'
    return "$EX_SETUP"
  fi
}

# worker_command VERB NODE_INDEX: sets REMOTE, the words of worker_run.sh for a node.
worker_command() {
  REMOTE=(bash scripts/worker_run.sh "$1" "$OPT_RUN_NAME")
  if [ "$OPT_SLICES" -gt 1 ]; then
    REMOTE+=(--slice "$2")
  fi
}

# run_job [--force]: starts the command detached on every worker. ATTEMPT: the number of this request,
# where the caller may have to ask again.
run_job() {
  local i code pair attempt
  # A worker that started and could not say so, because the connection broke, is asked again: it
  # knows the request by this.
  attempt=${ATTEMPT:-$(date +%s).$$}
  for ((i = 0; i < ${#NODES[@]}; i++)); do
    worker_command start "$i"
    REMOTE+=(--attempt "$attempt")
    [ "${1:-}" != --force ] || REMOTE+=(--force)
    [ -z "$OPT_BUCKET" ] || REMOTE+=(--bucket "$OPT_BUCKET/$OPT_RUN_NAME")
    [ -z "$OPT_ENV_FILE" ] || REMOTE+=(--env-file .hrvlm/env)
    for pair in ${OPT_ENV[@]+"${OPT_ENV[@]}"}; do
      REMOTE+=(--env "$pair")
    done
    REMOTE+=(-- "${JOB[@]}")
    code=0
    on "${NODES[i]}" all "cd hrvlm && $(quote "${REMOTE[@]}")" || code=$?
    [ -z "$ANSWER" ] || printf '%s\n' "$ANSWER"
    if [ "$code" -ne 0 ]; then
      printf '%s\n' "$COMPLAINT" >&2
      case $COMPLAINT$ANSWER in
        *'already running'*)
          note "a job is running on $OPT_NAME; look at it with status, end it with stop, or use --force."
          return "$EX_USAGE"
          ;;
      esac
      note "could not start the job on ${NODES[i]} (exit code $code)."
      return "$EX_SETUP"
    fi
  done
}

# silence CODE: the state of a host whose answer did not come. `unknown`: gcloud itself did not answer,
# which says nothing about the host; `none`: the host answers and has no source yet.
silence() {
  if [ "$1" -ne 0 ] && ! connection_failed "$1"; then
    if passing "$COMPLAINT"; then printf unknown && return 0; fi
    case $COMPLAINT in *'hrvlm: No such file'* | *'worker_run.sh: No such file'*) printf none && return 0 ;; esac
  fi
  printf unreachable
}

# Sets STATUS: one line for each expected worker, from worker_run.sh or made up here (`silence`).
collect_status() {
  local i w name line reply code absent silent
  STATUS=()
  for ((i = 0; i < ${#NODES[@]}; i++)); do
    worker_command status "$i"
    code=0
    on "${NODES[i]}" all "cd hrvlm && $(quote "${REMOTE[@]}")" || code=$?
    reply=$ANSWER
    silent=$(silence "$code")
    absent=''
    # One dead host makes gcloud drop the answers of the others: then ask one by one.
    if ! dry_run && [ "${WORKERS[i]}" -gt 1 ] &&
      [ "$(grep -c '^status ' <<<"$reply")" -lt "${WORKERS[i]}" ]; then
      reply=''
      for ((w = 0; w < WORKERS[i]; w++)); do
        code=0
        on "${NODES[i]}" "$w" "cd hrvlm && $(quote "${REMOTE[@]}")" || code=$?
        reply+="$ANSWER"$'\n'
        absent+=" $w=$(silence "$code") "
      done
    fi
    for ((w = 0; w < WORKERS[i]; w++)); do
      name=$(label "$i" "$w")
      line=$(grep -m 1 "^status $name " <<<"$reply") || {
        [ -z "$absent" ] || silent=$(field "$w" "$absent")
        line="status $name state=$silent"
      }
      STATUS+=("$line")
    done
  done
}

# field KEY LINE: the value of KEY=VALUE in a status line.
field() {
  local pattern=" $1=([^ ]*)"
  if [[ $2 =~ $pattern ]]; then printf '%s' "${BASH_REMATCH[1]}"; else printf -- '-'; fi
}

print_status() {
  local line last
  printf '%-8s %-24s %-8s %-12s %-5s %-7s %s\n' WORKER HOST PID STATE EXIT AGE 'LAST LINE'
  for line in "${STATUS[@]}"; do
    last=${line##* last=}
    [ "$last" != "$line" ] || last=-
    printf '%-8s %-24s %-8s %-12s %-5s %-7s %s\n' "$(cut -d' ' -f2 <<<"$line")" \
      "$(field host "$line")" "$(field pid "$line")" "$(field state "$line")" \
      "$(field exit "$line")" "$(field age "$line")" "$last"
  done
}

stop_job() {
  local i code=0
  for ((i = 0; i < ${#NODES[@]}; i++)); do
    worker_command stop "$i"
    on "${NODES[i]}" all "cd hrvlm && $(quote "${REMOTE[@]}")" || code=$?
    [ -z "$ANSWER" ] || printf '%s\n' "$ANSWER"
  done
  return "$code"
}

# last_lines LABEL COUNT: the end of one worker's log; from the bucket when the worker is gone.
last_lines() {
  local slice=0 worker=$1
  case $1 in
    *.*) slice=${1%%.*} worker=${1#*.} ;;
  esac
  worker_command logs "$slice"
  REMOTE+=(--lines "$2")
  if on "${NODES[slice]}" "$worker" "cd hrvlm && $(quote "${REMOTE[@]}")"; then
    printf '%s\n' "$ANSWER"
  elif [ -n "$OPT_BUCKET" ]; then
    gcloud storage cat "$OPT_BUCKET/$OPT_RUN_NAME/logs/log.$1" | tail -n "$2"
  else
    note "the log of worker $1 cannot be read: $COMPLAINT"
  fi
}

# Follows logs; with several workers each line carries its worker's label when --prefix is given.
follow_logs() {
  local i w name
  local -a pids
  pids=()
  for ((i = 0; i < ${#NODES[@]}; i++)); do
    for ((w = 0; w < WORKERS[i]; w++)); do
      name=$(label "$i" "$w")
      [ "$OPT_WORKER" = all ] || [ "$OPT_WORKER" = "$name" ] || continue
      worker_command logs "$i"
      REMOTE+=(--lines "$OPT_LINES")
      [ "$OPT_FOLLOW" = 0 ] || REMOTE+=(--follow)
      backend ssh_args "${NODES[i]}" "$w"
      SSH_ARGS+=("--command=cd hrvlm && $(quote "${REMOTE[@]}")")
      if dry_run; then
        show "${SSH_ARGS[@]}"
      elif [ "$OPT_PREFIX" = 1 ]; then
        "${SSH_ARGS[@]}" </dev/null | while IFS= read -r line; do printf '[%s] %s\n' "$name" "$line"; done &
        pids+=("$!")
      else
        "${SSH_ARGS[@]}" </dev/null &
        pids+=("$!")
      fi
      FOUND_WORKER=1
    done
  done
  [ "${FOUND_WORKER:-0}" = 1 ] || die "$EX_USAGE" "logs: there is no worker '$OPT_WORKER'; run status to see them."
  for i in ${pids[@]+"${pids[@]}"}; do
    wait "$i" || LOG_CODE=$?
  done
  return "${LOG_CODE:-0}"
}
