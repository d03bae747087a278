# SPDX-License-Identifier: Apache-2.0
# make demo   a file through shared memory between two processes, with the comparison to TCP
# make test   all tests but those in guests; installs the outside tools they check against (lspci, tshark, spin) when it may
# make vm-test   the tests in virtual machines: fetches QEMU and a guest from Debian's packages into ~/.cache/ism-vm, once
# make vm-demo   two virtual machines, a file and an RPC between them, with the comparison to TCP
# make vm-bench  what sockets between virtual machines cost, against TCP between the same two
# make lint   ruff, mypy, import-linter
# make bench  every benchmark: figures and charts in bench/results
# Each target sets up what it needs: a virtual environment in .venv with this project in editable mode.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test vm-test vm-demo vm-bench lint bench format clean

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
	$(BIN)/python -m pytest -m "not vm" $(PYTEST_ARGS)

vm-test: $(VENV)/.installed
	tests/install-tools
	$(BIN)/ism vm setup || echo "make: no guests; the tests say why they are skipped" >&2
	$(BIN)/python -m pytest -m vm $(PYTEST_ARGS)

vm-demo: $(VENV)/.installed
	$(BIN)/ism vm demo

vm-bench: $(VENV)/.installed
	$(BIN)/ism vm bench

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
