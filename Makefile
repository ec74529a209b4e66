# `make study`, `make docs` and `make test` work on a fresh clone: each sets up .venv by itself, the
# first two without the development tools.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STUDY_STAMP := $(VENV)/.installed-study
DOCS_STAMP := $(VENV)/.installed-docs
DEV_STAMP := $(VENV)/.installed-dev
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --no-compile \
	--constraint constraints.txt
WORKERS ?= 2
# With --no-compile, every process would compile torch anew where bytecode is never written.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help study quick docs test test-all lint format bench clean
.DEFAULT_GOAL := help

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

# What the study needs, and nothing more. --no-compile: of the packages' many files only those that
# are imported are compiled, at their first import, which saves half a minute and 200 MB.
$(STUDY_STAMP): pyproject.toml constraints.txt
	@echo "Setting up $(VENV), once, with PyTorch and what the study needs:"
	@echo "430 MB to download, 1.5 GB on disk, one to three minutes."
	@echo "(Where PyTorch comes with CUDA it is 3 GB more; its index of builds for CPUs, given in"
	@echo " PIP_EXTRA_INDEX_URL, avoids that.)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "1 of 2: PyTorch, 200 MB"
	$(PIP_INSTALL) torch
	@echo "2 of 2: unclamp with transformers, pyarrow, numba and the rest, 230 MB"
	$(PIP_INSTALL) --editable '.[hf]'
	@touch $@

$(DOCS_STAMP): $(STUDY_STAMP)
	@echo "Adding what builds the documentation, once: 35 MB to download, 140 MB on disk."
	$(PIP_INSTALL) --editable '.[docs]'
	@touch $@

$(DEV_STAMP): $(STUDY_STAMP)
	@echo "Adding what the tests and the linters need, once:"
	@echo "325 MB to download, 1.1 GB on disk, one to three minutes."
	$(PIP_INSTALL) --editable '.[dev]'
	@touch $@

study: $(STUDY_STAMP) ## train every arm on real text and write runs/study/report.html
	$(BIN)/unclamp study --out runs/study

quick: $(STUDY_STAMP) ## a first look at the study, in a minute; writes runs/quick/report.html
	$(BIN)/unclamp study --quick --out runs/quick

# Strict: a link that leads nowhere, and a page that is in no menu, end it.
docs: $(DOCS_STAMP) ## build the documentation into site/index.html, to be read offline
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

test: $(DEV_STAMP) ## the tests, in about twenty minutes
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m 'not slow'

test-all: $(DEV_STAMP) ## the tests and the slow, exhaustive extras
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

lint: $(DEV_STAMP) ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(DEV_STAMP) ## rewrite the code in ruff's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(DEV_STAMP) ## measure speed against the peers; writes bench/results.json
	$(BIN)/python -m bench

clean: ## remove what was built and recorded
	rm -rf $(VENV) runs site
