.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
QUIET := --quiet --constraint constraints.txt
# How stable-diffusion.cpp is built. Its own default fits the machine that builds and no lesser one;
# these instructions every x86-64 server since 2013 has, and ARM ignores them. On another device:
#   CUDA:   make sdcpp SDCPP_CMAKE=-DSD_CUDA=ON     (the CUDA toolkit: nvcc)
#   Vulkan: make sdcpp SDCPP_CMAKE=-DSD_VULKAN=ON   (libvulkan-dev and glslc)
# Pictures of two builds differ for the same seed; a worker tells the build it has.
SDCPP_CMAKE ?= -DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON \
	-DGGML_BMI2=ON

.PHONY: help
help: ## Show this help
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; say: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade 'pip>=25.1'

# torch first: what depends on it must find it, or a build of several GB is taken instead.
$(VENV)/.farm: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing the farm into $(VENV) (torch is large; about a minute)"
	$(PIP) install $(QUIET) torch
	$(PIP) install $(QUIET) --editable '.[embedded,diffusers,models,http,client,dataset,provenance]'
	@touch $@

$(VENV)/.dev: $(VENV)/.farm
	@echo "Installing what the tests need (stable-diffusion.cpp is built: minutes, a C++ compiler)"
	CMAKE_ARGS="$(SDCPP_CMAKE)" \
		$(PIP) install $(QUIET) --editable '.[embedded,diffusers,models,http,client,server,sdcpp,dataset,provenance]' --group dev
	@touch $@

.PHONY: install sdcpp demo test test-unit lint check format bench fuzz state chaos soak dataset-kills demo-model clean
install: $(VENV)/.farm ## Install the farm and the diffusers engine into .venv

# Always built anew: pip's cache of wheels does not tell one build from another.
sdcpp: $(VENV)/.farm ## Build the stable-diffusion.cpp engine, portable
	CMAKE_ARGS="$(SDCPP_CMAKE)" $(PIP) install $(QUIET) --no-deps --no-cache-dir --force-reinstall \
		stable-diffusion-cpp-python

demo: $(VENV)/.farm ## Render prompts with a real model and show where the pictures are
	@$(BIN)/python -m farm.demo.run

# Two processes, a file of tests in one of them: each has its own servers, and most tests wait for some.
# Whole farms come after them, alone: they are held to seconds.
ALONE := tests/e2e tests/chaos
test: $(VENV)/.dev ## Run every test; the tests start their own servers
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ALONE:%=--ignore=%) $(ARGS)
	$(BIN)/python -m pytest $(ALONE) $(ARGS)

test-unit: $(VENV)/.dev ## Run the tests that need no service (seconds)
	$(BIN)/python -m pytest tests/unit $(ARGS)

lint: $(VENV)/.dev ## Check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# The audit asks the public advisory service about every pinned package; it needs a network.
AUDIT := pip-audit --requirement constraints.txt --disable-pip --no-deps --strict \
	--progress-spinner off
check: lint ## Check style and types, look for secrets in the repository, audit the dependencies
	$(BIN)/python -m tests.leaked
	$(PIP) install $(QUIET) --group audit
	@$(BIN)/$(AUDIT) || { echo "Not passed: a package above has a known fault, or \
	could not be asked about (is there a network?)"; exit 1; }

format: $(VENV)/.dev ## Mend style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(VENV)/.dev ## Measure the farm's cost and an engine's memory; ARGS=--write keeps the tables
	$(BIN)/python -m tests.benchmarks $(ARGS)

fuzz: $(VENV)/.dev ## Put more than 50,000 bad inputs to the API, the commands and workers (20 minutes)
	$(BIN)/python -m tests.fuzz $(ARGS)

state: $(VENV)/.dev ## Take 20,000 random steps in the store of each database, beside a model (20 minutes)
	HYPOTHESIS_PROFILE=nightly $(BIN)/python -m pytest -o timeout=7200 tests/contract/test_state_machine.py $(ARGS)

chaos: $(VENV)/.dev ## Kill, stop and cut off everything while jobs render, then audit (20 minutes)
	CHAOS_TTL_S=30 $(BIN)/python -m pytest -q -s tests/chaos/test_points.py tests/chaos/test_poison.py
	$(BIN)/python -m tests.chaos.outage 60
	$(BIN)/python -m tests.chaos $(ARGS)

soak: $(VENV)/.dev ## Run a whole farm at full speed for 20 minutes: do its processes grow?
	$(BIN)/python -m tests.benchmarks.soak $(ARGS)

dataset-kills: $(VENV)/.dev ## Make a dataset with the demo model, killed five times: the same bytes?
	DATASET_MODEL=shapes $(BIN)/python -m pytest -q -s tests/e2e/test_dataset_run.py $(ARGS)

demo-model: $(VENV)/.farm ## Train the demo model anew (more than an hour on two cores)
	$(BIN)/python -m workers.demo.train --out farm/demo/shapes --work build/demo-model

clean: ## Remove what the demo and the tests left here (not .venv)
	rm -rf farm-data .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist
