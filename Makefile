# `make demo` and `make test` create .venv themselves, install what they need once, and are quick from then on.

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c

PYTHON ?= python3
# Further flags of pip. On x86-64, torch's CPU build (200 MB instead of gigabytes) comes from its own index:
#   make test PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_ARGS ?=
# Further flags of pytest, for instance PYTEST_ARGS="-k manifest".
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
EDGE := $(VENV)/.installed-edge
ALL := $(VENV)/.installed-all
NATIVE := $(wildcard edge/native/*.cpp edge/native/*.h)

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-systemd gpu check clean venv
.SILENT: help demo test test-fast test-systemd gpu clean venv $(EDGE) $(ALL)

help:
	echo "make demo    install the edge, and watch the shipped model write a story"
	echo "make test    install everything, and run the tests; those of MQTT need mosquitto"
	echo "make test-fast   those without the slow ones, while you work: two minutes on two cores"
	echo "make test-systemd   the installed service on a booted systemd; needs root and systemd-container"
	echo "make gpu     on an NVIDIA machine: tests, training benchmark, a short run, in build/gpu/report.txt"
	echo "make check   formatting, types, floors, pages, file sizes, line budget"
	echo "make clean   remove .venv and caches; data, runs and bundles stay"

demo: $(EDGE)
	$(BIN)/python -m edge.demo

# One thread a process: pytest already runs as many processes as there are cores.
test: $(ALL)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --ignore=tests/systemd $(PYTEST_ARGS)

# One process more than there are cores: many of these wait, for a daemon or a broker.
test-fast: $(ALL)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $$(($$(nproc) + 1)) -m "not slow" --ignore=tests/systemd $(PYTEST_ARGS)

# By itself, in one process: every process would boot a machine of its own. Skipped, with the reason, where none can be.
test-systemd: $(ALL)
	$(BIN)/python -m pytest tests/systemd -s $(PYTEST_ARGS)

gpu: $(ALL)
	PYTHON=$(BIN)/python bash tests/gpu/report.sh

check: $(ALL)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/contract

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis edge/native/*.so
	find host edge shared tests -name __pycache__ -prune -exec rm -rf {} +

# Debian's python3 has `venv` but not `ensurepip` until python3-venv is installed, and would leave half of a .venv.
venv:
	if ! command -v $(PYTHON) >/dev/null; then \
	    echo "error: $(PYTHON) is not installed: install Python 3.10 or newer, or name one with PYTHON=..." >&2; exit 1; fi; \
	if ! $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then \
	    echo "error: $$($(PYTHON) --version) is too old: install 3.10 or newer, or name one with PYTHON=..." >&2; exit 1; fi; \
	if ! $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then \
	    echo "error: $(PYTHON) cannot make virtual environments: on Debian and Ubuntu, apt install python3-venv" >&2; exit 1; fi; \
	$(PYTHON) -m venv --clear $(VENV)

# A .venv that cannot be used (interrupted, or its Python is gone or too old) is made again: it holds nothing of value.
USABLE := $(shell $(BIN)/python -c 'import sys, pip; print(sys.version_info >= (3, 10))' 2>/dev/null)
VENV_MADE := $(if $(filter True,$(USABLE)),,venv)

# Editable, so that the shipped bundle is found beside the packages; compiles edge/native where there is a compiler.
$(EDGE): pyproject.toml $(NATIVE) $(VENV_MADE)
	$(call install,the edge,-e .)
	touch $@

$(ALL): pyproject.toml constraints.txt $(NATIVE) $(VENV_MADE)
	$(call install,everything the tests need,-e '.[host$(comma)dev$(comma)trtcheck]' -c constraints.txt)
	touch $(EDGE) $@

comma := ,
# Removed before an installation: where the sources no longer compile, pip would leave the old one.
COMPILED := edge/native/*.so

# $(1) what, in words; $(2) for pip. Shows what pip fetches and builds; all it says goes to a file, because the last lines
# of it seldom say what is wrong.
define install
	echo "Installing $(1) into $(VENV); the first time takes minutes:"; \
	rm -f $(COMPILED); \
	if ! $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off $(PIP_ARGS) $(2) 2>&1 \
	    | tee $(VENV)/pip.log \
	    | sed -nu '/\.metadata/d; s/^ *\(Downloading\|Using cached\|Building\|Installing\|Successfully\)\(.\{,100\}\).*/  \1\2/p'; then \
	    if grep -q 'Retrying (' $(VENV)/pip.log; then reason="the package index cannot be reached: is there a network?"; \
	    else reason=$$(sed -n 's/^ *ERROR: //p' $(VENV)/pip.log | tail -n 1); fi; \
	    echo "error: pip cannot install $(1): $${reason:-it stopped} (details in $(VENV)/pip.log)" >&2; exit 1; \
	fi; \
	if ! command -v $(firstword $(CXX)) >/dev/null; then \
	    echo "note: without a C++ compiler ONNX Runtime decodes alone, on x86 processors with VNNI more slowly: apt install g++," \
	        "then touch pyproject.toml and make this again" >&2; fi
endef
