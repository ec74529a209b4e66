# `make study` and `make test` work on a fresh clone: each sets up .venv by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2

.PHONY: help study test test-all lint format bench clean
.DEFAULT_GOAL := help

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[dev]'
	@touch $@

study: $(STAMP) ## train every arm on real text and write runs/study/report.html
	$(BIN)/unclamp study --out runs/study

test: $(STAMP) ## the tests, in a few minutes
	$(BIN)/python -m pytest -n $(WORKERS) -m 'not slow'

test-all: $(STAMP) ## the tests and the slow, exhaustive extras
	$(BIN)/python -m pytest -n $(WORKERS)

lint: $(STAMP) ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(STAMP) ## rewrite the code in ruff's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## measure speed against the peers; writes bench/results.json
	$(BIN)/python -m bench

clean: ## remove what was built and recorded
	rm -rf $(VENV) runs
