# One image for producer and consumer, which differ only in the command. The stage `tests` adds pytest and the tests.
#
# A release sets PYTHON_IMAGE to a digest (.github/workflows/release.yml). Its default is the stage below, because
# Dependabot updates FROM, but not ARG.
ARG PYTHON_IMAGE=python-by-tag
FROM python:3.13-slim AS python-by-tag

FROM ${PYTHON_IMAGE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_PYTHON=/opt/venv/bin/python
COPY requirements.txt .
RUN python -m venv --without-pip /opt/venv && pip install --require-hashes -r requirements.txt
WORKDIR /app
COPY common common
COPY scripts/__init__.py scripts/carry_ids.py scripts/
COPY producer.py consumer.py deploy/compose/healthcheck.py ./
RUN python -m compileall -q .

FROM ${PYTHON_IMAGE} AS predlog
LABEL org.opencontainers.image.title="predlog" \
      org.opencontainers.image.description="Predictions in over HTTP, through RabbitMQ, into CSV: each exactly once" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="2.0.0"
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PATH=/opt/venv/bin:$PATH
WORKDIR /app
# A new volume mounted on data/ gets the owner that the folder has in the image.
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin predlog && install -d -o predlog -g predlog data
COPY --from=build /opt/venv /opt/venv
COPY --from=build /app ./
# The user is given by number, so that Kubernetes can see that it is not root.
USER 10001
ENV HTTP_HOST=0.0.0.0 HTTP_PORT=8000 HEALTH_HOST=0.0.0.0 HEALTH_PORT=8001
EXPOSE 8000 8001
# This asks for liveness (/healthz). Readiness (/readyz) is for load balancers. While the broker is unreachable, the
# producer is alive but not ready, and a restart would not help.
HEALTHCHECK --interval=5s --timeout=10s --start-period=30s --retries=3 CMD ["python", "healthcheck.py"]
CMD ["python", "producer.py"]

FROM predlog AS tests
USER root
COPY requirements-e2e.txt .
RUN PIP_PYTHON=/opt/venv/bin/python pip install --no-cache-dir --require-hashes -r requirements-e2e.txt
COPY scripts scripts
COPY tests tests
USER predlog
HEALTHCHECK NONE
CMD ["python", "-m", "pytest", "-p", "no:cacheprovider", "-v", "tests/e2e"]

# The default target has no pytest.
FROM predlog
