PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: install quickstart test test-slow bench lint format clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

quickstart: install ## train SAM on scans of digits: less than a minute on two cores
	$(BIN)/python train.py experiment=quickstart

test: install ## the default test suite: less than five minutes on two cores
	$(BIN)/python -m pytest

test-slow: install ## the tests that take longer
	$(BIN)/python -m pytest -m slow

bench: install ## the tables of benchmarks/: ten minutes on two cores
	$(BIN)/python -m benchmarks

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV)
