# tminus as a container. docker/README.md has the details.
#   docker build -t tminus . && docker run --rm --init --stop-timeout 40 -e TMINUS_OPEN=yes -p 127.0.0.1:8000:8000 tminus

# Wheels that pip finds in addition to the index. Empty, unless `--build-context wheels=FOLDER` replaces this stage.
FROM scratch AS wheels

# Only the list of dependencies leaves this stage, so that no other change in pyproject.toml reinstalls torch.
FROM python:3.11-slim AS requirements
WORKDIR /src
COPY pyproject.toml ./
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
        print(*project['dependencies'], *project['optional-dependencies']['openvino'], sep='\n')" \
        > all.txt \
    && grep -w '^torch' all.txt > torch.txt

FROM python:3.11-slim AS dependencies
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore
# The index for torch only. The torch on PyPI for x86_64 has gigabytes of CUDA; an empty value selects it.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /src
RUN python -m venv --without-pip /opt/tminus
COPY --from=requirements /src/torch.txt /src/all.txt ./
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=bind,from=wheels,target=/wheels \
    pip --python /opt/tminus/bin/python install --find-links /wheels \
        ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} --requirement torch.txt \
    && pip --python /opt/tminus/bin/python install --find-links /wheels --requirement all.txt

# --root installs the code apart from its dependencies, so that it is a small layer of its own in the image.
FROM dependencies AS code
COPY . ./
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=bind,from=wheels,target=/wheels \
    pip --python /opt/tminus/bin/python install --find-links /wheels --no-deps --root /code . \
    && chmod -R u=rwX,go=rX /code/opt/tminus/lib/python3.11/site-packages/tminus

FROM python:3.11-slim AS base
LABEL org.opencontainers.image.title="tminus" \
      org.opencontainers.image.description="A server for trained denoising diffusion U-Nets" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin tminus \
    && install --directory --owner=tminus --group=tminus /cache \
    && install --directory --owner=tminus --group=tminus --mode=700 /state
WORKDIR /app
COPY --from=dependencies /opt/tminus /opt/tminus
COPY --from=code /code/opt/tminus /opt/tminus
ENV PATH="/opt/tminus/bin:$PATH" \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    TMINUS_CACHE_DIR=/cache \
    TMINUS_HOST=0.0.0.0 \
    TMINUS_PORT=8000 \
    TMINUS_STATE_DIR=/state
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
# http.client, because urllib would use a proxy from the environment.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --start-interval=2s --retries=3 \
    CMD ["python", "-c", "import http.client, os, sys; probe = http.client.HTTPConnection('127.0.0.1', int(os.environ['TMINUS_PORT']), timeout=4); probe.request('GET', '/readyz'); sys.exit(probe.getresponse().status != 200)"]
ENTRYPOINT ["tminus"]
CMD ["serve"]

# PyPI's torch brings the CUDA libraries as wheels, so a CUDA base image would only bring them twice. torch.compile calls a
# C compiler for the launchers of its kernels.
FROM base AS cuda
USER 0:0
# Debian keeps no earlier versions that could be named.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
USER 10001:10001

FROM base AS cpu
