# Each target does its own set-up: scripts/setup.py says what it installs, and is silent when nothing is missing.
PYTHON ?= python3
VENV_PYTHON := .venv/bin/python

.PHONY: run test bench chaos fuzz check clean

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

# data/ stays: it holds the CSV, and messages that were accepted and are not in it yet.
clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
