.DEFAULT_GOAL := help
.PHONY: help setup demo serve test check lint type bench clean

# The first Python of a fitting version; PYTHON=... chooses another.
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
READY := .venv/.ready

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1	\2/p' $(MAKEFILE_LIST) | expand -t 16

setup: $(READY)  ## make .venv with everything pinned (once; again when pins or protos change)

$(READY): pyproject.toml setup.py constraints.txt .ci/setup_environment.py $(wildcard proto/seamount/v1/*.proto)
	@test -n "$(PYTHON)" || { echo "setup: Seamount needs Python 3.11 or 3.12 on the PATH, or PYTHON=..." >&2; exit 1; }
	@$(PYTHON) .ci/setup_environment.py
	@touch $@

demo: $(READY)  ## start everything on Ray Serve, hold a three-turn conversation, check it, stop
	$(BIN)/seamount demo

serve: $(READY)  ## start everything in the foreground; Ctrl-C stops it
	$(BIN)/seamount up

test: $(READY)  ## all tests, parity included (CPU)
	$(BIN)/python -m pytest -q

check: lint type  ## everything that reads code without running it

lint: $(READY)  ## ruff, import contracts, buf
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	cd proto && ../$(BIN)/buf lint

type: $(READY)  ## mypy --strict
	$(BIN)/mypy

bench: $(READY)  ## run every program of benchmarks/ (CPU, 8 minutes on an idle machine)
	@set -e; for name in $(sort $(basename $(notdir $(wildcard benchmarks/[a-z]*.py)))); do \
		echo "== benchmarks.$$name"; $(BIN)/python -m benchmarks.$$name; done

clean:  ## remove the environment and everything generated; checkpoints stay
	rm -rf .venv gen build dist .run .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
