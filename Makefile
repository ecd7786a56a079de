# Each target does its own set-up: scripts/setup.py says what it installs, and is silent when nothing is missing.
PYTHON ?= python3
VENV_PYTHON := .venv/bin/python

.PHONY: run test bench chaos fuzz check lock clean

run:
	@$(PYTHON) -m scripts.setup run
	@$(VENV_PYTHON) -m scripts.run

test:
	@$(PYTHON) -m scripts.setup test
	$(VENV_PYTHON) -m pytest -n 2 --dist worksteal --benchmark-disable

bench:
	@$(PYTHON) -m scripts.setup bench
	$(VENV_PYTHON) -m tests.bench

chaos:
	@$(PYTHON) -m scripts.setup chaos
	$(VENV_PYTHON) -m tests.chaos

fuzz:
	@$(PYTHON) -m scripts.setup check
	$(VENV_PYTHON) -m tests.fuzz.fuzz_http1
	$(VENV_PYTHON) -m pytest --hypothesis-profile=fuzz -m fuzz

check:
	@$(PYTHON) -m scripts.setup check
	$(VENV_PYTHON) -m ruff check
	$(VENV_PYTHON) -m ruff format --check
	$(VENV_PYTHON) -m mypy

# After a change of the dependencies in pyproject.toml. What is pinned stays unless that asks for more;
# `make lock LOCK=--upgrade` takes the newest of all.
COMPILE = $(VENV_PYTHON) -m uv --no-config pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--index-url https://pypi.org/simple --custom-compile-command 'make lock' $(LOCK)
lock:
	@$(PYTHON) -m scripts.setup check
	$(COMPILE) pyproject.toml --output-file requirements.txt
	$(COMPILE) pyproject.toml --group dev --constraint requirements.txt --output-file requirements-dev.txt
	$(COMPILE) --group e2e --constraint requirements-dev.txt --output-file requirements-e2e.txt

# data/ stays: it holds the CSV, and messages that were accepted and are not in it yet.
clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
