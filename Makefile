# make demo: install and train the demo. make test: install what tests need and run them, those on Ray one after the
# other; make test-all: also those that compile, take long, or kill and repeat what others have killed. make lint: ruff
# and mypy.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all lint clean

demo: .venv/installed
	$(BIN)/posmlp demo

test: .venv/installed-test
	$(BIN)/pytest -q -m "not ray and not slow" -n logical --maxprocesses 8
	$(BIN)/pytest -q -m "ray and not slow"

test-all: test
	$(BIN)/pytest -q -m slow

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/bin/pip:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv

# All versions are pinned by constraints.txt; pyproject.toml has the ranges that are meant to work.
.venv/installed: .venv/bin/pip pyproject.toml constraints.txt
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/pip install -q -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf .venv build *.egg-info
