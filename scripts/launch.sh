#!/usr/bin/env bash
# Launches hrvlm_jax on Cloud TPU VMs from a laptop: see usage below and tpu/README.md.
# Every option can come from the environment (HRVLM_ZONE for --zone) or from scripts/launch.env
# (KEY=VALUE lines, same names); the command line wins, then the environment, then the file.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
REPO=$(cd "$HERE/.." && pwd)
# shellcheck source=scripts/launch/common.sh
. "$HERE/launch/common.sh"
# shellcheck source=scripts/launch/settings.sh
. "$HERE/launch/settings.sh"
# shellcheck source=scripts/launch/types.sh
. "$HERE/launch/types.sh"
# shellcheck source=scripts/launch/qr.sh
. "$HERE/launch/qr.sh"
# shellcheck source=scripts/launch/gce.sh
. "$HERE/launch/gce.sh"
# shellcheck source=scripts/launch/machines.sh
. "$HERE/launch/machines.sh"
# shellcheck source=scripts/launch/source.sh
. "$HERE/launch/source.sh"
# shellcheck source=scripts/launch/job.sh
. "$HERE/launch/job.sh"
# shellcheck source=scripts/launch/babysit.sh
. "$HERE/launch/babysit.sh"
# shellcheck source=scripts/launch/simulate.sh
. "$HERE/launch/simulate.sh"

usage() {
  cat <<'TEXT'
usage: scripts/launch.sh COMMAND --name N --zone Z --type v6e-16 [options] [-- JOB...]
JOB is what every worker runs, for example:
  -- python -m hrvlm_jax.cli train --config configs/C.py --workdir gs://BUCKET/RUN

commands
  create    ask for the machines (nothing happens when they are there already)
  wait      wait until they are ACTIVE
  setup     install packages on every worker and check them (sends the source if needed)
  sync      send the source: files that git tracks, as they are now
  run       start JOB detached on every worker
  logs      show a worker's log and follow it
  status    one line per worker: host, pid, state, exit code, age, last log line
  ssh       open a shell on one worker (-- COMMAND runs it there)
  stop      end the job, keep the machines
  delete    delete the machines
  up        create, wait, setup, sync, run
  babysit   up, then resume after preemption until success; deletes at the end unless --keep
  simulate  two local "hosts", one is killed, the run resumes, losses are compared (no cloud)

machines
  --name N              name of the request and of its nodes          (required but for simulate)
  --zone Z              zone; --zones A,B,C: babysit tries them in turn on a stock-out
  --type T              v4-N, v5e-N, v5p-N, v6e-N, tpu7x-N (v4, v5p, tpu7x count TensorCores)
  --project P           Google Cloud project (default: gcloud's)
  --backend qr|gce      queued resources (default), or one Compute Engine VM (default for tpu7x)
  --spot | --reserved | --on-demand | --flex          kind of capacity (default --on-demand)
  --slices K            K equal slices (multi-slice), qr only          (1)
  --runtime V           TPU software version                          (by type)
  --valid-until 6h      give up the request after this time
  --max-run-duration D  machines end by themselves after D
  --wait-timeout 6h     how long wait, up and babysit wait for capacity
  --internal-ip         no external addresses (the network needs Cloud NAT)
  --service-account A, --network N, --subnet S, --labels k=v,...

job
  --run-name R          name of the run, kept over restarts            (name of the machines)
  --bucket gs://B       source and logs also go there (survives preemption)
  --env K=V             set for the job; repeat. Not for secrets.
  --env-file F          secrets as a shell writes them (KEY=VALUE, export, quotes); mode 600;
                        copied, never in a command line
  --python 3.12, --extra tpu                                           for setup
  --max-retries 20      preemptions (and stock-outs in a row) that babysit accepts
  --patience 30m        how long babysit and up try again what fails in passing: no answer, rate
                        limits, copies, package installs (15, 30, 60, ... 300 s apart)
  --stall 1h            babysit starts a job again when no host has written to its log for so long
                        (hrvlm train says every 10 minutes that it lives); 0 for never
  --keep                keep the machines after success
  --force               run: end a live job first
  --worker W            logs, ssh: worker (slice.worker with several slices), logs also all  (0)
  --prefix, --lines N, --no-follow                                     for logs
  --poll 30             seconds between two looks of babysit
  --ssh-tries 4         tries of one connection

simulate
  --hosts 2 --devices 4 --kill-host 1 --kill-at-step 10 --workdir DIR --rtol 1e-5
  --end-within 60       seconds in which the surviving hosts must end

  --dry-run             print every command and run none
  --yes                 do not ask before deleting
  --help

exit codes: 0 done, 2 usage, 3 quota or stock-out, 4 set-up failed, 5 training failed,
  6 preempted and retries used up, 7 time-out
TEXT
}

# --- options -----------------------------------------------------------------------------------

# name=default for options with a value, then switches (0 or 1).
VALUES='name= zone= zones= type= project= backend= slices=1 runtime= valid-until= max-run-duration=
wait-timeout=6h patience=30m stall=1h python=3.12 extra=tpu env-file= bucket= run-name= service-account= network= subnet=
labels= max-retries=20 worker=0 lines=+1 poll=30 ssh-tries=4 hosts=2 devices=4 kill-host=1
kill-at-step=10 workdir= rtol=1e-5 end-within=60 capacity=on-demand'
SWITCHES='internal-ip keep dry-run yes force prefix'

upper() { printf '%s' "$1" | tr 'a-z-' 'A-Z_'; }

# shellcheck disable=SC2329 # called by name from each_setting
from_file() {
  case $1 in
    HRVLM_*) ;;
    *) die "$EX_USAGE" "launch.env: found $1, expected names that begin with HRVLM_." ;;
  esac
  # The environment wins over the file.
  if [ -z "${!1+set}" ]; then
    printf -v "$1" '%s' "$2"
  fi
}

defaults() {
  local entry name variable
  local file=${HRVLM_LAUNCH_ENV:-$HERE/launch.env}
  [ ! -f "$file" ] || each_setting "$file" from_file strict
  for entry in $VALUES; do
    name=$(upper "${entry%%=*}")
    variable=HRVLM_$name
    printf -v "OPT_$name" '%s' "${!variable-${entry#*=}}"
  done
  for entry in $SWITCHES; do
    name=$(upper "$entry")
    variable=HRVLM_$name
    case ${!variable-0} in
      1 | true | yes) printf -v "OPT_$name" 1 ;;
      0 | false | no | '') printf -v "OPT_$name" 0 ;;
      *) die "$EX_USAGE" "$variable: found '${!variable}', expected 1 or 0." ;;
    esac
  done
  OPT_FOLLOW=1
  OPT_ENV=()
  JOB=()
}

is_in() {
  local word
  for word in $2; do
    [ "${word%%=*}" != "$1" ] || return 0
  done
  return 1
}

parse() {
  local name value
  while [ $# -gt 0 ]; do
    case $1 in
      --)
        shift
        JOB=("$@")
        return 0
        ;;
      --help | -h) usage && exit 0 ;;
      --spot | --reserved | --on-demand | --flex) OPT_CAPACITY=${1#--} ;;
      --no-follow) OPT_FOLLOW=0 ;;
      --*)
        name=${1#--}
        name=${name%%=*}
        if [ "$1" = "--$name" ] && is_in "$name" "$SWITCHES"; then
          printf -v "OPT_$(upper "$name")" 1
          shift
          continue
        fi
        [ "$name" = env ] || is_in "$name" "${VALUES% capacity=*}" ||
          die "$EX_USAGE" "unknown option --$name; see scripts/launch.sh --help."
        if [ "$1" != "--$name" ]; then
          value=${1#*=}
        else
          [ $# -ge 2 ] || die "$EX_USAGE" "--$name needs a value."
          value=$2
          shift
        fi
        if [ "$name" = env ]; then
          OPT_ENV+=("$value")
        else
          printf -v "OPT_$(upper "$name")" '%s' "$value"
        fi
        ;;
      *) die "$EX_USAGE" "unexpected word '$1'; the job comes after --. See scripts/launch.sh --help." ;;
    esac
    shift
  done
}

check_number() {
  case $2 in
    '' | *[!0-9]*) die "$EX_USAGE" "--$1: found '$2', expected a whole number." ;;
  esac
}

check_env() {
  local pair key
  for pair in ${OPT_ENV[@]+"${OPT_ENV[@]}"}; do
    key=${pair%%=*}
    # The value is never shown: it may be a secret all the same.
    [ "$key" != "$pair" ] || die "$EX_USAGE" '--env: found a word without =, expected KEY=VALUE.'
    is_name "$key" || die "$EX_USAGE" "--env: what stands before = is no name of a variable (letters, digits, _)."
    if secret_name "$key" || secret_value "${pair#*=}"; then
      die "$EX_USAGE" "--env $key: this looks like a secret and a command line can be read by" \
        'others; put it into a file of mode 600 and use --env-file.'
    fi
  done
  [ -n "$OPT_ENV_FILE" ] || return 0
  [ -f "$OPT_ENV_FILE" ] || die "$EX_USAGE" "--env-file: there is no file $OPT_ENV_FILE."
  case $(mode_of "$OPT_ENV_FILE") in
    600 | 400) ;;
    *) die "$EX_USAGE" "--env-file: $OPT_ENV_FILE has mode $(mode_of "$OPT_ENV_FILE"), expected 600;" \
      "run: chmod 600 $OPT_ENV_FILE" ;;
  esac
  each_setting "$OPT_ENV_FILE" : strict
}

check_options() {
  local name
  IFS=, read -r -a ZONES <<<"${OPT_ZONES:-$OPT_ZONE}"
  ZONE=${OPT_ZONE:-${ZONES[0]:-}}
  for name in NAME TYPE; do
    local variable=OPT_$name
    [ -n "${!variable}" ] || die "$EX_USAGE" "--$(printf '%s' "$name" | tr '[:upper:]' '[:lower:]') is required."
  done
  [ -n "$ZONE" ] || die "$EX_USAGE" '--zone is required.'
  case $OPT_NAME in
    [!a-z]* | *[!a-z0-9-]* | *-) die "$EX_USAGE" "--name: found '$OPT_NAME', expected small letters, digits and dashes." ;;
  esac
  OPT_TYPE=$(api_type "$OPT_TYPE")
  check_type "$OPT_TYPE"
  OPT_RUN_NAME=${OPT_RUN_NAME:-$OPT_NAME}
  case $OPT_RUN_NAME in
    *[!A-Za-z0-9._-]* | .* | -*) die "$EX_USAGE" "--run-name: found '$OPT_RUN_NAME', expected letters, digits, dots, dashes." ;;
  esac
  OPT_BACKEND=${OPT_BACKEND:-$(default_backend "$OPT_TYPE")}
  check_number slices "$OPT_SLICES"
  [ "$OPT_SLICES" -ge 1 ] || die "$EX_USAGE" "--slices: found 0, expected at least 1."
  check_number max-retries "$OPT_MAX_RETRIES"
  check_number poll "$OPT_POLL"
  check_number ssh-tries "$OPT_SSH_TRIES"
  case $OPT_BACKEND in
    qr)
      OPT_RUNTIME=${OPT_RUNTIME:-$(default_runtime "$OPT_TYPE")} ||
        die "$EX_USAGE" "$OPT_TYPE is not in the Cloud TPU API; use --backend gce, or GKE with xpk (tpu/README.md)."
      ;;
    gce)
      [ "$OPT_SLICES" -eq 1 ] || die "$EX_USAGE" '--slices needs --backend qr (or GKE with xpk, tpu/README.md).'
      machine_type "$OPT_TYPE" >/dev/null ||
        die "$EX_USAGE" "--backend gce drives a single host and $OPT_TYPE is none;" \
          'use --backend qr, or GKE with xpk (tpu/README.md).'
      ;;
    *) die "$EX_USAGE" "--backend: found '$OPT_BACKEND', expected qr or gce." ;;
  esac
  for name in wait-timeout patience stall valid-until max-run-duration; do
    variable=OPT_$(upper "$name")
    [ -z "${!variable}" ] || seconds "${!variable}" >/dev/null ||
      die "$EX_USAGE" "--$name: found '${!variable}', expected a duration such as 90s, 30m, 6h or 2d."
  done
  case $OPT_BUCKET in
    '' | gs://?*) OPT_BUCKET=${OPT_BUCKET%/} ;;
    *) die "$EX_USAGE" "--bucket: found '$OPT_BUCKET', expected gs://NAME." ;;
  esac
  check_env
  PROJECT_FLAG=()
  [ -z "$OPT_PROJECT" ] || PROJECT_FLAG=("--project=$OPT_PROJECT")
  # Labels allow small letters, digits, dashes and underscores, 63 at most.
  LABELS="run=$(printf '%s' "$OPT_RUN_NAME" | tr 'A-Z.' 'a-z_' | cut -c1-63)${OPT_LABELS:+,$OPT_LABELS}"
  SNAPSHOT=${XDG_CACHE_HOME:-$HOME/.cache}/hrvlm/launch/$OPT_NAME/$OPT_RUN_NAME/src.tgz
}

need_job() {
  local word name flag i=0
  [ "${#JOB[@]}" -gt 0 ] ||
    die "$EX_USAGE" "$COMMAND needs the job's command after --, for example:" \
      '-- python -m hrvlm_jax.cli train --config configs/C.py --workdir gs://BUCKET/RUN'
  for word in "${JOB[@]}"; do
    i=$((i + 1))
    name=${word%%=*}
    case $word in
      *=*) ;;
      *) name='' ;;
    esac
    case $name in
      *[!A-Z0-9_]*) flag=0 ;; # --config.model.pad_token=0 is none
      ?*) if secret_name "$name"; then flag=1; else flag=0; fi ;;
      *) flag=0 ;;
    esac
    case $word in
      *_TOKEN=?* | *API_KEY=?* | *PASSWORD=?* | *SECRET=?* | --password=?* | --api[-_]key=?*) flag=1 ;;
    esac
    if [ "$flag" = 1 ] || secret_value "$word"; then
      [ -z "$name" ] || ! secret_value "$name" || name=''
      die "$EX_USAGE" "the job's command holds what looks like a secret (word $i${name:+, $name=...}) and" \
        'command lines can be read by others; put it into a file of mode 600 and use --env-file.'
    fi
  done
}

need_gcloud() {
  dry_run || command -v gcloud >/dev/null ||
    die "$EX_USAGE" 'gcloud is not installed; see https://cloud.google.com/sdk/docs/install'
}

need_nodes() {
  find_nodes || die "$EX_USAGE" "the nodes of $OPT_NAME cannot be read; is it ACTIVE? Run: scripts/launch.sh wait"
}

delete_hint() {
  printf 'scripts/launch.sh delete --name %s --zone %s --type %s' "$OPT_NAME" "$ZONE" "$OPT_TYPE"
  [ "$OPT_BACKEND" = "$(default_backend "$OPT_TYPE")" ] || printf ' --backend %s' "$OPT_BACKEND"
  [ -z "$OPT_PROJECT" ] || printf ' --project %s' "$OPT_PROJECT"
}

# Whatever way babysit and up end: machines that were asked for and may be there are named, with the
# command that deletes them.
# shellcheck disable=SC2329 # called by trap
finish() {
  local code=$?
  trap - EXIT
  if [ "$code" -ne 0 ] && [ "$ASKED" = 1 ] && ! dry_run; then
    case $COMMAND in
      up | babysit)
        backend state ACTIVE || true
        case $STATE in
          MISSING) ;;
          FAILED) note "the request $OPT_NAME in $ZONE failed and keeps its name. Delete it with: $(delete_hint)" ;;
          UNKNOWN) note "gcloud does not say whether $OPT_NAME in $ZONE is up: it may cost money. Delete it with: $(delete_hint)" ;;
          *) note "$OPT_NAME in $ZONE is still there ($STATE) and costs money. Delete it with: $(delete_hint)" ;;
        esac
        ;;
    esac
  fi
  rm -rf "$SCRATCH"
  exit "$code"
}

# --- commands ------------------------------------------------------------------------------------

do_wait() {
  local code=0
  await_active || code=$?
  if [ "$code" -eq "$EX_PREEMPTED" ]; then
    note "$OPT_NAME is $STATE: $([ "$STATE" = MISSING ] && printf 'run create first.' || printf 'it was taken away; run create again.')"
  fi
  return "$code"
}

do_up() {
  local code=0
  patiently known create || return "$?"
  do_wait || return "$?"
  patiently any count_hosts || need_nodes
  patiently any setup || return "$?"
  [ "$SENT" = 1 ] || sync_source || return "$?" # setup needs the source and has sent it
  if [ "$OPT_FORCE" = 1 ]; then run_job --force || code=$?; else run_job || code=$?; fi
  [ "$code" -ne 0 ] || note "started. Follow it with: scripts/launch.sh logs --name $OPT_NAME --zone $ZONE --type $OPT_TYPE"
  return "$code"
}

do_ssh() {
  local i=0 worker=$OPT_WORKER
  case $worker in
    *.*) i=${worker%%.*} worker=${worker#*.} ;;
  esac
  backend nodes
  [ "$i" -lt "${#NODES[@]}" ] || die "$EX_USAGE" "ssh: there is no worker $OPT_WORKER."
  backend ssh_args "${NODES[i]}" "$worker"
  [ "${#JOB[@]}" -eq 0 ] || SSH_ARGS+=("--command=$(quote "${JOB[@]}")")
  if dry_run; then show "${SSH_ARGS[@]}"; else "${SSH_ARGS[@]}"; fi
}

# shellcheck disable=SC2329 # called by trap
interrupted() {
  trap - INT TERM HUP
  ASKED=0 # said here
  # shellcheck disable=SC2046
  [ -z "$(jobs -p)" ] || kill $(jobs -p) 2>/dev/null || true
  if [ "$COMMAND" != simulate ]; then
    printf '\ninterrupted: the machines stay up and cost money. Delete them with: %s\n' "$(delete_hint)" >&2
  fi
  exit 130
}

main() {
  local code=0
  COMMAND=${1:-}
  case $COMMAND in
    '' ) usage >&2 && exit "$EX_USAGE" ;;
    -h | --help | help) usage && exit 0 ;;
    create | wait | setup | sync | run | logs | status | ssh | stop | delete | up | babysit | simulate) shift ;;
    *) die "$EX_USAGE" "unknown command '$COMMAND'; see scripts/launch.sh --help." ;;
  esac
  defaults
  parse "$@"
  SCRATCH=$(mktemp -d "${TMPDIR:-/tmp}/hrvlm_launch.XXXXXX")
  ASKED=0 SOURCE_CHECKED=0 ATTEMPT=''
  trap finish EXIT
  trap interrupted INT TERM HUP
  NAPPED=0 SENT=0 REUSE_SOURCE=0 EXISTED=0 DRY_REPLY='' ANSWER='' COMPLAINT=''
  WORKERS=() NODES=() STATUS=()
  if [ "$COMMAND" = simulate ]; then
    need_job
    simulate || code=$?
    exit "$code"
  fi
  check_options
  need_gcloud
  case $COMMAND in
    create) create || code=$? ;;
    wait) do_wait || code=$? ;;
    setup) need_nodes && { setup || code=$?; } ;;
    sync) need_nodes && { sync_source || code=$?; } ;;
    run)
      need_job
      need_nodes
      if [ "$OPT_FORCE" = 1 ]; then run_job --force || code=$?; else run_job || code=$?; fi
      ;;
    logs) need_nodes && { follow_logs || code=$?; } ;;
    status) need_nodes && collect_status && { dry_run || print_status; } ;;
    ssh) do_ssh || code=$? ;;
    stop) need_nodes && { stop_job || code=$?; } ;;
    delete) confirm "delete $OPT_NAME in $ZONE?" && { remove || code=$?; } ;;
    up) need_job && { do_up || code=$?; } ;;
    babysit) need_job && { babysit || code=$?; } ;;
  esac
  exit "$code"
}

main "$@"
