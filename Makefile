# Everything a contributor or a curious reader runs. The environment makes itself: on a fresh machine, `make demo`.
# On Windows, or without make: the pip lines are in README.md.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
OUT ?= out/demo

.PHONY: help demo test tutorials check format docs notebooks bench weights golden clean

help:            ## this list
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)       ## make a table, draw with and without it, save pictures (two minutes)
	$(BIN)/python -m harmonica.demo --out $(OUT)

test: $(READY)       ## the tests, on two cores
	$(BIN)/python -m pytest -n 2 --dist worksteal

tutorials: $(READY)  ## run the tutorials at full length, and hold every printed number to what they say
	TUTORIALS=full $(BIN)/python -m pytest tests/test_tutorials.py

check: $(READY)      ## ruff, formatting, mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict harmonica

format: $(READY)     ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

golden: $(READY)     ## a line for each number recorded from the authors' code
	$(BIN)/python tests/golden.py tests/data/golden_a.safetensors

docs: $(READY)       ## the documentation site in out/site; a dead link is an error
	$(BIN)/mkdocs build --strict

NOTEBOOKS := $(patsubst %.py,%.ipynb,$(wildcard tutorials/[0-9]*.py))
notebooks: $(NOTEBOOKS)  ## build and run the tutorials' notebooks from the scripts beside them
tutorials/%.ipynb: tutorials/%.py tutorials/build.py | $(READY)
	$(BIN)/python tutorials/build.py $<

BENCHES := gate walks server update dry_run bundled_models sensitivity ablation zoo two_processes full_size speed targets predicted fuzz quality transfer weights
bench: $(READY)      ## every figure in benchmarks/results (hours; gpu.py needs a GPU, imports.py other people's files)
	for name in $(BENCHES); do $(BIN)/python benchmarks/$$name.py || exit 1; done

weights: $(READY)    ## train the bundled models and the judge again (three hours)
	$(BIN)/python benchmarks/bundled_models.py train

clean:           ## remove what was built
	rm -rf .venv out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
