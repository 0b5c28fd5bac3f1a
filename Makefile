# Every target works on a fresh clone; `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PEERS := .venv-peers

.DEFAULT_GOAL := help
.PHONY: help demo test e2e ui check fix peers bench lock

help: ## List the targets
	@grep -hE '^[a-z0-9]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "make %-6s %s\n", $$1, $$2}'

$(STAMP): requirements.lock pyproject.toml $(wildcard serving/kernels/avx512*.[ch])
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --config-settings editable_mode=compat --editable .
	touch $@

demo: $(STAMP) ## Forge, judge, publish and serve the real all-MiniLM-L6-v2
	$(BIN)/python -m flows.demo

test: $(STAMP) check ## Linters, types, import contracts and every test that needs nothing but pip
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 -m "not e2e and not gpu" --cov --cov-report=term:skip-covered

e2e: $(STAMP) ## The tests that need servers or a browser from the system's packages, or minutes
	$(BIN)/python -m tests.e2e.prepare
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m e2e --timeout 1500

ui: $(STAMP) ## Open the MLflow and Prefect pages over the demo's own runs (Ctrl-C ends both)
	$(BIN)/python -m flows.ui

check: $(STAMP) ## Linters, types and import contracts; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

fix: $(STAMP) ## Let the linter and the formatter mend what they can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python -m tests.reference

$(PEERS)/.installed: benchmarks/requirements-peers.lock
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	touch $@

peers: $(PEERS)/.installed ## The servers the benchmarks compare with, in an environment of their own

bench: $(STAMP) peers ## Measure, alone on the machine; rows are appended to benchmarks/results
	$(BIN)/python -m benchmarks.bench_variants
	$(BIN)/python -m benchmarks.bench_serving --peer infinity

lock: ## Write requirements.lock anew from the extras in pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade setuptools --editable '.[dev]'
	$(BIN)/python -m pip list --format=freeze --exclude pip --exclude thorforge | sed 's/+cpu$$//' > requirements.lock
