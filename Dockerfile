# One image for every role: `bootstrap`, `join`, `peers`, `init`.
#
#   docker build --tag sentinel-node .
#   docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 --tag sentinel-node:cuda .
#
# docs/operating.md says how to run it. docker-compose.yml starts a whole run on one machine.

FROM python:3.11-slim AS build
# Where torch comes from; PyPI's own is a CUDA build of several GB. Everything else comes from PYPI.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG PYPI=https://pypi.org/simple
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/sentinel
ENV PATH=/opt/sentinel/bin:$PATH
WORKDIR /src
# The dependencies in layers of their own, which a change of our code does not touch.
COPY pyproject.toml constraints.txt ./
RUN pip install --constraint constraints.txt --index-url "$TORCH_INDEX" --extra-index-url "$PYPI" torch
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
print(*project['dependencies'], *project['optional-dependencies']['data'], sep='\n')" > requirements.txt \
    && pip install --constraint constraints.txt --index-url "$PYPI" --requirement requirements.txt
COPY . .
RUN pip install --no-deps --index-url "$PYPI" .

FROM python:3.11-slim
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini=0.19.* \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home sentinel \
    && install --directory --owner=sentinel --group=sentinel --mode=0700 /data \
    && install --directory --owner=sentinel --group=sentinel --mode=0755 /shared
COPY --from=build /opt/sentinel /opt/sentinel
ENV PATH=/opt/sentinel/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    XDG_DATA_HOME=/data \
    HF_HOME=/data/huggingface
USER 10001
WORKDIR /data
# Keys, checkpoints and downloads: keep it, and the peer keeps its name.
VOLUME /data
EXPOSE 31337/tcp 31337/udp
# The node ends when its network daemon does, so this only has to see that the daemon has come up.
HEALTHCHECK --interval=10s --timeout=10s --start-period=90s --retries=3 \
    CMD ["python", "-c", "import psutil, sys; sys.exit(not any(p.name() == 'p2pd' for p in psutil.process_iter()))"]
# tini hands on signals and reaps: without it an orphaned p2pd could hold its port.
ENTRYPOINT ["tini", "--", "sentinel-node"]
CMD ["--help"]
