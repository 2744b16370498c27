# Image for GKE (xpk, SkyPilot on Kubernetes) and for a GPU machine:
#   docker build -t hrvlm .                             TPU (jax[tpu] brings libtpu)
#   docker build -t hrvlm --build-arg EXTRA=cuda .      NVIDIA GPU
FROM python:3.12-slim

ARG EXTRA=tpu

# git: provenance of results; curl: the metadata server; procps and util-linux: scripts/worker_run.sh.
RUN apt-get update \
  && apt-get install -y --no-install-recommends curl git procps util-linux \
  && rm -rf /var/lib/apt/lists/* \
  && pip install --no-cache-dir uv

# One run can ask for few, large reads from storage; those that hang are given up after a minute.
ENV UV_SYSTEM_PYTHON=1 \
  PYTHONUNBUFFERED=1 \
  TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS=60 \
  TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES=1024

WORKDIR /hrvlm

# Packages first: they change less often than the source.
COPY pyproject.toml requirements.lock README.md LICENSE NOTICE ./
COPY hrvlm_jax/__init__.py hrvlm_jax/__init__.py
RUN uv pip install --no-cache --constraint requirements.lock ".[${EXTRA}]"

COPY . .
RUN uv pip install --no-cache --no-deps --editable .

ENTRYPOINT ["python", "-m", "hrvlm_jax.cli"]
CMD ["doctor"]
