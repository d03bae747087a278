# SPDX-License-Identifier: Apache-2.0
# make demo   a file through shared memory between two processes, with the comparison to TCP
# make test   all tests; installs the outside tools they check against (lspci, tshark, spin) when it may
# make lint   ruff, mypy, import-linter
# make bench  every benchmark, ratios in one run
# Each target sets up what it needs: a virtual environment in .venv with this project in editable mode.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench format clean

help:
	@sed -n 's/^# make /make /p' Makefile

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -m venv $(VENV) || { echo "make: no virtual environment; on Debian: apt-get install python3-venv" >&2; exit 1; }
	@for try in 1 2 3 4; do \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --retries 5 --timeout 60 --editable '.[dev]' && exit 0; \
	  echo "make: pip failed (try $$try of 4)" >&2; sleep $$((try * 5)); \
	done; exit 1
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/ism demo

test: $(VENV)/.installed
	tests/install-tools
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed
	$(BIN)/python bench/run_all.py

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis bench/results
