# shellcheck shell=bash
# Sourced by the other scripts: makes and fills .venv. Not meant to be run alone.
# usage: ensure_env EXTRA [PIP_REQUIREMENT...]; EXTRA "none" is the package alone
#
# PYTHON names the interpreter that .venv is made from (default: python3).
# Nothing is installed again while pyproject.toml, requirements.lock, the extra and the folder stay
# as they are; delete .venv to start over.

say() { printf '%s\n' "$*" >&2; }

ensure_env() {
  local extra=$1; shift
  local python=${PYTHON:-python3}
  if [[ ! -x .venv/bin/pip ]]; then # made last; an interrupted start lacks it
    rm -rf .venv
    if ! command -v "$python" >/dev/null; then
      say "Python was not found ($python): install Python 3.11 or newer, or set PYTHON to its path."
      return 2
    fi
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      say "hrvlm_jax needs Python 3.11 or newer, found $("$python" -V 2>&1):" \
          "install a newer one, or set PYTHON to its path."
      return 2
    fi
    if ! "$python" -m venv .venv; then
      rm -rf .venv
      say "$python could not make a virtual environment: install its venv module" \
          "(python3-venv on Debian and Ubuntu) or set PYTHON to another interpreter."
      return 2
    fi
  fi

  local stamp=".venv/installed-$extra" key
  key=$(.venv/bin/python - "$extra" "$@" <<'PY'
import hashlib, os, pathlib, sys
files = [pathlib.Path(name).read_bytes() for name in ('pyproject.toml', 'requirements.lock')]
parts = [*files, os.getcwd().encode(), sys.version.encode(), *(a.encode() for a in sys.argv[1:])]
print(hashlib.sha256(b'\0'.join(parts)).hexdigest())
PY
)
  if [[ -f $stamp && $(<"$stamp") == "$key" ]]; then
    return 0
  fi
  local package=".[$extra]"
  [[ $extra != none ]] || package=.
  say "Installing hrvlm_jax (extra: $extra) into .venv (once; needs the network, takes a few minutes)."
  rm -f "$stamp"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    -c requirements.lock setuptools
  # One call, so that nothing can pull in another PyTorch than the one named here.
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation \
    -c requirements.lock "$@" -e "$package"
  printf '%s' "$key" >"$stamp"
}

# An environment beside .venv, for what cannot share its versions: .matrix/NAME, from a lock of its own.
# usage: ensure_beside NAME LOCK PIP_REQUIREMENT...
ensure_beside() {
  local name=$1 lock=$2 env=.matrix/$1 key; shift 2
  key="$PWD $(cat pyproject.toml "$lock" | sha256sum) $*"
  if [[ ! -f $env/installed || $(<"$env/installed") != "$key" ]]; then
    say "Installing what part $name needs into $env (once; needs the network)."
    rm -rf "$env"
    "${PYTHON:-python3}" -m venv "$env"
    "$env/bin/python" -m pip install --quiet --disable-pip-version-check -c "$lock" "$@"
    printf '%s' "$key" >"$env/installed"
  fi
}
