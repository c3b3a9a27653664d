# Two commands matter: `make advise` and `make test`. Both work on a fresh checkout.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
EXAMPLE ?= examples/corporate-archive.yaml
export PYTHONSAFEPATH := 1

# pip compiles what it installs, but not what it only links to.
COMPILE = $(BIN)/python -m compileall -q src advisor blocks kernels profiles

.PHONY: advise test lint types format wheel kernels-aot gpu accuracy release-check picture clean

advise: $(VENV)/.installed
	$(BIN)/archcompass advise $(EXAMPLE) -o out/

test: $(VENV)/.installed-test lint types
	$(BIN)/pytest -n 2 --dist worksteal

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-test
	$(BIN)/mypy

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Every Triton kernel and every table row, compiled for six GPU architectures; minutes.
kernels-aot: $(VENV)/.installed-test
	$(BIN)/python -P tools/kernels_aot.py

# Every kernel on this machine's GPU: right first, then timed beside its peers; under nine minutes.
gpu: $(VENV)/.installed
	$(BIN)/python -P benchmarks/gpu.py --out benchmarks/results/gpu.json

# This processor's tables for one thread and for two, and how well predictions meet measurements; fifteen idle minutes.
accuracy: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -P benchmarks/accuracy.py --ship
	OMP_NUM_THREADS=2 $(BIN)/python -P benchmarks/accuracy.py --ship --table-only

wheel: $(VENV)/.installed-test
	$(BIN)/python -m build

# What would be released, in empty environments with dependencies of their own: wheel and sdist install and answer; minutes.
release-check: $(VENV)/.installed-test
	$(BIN)/python -P tools/release_check.py

# The README's picture of the report, taken by a headless Chromium.
picture: $(VENV)/.installed-test
	PYTHONPATH=tools $(BIN)/python -P tools/picture.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	$(COMPILE)
	touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	$(COMPILE)
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) out dist .mypy_cache .pytest_cache .ruff_cache
