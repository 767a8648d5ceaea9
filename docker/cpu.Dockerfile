# dtrain on CPU. Built in the repository's root: docker build -f docker/cpu.Dockerfile -t dtrain:cpu .
FROM python:3.12.11-slim-bookworm@sha256:519591d6871b7bc437060736b9f7456b8731f1499a57e22e6c285135ae657bf7

# A compiler: torch.compile and DeepSpeed's ops for the CPU are made when they are first used.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --uid 10001 --create-home dtrain && install -d -o 10001 -g 10001 /opt/dtrain /work
USER 10001:10001
ENV PATH=/opt/dtrain/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/work/.cache/huggingface
RUN python3 -m venv /opt/dtrain && mkdir /opt/dtrain/src

# What dtrain needs comes before dtrain itself, so that a change of its source leaves these layers as they are.
# PIP_EXTRA_INDEX_URL may name an index of torch's builds for CPU; without it torch brings CUDA's libraries, which lie
# idle.
ARG TORCH_VERSION=2.12.0
ARG PIP_EXTRA_INDEX_URL
RUN pip install "torch==${TORCH_VERSION}"
COPY --chown=10001:10001 docker/requirements.py pyproject.toml /opt/dtrain/src/
RUN python3 /opt/dtrain/src/requirements.py /opt/dtrain/src/pyproject.toml eval >/opt/dtrain/src/requirements.txt \
    && pip install --requirement /opt/dtrain/src/requirements.txt "torch==${TORCH_VERSION}"

COPY --chown=10001:10001 README.md LICENSE /opt/dtrain/src/
COPY --chown=10001:10001 conf /opt/dtrain/src/conf
COPY --chown=10001:10001 launch /opt/dtrain/src/launch
COPY --chown=10001:10001 dtrain /opt/dtrain/src/dtrain
RUN pip install --no-deps /opt/dtrain/src

WORKDIR /work
# Versions and limits alone: a look at the devices would take memory from a run, one at the disk its bandwidth.
HEALTHCHECK --interval=5m --timeout=60s --start-period=60s --retries=3 \
    CMD ["dtrain", "doctor", "--only", "versions,limits"]
ENTRYPOINT ["dtrain"]
CMD ["--help"]
