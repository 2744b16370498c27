#!/usr/bin/env bash
# Greedy tokens of an original's own code beside ours, on the same random weights of a tiny model.
#
#   ./scripts/originals.sh DIR          DIR: a checkout of an original that you made (git clone)
#   HRVLM_WHEELS=FOLDER ./scripts/originals.sh DIR
#                                       packages of its environment, put there by `pip download`
#   HRVLM_ORIGINAL_PYTHON=PYTHON ./scripts/originals.sh DIR
#                                       an environment that has them already
#
# Nothing is fetched: neither code nor weights nor packages; what is missing is named with the
# command that gets it. A run writes its row of docs/originals.md: commit of the checkout, date,
# versions, tokens. The environment lies under .cache/originals; delete it to start over.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf 'originals.sh: %s\n' "$*" >&2; }

if [[ $# != 1 || ! -d ${1:-} ]]; then
  say "expected one folder, the checkout of an original, found: $*"
  exit 2
fi
checkout=$(cd "$1" && pwd)

# Which original it is, and the versions of its time.
torch=${HRVLM_ORIGINAL_TORCH:-torch==2.13.0}
if [[ -f $checkout/modeling_mc_llava.py ]]; then
  name=mc_llava
  packages=("$torch" transformers==4.37.2 'pillow>=11,<12' 'numpy<3' safetensors)
elif [[ -f $checkout/pheye_builder/factory.py ]]; then
  name=pheye
  packages=("$torch" transformers==4.37.2 peft==0.7.0 'accelerate<1' einops einops-exts
    'pillow>=11,<12' 'numpy<3' safetensors)
elif [[ -d $checkout/llava_hr/model ]]; then
  name=llava_hr
  packages=("$torch" transformers==4.31.0 timm==1.0.15 'pillow>=11,<12' 'numpy<3' safetensors)
else
  say "$checkout: none of modeling_mc_llava.py (visheratin/mc-llava), pheye_builder/" \
      "(miguelscarv/pheye) and llava_hr/ (luogen1996/LLaVA-HR) is there; other originals have no" \
      "runner in scripts/originals yet"
  exit 2
fi

python=${HRVLM_ORIGINAL_PYTHON:-}
if [[ -z $python ]]; then
  env=.cache/originals/$name
  python=$env/bin/python
  if [[ ! -f $env/installed || $(<"$env/installed") != "${packages[*]}" ]]; then
    if [[ ! -d ${HRVLM_WHEELS:-} ]]; then
      say "HRVLM_WHEELS names no folder of packages; get them with" \
          "pip download -d WHEELS ${packages[*]@Q}, or name an environment that has them:" \
          "HRVLM_ORIGINAL_PYTHON"
      exit 2
    fi
    rm -rf "$env"
    "${PYTHON:-python3}" -m venv "$env"
    "$python" -m pip install --quiet --disable-pip-version-check --no-index \
      --find-links "$HRVLM_WHEELS" "${packages[@]}"
    printf '%s' "${packages[*]}" >"$env/installed"
  fi
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
.venv/bin/python -m scripts.originals.ours "$name" "$work"
# timm asks for torchvision, whose wheel does not load beside a PyTorch for CPUs: a stand-in.
HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 PYTHONPATH=$([[ $name != llava_hr ]] || echo benchmarks/shield) \
  "$python" scripts/originals/theirs.py "$name" "$checkout" "$work"
.venv/bin/python -m scripts.originals.keep "$name" "$checkout" "$work" "${HRVLM_ORIGINALS_PAGE:-docs/originals.md}"
