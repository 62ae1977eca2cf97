# weft, on the CPU or on CUDA:
#
#   docker build -t weft .                                          # CPU
#   docker build -t weft:cuda --build-arg TORCH_INDEX=cu130 --build-arg EXTRAS=[gpu] .
#   docker run --rm -p 127.0.0.1:8321:8321 -v ./models:/models:ro -v ./pool.yaml:/pool.yaml:ro weft
#   docker run --rm --gpus all --ulimit memlock=-1 --shm-size 0 ... weft:cuda
#
# See docs/container.md for memory limits, memlock and keys.
FROM python:3.12-slim AS build
ARG TORCH_INDEX=cpu
ARG TORCH_VERSION=2.11.0
ARG EXTRAS=
RUN python -m venv /opt/weft
ENV PATH=/opt/weft/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN pip install "torch==${TORCH_VERSION}" --index-url "https://download.pytorch.org/whl/${TORCH_INDEX}"
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install ".${EXTRAS}"

FROM python:3.12-slim
# Triton compiles a small launcher with the C compiler when a kernel is first used.
ARG EXTRAS=
RUN if [ -n "$EXTRAS" ]; then \
      apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev \
      && rm -rf /var/lib/apt/lists/*; fi \
    && useradd --create-home --uid 10001 weft
COPY --from=build /opt/weft /opt/weft
ENV PATH=/opt/weft/bin:$PATH PYTHONUNBUFFERED=1
USER weft
WORKDIR /home/weft
EXPOSE 8321
HEALTHCHECK --start-period=120s CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8321/health', timeout=5)"]
STOPSIGNAL SIGTERM
# Inside a container every address is reached from outside through the published port only; give keys
# in pool.yaml (docs/security.md) before publishing it to others.
ENTRYPOINT ["weft"]
CMD ["serve", "/pool.yaml", "--host", "0.0.0.0", "--insecure"]
