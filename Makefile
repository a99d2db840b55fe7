# `make test` and `make adaptive-depth` need Python 3.11 or newer and make, nothing else.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: adaptive-depth test benchmarks clean

adaptive-depth: .venv/installed
	$(BIN)/python experiments/adaptive_depth.py --resume $(ARGS)

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/pytest -q

benchmarks: .venv/installed
	$(BIN)/pytest benchmarks --benchmark-only --benchmark-group-by=group --benchmark-columns=min,median,iqr

.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[experiments,dev]'
	touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache
