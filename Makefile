# The two commands a newcomer needs are `make demo` and `make test`; both make .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check lint types tests bench clean

demo: .venv/installed
	$(BIN)/fastpo demo

test: .venv/installed
	$(MAKE) check

check: lint types tests

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed
	$(BIN)/mypy

tests: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist worksteal

bench: .venv/installed
	$(BIN)/python -m bench

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e ".[train,test]"
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
