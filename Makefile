PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
BASE := $(VENV)/.base
DEV := $(VENV)/.dev

.PHONY: quickstart test test-slow bench lint format clean

quickstart: $(BASE) ## train SAM on scans of digits: less than a minute on two cores
	$(BIN)/python train.py experiment=quickstart

test: $(DEV) ## the default test suite: less than five minutes on two cores
	$(BIN)/python -m pytest

test-slow: $(DEV) ## the tests that take longer
	$(BIN)/python -m pytest -m slow

bench: $(DEV) ## the tables of benchmarks/: ten minutes on two cores
	$(BIN)/python -m benchmarks

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(BASE): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(DEV): $(BASE)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV)
