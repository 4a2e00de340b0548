# `make` alone lists what there is. Every target does the set-up that it needs.
#   PYTHON=python3.12   the Python (3.11 to 3.13) that .venv is made from
#   ARGS="..."          passed on to the command, for instance: make demo ARGS="--run.seed 7"

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-all lint format docs clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 18

setup: $(INSTALLED) ## make .venv and install the pinned libraries

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "threefold needs Python 3.11, 3.12 or 3.13, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true):" \
	       "install one, or say where it is, for instance: make PYTHON=python3.12 $(or $(MAKECMDGOALS),setup)"; exit 1; } >&2
	@$(PYTHON) -m venv --clear $(VENV) >$(VENV).log 2>&1 || { \
	  $(PYTHON) -m venv --clear --without-pip $(VENV) && \
	  $(PYTHON) -m pip --python $(BIN)/python install -qq pip; } >>$(VENV).log 2>&1 || { \
	  cat $(VENV).log; rm -rf $(VENV) $(VENV).log; \
	  echo "could not make $(VENV): '$(PYTHON)' has neither a working venv module nor pip; install one of them" \
	       "(on Debian and Ubuntu: apt install python3-venv)"; exit 1; } >&2
	@rm -f $(VENV).log

$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing the pinned libraries into $(VENV) (some minutes the first time)"
	@$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt -e '.[dev]' \
	  >$(VENV)/install.log 2>&1 || { tail -n 30 $(VENV)/install.log; \
	  echo "installing failed: the reason is above, all of pip's output in $(VENV)/install.log"; exit 1; } >&2
	@touch $@

demo: setup ## the three steps on the embedded default: no network, no GPU, a few minutes
	@HF_HUB_OFFLINE=1 $(BIN)/threefold train recipes/demo.toml $(ARGS)

test: lint ## lint, then all tests that are neither slow nor need a GPU
	@$(PYTEST) -m "not slow and not gpu" $(ARGS)

test-all: lint ## lint, then all tests that this machine can run, slow ones included
	@$(PYTEST) $(ARGS)

lint: setup ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: setup ## let ruff rewrite what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: setup ## write docs/recipe.md anew from the recipe's own descriptions
	@$(BIN)/threefold recipe --markdown > docs/recipe.md.new && mv docs/recipe.md.new docs/recipe.md

clean: ## remove caches and builds (not .venv, not runs/)
	rm -rf build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
