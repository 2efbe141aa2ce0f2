# make demo      install, and train the demo
# make test      run the tests: unit tests in parallel, then integration tests (Ray, MLflow, PostgreSQL) one by one
# make test-all  also run the slow tests, which compile, train for long, or kill processes many times
# make lint      run ruff and mypy
# make mutants   change the pure modules in small ways, and list the changes that no test notices (hours; not in CI)
# make docs      build the documentation site in site/
# make clean     delete .venv and build output
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all lint mutants docs clean

demo: .venv/installed
	$(BIN)/posmlp demo

test: .venv/installed-test
	$(BIN)/pytest -q -m "not slow" -n logical --maxprocesses 8 --dist worksteal tests/unit
	$(BIN)/pytest -q -m "not slow" tests/integration

test-all: test
	$(BIN)/pytest -q -m slow

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

mutants: .venv/installed-test
	$(BIN)/pip install -q -c constraints.txt -e '.[mutants]'
	nice $(BIN)/mutmut run --max-children 1
	$(BIN)/mutmut results

# Broken links, pages outside the navigation and wrong docstrings are errors.
docs: .venv/installed
	$(BIN)/pip install -q -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.venv/bin/pip:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv

# constraints.txt pins all versions; pyproject.toml has the ranges that should work.
.venv/installed: .venv/bin/pip pyproject.toml constraints.txt
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/pip install -q -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf .venv build mutants site *.egg-info
