# Two commands on a fresh machine: `make train` and `make test`.
# Each sets up what it needs first; `make help` lists the rest.

PYTHON ?= python3
CONFIG = configs/lm_64k.py
# Empty: the one that launch.py names after the recipe, runs/lm_64k_quick for
# configs/lm_64k.py:quick.
WORKDIR =
# Of `make soak`.
MINUTES = 30
# More flags: for launch.py in `make train`, for pytest in `make test`, for
# experiments.aot in `make aot`.
ARGS =

VENV := .venv
SIZE := 1.1 GB
BIN = $(VENV)/bin
# Half the files to each worker, in their order, so that tests which share
# programs and fixtures meet; one that is done takes from the other.
PYTEST = $(BIN)/python -m pytest -n 2 --dist=worksteal
# Packages that have no wheel: no other may run code of its own to be installed.
SDISTS = promise,seqeval
# No bytecode at install: most files of a wheel are never imported.
PIP = $(BIN)/python -m pip install -qq --no-input --no-compile \
  --disable-pip-version-check --progress-bar=off \
  --only-binary=:all: --no-binary=$(SDISTS)

# A set-up is done when the stamp with the hash of its requirements exists.
hash = $(firstword $(shell cat $(1) | cksum))
TRAIN_STAMP := $(VENV)/installed-$(call hash,requirements.txt)
DEV_STAMP := $(TRAIN_STAMP)-dev-$(call hash,requirements-dev.txt)
# The compilers for TPUs and GPUs have an environment of their own.
AOT_STAMP := $(subst $(VENV)/,.venv-aot/,$(TRAIN_STAMP))-aot-$(call \
  hash,requirements-aot.txt)
aot $(AOT_STAMP): VENV := .venv-aot
aot $(AOT_STAMP): SIZE := 2.4 GB

.PHONY: train test test-quick test-all soak lint types format tables aot \
  audit bench-peers clean help

train: $(TRAIN_STAMP) ## train CONFIG; the same command again resumes
	$(BIN)/python launch.py --config='$(CONFIG)' $(WORKDIR:%=--workdir='%') $(ARGS)

test: $(DEV_STAMP) ## run the test suite, on the CPU
	$(PYTEST) $(ARGS)

test-quick: $(DEV_STAMP) ## run what one runs between two edits
	$(PYTEST) --tier=quick $(ARGS)

test-all: $(DEV_STAMP) ## run every shape and simulator, compiled as in training
	PSA_JAX_TEST_OPTIMIZED=1 $(PYTEST) --tier=all $(ARGS)

soak: $(DEV_STAMP) ## fuzz configurations, files and kills for MINUTES
	$(BIN)/python -m tests.fuzz.soak --minutes='$(MINUTES)' $(ARGS)

lint: $(DEV_STAMP) ## check style, formatting and types
	@code=0; $(BIN)/ruff check || code=1; $(BIN)/ruff format --check || code=1; \
	  $(BIN)/ty check || code=1; exit $$code

types: $(DEV_STAMP) ## check types with the pins of both lines of Python
	$(BIN)/python .ci/check_types.py

audit: $(DEV_STAMP) ## list what is not locked by a version and a hash
	$(BIN)/python .ci/audit.py

format: $(DEV_STAMP) ## rewrite the code in the house style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

tables: $(TRAIN_STAMP) ## renew every table and picture, running nothing
	$(BIN)/python -m experiments --regenerate

aot: $(AOT_STAMP) ## compile the kernels for TPUs and GPUs, with none there
	$(BIN)/python -m experiments.aot $(ARGS)

bench-peers: ## set up .venv-peers with what the benchmarks compare to
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install -qq --disable-pip-version-check \
	  --only-binary=:all: torch==2.13.0 numpy==2.4.6 native-sparse-attention-pytorch==0.2.3

clean: ## remove environments and caches; runs/ stays
	rm -rf $(VENV) .venv-aot .venv-peers .jax_cache .types .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile
	@echo 'Variables: PYTHON CONFIG WORKDIR MINUTES ARGS, for instance'
	@echo "  make train CONFIG=configs/lm_64k.py:quick ARGS='--config.seed=1'"

define CHECK_PYTHON
import sys
ok = (3, 11) <= sys.version_info[:2] <= (3, 13)
sys.exit(None if ok else 'psa_jax needs Python 3.11, 3.12 or 3.13, and '
  '$(PYTHON) is %d.%d; name another one: PYTHON=python3.12'
  % sys.version_info[:2])
endef
export CHECK_PYTHON

# `unfinished` stands while a set-up runs. What was interrupted is made anew:
# pip may take a half-copied package for an installed one. After a failure that
# pip itself reports (no network, exit code 1 or 2) nothing is half-copied.
define SET_UP
@if [ -e $(VENV)/unfinished ] \
    || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
  command -v '$(PYTHON)' >/dev/null || { echo "$(PYTHON) was not found;" \
    "name the interpreter: PYTHON=python3.12" >&2; exit 1; }; \
  '$(PYTHON)' -c "$$CHECK_PYTHON" || exit 1; \
  rm -rf $(VENV) && mkdir $(VENV) && touch $(VENV)/unfinished || exit 1; \
  '$(PYTHON)' -m venv $(VENV) || { echo "$(PYTHON) cannot make a virtual" \
    "environment; on Debian: apt install python3-venv" >&2; exit 1; }; \
fi
@touch $(VENV)/unfinished
@rm -f $(filter-out $(TRAIN_STAMP),$(wildcard $(VENV)/installed-*))
@echo "Installing $(1) into $(VENV); the first time takes a minute or two" \
  "and $(SIZE)."
@$(PIP) -r $(1) || { code=$$?; \
  [ $$code -gt 2 ] || rm $(VENV)/unfinished; exit $$code; }
@touch $(2)
@rm $(VENV)/unfinished
endef

$(TRAIN_STAMP):
	$(call SET_UP,requirements.txt,$@)

$(AOT_STAMP):
	$(call SET_UP,requirements-aot.txt,$@)

$(DEV_STAMP):
	$(call SET_UP,requirements-dev.txt,$(TRAIN_STAMP) $@)
