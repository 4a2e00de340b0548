# `make` alone lists what there is. Every target does the set-up that it needs.
#   PYTHON=python3.12   the Python (3.11 to 3.13) that .venv is made from
#   ARGS="..."          passed on to the command, for instance: make demo ARGS="--run.seed 7"

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BENCH_INSTALLED := $(VENV)/.installed-bench
PEERS_VENV := .venv-peers
PEERS_INSTALLED := $(PEERS_VENV)/.installed
PEERS_PINS := benchmarks/peers/constraints.txt
PYTEST := $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo bench test test-all lint format docs clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 18

setup: $(INSTALLED) ## make .venv and install the pinned libraries

# $(call make-venv,DIRECTORY)
define make-venv
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "threefold needs Python 3.11, 3.12 or 3.13, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true):" \
	       "install one, or say where it is, for instance: make PYTHON=python3.12 $(or $(MAKECMDGOALS),setup)"; exit 1; } >&2
	@$(PYTHON) -m venv --clear $(1) >$(1).log 2>&1 || { \
	  $(PYTHON) -m venv --clear --without-pip $(1) && \
	  $(PYTHON) -m pip --python $(1)/bin/python install -qq pip; } >>$(1).log 2>&1 || { \
	  cat $(1).log; rm -rf $(1) $(1).log; \
	  echo "could not make $(1): '$(PYTHON)' has neither a working venv module nor pip; install one of them" \
	       "(on Debian and Ubuntu: apt install python3-venv)"; exit 1; } >&2
	@rm -f $(1).log
endef

# $(call install,DIRECTORY,ARGUMENTS OF PIP)
define install
	@echo "installing the pinned libraries into $(1) (some minutes the first time)"
	@$(1)/bin/python -m pip install --disable-pip-version-check --progress-bar off $(2) \
	  >$(1)/install.log 2>&1 || { tail -n 30 $(1)/install.log; \
	  echo "installing failed: the reason is above, all of pip's output in $(1)/install.log"; exit 1; } >&2
	@touch $@
endef

$(BIN)/python:
	$(call make-venv,$(VENV))

$(PEERS_VENV)/bin/python:
	$(call make-venv,$(PEERS_VENV))

$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	$(call install,$(VENV),-c constraints.txt -e '.[dev]')

$(BENCH_INSTALLED): $(INSTALLED)
	$(call install,$(VENV),-c constraints.txt -e '.[bench]')

$(PEERS_INSTALLED): $(PEERS_PINS) | $(PEERS_VENV)/bin/python
	$(call install,$(PEERS_VENV),-c $(PEERS_PINS) torch transformers trl rich)

demo: setup ## the three steps on the embedded default: no network, no GPU, a few minutes
	@HF_HUB_OFFLINE=1 $(BIN)/threefold train recipes/demo.toml $(ARGS)

bench: $(BENCH_INSTALLED) $(PEERS_INSTALLED) ## side by side with TRL and transformers, some 15 minutes; ARGS="--only A"
	@$(BIN)/python -m benchmarks.side_by_side run $(ARGS)

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

clean: ## remove caches and builds (not .venv, .venv-peers and runs/)
	rm -rf build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
