# shellcheck shell=bash
# Backend `qr`: queued resources of the Cloud TPU API (v4, v5e, v5p, v6e; one or several slices).
# A backend defines: state, failure_reason, create, delete, nodes, count_workers, ssh_args,
# ssh_to, copy_to. Sourced by launch.sh.
# shellcheck disable=SC2034 # variables are shared with the other files

# One node keeps the name; K slices are NAME-0 .. NAME-(K-1).
qr_nodes() {
  local i
  NODES=()
  if [ "$OPT_SLICES" -eq 1 ]; then
    NODES=("$OPT_NAME")
    return 0
  fi
  for ((i = 0; i < OPT_SLICES; i++)); do
    NODES+=("$OPT_NAME-$i")
  done
}

# Sets STATE: the API's state, MISSING, or UNKNOWN when the question itself failed.
qr_state() {
  local code=0
  ask "$1" gcloud compute tpus queued-resources describe "$OPT_NAME" "--zone=$ZONE" \
    ${PROJECT_FLAG[@]+"${PROJECT_FLAG[@]}"} '--format=value(state.state)' || code=$?
  if [ "$code" -eq 0 ]; then
    STATE=${ANSWER:-UNKNOWN} # an empty answer does not say that the machines are gone
    ! dry_run || STATE=${ANSWER:-MISSING}
  elif [ "$(classify "$COMPLAINT")" = gone ]; then
    STATE=MISSING
  else
    STATE=UNKNOWN
  fi
}

qr_failure_reason() {
  ask '' gcloud compute tpus queued-resources describe "$OPT_NAME" "--zone=$ZONE" \
    ${PROJECT_FLAG[@]+"${PROJECT_FLAG[@]}"} '--format=value(state.failedData.error.message)' || true
}

# Sets STATE to the state of one node: READY, PREEMPTED, TERMINATED, MISSING, UNKNOWN...
qr_node_state() {
  local code=0
  ask READY gcloud compute tpus tpu-vm describe "$1" "--zone=$ZONE" \
    ${PROJECT_FLAG[@]+"${PROJECT_FLAG[@]}"} '--format=value(state)' || code=$?
  if [ "$code" -eq 0 ]; then
    STATE=${ANSWER:-UNKNOWN}
  elif [ "$(classify "$COMPLAINT")" = gone ]; then
    STATE=MISSING
  else
    STATE=UNKNOWN
  fi
}

qr_create() {
  local -a command
  command=(gcloud)
  # Flex-start and run-time limits exist in the alpha commands only.
  if [ "$OPT_CAPACITY" = flex ] || [ -n "$OPT_MAX_RUN_DURATION" ]; then
    command+=(alpha)
  fi
  command+=(compute tpus queued-resources create "$OPT_NAME" "--zone=$ZONE"
    ${PROJECT_FLAG[@]+"${PROJECT_FLAG[@]}"} "--accelerator-type=$OPT_TYPE"
    "--runtime-version=$OPT_RUNTIME")
  if [ "$OPT_SLICES" -eq 1 ]; then
    command+=("--node-id=$OPT_NAME")
  else
    command+=("--node-count=$OPT_SLICES" "--node-prefix=$OPT_NAME")
  fi
  case $OPT_CAPACITY in
    spot) command+=(--spot) ;;
    reserved) command+=(--reserved) ;;
    flex) command+=(--provisioning-model=FLEX_START) ;;
  esac
  [ -z "$OPT_MAX_RUN_DURATION" ] || command+=("--max-run-duration=$OPT_MAX_RUN_DURATION")
  [ -z "$OPT_VALID_UNTIL" ] || command+=("--valid-until-duration=$OPT_VALID_UNTIL")
  [ "$OPT_INTERNAL_IP" = 0 ] || command+=(--internal-ips)
  [ -z "$OPT_SERVICE_ACCOUNT" ] || command+=("--service-account=$OPT_SERVICE_ACCOUNT")
  [ -z "$OPT_NETWORK" ] || command+=("--network=$OPT_NETWORK")
  [ -z "$OPT_SUBNET" ] || command+=("--subnetwork=$OPT_SUBNET")
  command+=("--labels=$LABELS" "--metadata-from-file=startup-script=$REPO/tpu/startup.sh" --async)
  act "${command[@]}"
}

qr_delete() {
  act gcloud compute tpus queued-resources delete "$OPT_NAME" "--zone=$ZONE" \
    ${PROJECT_FLAG[@]+"${PROJECT_FLAG[@]}"} --force --quiet
}

# Sets ANSWER to the number of hosts of a node.
qr_count_workers() {
  ask 1 gcloud compute tpus tpu-vm describe "$1" "--zone=$ZONE" \
    ${PROJECT_FLAG[@]+"${PROJECT_FLAG[@]}"} '--format=value(networkEndpoints.len())'
}

# qr_ssh_args NODE WORKER: sets SSH_ARGS, the command up to --command.
qr_ssh_args() {
  SSH_ARGS=(gcloud compute tpus tpu-vm ssh "$1" "--zone=$ZONE"
    ${PROJECT_FLAG[@]+"${PROJECT_FLAG[@]}"} "--worker=$2" '--ssh-flag=-o ServerAliveInterval=30')
  [ "$OPT_INTERNAL_IP" = 0 ] || SSH_ARGS+=(--internal-ip)
}

# qr_copy_args NODE SOURCE TARGET: sets COPY_ARGS; the copy goes to every worker.
qr_copy_args() {
  COPY_ARGS=(gcloud compute tpus tpu-vm scp "$2" "$1:$3" "--zone=$ZONE"
    ${PROJECT_FLAG[@]+"${PROJECT_FLAG[@]}"} --worker=all)
  [ "$OPT_INTERNAL_IP" = 0 ] || COPY_ARGS+=(--internal-ip)
}
