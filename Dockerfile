# tminus as a container. docker/README.md has the details.
#   docker build -t tminus --build-arg TORCH_INDEX=… .
#   docker run --rm --init --stop-timeout 40 -e TMINUS_OPEN=yes -p 127.0.0.1:8000:8000 tminus

# Wheels that pip finds in addition to the index. Empty, unless `--build-context wheels=FOLDER` replaces this stage.
FROM scratch AS wheels

# All but torch. pip takes no file but those whose hashes are in the lock, and no source, which would have to be built by
# packages that no lock names.
FROM python:3.11-slim@sha256:90744cff8f32887f075c47d747a173ff333e9e98801667af93c357fa9f5e28ff AS dependencies
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
RUN python -m venv --without-pip /opt/tminus
COPY docker/locks/requirements.txt ./
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=bind,from=wheels,target=/wheels \
    pip --python /opt/tminus/bin/python install --require-hashes --only-binary :all: --find-links /wheels \
        --requirement requirements.txt

# --root installs apart from what is there already, as a layer of its own in the image.
FROM dependencies AS torch-cpu
# PyPI has no build of torch for CPUs on Linux: the index that has, and for a wheel that is not in the lock, its hash.
ARG TORCH_INDEX=
ARG TORCH_SHA256=
COPY docker/locks/torch-cpu.txt torch.txt
RUN if [ -z "$TORCH_INDEX$TORCH_SHA256" ]; then \
        echo "TORCH_INDEX is missing: the index with PyTorch's wheels for CPUs. docker/README.md, Build, says which." >&2; \
        exit 1; \
    fi \
    && if [ -n "$TORCH_SHA256" ]; then sed -i "s/sha256:.*[0-9a-f]/sha256:$TORCH_SHA256/" torch.txt; fi
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=bind,from=wheels,target=/wheels \
    pip --python /opt/tminus/bin/python install --require-hashes --only-binary :all: --find-links /wheels \
        ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} --no-deps --root /torch --requirement torch.txt

FROM dependencies AS torch-cuda
# Empty: PyPI, whose build is for GPUs.
ARG TORCH_INDEX=
COPY docker/locks/torch-cuda.txt torch.txt
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=bind,from=wheels,target=/wheels \
    pip --python /opt/tminus/bin/python install --require-hashes --only-binary :all: --find-links /wheels \
        ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} --no-deps --root /torch --requirement torch.txt

# Built by the setuptools of the lock.
FROM dependencies AS code
COPY . ./
RUN pip --python /opt/tminus/bin/python install --no-cache-dir --no-index --no-build-isolation --no-deps \
        --root /code . \
    && chmod -R u=rwX,go=rX /code/opt/tminus/lib/python3.11/site-packages/tminus

# What lists the packages of an image: mounted when that is made, and not in it.
FROM dependencies AS sbom
COPY docker/locks/sbom.txt ./
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=bind,from=wheels,target=/wheels \
    python -m venv --without-pip /opt/sbom \
    && pip --python /opt/sbom/bin/python install --require-hashes --only-binary :all: --find-links /wheels \
        --requirement sbom.txt
COPY pyproject.toml /opt/sbom/
COPY docker/sbom /opt/sbom/docker/

FROM python:3.11-slim@sha256:90744cff8f32887f075c47d747a173ff333e9e98801667af93c357fa9f5e28ff AS base
LABEL org.opencontainers.image.title="tminus" \
      org.opencontainers.image.description="A server for trained denoising diffusion U-Nets" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.source="https://github.com/tminus/tminus"
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin tminus \
    && install --directory --owner=tminus --group=tminus /cache \
    && install --directory --owner=tminus --group=tminus --mode=700 /state
WORKDIR /app
COPY --from=dependencies /opt/tminus /opt/tminus
COPY --from=code /code/opt/tminus /opt/tminus
ENV PATH="/opt/tminus/bin:$PATH" \
    HF_HOME=/cache/huggingface \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    TMINUS_CACHE_DIR=/cache \
    TMINUS_HOST=0.0.0.0 \
    TMINUS_PORT=8000 \
    TMINUS_STATE_DIR=/state
EXPOSE 8000
STOPSIGNAL SIGTERM
# http.client, because urllib would use a proxy from the environment.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --start-interval=2s --retries=3 \
    CMD ["python", "-c", "import http.client, os, sys; probe = http.client.HTTPConnection('127.0.0.1', int(os.environ['TMINUS_PORT']), timeout=4); probe.request('GET', '/readyz'); sys.exit(probe.getresponse().status != 200)"]
ENTRYPOINT ["tminus"]
CMD ["serve"]

FROM base AS cuda
# torch.compile calls a C compiler for the launchers of its kernels. Debian keeps no earlier versions that could be named.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
# PyPI's torch brings the CUDA libraries as wheels, so a CUDA base image would only bring them twice.
COPY --link --from=torch-cuda /torch/opt/tminus /opt/tminus
RUN --mount=type=bind,from=sbom,source=/opt/sbom,target=/opt/sbom \
    pip --python /opt/tminus/bin/python check \
    && PATH="/opt/sbom/bin:$PATH" /opt/sbom/docker/sbom /opt/tminus/bin/python /usr/share/sbom/tminus.cdx.json
USER 10001:10001

FROM base AS cpu
COPY --link --from=torch-cpu /torch/opt/tminus /opt/tminus
RUN --mount=type=bind,from=sbom,source=/opt/sbom,target=/opt/sbom \
    pip --python /opt/tminus/bin/python check \
    && PATH="/opt/sbom/bin:$PATH" /opt/sbom/docker/sbom /opt/tminus/bin/python /usr/share/sbom/tminus.cdx.json
USER 10001:10001
