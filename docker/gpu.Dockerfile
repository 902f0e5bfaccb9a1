# docker build -f docker/gpu.Dockerfile -t syncbn:gpu .
#
# For a machine with GPUs and the NVIDIA container toolkit, which brings the driver's libraries into the container; torch
# brings all others, in packages from PyPI, so the base is that of the CPU image. pip's settings go in as a secret:
# --secret id=pip.conf,src=pip.conf. Built and run without a GPU so far (docs/deploy.md).
FROM docker.io/library/python:3.11.13-slim-bookworm@sha256:86adf8dbadc3d6e82ee5dd2c74bec2e1c2467cdad47886280501df722372d2e1 AS base
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/app PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS=1
# What the toolkit reads: which GPUs, which of the driver's parts, and the CUDA that the driver has to be new enough for.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility NVIDIA_REQUIRE_CUDA=cuda>=13.0
# Triton and Inductor compile at run time: they need a compiler, the C library's headers (g++ depends on them, in the
# version of the base) and Python's, which the base has.
RUN apt-get update && \
    apt-get install -y --no-install-recommends gcc=4:12.2.0-3 g++=4:12.2.0-3 tini=0.19.0-1+b3 && \
    rm -rf /var/lib/apt/lists/*
RUN useradd --uid 1000 --create-home syncbn
WORKDIR /app

FROM base AS packages
RUN python3 -m venv /opt/venv
COPY pyproject.toml constraints.txt ./
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    mkdir syncbn && touch syncbn/__init__.py README.md && \
    pip install --no-cache-dir --no-compile -c constraints.txt ".[train]" && pip uninstall -y syncbn

FROM base AS train
COPY --from=packages /opt/venv /opt/venv
COPY train.py ./
COPY configs configs
COPY syncbn syncbn
COPY docker/cluster/store.py docker/cluster/
RUN mkdir outputs && chown 1000:1000 outputs
USER 1000:1000
VOLUME /app/outputs
# What they compile is kept for as long as the container: /tmp is writable where the rest is not.
ENV TRITON_CACHE_DIR=/tmp/triton TORCHINDUCTOR_CACHE_DIR=/tmp/inductor TORCH_ELASTIC_SHUTDOWN_TIMEOUT=90
STOPSIGNAL SIGTERM
ENTRYPOINT ["tini", "--"]
CMD ["torchrun", "--local-addr", "localhost", "--nproc-per-node", "gpu", "train.py"]
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 CMD grep -qsz ^LOCAL_RANK= /proc/[0-9]*/environ
