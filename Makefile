# Everything runs in .venv, made on first use from the newest suitable Python that starts.
#
#   make demo ARGS="--help"        arguments for the command that is run
#   make test PYTHON=python3.12    a chosen interpreter (make clean first, to replace .venv)
#   make test JOBS=8               tests side by side: each takes up to 4 GB

VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
PYTHON ?=
JOBS ?= 2
CANDIDATES := python3.13 python3.12 python3.11 python3

# In a folder of its own: with libtpu among its packages jax would look for a TPU in every process.
# One process at a time may load it, so its tests do not run side by side.
TPU := $(VENV)/tpu
TPU_TESTS := tests/lowering/test_tpu_compiler.py tests/lowering/test_billion_decoder.py \
  tests/cli/test_aot_command.py

# Run, not looked up: a version manager's shim may be on PATH and still fail to start.
SUITABLE := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
VERSION := import sys; print("%d.%d" % sys.version_info[:2])

# Each extra contains the ones before it, so installing one brings those up to date too.
CONTAINS_demo := demo
CONTAINS_test := demo test
CONTAINS_dev := demo test dev

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test tpu lint clean check-venv

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-6s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.installed-demo ## Train a small model, quantize it, report
	@$(BIN)/jaxrmils demo $(ARGS)

test: $(VENV)/.installed-test ## Run the tests and the docstring examples
	@$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

tpu: $(VENV)/.installed-test $(TPU)/.installed ## Run the tests that need a TPU's compiler, but no TPU
	@PYTHONPATH=$(TPU) $(BIN)/python -m pytest $(TPU_TESTS) $(ARGS)

lint: $(VENV)/.installed-dev ## Check style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright --pythonpath $(BIN)/python

clean: ## Remove .venv, caches and builds (not your runs)
	@rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed-%: pyproject.toml | check-venv $(BIN)/python
	@echo "Installing jaxrmils[$*] into $(VENV); the first time takes a minute or more ..."
	@$(BIN)/python -m pip install -q -e '.[$*]'
	@touch $(foreach extra,$(CONTAINS_$*),$(VENV)/.installed-$(extra))

$(TPU)/.installed: | check-venv $(BIN)/python
	@echo "Installing libtpu into $(TPU) (half a gigabyte) ..."
	@$(BIN)/python -m pip install -q --no-deps --upgrade --target $(TPU) libtpu
	@touch $@

$(BIN)/python:
	@found=""; for candidate in $(or $(PYTHON),$(CANDIDATES)); do \
	  if "$$candidate" -c '$(SUITABLE)' >/dev/null 2>&1; then found="$$candidate"; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "error: no suitable Python among: $(or $(PYTHON),$(CANDIDATES))." >&2; \
	  echo "Python 3.11, 3.12 or 3.13 with its venv and ensurepip modules is needed" >&2; \
	  echo "(Debian and Ubuntu: the package python3-venv). Name one with make PYTHON=..." >&2; \
	  exit 1; \
	fi; \
	echo "Making $(VENV) with $$found (Python $$("$$found" -c '$(VERSION)'))"; \
	"$$found" -m venv --clear $(VENV) || { rm -rf $(VENV); exit 1; }

# An existing .venv that does not start, or is not the Python asked for, is never used in silence.
check-venv:
	@if [ -e $(VENV)/pyvenv.cfg ]; then \
	  has="$$($(BIN)/python -c '$(VERSION)' 2>/dev/null)" || \
	    { echo "error: the Python of $(VENV) does not start; run make clean" >&2; exit 1; }; \
	  if [ -n "$(PYTHON)" ]; then \
	    asked="$$("$(PYTHON)" -c '$(VERSION)' 2>/dev/null)" || \
	      { echo "error: PYTHON=$(PYTHON) does not start" >&2; exit 1; }; \
	    [ "$$has" = "$$asked" ] || { \
	      echo "error: $(VENV) is Python $$has but PYTHON=$(PYTHON) is $$asked; run make clean" >&2; \
	      exit 1; }; \
	  fi; \
	fi
