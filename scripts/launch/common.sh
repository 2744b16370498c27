# shellcheck shell=bash
# Helpers of launch.sh: messages, dry runs, questions to gcloud, waiting, error sentences.
# Sourced, never run. Works with bash 3.2 (macOS): no associative arrays, no mapfile, and empty
# arrays are expanded as ${a[@]+"${a[@]}"} because `set -u` refuses the plain form there.
# shellcheck disable=SC2034 # variables are shared with the other files

# Exit codes of launch.sh (also in its usage text).
export EX_USAGE=2 EX_STOCKOUT=3 EX_SETUP=4 EX_TRAINING=5 EX_PREEMPTED=6 EX_TIMEOUT=7

say() { printf '%s\n' "$*"; }

note() { printf '%s launch: %s\n' "$(date +%H:%M:%S)" "$*" >&2; }

die() {
  local code=$1
  shift
  printf 'launch.sh: %s\n' "$*" >&2
  exit "$code"
}

# Words quoted so that another shell reads them back unchanged: the only place where a command
# becomes a string (a remote shell takes nothing else).
quote() {
  local word out=''
  for word in "$@"; do
    out+="$(printf '%q' "$word") "
  done
  printf '%s' "${out% }"
}

dry_run() { [ "$OPT_DRY_RUN" = 1 ]; }

show() { say "+ $(quote "$@")"; }

# act COMMAND...: does something. A dry run prints it and does nothing. stderr is shown and also
# kept in COMPLAINT, so that a failure can be explained.
act() {
  local code=0
  COMPLAINT=''
  if dry_run; then
    show "$@"
    return 0
  fi
  note "$(quote "$@")"
  "$@" 2>"$SCRATCH/complaint" || code=$?
  COMPLAINT=$(cat "$SCRATCH/complaint")
  if [ -n "$COMPLAINT" ]; then
    printf '%s\n' "$COMPLAINT" >&2
  fi
  return "$code"
}

# ask DRY_ANSWER COMMAND...: asks something; stdout lands in ANSWER, stderr in COMPLAINT. A dry
# run prints the command and goes on as if DRY_ANSWER had come back.
ask() {
  local assumed=$1 code=0
  shift
  ANSWER='' COMPLAINT=''
  if dry_run; then
    show "$@"
    ANSWER=$assumed
    return 0
  fi
  ANSWER=$("$@" 2>"$SCRATCH/complaint") || code=$?
  COMPLAINT=$(cat "$SCRATCH/complaint")
  return "$code"
}

# Sleeps and counts the seconds, so that time-outs hold whatever else takes time.
nap() {
  NAPPED=$((NAPPED + $1))
  dry_run || sleep "$1"
}

# grow DELAY FACTOR_PERCENT LIMIT: the next delay of a back-off.
grow() {
  local next=$(($1 * $2 / 100))
  if [ "$next" -gt "$3" ]; then
    next=$3
  fi
  printf '%s' "$next"
}

# seconds 6h -> 21600; plain numbers are seconds.
seconds() {
  local number=${1%[smhd]}
  case $number in
    '' | *[!0-9]*) return 1 ;;
  esac
  case $1 in
    *m) number=$((number * 60)) ;;
    *h) number=$((number * 3600)) ;;
    *d) number=$((number * 86400)) ;;
  esac
  printf '%s' "$number"
}

# One word for what gcloud complained about.
classify() {
  case $1 in
    *[Qq]uota* | *QUOTA*) say quota ;;
    *'no more capacity'* | *RESOURCE_EXHAUSTED* | *RESOURCE_POOL_EXHAUSTED* | *[Ss]tockout* | \
      *STOCKOUT* | *'enough resources'*) say stockout ;;
    *'has not been used in project'* | *SERVICE_DISABLED* | *'is disabled'*) say api_off ;;
    *'unrecognized arguments'* | *'Invalid choice'* | *'invalid choice'*) say old_sdk ;;
    *'auth login'* | *eauthentication*) say login ;;
    *ALREADY_EXISTS* | *'already exists'*) say exists ;;
    *[Aa]ccelerator' type'* | *'machine type'* | *machineTypes*) say no_type ;;
    *NOT_FOUND* | *'was not found'* | *notFound*) say gone ;;
    *PERMISSION_DENIED* | *'ermission'*) say denied ;;
    *) say other ;;
  esac
}

# explain TEXT: the sentence for a complaint; returns the exit code that belongs to it.
explain() {
  case $(classify "$1") in
    quota)
      note "no quota for $OPT_TYPE in $ZONE. Ask for quota, or choose a zone where you have it:" \
        "gcloud compute tpus locations list"
      return "$EX_STOCKOUT"
      ;;
    stockout)
      note "no capacity for $OPT_TYPE in $ZONE at present. Try later, --spot or --flex, or" \
        "--zones A,B,C; zones: gcloud compute tpus locations list"
      return "$EX_STOCKOUT"
      ;;
    api_off)
      note 'the API is off in this project; turn it on with:' \
        'gcloud services enable tpu.googleapis.com compute.googleapis.com'
      ;;
    old_sdk)
      note "this Google Cloud SDK ($(sdk_version)) does not know a flag that is needed; run" \
        'gcloud components update (flex-start instances need one newer than 528.0.0)'
      ;;
    login) note 'you are not signed in; run: gcloud auth login' ;;
    denied)
      note 'your account lacks a permission for this project (roles/tpu.admin and' \
        'roles/iam.serviceAccountUser are the usual ones).'
      ;;
    no_type)
      note "zone $ZONE does not offer $OPT_TYPE; see:" \
        "gcloud compute tpus accelerator-types list --zone=$ZONE"
      ;;
    *) note 'gcloud failed; its own words are above.' ;;
  esac
  return "$EX_USAGE"
}

sdk_version() {
  local version
  version=$(gcloud --version 2>/dev/null | head -n 1) || version=''
  printf '%s' "${version##* }"
}

# Reads KEY=VALUE lines without executing them. $2 is called with each key and value.
each_setting() {
  local line
  while IFS= read -r line || [ -n "$line" ]; do
    case $line in
      '' | \#*) continue ;;
      *=*) "$2" "${line%%=*}" "${line#*=}" ;;
      *) die "$EX_USAGE" "$1: expected KEY=VALUE, found: $line" ;;
    esac
  done <"$1"
}

# Permission bits as octal digits; stat differs between Linux and macOS.
mode_of() { stat -c %a "$1" 2>/dev/null || stat -f %Lp "$1"; }

confirm() {
  local reply
  if [ "$OPT_YES" = 1 ] || dry_run; then
    return 0
  fi
  if [ ! -t 0 ]; then
    die "$EX_USAGE" "$1 needs --yes when there is no terminal to ask."
  fi
  printf '%s [y/N] ' "$1" >&2
  read -r reply
  case $reply in
    y | Y | yes) ;;
    *) die "$EX_USAGE" 'nothing was done.' ;;
  esac
}
