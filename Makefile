# Every task has one command. It needs a Python >= 3.11 with venv, and makes the rest itself.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --quiet --disable-pip-version-check
JOB ?= jobs/flight_delays.yaml
TESTERS ?= 3

.DEFAULT_GOAL := help
.PHONY: help install run test chaos lint fmt bench clean

help: ## print this list
	@sed -n 's/^\([a-z]*\):.* ## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 10

install: $(VENV)/.installed-dev ## make .venv with everything for working on batchpipe

run: $(VENV)/.installed-examples ## run the flight delays job (JOB=another.yaml, ARGS="--set k=v")
	@$(BIN)/batchpipe run $(JOB) $(ARGS)

test: $(VENV)/.installed-test ## run all tests, TESTERS at a time (ARGS="-k name")
	@$(BIN)/python -m pytest -n $(TESTERS) --dist loadgroup $(ARGS)

chaos: $(VENV)/.installed-test ## inject 200 faults and more into runs, print what survived (ARGS="--seed 2 --only KIND")
	@$(BIN)/python -m tests.chaos $(ARGS)

lint: $(VENV)/.installed-dev ## check style, format, types and the direction of imports
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

fmt: $(VENV)/.installed-dev ## mend style and format
	@$(BIN)/ruff check --fix-only
	@$(BIN)/ruff format

bench: $(VENV)/.installed-bench ## run the benchmarks (ARGS=name)
	@$(BIN)/python -m benchmarks $(ARGS)

clean: ## remove .venv, caches and the jobs' outputs
	rm -rf $(VENV) out build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp for each set of extras: the second time is a no-op, until pyproject.toml changes.
$(VENV)/.installed-examples: EXTRAS := examples
$(VENV)/.installed-test: EXTRAS := examples,test
$(VENV)/.installed-dev: EXTRAS := examples,dev
$(VENV)/.installed-bench: EXTRAS := bench
$(VENV)/.installed-%: pyproject.toml | $(BIN)/pip
	@echo "installing batchpipe[$(EXTRAS)] into $(VENV)" >&2
	@$(PIP) install --editable '.[$(EXTRAS)]'
	@touch $@

# pip is the last thing that venv puts there: one without it was interrupted, and is completed.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: '$(PYTHON)' is not a Python >= 3.11; next: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: '$(PYTHON)' has no venv module; next: apt install python3-venv" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)
