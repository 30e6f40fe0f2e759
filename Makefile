# Each target sets up what it needs in .venv: nothing but Python >= 3.10 (with venv) and make has to be there before.
# Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# One thread per process: on small machines several threads of several processes get into each other's way.
export OMP_NUM_THREADS := 1

.PHONY: help demo test lint bench docs generated mutants constraints clean

help:
	@echo "make demo     compare GaLore with its rivals on a small model, and open the report (minutes)"
	@echo "make test     run the tests"
	@echo "make lint     check style, types and the import rule"
	@echo "make bench    measure every claim again and write benchmarks/results/"
	@echo "make docs     build the site into site/"
	@echo "make mutants  break the optimizers line by line and count what the tests notice (minutes)"
	@echo "make generated    write the generated tables of README and docs"
	@echo "make constraints  pin the newest packages that fit together"

demo: $(VENV)/core
	$(BIN)/leantrain compare recipes/demo.yaml --open

test: $(VENV)/test
	$(BIN)/pytest -n 2

lint: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_import_rule.py

bench: $(VENV)/test
	set -e; for file in $$(grep -l 'write_result(' benchmarks/*/*.py); do \
	    module=$${file%.py}; $(BIN)/python -m $$(echo $$module | tr / .); done
	$(BIN)/python -m docs.generate

docs: $(VENV)/docs
	$(BIN)/python -m docs.generate --check
	$(BIN)/mkdocs build --strict --quiet

generated: $(VENV)/core
	$(BIN)/python -m docs.generate

mutants: $(VENV)/mutants
	$(BIN)/python -m benchmarks.mutants

# The newest versions that fit together, with all extras, become the pinned set.
constraints:
	$(PYTHON) -m venv --clear $(VENV)-all
	$(VENV)-all/bin/python -m pip install --quiet '.[hf,images,energy,trackers,test,bench,hosts,lint,docs,mutants]'
	$(VENV)-all/bin/python .ci/pin.py > constraints.txt
	rm -rf $(VENV)-all build

clean:
	rm -rf $(VENV) build dist site mutants .pytest_cache .hypothesis .mypy_cache .ruff_cache src/*.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# The environment, in the portions that the targets need. A changed pin builds it up again from the first portion.
$(VENV)/core: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) --editable .
	@touch $@

$(VENV)/test: $(VENV)/core
	$(PIP) --editable '.[test,lint,hf,hosts,bench]'
	@touch $@

$(VENV)/docs: $(VENV)/core
	$(PIP) --editable '.[docs]'
	@touch $@

$(VENV)/mutants: $(VENV)/test
	$(PIP) --editable '.[mutants]'
	@touch $@
