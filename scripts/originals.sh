#!/usr/bin/env bash
# Greedy tokens of an original's own code beside ours, on the same random weights of a tiny model
# (PS3, which gives no tokens: chosen patches and features).
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

# Which original it is, the models of ours that are compared with it, and the versions of its time.
# timm and ps3 ask for torchvision, whose wheel does not load beside a PyTorch for CPUs: a stand-in.
torch=${HRVLM_ORIGINAL_TORCH:-torch==2.13.0}
usual=('pillow>=11,<12' 'numpy<3' safetensors)
shield=benchmarks/shield
if [[ -f $checkout/modeling_mc_llava.py ]]; then
  name=mc_llava shield=
  packages=("$torch" transformers==4.37.2 "${usual[@]}")
elif [[ -f $checkout/pheye_builder/factory.py ]]; then
  name=pheye shield=
  packages=("$torch" transformers==4.37.2 peft==0.7.0 'accelerate<1' einops einops-exts
    "${usual[@]}")
elif [[ -d $checkout/llava_hr/model ]]; then
  name=llava_hr
  packages=("$torch" transformers==4.31.0 timm==1.0.15 "${usual[@]}")
elif [[ -f $checkout/ps3/modeling_ps3.py ]]; then
  name=ps3
  packages=("$torch" transformers==4.49.0 timm==1.0.15 einops accelerate tiktoken ftfy
    sentencepiece "${usual[@]}")
elif [[ -f $checkout/llava/model/multimodal_encoder/ps3_encoder.py ]]; then
  name=vila_hd
  packages=("$torch" transformers==4.46.0 timm==1.0.15 einops accelerate==0.34.2 peft tiktoken ftfy
    sentencepiece hydra-core loguru 'pydantic<3' 'huggingface-hub<1' "${usual[@]}")
elif [[ -f $checkout/llava/model/llava_arch.py ]]; then
  name=llava shield=
  packages=("$torch" transformers==4.37.2 accelerate==0.21.0 einops sentencepiece protobuf requests
    "${usual[@]}")
else
  say "$checkout: expected a checkout of visheratin/mc-llava, miguelscarv/pheye," \
      "luogen1996/LLaVA-HR, NVlabs/PS3, NVlabs/VILA or haotian-liu/LLaVA; other originals have no" \
      "runner in scripts/originals"
  exit 2
fi
models=("$name")
[[ $name != llava ]] || models=(single_view anyres s2)

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

needs() {  # MODULE CHECKOUT: what the original imports from another one
  PYTHONPATH=$path "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)" ||
    { say "$name needs the module $1: put a checkout of $2 on PYTHONPATH"; exit 2; }
}
path=${shield:+$shield:}$PWD${PYTHONPATH:+:$PYTHONPATH}
case $name in
  vila_hd) needs ps3 NVlabs/PS3 ;;
  llava) needs s2wrapper bfshi/scaling_on_scales ;;
esac

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
status=0
for model in "${models[@]}"; do
  mkdir "$work/$model"
  .venv/bin/python -m scripts.originals.ours "$model" "$work/$model"
  HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 PYTHONPATH=$path \
    "$python" scripts/originals/theirs.py "$model" "$checkout" "$work/$model"
  .venv/bin/python -m scripts.originals.keep "$model" "$checkout" "$work/$model" \
    "${HRVLM_ORIGINALS_PAGE:-docs/originals.md}" || status=$?
done
exit "$status"
