# Each target does its own set-up. scripts/setup.py prints what it installs, and nothing if nothing is missing.
PYTHON ?= python3
VENV_PYTHON := .venv/bin/python

.PHONY: help run test check compile bench chaos fuzz lock release clean

help:  ## print this list
	@echo "Usage: make TARGET"
	@sed -nE 's/^([a-z]+):[^#]*##  ?(.*)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 12

run:  ## run producer, consumer and a broker in the foreground; Ctrl-C drains and stops them
	@$(PYTHON) -m scripts.setup run
	@$(VENV_PYTHON) -m scripts.run

test:  ## run the checks, then every test except the compose ones; two and a half minutes on two cores
	@$(PYTHON) -m scripts.setup test
	@$(MAKE) --no-print-directory --jobs=2 check compile
	$(VENV_PYTHON) -m pytest -n 5 --dist loadfile --no-loadscope-reorder --benchmark-disable

# pytest compiles the tests with its own asserts. Without this, each of its processes would do that for itself.
compile:
	@env --unset=PYTHONDONTWRITEBYTECODE $(VENV_PYTHON) -m pytest --collect-only --quiet >/dev/null

check:  ## lint, and check the format, the types, and the schemas of the YAML that other programs read
	@$(PYTHON) -m scripts.setup check
	$(VENV_PYTHON) -m ruff check
	$(VENV_PYTHON) -m ruff format --check
	$(VENV_PYTHON) -m mypy
	$(VENV_PYTHON) -m check_jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(VENV_PYTHON) -m check_jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(VENV_PYTHON) -m check_jsonschema --builtin-schema vendor.compose-spec compose.yaml deploy/compose/*.yaml
	$(VENV_PYTHON) -m pre_commit validate-config

bench:  ## measure the figures of docs/benchmarks.md, in about twelve minutes; QUICK=1 is a short run
	@$(PYTHON) -m scripts.setup bench
	$(VENV_PYTHON) -m tests.bench

chaos:  ## kill and freeze everything under load, then count what is lost; SECONDS=120, ROUNDS, SEED, CLUSTER=3
	@$(PYTHON) -m scripts.setup chaos
	$(VENV_PYTHON) -m tests.chaos

fuzz:  ## search for counter-examples for longer than `make test` does
	@$(PYTHON) -m scripts.setup check
	$(VENV_PYTHON) -m tests.fuzz.fuzz_http1
	$(VENV_PYTHON) -m pytest --hypothesis-profile=fuzz -m fuzz

# Run this after a change of the dependencies in pyproject.toml. A pin stays unless pyproject.toml requires a newer
# version.
COMPILE = $(VENV_PYTHON) -m uv --no-config pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--index-url https://pypi.org/simple --custom-compile-command 'make lock' $(LOCK)
lock:  ## pin the dependencies of pyproject.toml with hashes; LOCK=--upgrade takes the newest versions
	@$(PYTHON) -m scripts.setup check
	$(COMPILE) pyproject.toml --output-file requirements.txt
	$(COMPILE) pyproject.toml --group dev --constraint requirements.txt --output-file requirements-dev.txt
	$(COMPILE) --group e2e --constraint requirements-dev.txt --output-file requirements-e2e.txt
	$(COMPILE) --group bench --constraint requirements-dev.txt --output-file requirements-bench.txt

release:  ## check that every place names the same version, then build the source archive and the image
	@$(PYTHON) -m scripts.release

# data/ stays, because it has the CSV, and accepted messages that are not in the CSV yet.
clean:  ## remove .venv, caches and dist/; data/ stays
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks dist
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
