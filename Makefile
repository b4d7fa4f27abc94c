# Two commands on a fresh machine: `make quickstart` and `make test`. Everything lives in .venv.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: install quickstart test check lint types slow full conformance mutants clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

quickstart: install
	$(BIN)/tercet quickstart

# Two workers of one thread each: the models of the tests are too small to share.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: install
	$(BIN)/mypy

check: lint types test

slow: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m 'slow or dist'

full: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m full

clean:
	rm -rf .venv build dist *.egg-info
