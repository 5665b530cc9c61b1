# `make demo` needs Python 3.11 or newer, `make test` nothing more. Both set up .venv; a second run finds it ready.

PYTHON ?= python3
# Installed before anything that depends on torch, so this choice (a CPU build, a CUDA build, another version) stands.
TORCH ?= torch==2.13.0
export PYTHON TORCH

.PHONY: help setup demo test check format docs clean

help:
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

setup: ## everything a developer needs, in .venv
	@scripts/setup.sh dev

demo: ## three specialists become one model; results in runs/demo
	@scripts/setup.sh runtime
	.venv/bin/ultrafuser demo

test: setup ## what CI runs: check, all tests, model tests on the oldest transformers
	@scripts/check.sh

check: setup ## format, lint and types, without tests
	@scripts/check.sh static

format: setup ## rewrite files the way check wants them
	.venv/bin/python -m ruff check --fix-only --quiet .
	.venv/bin/python -m ruff format .

docs: setup ## write docs/cli.md from the commands
	.venv/bin/python scripts/cli_docs.py

clean: ## forget caches and .venv
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis
