# Two images of the same tree: `--target cpu` (trials) and `--target cuda` (NVIDIA GPUs; the default). Both run as user
# 10001 with a read-only root file system; Ray and KubeRay find bash, python, ray and seamount on the PATH.
#
#   docker build --target cpu  -t registry.example/seamount:0.1.0-cpu .
#   docker build --target cuda -t registry.example/seamount:0.1.0 .
#
# PYTHON may carry a digest (python:3.12-slim-bookworm@sha256:...), which pins the last thing that is not pinned here.
ARG PYTHON=python:3.12-slim-bookworm

FROM ${PYTHON} AS tools
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /src
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
COPY constraints.txt pyproject.toml .ci/install_image.sh ./

# The wheel: stubs are generated, folders become the package seamount.
FROM tools AS wheel
COPY . .
RUN sh .ci/install_image.sh wheel /wheels

FROM tools AS packages-cpu
RUN sh install_image.sh packages cpu
COPY --from=wheel /wheels /wheels
RUN sh install_image.sh seamount /wheels

FROM tools AS packages-cuda
RUN sh install_image.sh packages cuda
COPY --from=wheel /wheels /wheels
RUN sh install_image.sh seamount /wheels

FROM ${PYTHON} AS base
RUN groupadd --gid 10001 seamount \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin seamount
ENV PATH=/opt/venv/bin:$PATH HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 RAY_USAGE_STATS_ENABLED=0
COPY checkpoints/tiny-agent /opt/seamount/checkpoints/tiny-agent
WORKDIR /tmp
USER 10001:10001
CMD ["seamount", "--help"]

FROM base AS cpu
COPY --from=packages-cpu /opt/venv /opt/venv

# Triton compiles its kernels at run time, for which it needs a C compiler.
FROM base AS cuda
USER root
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*
USER 10001:10001
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=packages-cuda /opt/venv /opt/venv
