# `make demo` and `make test` set everything up on a machine with Python 3.11, git and make.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
DEMO := .venv/.demo

.PHONY: demo test slow lint types check docs dist clean

demo: $(DEMO)
	$(BIN)/regroup demo

test: $(READY)
	$(BIN)/python -m pytest -n auto --dist loadfile

slow: $(READY)
	$(BIN)/python -m pytest -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/pyright

check: lint types test

# Strict: a link that leads nowhere is an error.
docs: .venv/.docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet --fresh-env --builder html docs site
	@echo "wrote site/index.html"

dist: $(READY)
	$(BIN)/python -m build --no-isolation

.venv/.pip: pyproject.toml constraints.txt
	@echo "Setting up .venv (once; about 400 MB to download)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip -c constraints.txt
	@touch $@

$(DEMO): .venv/.pip
	$(BIN)/python -m pip install --quiet --editable '.[train]' -c constraints.txt
	@touch $@

$(READY): .venv/.pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]' -c constraints.txt
	@touch $@ $(DEMO)

.venv/.docs: $(READY)
	$(BIN)/python -m pip install --quiet --editable '.[docs]' -c constraints.txt
	@touch $@

clean:
	rm -rf .venv demo-output dist site .pytest_cache .ruff_cache .hypothesis
