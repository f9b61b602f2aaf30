# `make lint test` is what CI runs. The environment makes itself: in .venv, with the first Python >= 3.11 that is found.
#   make demo VENV=/elsewhere PYTHON=python3.12 PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"

VENV ?= .venv
PIP_FLAGS ?=
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := $(VENV)/bin
PARALLEL ?= --numprocesses logical --maxprocesses 4 --dist worksteal
INSTALL := $(BIN)/python -m pip install --quiet $(PIP_FLAGS) --editable

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-gpu lint bench bench-gpu bench-peers format

help: ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1\t\2/p' Makefile | expand -t 18

demo: $(BIN)/.demo ## train Qwen 2's first four stages at nano scale: minutes on two cores, ends with one HTML page
	$(BIN)/lightning-llm run recipe=qwen2 scale=nano until=dpo

test: $(BIN)/.dev ## all tests
	$(BIN)/python -m pytest $(PARALLEL)

test-fast: $(BIN)/.dev ## the tests that take less than some ten seconds each
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

test-gpu: $(BIN)/.dev ## the tests that need an NVIDIA GPU: kernels of attention and of the loss, experts, recorded steps
	$(BIN)/python -m pytest -m gpu

lint: $(BIN)/.dev ## what must be clean: formatting, lint (notebooks too), types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(BIN)/.bench bench-peers ## make the figures of benchmarks/results and docs/performance.md again: several hours on two calm cores
	-$(BIN)/python benchmarks/learning.py
	-$(BIN)/python benchmarks/demo.py --clone
	-for name in pretrain sft dpo reward generate vocabulary reward_models policy_learning distillation annealing averaging warp pruning lengthening upcycling online_merging committee merging; do $(BIN)/python benchmarks/$$name.py; done
	$(BIN)/python benchmarks/page.py

bench-gpu: $(BIN)/.bench ## the part of docs/performance.md that needs an NVIDIA GPU
	$(BIN)/python benchmarks/gpu.py
	$(BIN)/python benchmarks/page.py

bench-peers: $(BIN)/python ## an environment for each library that the benchmarks compare with, in build/peers
	$(BIN)/python benchmarks/peers/environments.py

format: $(BIN)/.dev ## format and mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.11 found. Name one: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@test ! -e "$(VENV)" || test -f "$(VENV)/pyvenv.cfg" || { echo "error: $(VENV) is there and no environment: name another folder, make VENV=..." >&2; exit 2; }
	$(PYTHON) -m venv --clear "$(VENV)" || { echo "error: no environment. Debian and Ubuntu: apt install python3-venv" >&2; rm -f "$(VENV)"/bin/python; exit 2; }

# Stamps: nothing is installed again until pyproject.toml changes.
$(BIN)/.demo: pyproject.toml | $(BIN)/python
	$(INSTALL) .
	@touch $@

$(BIN)/.dev: pyproject.toml | $(BIN)/python
	$(INSTALL) '.[dev,loggers,notebooks]'
	@touch $@ $(BIN)/.demo

$(BIN)/.bench: pyproject.toml | $(BIN)/python
	$(INSTALL) '.[bench]'
	@touch $@ $(BIN)/.demo
