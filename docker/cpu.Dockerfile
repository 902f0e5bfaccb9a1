# docker build -f docker/cpu.Dockerfile -t syncbn:cpu .                                     to train
# docker build -f docker/cpu.Dockerfile -t syncbn:cpu-test --target test .                  to run the tests in it
#
# pip's settings go in as a secret, so that they stay out of the image: --secret id=pip.conf,src=pip.conf. Without them
# torch comes from PyPI with CUDA libraries, which this image does not use; an index of torch's CPU builds spares them.
# There is no compiler in it, so compile=true is an error at start.
FROM docker.io/library/python:3.11.13-slim-bookworm@sha256:86adf8dbadc3d6e82ee5dd2c74bec2e1c2467cdad47886280501df722372d2e1 AS base
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/app PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS=1
RUN apt-get update && apt-get install -y --no-install-recommends tini=0.19.0-1+b3 && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 1000 --create-home syncbn
WORKDIR /app

# What the project needs, without the project: a change of the code does not install it again.
FROM base AS packages
RUN python3 -m venv /opt/venv
COPY pyproject.toml constraints.txt ./
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    mkdir syncbn && touch syncbn/__init__.py README.md && \
    pip install --no-cache-dir --no-compile -c constraints.txt ".[train]" && pip uninstall -y syncbn

FROM packages AS test-packages
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    pip install --no-cache-dir --no-compile -c constraints.txt ".[train,test]" && pip uninstall -y syncbn

FROM base AS test
COPY --from=test-packages /opt/venv /opt/venv
COPY --chown=1000:1000 . .
RUN chown 1000:1000 /app
USER 1000:1000
CMD ["python3", "-m", "pytest", "-m", "not slow and not root", "-n", "2", "--dist", "worksteal", "-p", "no:cacheprovider"]

FROM base AS train
COPY --from=packages /opt/venv /opt/venv
COPY train.py ./
COPY configs configs
COPY syncbn syncbn
COPY docker/cluster/store.py docker/cluster/
RUN mkdir outputs && chown 1000:1000 outputs
USER 1000:1000
VOLUME /app/outputs
# tini is process 1: it hands SIGTERM on from the first moment, and waits as long as torchrun does. torchrun hands it on
# to the ranks, which save and leave; it gives them 90 s, so the container's own grace period has to be longer.
ENV TORCH_ELASTIC_SHUTDOWN_TIMEOUT=90
STOPSIGNAL SIGTERM
ENTRYPOINT ["tini", "--"]
CMD ["torchrun", "--local-addr", "localhost", "--nproc-per-node", "2", "train.py"]
# Healthy: at least one rank is there (torchrun gives each its LOCAL_RANK). Not so while a node waits for the others.
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 CMD grep -qsz ^LOCAL_RANK= /proc/[0-9]*/environ
