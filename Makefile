# Two commands on a fresh machine: `make quickstart` and `make test`. Everything lives in .venv.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: install quickstart test check lint types slow full clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

quickstart: install
	$(BIN)/tercet quickstart

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: install
	$(BIN)/mypy

check: lint types test

slow: install
	$(BIN)/python -m pytest -m 'slow or dist'

full: install
	$(BIN)/python -m pytest -m full

clean:
	rm -rf .venv build dist *.egg-info
