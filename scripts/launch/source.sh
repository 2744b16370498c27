# shellcheck shell=bash
# What is sent to the machines: the files git knows, without credentials; and whether the files the
# job names are among them, asked before machines cost money. Sourced by launch.sh.
# shellcheck disable=SC2034,SC2153 # variables are shared with the other files

# credential_name FILE: is this a file that holds credentials by its name?
credential_name() {
  local name
  name=$(printf '%s' "${1##*/}" | tr '[:upper:]' '[:lower:]')
  case /$1 in
    */.ssh/* | */.aws/* | */.azure/* | */.gnupg/* | */.kube/* | */.docker/* | */gcloud/*) return 0 ;;
  esac
  case $name in
    .env | .env.* | *.env | .envrc | .netrc | _netrc | .git-credentials | .npmrc | .pypirc | .htpasswd | .pgpass | \
      id_rsa* | id_dsa* | id_ecdsa* | id_ed25519* | google_compute_engine* | \
      *.pem | *.key | *.p8 | *.p12 | *.pfx | *.jks | *.keystore | *.ppk | *.kdbx | \
      *[._-]key | *[._-]key.txt | api[_-]key.[jtyi]* | apikey | apikey.[jtyi]* | .boto | .s3cfg | .my.cnf | .dockercfg | *.tfstate | \
      password.txt | passwords.txt | passwd | *.gpg | \
      token | *[._-]token | token.txt | *[._-]token.txt | token.json | *[._-]token.json | \
      kaggle.json | credentials | .credentials | *credentials.json | credentials.[cityd]* | client_secret*.json | \
      secrets | secret | secrets.[jtyi]* | secret.[jtyi]* | *service[-_]account*.json) return 0 ;;
  esac
  return 1
}

# Sets $SCRATCH/files (names that are sent, each ended by a zero byte) and $SCRATCH/credentials (one
# name a line). Left out whatever git says: credentials, data, checkpoints, runs.
list_source() {
  local file
  git -C "$REPO" rev-parse --git-dir >/dev/null 2>"$SCRATCH/complaint" ||
    die "$EX_USAGE" "sync: git does not answer in $REPO, so it is unknown which files to send:" \
      "$(head -n 3 "$SCRATCH/complaint" | tr '\n' ' ')"
  git -C "$REPO" ls-files -z >"$SCRATCH/tracked" || die "$EX_USAGE" "sync: git ls-files failed in $REPO."
  # By content: private keys, service accounts, sign-ins of gcloud and tokens of known forms, in files
  # that are no programs.
  (cd "$REPO" && git ls-files -z -- ':!*.py' ':!*.sh' ':!*.md' | xargs -0 grep -lIE \
    -e '-----BEGIN ([A-Z0-9]+ )*PRIVATE KEY' \
    -e '"type": *"(service_account|authorized_user|external_account)"' \
    -e '(^|[^A-Za-z0-9])(hf_[A-Za-z0-9]{30}|gh[opsu]_[A-Za-z0-9]{30}|github_pat_[A-Za-z0-9_]{30}|AKIA[A-Z0-9]{16}|AIza[A-Za-z0-9_-]{30})' \
    -- /dev/null 2>/dev/null) \
    >"$SCRATCH/by_content" || true
  : >"$SCRATCH/credentials"
  while IFS= read -r -d '' file; do
    case $file in
      data/* | checkpoints/* | runs/*) continue ;;
    esac
    [ -f "$REPO/$file" ] || continue
    if credential_name "$file" || [ "$REPO/$file" -ef "${OPT_ENV_FILE:-/}" ] || { [ -s "$SCRATCH/by_content" ] && grep -qxF -e "$file" "$SCRATCH/by_content"; }; then
      printf '%s\n' "$file" >>"$SCRATCH/credentials"
      continue
    fi
    printf '%s\0' "$file"
  done <"$SCRATCH/tracked" >"$SCRATCH/files"
  tr '\0' '\n' <"$SCRATCH/files" >"$SCRATCH/names"
}

# is_sent FILE (relative to the checkout)
is_sent() { grep -qxF -e "$1" "$SCRATCH/names"; }

# Why a file that exists here is not sent.
why_not_sent() {
  if grep -qxF -e "$1" "$SCRATCH/credentials"; then
    printf 'it looks like credentials and is left out'
    return 0
  fi
  case $1 in
    data/* | checkpoints/* | runs/*) printf 'data/, checkpoints/ and runs/ are never sent: move it' && return 0 ;;
  esac
  if git -C "$REPO" check-ignore -q -- "$1" 2>/dev/null; then
    printf 'git ignores it; run: git add -f %s' "$1"
  else
    printf 'git does not know it yet; run: git add %s' "$1"
  fi
}

# config_file SPEC: the file that `--config SPEC` stands for, relative to the checkout. SPEC is
# FILE.py[:WORDS] or the name of a file in configs/.
config_file() {
  local path=${1%%:*}
  path=${path#./}
  case $path in
    "$REPO"/*) path=${path#"$REPO"/} ;;
  esac
  case $path in
    *.py) ;;
    *) [ -f "$REPO/$path" ] || path=configs/$path.py ;;
  esac
  printf '%s' "$path"
}

# check_config SPEC: ends with a sentence when the machines would not find the config.
check_config() {
  local file name
  case $1 in
    '' | gs://*) return 0 ;;
  esac
  file=$(config_file "$1")
  name=${file##*/}
  is_sent "$file" && case $1 in
    # Sent, but under the path it has here, which the machines do not have.
    "$REPO"/*) die "$EX_USAGE" "--config $1: the machines do not have this path; write --config $file${1#"${1%%:*}"}" ;;
    *) return 0 ;;
  esac
  case $name in
    # Names that recipes had before (training/recipe.py, RENAMED) are left to the trainer.
    pheye_x[24]_* | llava_hr_7b_* | llava_hr_x_13b_* | mc_llava_3b_* | ps3_1_5k_pretrain.py | ps3_4k_pretrain.py | vila_hd_8b_*)
      [ -f "$REPO/$file" ] || return 0
      ;;
  esac
  case $file in
    /* | ../* | '~'*)
      [ -e "$file" ] || case $file in ../*) ;; *) return 0 ;; esac # may lie on the machines
      die "$EX_USAGE" "--config $1: $file lies outside $REPO and is not sent; copy it into configs/ and git add it."
      ;;
  esac
  if [ -f "$REPO/$file" ]; then
    die "$EX_USAGE" "--config $1: $file would not be there on the machines: $(why_not_sent "$file")"
  fi
  die "$EX_USAGE" "--config $1: there is no file $file in $REPO (the job starts there on the machines)." \
    'Nothing was asked for.'
}

# The files that the job's words name are looked for in what is sent. Once, before the first request.
check_source() {
  local i word value file others
  if [ "$SOURCE_CHECKED" = 1 ] || [ "${#JOB[@]}" -eq 0 ] || dry_run; then
    return 0
  fi
  list_source
  for ((i = 0; i < ${#JOB[@]}; i++)); do
    word=${JOB[i]}
    case $word in
      --config) check_config "${JOB[i + 1]:-}" && i=$((i + 1)) && continue ;;
      --config=*) check_config "${word#--config=}" && continue ;;
    esac
    value=${word#*=}
    file=${value%%:*}
    file=${file#./}
    case $file in '' | /* | ../* | *://*) continue ;; esac
    if [ ! -f "$REPO/$file" ] || is_sent "$file"; then
      continue
    fi
    case $file in
      *.py) die "$EX_USAGE" "$word: $file would not be there on the machines: $(why_not_sent "$file")" ;;
      *) note "warning: $word: $file is not sent: $(why_not_sent "$file"). Is it on the machines already?" ;;
    esac
  done
  others=$(git -C "$REPO" ls-files --others --exclude-standard | head -n 12)
  [ -z "$others" ] ||
    note "untracked files are not sent: $(printf '%s' "$others" | head -n 11 | tr '\n' ' ')$([ "$(wc -l <<<"$others")" -lt 12 ] || printf '...')"
  SOURCE_CHECKED=1
}

# Writes $SNAPSHOT: the files git knows (tracked and staged) as they are now, SOURCE_STATE, and
# RUN_TOKEN, by which the processes of the run know each other (parallel/secret.py).
make_snapshot() {
  local commit dirty='' count
  if dry_run; then
    show git -C "$REPO" ls-files -z
    show tar -czf "$SNAPSHOT" SOURCE_STATE RUN_TOKEN ...
    return 0
  fi
  list_source
  commit=$(git -C "$REPO" rev-parse --verify -q HEAD) || commit=none
  if [ -n "$(git -C "$REPO" status --porcelain)" ]; then
    dirty=$(git -C "$REPO" diff HEAD 2>/dev/null | git hash-object --stdin)
    note "warning: the working tree has changes that are not committed (diff $dirty)."
    note '  tracked and staged files are sent as they are; untracked files are not.'
  fi
  if [ -s "$SCRATCH/credentials" ]; then
    count=$(wc -l <"$SCRATCH/credentials" | tr -d ' ')
    note "left out of the source because they look like credentials ($count):" \
      "$(head -n 20 "$SCRATCH/credentials" | tr '\n' ' ')$([ "$count" -le 20 ] || printf '...')"
  fi
  {
    printf 'commit=%s\n' "$commit"
    printf 'diff=%s\n' "${dirty:-clean}"
  } >"$SCRATCH/SOURCE_STATE"
  (umask 077 && od -An -N16 -tx1 /dev/urandom | tr -d ' \n' >"$SCRATCH/RUN_TOKEN") || return "$EX_SETUP"
  mkdir -p "$(dirname "$SNAPSHOT")" || return "$EX_SETUP"
  # Two steps, because GNU and BSD tar disagree on changing the directory half-way.
  (cd "$REPO" && COPYFILE_DISABLE=1 tar -cf "$SCRATCH/src.tar" --null -T "$SCRATCH/files") &&
    (cd "$SCRATCH" && tar -rf src.tar SOURCE_STATE RUN_TOKEN && (umask 077 && gzip -c src.tar >"$SNAPSHOT.part")) &&
    mv "$SNAPSHOT.part" "$SNAPSHOT" || return "$EX_SETUP"
}
