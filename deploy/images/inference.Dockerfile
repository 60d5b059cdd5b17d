# A worker. Run in the root of the repository:
#   docker build -f deploy/images/inference.Dockerfile -t forebay-inference:cpu .
#   docker build -f deploy/images/inference.Dockerfile -t forebay-inference:cuda --build-arg VARIANT=cuda .
#   docker build -f deploy/images/inference.Dockerfile -t forebay-inference:served --build-arg VARIANT=served .
# The served variant has no PyTorch. It asks an inference server in another container.
# The wheels of the cuda variant contain the CUDA libraries. The machine needs the driver (NVIDIA Container Toolkit).

ARG BASE=python:3.11-slim-bookworm
# An image with wheels in its root folder. If given, the build takes all packages from it and needs no network.
ARG WHEELS=scratch

FROM ${WHEELS} AS wheels

FROM ${BASE} AS build
RUN python -m venv /build && python -m venv --without-pip /opt/forebay
COPY --from=wheels . /wheels/
# cpu, cuda or served selects the lock file. Only the builds of PyTorch without CUDA are not on the package index.
ARG VARIANT=cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY constraints/build.lock constraints/inference-${VARIANT}.lock /locks/
ARG PIP_INDEX_URL
# nkeys has no wheel. The packages of build.lock build it.
RUN if [ "$VARIANT" = cpu ]; then from="--extra-index-url $TORCH_INDEX"; fi; \
    if ls /wheels/*.whl > /dev/null 2>&1; then from="--no-index --find-links /wheels"; fi; \
    pip="/build/bin/python -m pip --no-cache-dir --disable-pip-version-check"; \
    $pip install $from --require-hashes --only-binary :all: -r /locks/build.lock && \
    $pip wheel $from --require-hashes --only-binary :all: --no-binary nkeys --no-build-isolation \
        --wheel-dir /dist -r /locks/inference-${VARIANT}.lock
COPY pyproject.toml README.md LICENSE /src/
COPY libs /src/libs
COPY services /src/services
# The output of `forebay --version`. There is no .git here to derive it from.
ARG VERSION=0
RUN export SETUPTOOLS_SCM_PRETEND_VERSION_FOR_FOREBAY="$VERSION"; \
    pip="/build/bin/python -m pip --no-cache-dir --disable-pip-version-check"; \
    $pip wheel --no-deps --no-index --no-build-isolation --wheel-dir /dist /src && \
    $pip --python /opt/forebay/bin/python install --no-deps --no-index /dist/*.whl

FROM ${BASE}
ARG VERSION=0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Forebay inference" \
      org.opencontainers.image.description="NATS JetStream in, tokens out" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# The base image has pip. The running image does not need it.
RUN rm -rf /usr/local/bin/pip* /usr/share/python-wheels $(python -c "import glob, sysconfig; p = sysconfig.get_paths(); \
        print(p['stdlib'] + '/ensurepip', *glob.glob(p['purelib'] + '/pip*'), *glob.glob(p['purelib'] + '/setuptools*'))") && \
    groupadd --gid 10001 forebay && \
    useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin forebay && \
    install -d -o 10001 -g 10001 /data
COPY --from=build /opt/forebay /opt/forebay
# The root may be read-only. A worker writes to /tmp, for which a tmpfs is enough, and to the models' volume at /data.
ENV PATH=/opt/forebay/bin:$PATH \
    HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    DATA_DIR=/data \
    METRICS_HOST=0.0.0.0 \
    METRICS_PORT=9091
USER 10001:10001
WORKDIR /
EXPOSE 9091
# A loading worker is live. /health/ready says whether it serves.
HEALTHCHECK --interval=10s --timeout=6s --start-period=60s --retries=3 \
    CMD python -m forebay_contracts.probe "$METRICS_PORT" /health/live
ENTRYPOINT ["forebay"]
CMD ["inference"]
