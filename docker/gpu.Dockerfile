# docker build -f docker/gpu.Dockerfile -t syncbn:gpu .
#
# Written for a machine with GPUs and the NVIDIA container toolkit; it has never been built or run yet.
# torch brings its own CUDA libraries (13.0), so the base is the smallest of NVIDIA's: it asks for a driver that is new
# enough. pip's settings go in as a secret: --secret id=pip.conf,src=pip.conf.
FROM docker.io/nvidia/cuda:13.0.1-base-ubuntu24.04 AS base
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS=1
# Triton and Inductor compile at run time: they need gcc, the C library's headers and Python's.
RUN apt-get update && \
    apt-get install -y --no-install-recommends python3 python3-venv python3-dev gcc g++ libc6-dev tini && \
    rm -rf /var/lib/apt/lists/*
# The base has a user of this number already.
RUN userdel --remove ubuntu && useradd --uid 1000 --create-home syncbn
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
