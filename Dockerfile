# docs/deployment.md, "Docker", has the commands. Build with BuildKit (Docker's own since 23) or Podman, which leave out the
# stages that a target does not need.
ARG PYTHON=3.12-slim-bookworm

# --- Python environments: wheels alone, by hash ------------------------------------------------------------------
FROM python:${PYTHON} AS build-edge
ENV PIP_NO_CACHE_DIR=1 PIP_ONLY_BINARY=:all: PIP_PYTHON=/opt/venv/bin/python
WORKDIR /build
RUN python -m venv --without-pip /opt/venv
COPY requirements-edge-locked.txt requirements-immich-locked.txt ./
RUN pip install --require-hashes -r requirements-edge-locked.txt \
    && pip install --require-hashes -r requirements-immich-locked.txt

FROM build-edge AS build-cuda
COPY requirements-locked.txt ./
RUN pip install --require-hashes -r requirements-locked.txt

# Only PyTorch's own index has wheels for ROCm, of which the lock has no hashes; all else is of the lock's versions.
FROM build-edge AS build-rocm
ARG ROCM_INDEX=https://download.pytorch.org/whl/rocm7.2
COPY requirements.txt requirements-edge.txt requirements-torch.txt requirements-locked.txt ./
# hadolint ignore=DL3013
RUN pip install --index-url "${ROCM_INDEX}" "$(grep ^torch requirements-torch.txt)" torchvision \
    && sed -nE '/^(torch|torchvision|triton)==/d; /^[a-z].*==/s/ \\$//p' requirements-locked.txt > pins.txt \
    && pip install -c pins.txt -r requirements.txt

# --- the program; .dockerignore says what of it is not needed ------------------------------------------------------
FROM build-edge AS app
WORKDIR /app
COPY *.py LICENSE ./
COPY gen gen
RUN python -m compileall -q . && chmod -R a+rX .

# --- what all targets share -----------------------------------------------------------------------------------------
FROM python:${PYTHON} AS base
RUN useradd --uid 10001 --home-dir /data --no-create-home --shell /usr/sbin/nologin lumen \
    && install -d -o lumen -g lumen /data
ENV PATH=/opt/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 HOME=/data HF_HOME=/data/hub LUMEN_DATA_DIR=/data
WORKDIR /app
USER 10001:10001
VOLUME /data
EXPOSE 50051
# The first start downloads models, and may compute the vectors of labels.
HEALTHCHECK --start-period=1h --timeout=10s CMD ["python", "client.py", "health", "--timeout", "5"]
ENTRYPOINT ["python", "lumen_clip.py"]

# A container that was started without its GPU says so and ends; it does not go on a hundred times slower.
FROM base AS cuda
ENV CLIP_DEVICE=cuda BIOCLIP_DEVICE=cuda NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-cuda /opt/venv /opt/venv
COPY --from=app /app /app

FROM base AS rocm
ENV CLIP_DEVICE=cuda BIOCLIP_DEVICE=cuda
COPY --from=build-rocm /opt/venv /opt/venv
COPY --from=app /app /app

FROM base AS rknn
ENV CLIP_BACKEND=rknn BIOCLIP_BACKEND=none
COPY --from=build-edge /opt/venv /opt/venv
COPY --from=app /app /app

FROM base AS cpu
ENV CLIP_BACKEND=onnxrt BIOCLIP_BACKEND=none
COPY --from=build-edge /opt/venv /opt/venv
COPY --from=app /app /app
