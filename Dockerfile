# One image for producer, consumer and tests; what differs is the command, and pytest in the last stage.
FROM python:3.13-slim AS predlog
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PATH=/opt/venv/bin:$PATH
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_PYTHON=/opt/venv/bin/python
WORKDIR /app
# A volume on data/ takes over its owner when it is new.
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin predlog && install -d -o predlog -g predlog data
COPY requirements.txt .
RUN python -m venv --without-pip /opt/venv && pip install --require-hashes -r requirements.txt
COPY common common
COPY producer.py consumer.py ./
RUN python -m compileall -q .
USER predlog
ENV HTTP_HOST=0.0.0.0 HTTP_PORT=8000
EXPOSE 8000
# The consumer's port is HEALTH_PORT, the producer's HTTP_PORT.
HEALTHCHECK --interval=5s --timeout=5s --start-period=30s --retries=3 CMD ["python", "-c", \
  "import os, urllib.request as u; u.urlopen('http://127.0.0.1:%s/readyz' % os.environ.get('HEALTH_PORT', os.environ['HTTP_PORT']), timeout=4)"]
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
