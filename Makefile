.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
QUIET := --quiet --constraint constraints.txt

.PHONY: help
help: ## Show this help
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; say: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade 'pip>=25.1'

# torch first: what depends on it must find it, or a build of several GB is taken instead.
$(VENV)/.farm: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing the farm into $(VENV) (torch is large; about a minute)"
	$(PIP) install $(QUIET) torch
	$(PIP) install $(QUIET) --editable '.[embedded,diffusers]'
	@touch $@

$(VENV)/.dev: $(VENV)/.farm
	@echo "Installing what the tests need"
	$(PIP) install $(QUIET) --editable '.[embedded,diffusers,server]' --group dev
	@touch $@

.PHONY: install demo test test-unit lint format bench demo-model clean
install: $(VENV)/.farm ## Install the farm and the diffusers engine into .venv

demo: $(VENV)/.farm ## Render prompts with a real model and show where the pictures are
	@$(BIN)/python -m farm.demo.run

test: $(VENV)/.dev ## Run every test; the tests start their own servers
	$(BIN)/python -m pytest $(ARGS)

test-unit: $(VENV)/.dev ## Run the tests that need no service (seconds)
	$(BIN)/python -m pytest tests/unit $(ARGS)

lint: $(VENV)/.dev ## Check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.dev ## Mend style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(VENV)/.dev ## Measure what the farm costs beside the work; ARGS=--write keeps the table
	$(BIN)/python -m tests.benchmarks $(ARGS)

demo-model: $(VENV)/.farm ## Train the demo model anew (more than an hour on two cores)
	$(BIN)/python -m workers.demo.train --out farm/demo/shapes --work build/demo-model

clean: ## Remove what the demo and the tests left here (not .venv)
	rm -rf farm-data .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist
