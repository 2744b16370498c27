#!/usr/bin/env bash
# The two ends of the promised versions: the fast subset in an environment of its own for each; and
# the folders that transformers opens, with its oldest version that does.
#
#   ./scripts/test_matrix.sh                  all
#   ./scripts/test_matrix.sh oldest|newest|transformers    one of them
#   PYTHON_NEWEST=/path/to/python3.13 ./scripts/test_matrix.sh newest
#
# A run writes its row of docs/matrix.md: commit, date, versions, counts, seconds. The environments
# lie under .matrix/ and are made once; delete one to start over.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

ends=("$@")
[[ $# -gt 0 ]] || ends=(oldest newest transformers)
failed=0
for end in "${ends[@]}"; do
  tests=(-m fast)
  # Lower ends as pyproject.toml names them; pip takes the newest of everything else.
  case $end in
    oldest)
      python=${PYTHON_OLDEST:-python3.11}
      pins=(jax==0.10.0 jaxlib==0.10.0 flax==0.12.8 orbax-checkpoint==0.12.8 grain==0.2.18
        optax==0.2.8) ;;
    newest)
      python=${PYTHON_NEWEST:-python3.13}
      pins=(jax==0.12.0.1 jaxlib==0.12.0.1) ;;
    transformers)
      python=${PYTHON_OLDEST:-python3.11}
      pins=(transformers==5.0.0)
      tests=(tests/interop/test_transformers.py tests/interop/test_transformers_calls.py
        tests/interop/test_transformers_folder.py tests/interop/test_native.py) ;;
    *)
      printf 'test_matrix.sh: expected oldest, newest or transformers, found %s\n' "$end" >&2
      exit 2 ;;
  esac
  if ! "$python" -c '' 2>/dev/null; then
    printf 'test_matrix.sh: %s is not on this machine; the end "%s" was not run\n' \
      "$python" "$end" >&2
    failed=1
    continue
  fi
  env=.matrix/$end
  if [[ ! -f $env/installed || $(<"$env/installed") != "${pins[*]}" ]]; then
    rm -rf "$env"
    "$python" -m venv "$env"
    "$env/bin/python" -m pip install --quiet --disable-pip-version-check \
      "${pins[@]}" torch==2.13.0 -e '.[test]'
    printf '%s' "${pins[*]}" >"$env/installed"
  fi
  report=$env/report.xml
  status=0
  # A cache of compiled programs belongs to one version of JAX.
  JAX_COMPILATION_CACHE_DIR="$PWD/$env/jax" "$env/bin/python" -m pytest \
    -n "${HRVLM_TEST_WORKERS:-2}" --dist loadfile "${tests[@]}" --junitxml "$report" || status=$?
  "$env/bin/python" scripts/keep_run.py docs/matrix.md "$end" "$report"
  [[ $status == 0 ]] || failed=1
done
exit "$failed"
