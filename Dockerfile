# syntax=docker/dockerfile:1
# `engine` in a container, and by default its server. CPU; for NVIDIA GPUs build with --build-arg TORCH=cu130.
#   docker build -t tmm-engine .
#   docker run --rm -v ./indexes:/indexes -p 127.0.0.1:8000:8000 -e TMM_ENGINE_API_KEY tmm-engine
ARG PYTHON=3.12

FROM python:${PYTHON}-slim-bookworm AS build
ARG TORCH=cpu
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/engine/bin:$PATH
RUN python -m venv /opt/engine
# PyTorch first: a layer that stays when only our code changes. Its floors are those of pyproject.toml.
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --index-url "https://download.pytorch.org/whl/${TORCH}" "torch>=2.11" "torchvision>=0.26"
WORKDIR /source
COPY pyproject.toml MANIFEST.in README.md LICENSE NOTICE ./
COPY engine engine
COPY index index
COPY rerank rerank
COPY bench bench
RUN --mount=type=cache,target=/root/.cache/pip pip install ".[serve,hf,timm]"

FROM python:${PYTHON}-slim-bookworm
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /tmp engine && install -d -o engine -g engine /indexes
COPY --from=build /opt/engine /opt/engine
# The root may be read-only: what libraries want to keep goes to /tmp, which is a tmpfs then.
ENV PATH=/opt/engine/bin:$PATH HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /indexes
VOLUME /indexes
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --start-interval=2s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/livez', timeout=4)"]
ENTRYPOINT ["engine"]
CMD ["serve", "photos.idx", "--host", "0.0.0.0"]
