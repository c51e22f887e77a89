# Garrison: `make demo` shows the main job, `make test` runs all tests; both set up everything they need first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-install check lint bench fuzz clean

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Install everything into .venv, and Mosquitto into .broker where the system has none

# The broker comes first: if it cannot be had, nothing is built before saying so.
$(STAMP): pyproject.toml constraints.txt scripts/setup.sh scripts/broker.sh
	@scripts/broker.sh
	@PYTHON="$(PYTHON)" VENV="$(VENV)" scripts/setup.sh
	@touch $@

demo: $(STAMP) ## Run the main job, end to end, on real parts (KEEP=1 leaves it running)
	@scripts/broker.sh
	@$(BIN)/python -m demo $(if $(KEEP),--keep)

test: $(STAMP) ## Run all tests
	@scripts/broker.sh
	@scripts/softhsm.sh
	@VENV="$(VENV)" scripts/node.sh
	@$(BIN)/python -m pytest

test-install: $(STAMP) ## Boot a real systemd in a container and install the agent there (needs root)
	@scripts/broker.sh
	@$(BIN)/python -m pytest tests/install -p no:cacheprovider

check: $(STAMP) ## Lint, types, and import rules
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: $(STAMP) ## Measure against the budgets of docs/performance.md
	@scripts/broker.sh
	@$(BIN)/python -m bench

fuzz: $(STAMP) ## Fuzz every reader of others' bytes, SECONDS=60 each (ENTRY=envelope: only that one)
	@$(BIN)/python -c 'import atheris' 2>/dev/null || $(BIN)/pip install -q -c constraints.txt -e '.[fuzz]'
	@$(BIN)/python -m tests.fuzz.atheris_run $(or $(SECONDS),60) $(ENTRY)

clean: ## Remove everything that the other targets made inside the checkout
	rm -rf $(VENV) .broker .broker.partial .softhsm .softhsm.partial .demo .cache .fuzz tests/node/node_modules
