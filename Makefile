# The two commands a newcomer needs are `make demo` and `make test`; both make .venv first.
PYTHON ?= python3
BIN := .venv/bin
LLAMAFACTORY := .venv-llamafactory/bin

.PHONY: demo pipeline lab test check lint types tests test-llamafactory bench clean

demo: .venv/installed
	$(BIN)/fastpo demo

pipeline: .venv/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" examples/pipeline/run.sh

lab: .venv/installed
	$(BIN)/fastpo compare plans/quick.yaml

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

# Apart from `make test`: llamafactory needs an older transformers, and so an environment of its own.
test-llamafactory: .venv-llamafactory/installed
	$(LLAMAFACTORY)/python -m pytest tests/llamafactory

bench: .venv/installed
	$(BIN)/python -m bench

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e ".[train,test]"
	touch $@

# torch first, so that what comes after it takes what is there. Then out with torchvision and torchaudio where they are
# built for another torch than this one (a CPU build, say): nothing here needs them, but they would fail to import.
.venv-llamafactory/installed: pyproject.toml constraints-llamafactory.txt
	$(PYTHON) -m venv .venv-llamafactory
	$(LLAMAFACTORY)/pip install -q --disable-pip-version-check -c constraints-llamafactory.txt torch
	$(LLAMAFACTORY)/pip install -q --disable-pip-version-check -c constraints-llamafactory.txt -e ".[llamafactory]" pytest
	for name in torchvision torchaudio; do \
		$(LLAMAFACTORY)/python -c "import $$name" 2>/dev/null || $(LLAMAFACTORY)/pip uninstall -q -y $$name; \
	done
	touch $@

clean:
	rm -rf .venv .venv-llamafactory build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
