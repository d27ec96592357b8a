# Every target sets up .venv first when it is missing, half made, or older than pyproject.toml or constraints.txt.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo demo-smollm2 docs test test-slow lint format clean

PYTHON ?= python3
TRANSFORMERS ?= newest
BIN := .venv/bin
STAMP := .venv/.stamp

help: ## show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' Makefile

demo: $(STAMP) ## extend the embedded model from 256 to 2,048 tokens and show the evidence (replaces runs/demo)
	@if [ -e runs/demo ]; then echo "removing runs/demo of the last demo (nothing else in runs/)"; rm -rf runs/demo; fi
	@$(BIN)/longrope extend -o runs/demo

SMOLLM2 := --target-length 16k --method gradient --steps 4 --no-continuation --samples 1 --eval-samples 2 --dtype bfloat16 \
  --attn-implementation blocked

demo-smollm2: $(STAMP) ## the same for SmolLM2-135M, a GGUF file, from 8k to 16k tokens (93 MB fetched; about an hour; goes on where it was stopped)
	@model=$$($(BIN)/python scripts/smollm2.py) && $(BIN)/longrope extend "$$model" $(SMOLLM2) -o runs/smollm2-demo \
	  --data book:an-american-tragedy --eval-data book:les-miserables --eval-data book:the-diary-of-samuel-pepys \
	  $$(if [ -e runs/smollm2-demo ]; then echo --resume; fi)

docs: $(STAMP) ## build the documentation as a site in site/, strictly
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

test: $(STAMP) ## run the tests, without the slow ones
	@$(BIN)/python -m pytest -n auto --dist worksteal

test-slow: $(STAMP) ## run the tests marked slow (minutes)
	@$(BIN)/python -m pytest -m slow

test-transformers: $(STAMP) ## run the tests that rest on transformers with another release (TRANSFORMERS=newest)
	@$(BIN)/python scripts/test_transformers.py $(TRANSFORMERS)

lint: $(STAMP) ## ruff check, ruff format --check, mypy --strict
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

format: $(STAMP) ## let ruff sort imports, mend what it can and format
	@$(BIN)/ruff check --fix-only
	@$(BIN)/ruff format

clean: ## remove .venv, caches, build output and runs/demo; the rest of runs/ stays
	rm -rf .venv .venv-transformers .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist site runs/demo
	find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so an install that failed or was interrupted starts again from an empty folder. It holds
# the folder it was made in: a moved repository, or a Python that has gone, makes .venv anew as well.
ifneq ($(shell test -x $(BIN)/python && cat $(STAMP) 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)
endif
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || \
	  { echo "longrope needs Python 3.11 or newer; '$(PYTHON)' was not found: name one, as in make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "longrope needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1): name one, as in make PYTHON=python3.12" >&2; exit 1; }
	@echo "setting up .venv (once; about a minute and 2 GB)"
	@rm -rf .venv
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@echo "$(CURDIR)" > $@
