#!/usr/bin/env bash
# Makes the environment of the PyTorch originals that this library is measured against.
#
#   ./scripts/peers.sh            .cache/peers, about 1 GB, a few minutes; needs the network
#   HRVLM_PEERS=DIR ./scripts/peers.sh     somewhere else
#   PYTHON=python3.11 ./scripts/peers.sh   another interpreter (3.11 or newer)
#
# `hrvlm bench` starts the peers' side with DIR/bin/python, and so do the tests marked `peers`. The
# environment is kept apart from .venv: ps3-torch needs an older transformers than the tests do.
# Prints the interpreter's path as its last line. Nothing is installed twice; delete DIR to start over.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '%s\n' "$*" >&2; }

DIR=${HRVLM_PEERS:-.cache/peers}
PYTHON=${PYTHON:-python3}

# Pillow: from 12.2 on it may resize the other way round than it did for the released models (core.images).
# torch: the version of the test suite, CPU build. ps3-torch and timm ask for torchvision, whose wheel
# fails at import beside a CPU-only torch: they come without dependencies, torchvision is a stand-in.
PACKAGES=(torch==2.13.0 transformers==4.49.0 'numpy>=2.1,<3' 'pillow>=11,<12' safetensors einops
  ftfy sentencepiece pyyaml 'huggingface_hub>=0.26,<1' 'setuptools<81')
ALONE=(timm==1.0.15 ps3-torch==0.1.3)

if ! command -v "$PYTHON" >/dev/null; then
  say "Python was not found ($PYTHON): install Python 3.11 or newer, or set PYTHON to its path."
  exit 2
fi
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  say "The peers need Python 3.11 or newer, found $("$PYTHON" -V 2>&1): set PYTHON to a newer one."
  exit 2
fi

stamp="$DIR/installed"
key=$({ printf '%s\n' "${PACKAGES[@]}" "${ALONE[@]}"; cat benchmarks/shield/torchvision/__init__.py
        "$PYTHON" -V; } | sha256sum)
if [[ ! -f $stamp || $(<"$stamp") != "$key" ]]; then
  say "Installing the PyTorch originals into $DIR (once; needs the network, takes a few minutes)."
  if [[ ! -x $DIR/bin/pip ]]; then # made last; an interrupted start lacks it
    rm -rf "$DIR"
    "$PYTHON" -m venv "$DIR"
  fi
  rm -f "$stamp"
  "$DIR/bin/python" -m pip install --quiet --disable-pip-version-check "${PACKAGES[@]}"
  "$DIR/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "${ALONE[@]}"
  site=$("$DIR/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
  rm -rf "$site/torchvision"
  cp -r benchmarks/shield/torchvision "$site/torchvision"
  "$DIR/bin/python" -c 'import ps3, timm, torch, transformers
print("torch", torch.__version__, "| transformers", transformers.__version__, "| timm", timm.__version__)' >&2
  printf '%s' "$key" >"$stamp"
fi
printf '%s\n' "$DIR/bin/python"
