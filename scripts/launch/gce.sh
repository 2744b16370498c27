# shellcheck shell=bash
# Backend `gce`: one Compute Engine TPU VM (a single host of v5e, v5p, v6e or tpu7x). Slices of
# several hosts on Compute Engine need managed instance groups; use the qr backend or xpk for them
# (tpu/README.md). Same functions as qr.sh. Sourced by launch.sh.
# shellcheck disable=SC2034 # variables are shared with the other files

gce_nodes() { NODES=("$OPT_NAME"); }

# Compute Engine's states in the words of the queued resources.
gce_state() {
  local code=0
  ask "$(gce_assumed "$1")" gcloud compute instances describe "$OPT_NAME" "--zone=$ZONE" \
    ${PROJECT_FLAG[@]+"${PROJECT_FLAG[@]}"} '--format=value(status)' || code=$?
  if [ "$code" -ne 0 ]; then
    if [ "$(classify "$COMPLAINT")" = gone ]; then STATE=MISSING; else STATE=UNKNOWN; fi
    return 0
  fi
  case $ANSWER in
    RUNNING) STATE=ACTIVE ;;
    PENDING | PROVISIONING | STAGING | REPAIRING) STATE=PROVISIONING ;;
    STOPPING | SUSPENDING | PENDING_STOP) STATE=SUSPENDING ;;
    STOPPED | SUSPENDED | TERMINATED) STATE=SUSPENDED ;;
    DEPROVISIONING) STATE=DELETING ;;
    '') if dry_run; then STATE=MISSING; else STATE=UNKNOWN; fi ;;
    *) STATE=UNKNOWN ;;
  esac
}

gce_assumed() {
  if [ "$1" = ACTIVE ]; then printf RUNNING; fi
}

gce_failure_reason() { ANSWER=''; }

gce_node_state() {
  gce_state ACTIVE
  if [ "$STATE" = ACTIVE ]; then STATE=READY; fi
}

gce_create() {
  local -a command
  command=(gcloud compute instances create "$OPT_NAME" "--zone=$ZONE"
    ${PROJECT_FLAG[@]+"${PROJECT_FLAG[@]}"} "--machine-type=$(machine_type "$OPT_TYPE")"
    --maintenance-policy=TERMINATE --image-project=ubuntu-os-accelerator-images
    "--image-family=$(image_family "$OPT_TYPE")" --boot-disk-size=200GB --scopes=cloud-platform)
  case $OPT_CAPACITY in
    spot) command+=(--provisioning-model=SPOT --instance-termination-action=DELETE) ;;
    reserved) command+=(--reservation-affinity=any) ;;
    flex)
      command+=(--provisioning-model=FLEX_START --instance-termination-action=DELETE
        "--request-valid-for-duration=${OPT_VALID_UNTIL:-2h}")
      ;;
  esac
  [ -z "$OPT_MAX_RUN_DURATION" ] || command+=("--max-run-duration=$OPT_MAX_RUN_DURATION")
  [ "$OPT_INTERNAL_IP" = 0 ] || command+=(--no-address)
  [ -z "$OPT_SERVICE_ACCOUNT" ] || command+=("--service-account=$OPT_SERVICE_ACCOUNT")
  [ -z "$OPT_NETWORK" ] || command+=("--network=$OPT_NETWORK")
  [ -z "$OPT_SUBNET" ] || command+=("--subnet=$OPT_SUBNET")
  command+=("--labels=$LABELS" "--metadata-from-file=startup-script=$REPO/tpu/startup.sh")
  act "${command[@]}"
}

gce_delete() {
  act gcloud compute instances delete "$OPT_NAME" "--zone=$ZONE" \
    ${PROJECT_FLAG[@]+"${PROJECT_FLAG[@]}"} --quiet
}

gce_count_workers() { ANSWER=1; }

gce_ssh_args() {
  SSH_ARGS=(gcloud compute ssh "$1" "--zone=$ZONE" ${PROJECT_FLAG[@]+"${PROJECT_FLAG[@]}"}
    '--ssh-flag=-o ServerAliveInterval=30')
  [ "$OPT_INTERNAL_IP" = 0 ] || SSH_ARGS+=(--internal-ip)
}

gce_copy_args() {
  COPY_ARGS=(gcloud compute scp "$2" "$1:$3" "--zone=$ZONE"
    ${PROJECT_FLAG[@]+"${PROJECT_FLAG[@]}"})
  [ "$OPT_INTERNAL_IP" = 0 ] || COPY_ARGS+=(--internal-ip)
}
