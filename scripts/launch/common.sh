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

# One word for what gcloud complained about. The order matters: a rate limit speaks of quota, a lost
# connection of signing in, a stock-out of status 429 or 503.
classify() {
  local text
  text=$(printf '%s' "$1" | tr '[:upper:]' '[:lower:]')
  case $text in
    *'no more capacity'* | *resource_pool_exhausted* | *stockout* | *'enough resources'* | *'unavailable in the '*zone*)
      say stockout
      ;;
    *'per minute'* | *perminute* | *'per second'* | *'seconds per user'* | *'per 100 seconds'* | *'requests per day'* | \
      *ratelimitexceeded* | *rate_limit* | *'rate limit'* | *'too many requests'* | *'error 429'* | *'http 429'*)
      say rate
      ;;
    *nameresolution* | *'name resolution'* | *'name or service not known'* | *'nodename nor servname'* | \
      *getaddrinfo* | *'unable to find the server'* | *servernotfound* | *'could not resolve'* | \
      *'no address associated'* | *connectionerror* | *'max retries exceeded'* | *'connection aborted'* | \
      *'connection reset'* | *'connection refused'* | *'connection timed out'* | *'connection closed'* | \
      *'lost connection'* | *'network is unreachable'* | *'no network'* | *'no route to host'* | *'host is down'* | \
      *remotedisconnected* | *'unexpected eof'* | *'eof occurred'* | *sslerror* | *'tls handshake'* | \
      *incompleteread* | *'incomplete read'* | *'broken pipe'* | *transporterror* | *'timed out'*)
      say network
      ;;
    *quota*) say quota ;;
    *resource_exhausted*) say stockout ;;
    *'has not been used in project'* | *service_disabled* | *'is disabled'*) say api_off ;;
    *'unrecognized arguments'* | *'invalid choice'*) say old_sdk ;;
    *'auth login'* | *eauthentication* | *unauthenticated*) say login ;;
    *already_exists* | *'already exists'*) say exists ;;
    *'accelerator type'* | *'machine type'* | *machinetypes*) say no_type ;;
    *permission* | *'error 403'*) say denied ;;
    *not_found* | *'was not found'* | *notfound*) say gone ;;
    *unavailable* | *internal:* | *'internal error'* | *'internal server error'* | *'backend error'* | \
      *backenderror* | *internalerror* | *deadline_exceeded* | *'deadline exceeded'* | *'bad gateway'* | \
      *'gateway timeout'* | *'aborted:'* | *'try again'* | *'gcloud crashed'*)
      say server
      ;;
    *)
      if [[ $text =~ (^|[^0-9])(408|500|502|503|504)([^0-9]|$) ]]; then say server; else say other; fi
      ;;
  esac
}

# passing TEXT: is it a complaint that passes by itself?
passing() {
  case $(classify "$1") in
    rate | network | server) ;;
    *) return 1 ;;
  esac
}

# patiently known|any COMMAND...: tries again what fails in passing, 15, 30, 60, ... 300 s apart, for
# --patience in all (a success starts it anew). `any`: whatever a machine complains about (a package
# index that does not answer has many words) passes, except what is known not to.
# Returns the last exit code.
patiently() {
  local which=$1 code delay=15 napped=$NAPPED clock=$SECONDS spent limit
  shift
  limit=$(seconds "$OPT_PATIENCE")
  while :; do
    code=0
    "$@" || code=$?
    if [ "$code" -eq 0 ] || dry_run || ! passes "$code" "$which"; then
      return "$code"
    fi
    spent=$((NAPPED - napped))
    [ $((SECONDS - clock)) -le "$spent" ] || spent=$((SECONDS - clock))
    if [ "$spent" -ge "$limit" ]; then
      note "it did not pass within $OPT_PATIENCE (--patience): giving up."
      return "$code"
    fi
    [ $((spent + delay)) -le "$limit" ] || delay=$((limit - spent))
    note "that may pass: trying again in $delay s (after $spent s of at most $limit; --patience)."
    nap "$delay"
    delay=$(grow "$delay" 200 300)
  done
}

# passes CODE WHICH: may the failure that COMPLAINT tells of be over soon?
passes() {
  case $1 in
    "$EX_STOCKOUT" | "$EX_PREEMPTED" | "$EX_TIMEOUT" | "$EX_TRAINING") return 1 ;;
  esac
  if [ -z "$COMPLAINT" ] || passing "$COMPLAINT" || connection_failed "$1"; then
    return 0
  fi
  [ "$2" = any ] && [ "$1" -eq "$EX_SETUP" ] || return 1
  case $COMPLAINT in *'FAILED at: the check'*) return 1 ;; esac
  case $(classify "$COMPLAINT") in
    denied | login | api_off | old_sdk | quota | no_type) return 1 ;;
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
    rate)
      note "the API's own limit of requests is reached (no accelerator quota): it passes after a minute;" \
        'gcloud failed; its own words are above.'
      ;;
    network | server) note 'gcloud failed in passing; its own words are above. Try again.' ;;
    *) note 'gcloud failed; its own words are above.' ;;
  esac
  return "$EX_USAGE"
}

sdk_version() {
  local version
  version=$(gcloud --version 2>/dev/null | head -n 1) || version=''
  printf '%s' "${version##* }"
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
