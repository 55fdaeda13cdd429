# The README's commands. Everything is installed into .venv; nothing outside this folder is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup quickstart test test-slow fuzz test-consumers check format clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ssl_pretrain needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@touch $@

quickstart: setup
	$(BIN)/ssl-pretrain pretrain recipes/quickstart.yaml

test: setup
	$(BIN)/python -m pytest -n auto --dist loadfile

test-slow: setup
	$(BIN)/python -m pytest -m slow

# 50,000 harmed files over all formats, in bounded child processes.
fuzz: setup
	$(BIN)/python tests/fuzz.py

# The real consumers of backbones, from the package index, in an environment of their own (5 GB, some minutes).
test-consumers:
	test -x $(VENV)-consumers/bin/python || $(PYTHON) -m venv $(VENV)-consumers
	$(VENV)-consumers/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[test,consumers]'
	$(VENV)-consumers/bin/python -m pytest -m "slow or not slow" tests/consumers tests/test_export*.py tests/test_detectors.py

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
