# One image per kind of machine, with the packages of requirements.lock:
#   docker build -t hrvlm --target tpu .       Cloud TPU (GKE: scripts/jobset.py, xpk)
#   docker build -t hrvlm --target cuda .      NVIDIA GPU
#   docker build -t hrvlm --target cpu .       neither; the default
# The lock is that of Python 3.11 on Linux.
FROM python:3.11-slim AS base

# git: provenance of results; curl: the metadata server; procps and util-linux: scripts/worker_run.sh.
# hadolint ignore=DL3008
RUN apt-get update \
  && apt-get install -y --no-install-recommends curl git procps util-linux \
  && rm -rf /var/lib/apt/lists/* \
  && pip install --no-cache-dir uv==0.13.9

# Reads from storage that hang are given up after a minute.
ENV UV_SYSTEM_PYTHON=1 \
  PYTHONUNBUFFERED=1 \
  TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS=60 \
  TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES=1024

WORKDIR /hrvlm

# Packages first: they change less often than the source. A layer of the kind's own packages lies on
# that of all, which the three images share.
COPY pyproject.toml setup.py requirements.lock README.md LICENSE NOTICE ./
COPY hrvlm_jax/__init__.py hrvlm_jax/__init__.py
RUN uv pip install --no-cache --constraint requirements.lock .
ENTRYPOINT ["hrvlm"]
CMD ["doctor"]

FROM base AS tpu
RUN uv pip install --no-cache --constraint requirements.lock ".[tpu]"
COPY . .
RUN uv pip install --no-cache --no-deps --editable .

FROM base AS cuda
RUN uv pip install --no-cache --constraint requirements.lock ".[cuda]"
COPY . .
RUN uv pip install --no-cache --no-deps --editable .

FROM base AS cpu
COPY . .
RUN uv pip install --no-cache --no-deps --editable .
