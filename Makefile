# `make study` and `make test` work on a fresh clone: each sets up .venv by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STUDY_STAMP := $(VENV)/.installed-study
DEV_STAMP := $(VENV)/.installed-dev
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --no-compile \
	--constraint constraints.txt
STUDY_SIZE := about 400 MB to download, 1.4 GB on disk, 2 to 3 minutes.
DEV_SIZE := about 350 MB to download, 1.3 GB on disk, 1 to 2 minutes.
WORKERS ?= 2

.PHONY: help study quick test test-all lint format bench clean
.DEFAULT_GOAL := help

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

# What the study needs, and nothing more. --no-compile: of the packages' many files only those that
# are imported are compiled, at their first import, which saves half a minute and 200 MB.
$(STUDY_STAMP): pyproject.toml constraints.txt
	@echo "Setting up $(VENV), once: PyTorch for the CPU and what the study needs,"
	@echo "$(STUDY_SIZE)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "1 of 2: PyTorch"
	$(PIP_INSTALL) torch
	@echo "2 of 2: unclamp, transformers and the rest"
	$(PIP_INSTALL) --editable '.[hf]'
	@touch $@

$(DEV_STAMP): $(STUDY_STAMP)
	@echo "Adding the tools for tests and lint, once: $(DEV_SIZE)"
	$(PIP_INSTALL) --editable '.[dev]'
	@touch $@

study: $(STUDY_STAMP) ## train every arm on real text and write runs/study/report.html
	$(BIN)/unclamp study --out runs/study

quick: $(STUDY_STAMP) ## a first look at the study, in a minute; writes runs/quick/report.html
	$(BIN)/unclamp study --quick --out runs/quick

test: $(DEV_STAMP) ## the tests, in a few minutes
	$(BIN)/python -m pytest -n $(WORKERS) -m 'not slow'

test-all: $(DEV_STAMP) ## the tests and the slow, exhaustive extras
	$(BIN)/python -m pytest -n $(WORKERS)

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
	rm -rf $(VENV) runs
