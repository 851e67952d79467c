# SPDX-License-Identifier: Apache-2.0
#
# docker build -t splicer .    (make image names version and revision as well)
#
# Everything comes from Debian: bcc exists as a distribution's package only, and the Python packages beside it
# get their security updates from the same place. Nothing is downloaded from PyPI.
# No BuildKit features: Compose 1.29 and Podman build this too.

ARG BASE=debian:13-slim

FROM ${BASE} AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-pip python3-setuptools
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY bpf bpf
COPY splicer splicer
# What splicer depends on is looked for in the image that will run it, below.
RUN python3 -m pip install --no-cache-dir --no-index --no-build-isolation --no-deps --break-system-packages \
        --root /installed .

FROM ${BASE}
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        python3-bpfcc python3-docker python3-prometheus-client python3-psutil python3-structlog \
    && apt-get clean \
    && rm -rf /var/lib/apt/lists/* /var/cache/debconf/* /var/log/*
COPY --from=build /installed/usr/local /usr/local
# A build must fail here rather than a container later: the command is complete, and so is what it imports.
RUN splicer version \
    && python3 -c 'import bcc, docker, prometheus_client, psutil, structlog; assert bcc.BPF'

ARG VERSION=0.2.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="splicer" \
      org.opencontainers.image.description="Makes same-host TCP between containers and processes faster" \
      org.opencontainers.image.licenses="Apache-2.0 AND GPL-2.0-only" \
      org.opencontainers.image.base.name="debian:13-slim" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

# Loading BPF programs needs root; what root may do here is up to the capabilities, see docker-compose.yml.
USER root
# Answers from the daemon's control socket: 0 only if it runs and keeps its promises. Each costs 0.1 s of CPU.
HEALTHCHECK --interval=30s --timeout=5s --start-period=30s --retries=3 CMD ["splicer", "status", "--brief"]
# Takes every connection back to plain TCP first, for --stop-timeout seconds (5) at most.
STOPSIGNAL SIGTERM
ENTRYPOINT ["splicer"]
CMD ["run"]
