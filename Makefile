# Everything a contributor or a curious reader runs. The environment makes itself: on a fresh machine, `make demo`.
# On Windows, or without make: the pip lines are in README.md.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
OUT ?= out/demo

.PHONY: help demo test check format notebooks bench weights golden clean

help:            ## this list
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)       ## train a router, draw with and without it, save pictures (two minutes)
	$(BIN)/python -m harmonica.demo --out $(OUT)

test: $(READY)       ## the tests, on two cores
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: $(READY)      ## ruff, formatting, mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict harmonica

format: $(READY)     ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

golden: $(READY)     ## a line for each number recorded from the authors' code
	$(BIN)/python tests/golden.py tests/data/golden_a.safetensors

NOTEBOOKS := $(patsubst %.py,%.ipynb,$(wildcard tutorials/[0-9]*.py))
notebooks: $(NOTEBOOKS)  ## build and run the tutorials' notebooks from the scripts beside them
tutorials/%.ipynb: tutorials/%.py tutorials/build.py | $(READY)
	$(BIN)/python tutorials/build.py $<

bench: $(READY)      ## the figures in benchmarks/results (an hour; each script says what it measures)
	$(BIN)/python benchmarks/gate.py
	$(BIN)/python benchmarks/update.py
	$(BIN)/python benchmarks/tiny_model.py
	$(BIN)/python benchmarks/sensitivity.py
	$(BIN)/python benchmarks/ablation.py
	$(BIN)/python benchmarks/zoo.py
	$(BIN)/python benchmarks/two_processes.py
	$(BIN)/python benchmarks/full_size.py
	$(BIN)/python benchmarks/others.py
	$(BIN)/python benchmarks/speed.py
	$(BIN)/python benchmarks/targets.py
	$(BIN)/python benchmarks/quality.py

weights: $(READY)    ## train the bundled model again (an hour)
	$(BIN)/python -m harmonica.models.tiny --out harmonica/models/tiny.safetensors

clean:           ## remove what was built
	rm -rf .venv out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
