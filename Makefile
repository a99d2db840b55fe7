# `make test`, `make test-all`, `make adaptive-depth`, `make neural-ode` and `make circles` need Python 3.11 or newer and make, nothing else.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: adaptive-depth circles neural-ode test test-all docs pages benchmarks release clean

adaptive-depth: .venv/installed
	$(BIN)/python experiments/adaptive_depth.py --resume $(ARGS)

neural-ode: .venv/installed
	$(BIN)/python experiments/neural_ode.py --resume $(ARGS)

circles: .venv/installed
	$(BIN)/python experiments/circles.py --resume $(ARGS)

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	PYTHONPATH=.:experiments $(BIN)/lint-imports --no-cache
	$(BIN)/pytest -q -n auto --dist worksteal

# after `make test`: the tests marked slow, and other random examples
test-all: test
	$(BIN)/pytest -q -n auto --dist worksteal -m "slow or hypothesis" --hypothesis-profile=new

# the site, in docs/_build/html; a broken reference, a docstring that is no reST and a tutorial that raises end it
docs: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/sphinx-build -W --keep-going -n -q -d docs/_build/doctrees -b html docs docs/_build/html

benchmarks: .venv/installed
	mkdir -p .benchmarks
	$(BIN)/pip install --quiet --no-deps torchode torchtyping
	$(BIN)/pytest benchmarks --benchmark-only --benchmark-min-rounds=3 --benchmark-json=.benchmarks/run.json --benchmark-quiet
	$(BIN)/python -m benchmarks.table .benchmarks/run.json

# docs/experiments, docs/reproduction.md, docs/benchmarks.md and experiments/README.md, from templates and results
pages: .venv/installed
	PYTHONPATH=.:experiments $(BIN)/python -m lab.pages

# dist, and all that it must pass (noxfile.py, docs/contributing/releasing.md); nothing is uploaded
release: .venv/installed
	$(BIN)/nox $(ARGS)

.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv .nox .pytest_cache .ruff_cache
