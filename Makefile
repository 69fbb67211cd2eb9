# Needs only python3 (3.10 or newer, with the venv module) and make. Everything lands in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed

.PHONY: quickstart test lint docs clean

quickstart: $(READY)  ## install, then train VMamba on scikit-learn's handwritten digits
	$(BIN)/vision-ssm train digits --out runs/quickstart --overwrite

test: $(READY)  ## install, then run all tests
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(READY)  ## ruff (lint and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)  ## the documentation site, in docs/_build; warnings are errors
	$(BIN)/python -m sphinx -W --keep-going -q docs docs/_build

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist docs/_build docs/api
