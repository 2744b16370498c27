# shellcheck shell=bash
# What follows from an accelerator type: API name, runtime version, machine type, image.
# Numbers of hosts are never derived from names (the documentation disagrees for v5e 4x4): the
# launcher asks the API for the network endpoints instead. Sourced by launch.sh.

# v5e-16 is what people say, v5litepod-16 what the API takes.
api_type() {
  case $1 in
    v5e-*) printf 'v5litepod-%s' "${1#v5e-}" ;;
    *) printf '%s' "$1" ;;
  esac
}

check_type() {
  local digits=${1##*-}
  case $1 in
    v4-* | v5litepod-* | v5p-* | v6e-* | tpu7x-*) ;;
    *) die "$EX_USAGE" "--type: found '$1', expected v4-N, v5e-N (v5litepod-N), v5p-N, v6e-N or tpu7x-N." ;;
  esac
  case $digits in
    '' | *[!0-9]* | 0) die "$EX_USAGE" "--type: found '$1', expected a number after the dash." ;;
  esac
}

default_backend() {
  case $1 in
    tpu7x-*) printf gce ;; # not in the Cloud TPU API
    *) printf qr ;;
  esac
}

default_runtime() {
  case $1 in
    v4-*) printf 'tpu-ubuntu2204-base' ;;
    v5litepod-*) printf 'v2-alpha-tpuv5-lite' ;;
    v5p-*) printf 'v2-alpha-tpuv5' ;;
    v6e-*) printf 'v2-alpha-tpuv6e' ;;
    *) return 1 ;;
  esac
}

# Machine type of a single-host Compute Engine TPU VM; fails for slices of several hosts.
# v4, v5p and tpu7x names count TensorCores (two a chip), the others count chips.
machine_type() {
  case $1 in
    v5litepod-1 | v5litepod-4 | v5litepod-8) printf 'ct5lp-hightpu-%st' "${1#v5litepod-}" ;;
    v5p-2 | v5p-4 | v5p-8) printf 'ct5p-hightpu-%st' "$((${1#v5p-} / 2))" ;;
    v6e-1 | v6e-4 | v6e-8) printf 'ct6e-standard-%st' "${1#v6e-}" ;;
    tpu7x-2 | tpu7x-8) printf 'tpu7x-standard-%st' "$((${1#tpu7x-} / 2))" ;;
    *) return 1 ;;
  esac
}

image_family() {
  case $1 in
    tpu7x-*) printf 'ubuntu-accel-2404-amd64-tpu-tpu7x' ;;
    *) printf 'ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e' ;;
  esac
}
