# Two commands on a fresh machine: `make quickstart` and `make test`. Everything lives in .venv.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1
# Of the fourteen thousand modules that pip would compile a run imports three: Python compiles those when it first meets them.
PIP := -m pip install --quiet --no-compile
export PYTHONDONTWRITEBYTECODE :=

.PHONY: install quickstart test check lint types slow full conformance mutants lowest newest bench clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python $(PIP) -c constraints.txt -e '.[dev]'
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

# Both write their section of docs/conformance.md. Half a minute, and a quarter of an hour.
conformance: install
	cd tests && OMP_NUM_THREADS=1 ../$(BIN)/python -m conformance.write_table

mutants: install
	cd tests && OMP_NUM_THREADS=1 ../$(BIN)/python -m mutants.run

# The default tests with the lowest releases that pyproject.toml allows, and with the newest that there are.
lowest newest:
	$(PYTHON) -m venv .$@
	.$@/bin/python $(PIP) $(if $(filter lowest,$@),-c constraints-lowest.txt) -e '.[dev]'
	OMP_NUM_THREADS=1 .$@/bin/python -m pytest -n 2

# Speed and memory beside TRL 1.12.0, in an environment of its own. On an idle machine; about half an hour on two cores.
.trl/installed:
	$(PYTHON) -m venv .trl
	.trl/bin/python $(PIP) -c constraints.txt 'trl==1.12.0' torch transformers peft datasets
	touch $@

bench: install .trl/installed
	$(BIN)/python benchmarks/ppo_iteration.py --peer-python .trl/bin/python --peer-dtypes bfloat16 -- tiny gpt2 ragged
	$(BIN)/python benchmarks/rollout.py

clean:
	rm -rf .venv .trl .lowest .newest build dist *.egg-info
