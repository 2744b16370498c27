# shellcheck shell=bash
# Machines: create, wait, delete, and the remote shell, over either backend. Sourced by launch.sh.
# shellcheck disable=SC2034 # variables are shared with the other files

backend() {
  local verb=$1
  shift
  "${OPT_BACKEND}_$verb" "$@"
}

# Makes sure that the machines are asked for. Doing it twice changes nothing.
# Returns 0, EX_STOCKOUT or EX_USAGE.
create() {
  local code=0
  backend state ''
  case $STATE in
    ACTIVE | ACCEPTED | WAITING_FOR_RESOURCES | CREATING | PROVISIONING) ASKED=1 ;;
    UNKNOWN) ;;
    *) check_source ;;
  esac
  case $STATE in
    ACTIVE)
      note "$OPT_NAME is ACTIVE already: nothing to create."
      EXISTED=1
      return 0
      ;;
    ACCEPTED | WAITING_FOR_RESOURCES | CREATING | PROVISIONING)
      note "$OPT_NAME has been asked for already ($STATE): nothing to create."
      return 0
      ;;
    FAILED | SUSPENDED | SUSPENDING | DELETING)
      note "$OPT_NAME is $STATE and its name stays taken: deleting it first."
      remove || return "$?"
      ;;
    UNKNOWN)
      printf '%s\n' "$COMPLAINT" >&2
      explain "$COMPLAINT" || code=$?
      return "$code"
      ;;
  esac
  ASKED=1 # even when the answer is an error: it may have been lost on the way
  backend create || code=$?
  if [ "$code" -eq 0 ]; then
    return 0
  fi
  if [ "$(classify "$COMPLAINT")" = exists ]; then
    note "$OPT_NAME was created in between: going on with it."
    return 0
  fi
  code=0
  explain "$COMPLAINT" || code=$?
  return "$code"
}

# Deletes and waits until the name is free. A name that is gone is fine.
remove() {
  local tries=0 delay=10
  while :; do
    if backend delete || [ "$(classify "$COMPLAINT")" = gone ]; then
      ASKED=0
      return 0
    fi
    tries=$((tries + 1))
    if [ "$tries" -ge 5 ]; then
      note "could not delete $OPT_NAME after $tries tries: it may still cost money. Delete it with: $(delete_hint)"
      return "$EX_USAGE"
    fi
    nap "$delay" # SUSPENDING and DELETING refuse for a while
    delay=$(grow "$delay" 200 60)
  done
}

# Waits for ACTIVE. Returns 0, EX_STOCKOUT (failed), EX_PREEMPTED (taken away or gone) or EX_TIMEOUT.
await_active() {
  local delay=10 before='' silent='' started=$NAPPED limit patience code
  limit=$(seconds "$OPT_WAIT_TIMEOUT")
  patience=$(seconds "$OPT_PATIENCE")
  while :; do
    backend state ACTIVE
    if [ "$STATE" != "$before" ]; then
      note "$OPT_NAME: ${before:-asked} -> $STATE after $((NAPPED - started)) s"
      before=$STATE
    fi
    case $STATE in
      ACTIVE) return 0 ;;
      FAILED)
        backend failure_reason
        note "the request failed: ${ANSWER:-no reason given}"
        code=0
        explain "${ANSWER:-stockout}" || code=$?
        return "$code"
        ;;
      SUSPENDING | SUSPENDED | DELETING | MISSING) return "$EX_PREEMPTED" ;;
      UNKNOWN)
        silent=${silent:-$NAPPED}
        if [ $((NAPPED - silent)) -ge "$patience" ]; then
          printf '%s\n' "$COMPLAINT" >&2
          note "gcloud did not answer for $OPT_PATIENCE (--patience)."
          return "$EX_TIMEOUT"
        fi
        ;;
      *) silent='' ;;
    esac
    if [ $((NAPPED - started)) -ge "$limit" ]; then
      note "$OPT_NAME is still $STATE after $OPT_WAIT_TIMEOUT (--wait-timeout); it stays in the queue."
      return "$EX_TIMEOUT"
    fi
    nap "$delay"
    delay=$(grow "$delay" 150 60)
  done
}

# Sets NODES and WORKERS (hosts of each node, asked once per life of the machines).
find_nodes() {
  local node
  backend nodes
  if [ "${#WORKERS[@]}" -gt 0 ]; then
    return 0
  fi
  for node in "${NODES[@]}"; do
    if ! backend count_workers "$node"; then
      printf '%s\n' "$COMPLAINT" >&2
      WORKERS=()
      return 1
    fi
    case $ANSWER in
      '' | *[!0-9]* | 0)
        note "node $node has no network endpoint yet (found '$ANSWER')."
        WORKERS=()
        return 1
        ;;
    esac
    WORKERS+=("$ANSWER")
  done
}

# label NODE_INDEX WORKER: how a host is called: `worker`, or `slice.worker` with several slices.
label() {
  if [ "$OPT_SLICES" -gt 1 ]; then printf '%s.%s' "$1" "$2"; else printf '%s' "$2"; fi
}

# unreachable CODE: was it the connection, rather than the command, that failed?
connection_failed() {
  [ "$1" -eq 255 ] && return 0
  case $COMPLAINT in
    *'return code [255]'* | *'Permission denied (publickey'* | *'Connection refused'* | *'Connection timed out'* | *'Connection reset'*)
      return 0
      ;;
  esac
  return 1
}

# on NODE WORKER COMMAND: runs a command string there; stdout in ANSWER. A connection that fails is
# tried again OPT_SSH_TRIES times in all; every command sent must be safe to send twice.
on() {
  local delay=5 tries=0 code
  while :; do
    code=0
    backend ssh_args "$1" "$2"
    ask "$DRY_REPLY" "${SSH_ARGS[@]}" "--command=$3" </dev/null || code=$?
    tries=$((tries + 1))
    if [ "$code" -eq 0 ] || ! connection_failed "$code" || [ "$tries" -ge "$OPT_SSH_TRIES" ]; then
      return "$code"
    fi
    note "$1 worker $2: no connection (try $tries of $OPT_SSH_TRIES)."
    nap "$delay"
    delay=$(grow "$delay" 200 60)
  done
}

# on_all COMMAND: the command on every worker of every node; the first failure ends it.
on_all() {
  local node code
  for node in "${NODES[@]}"; do
    code=0
    on "$node" all "$1" || code=$?
    [ -z "$ANSWER" ] || dry_run || printf '%s\n' "$ANSWER"
    if [ "$code" -ne 0 ]; then
      printf '%s\n' "$COMPLAINT" >&2
      return "$code"
    fi
  done
}

# copy_to_all SOURCE TARGET: a file to every worker of every node.
copy_to_all() {
  local node delay tries code
  for node in "${NODES[@]}"; do
    delay=5 tries=0
    while :; do
      code=0
      backend copy_args "$node" "$1" "$2"
      act "${COPY_ARGS[@]}" || code=$?
      tries=$((tries + 1))
      [ "$code" -ne 0 ] || break
      if [ "$tries" -ge "$OPT_SSH_TRIES" ]; then
        return "$code"
      fi
      nap "$delay"
      delay=$(grow "$delay" 200 60)
    done
  done
}
