# One image for producer, consumer and tests; what differs is the command, and pytest in the last stage.
FROM python:3.13-slim AS predlog
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PATH=/opt/venv/bin:$PATH
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_PYTHON=/opt/venv/bin/python
WORKDIR /app
# A new volume on data/ gets the owner of the folder in the image.
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin predlog && install -d -o predlog -g predlog data
COPY requirements.txt .
RUN python -m venv --without-pip /opt/venv && pip install --require-hashes -r requirements.txt
COPY common common
COPY scripts/__init__.py scripts/carry_ids.py scripts/
COPY producer.py consumer.py deploy/compose/healthcheck.py ./
RUN python -m compileall -q .
USER predlog
ENV HTTP_HOST=0.0.0.0 HTTP_PORT=8000 HEALTH_HOST=0.0.0.0 HEALTH_PORT=8001
EXPOSE 8000 8001
# Liveness (/healthz). Readiness (/readyz) is for load balancers: while the broker is away the producer is alive, but
# not ready, and a restart would not help.
HEALTHCHECK --interval=5s --timeout=10s --start-period=30s --retries=3 CMD ["python", "healthcheck.py"]
CMD ["python", "producer.py"]

FROM predlog AS tests
USER root
COPY requirements-e2e.txt .
RUN pip install --require-hashes -r requirements-e2e.txt
COPY scripts scripts
COPY tests tests
USER predlog
HEALTHCHECK NONE
CMD ["python", "-m", "pytest", "-p", "no:cacheprovider", "-v", "tests/e2e"]

# The default target is the one without pytest.
FROM predlog
