# make run | test | lab | notebooks: each sets up .venv first, and installs nothing when it is up to date.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
# Nothing here needs the network once the packages are installed.
export HF_HUB_OFFLINE := 1
# Threads that wait by spinning make training several times slower as soon as another program needs a core.
export OMP_WAIT_POLICY := passive

.PHONY: help run test lab notebooks lint

help:
	@echo "make run        the full QLoRA run on this machine, about a minute after the first set-up"
	@echo "make test       every test and every notebook"
	@echo "make lab        JupyterLab in notebooks/"
	@echo "make notebooks  rebuild and execute every edition of the lessons"
	@echo "make lint       ruff"

# The stamp keeps what it was made from: a changed requirements.txt or pyproject.toml installs again, a second run does not.
$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}: name one with  make PYTHON=python3.12")'
	@if ! cat requirements.txt pyproject.toml | cmp -s - $(READY); then \
		set -e; \
		[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV) || { echo "No virtual environment: on Debian or Ubuntu install python3-venv first."; exit 1; }; \
		echo "Installing the course's packages into $(VENV) (once; a few minutes)."; \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt; \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .; \
	fi
	@cat requirements.txt pyproject.toml > $(READY)

run: $(READY)
	@$(BIN)/python -m qlora_helpers run

# Two workers with one thread each: more threads than cores make every kernel slower by a factor.
test: $(READY)
	@$(BIN)/ruff check --quiet .
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q

lab: $(READY)
	@cd notebooks && ../$(BIN)/jupyter lab

notebooks: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python notebooks/build.py

lint: $(READY)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
