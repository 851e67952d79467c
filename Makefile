# SPDX-License-Identifier: Apache-2.0
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup setup-test run test lint unit kernel bench clean

BIN := .venv/bin
# Passed through to the command of the target: make run ARGS="--mode eager"
ARGS ?=

help: ## this list
	@echo 'make TARGET [ARGS="..."]'
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'

setup: ## make .venv and install what `splicer run` needs (apt, pip); quick when it is there
	@scripts/setup.sh run

setup-test: ## the same, and what the tests and the benchmark need
	@scripts/setup.sh test

run: setup ## setup, then `splicer run $(ARGS)` in the foreground; Ctrl-C drains and stops it
	@exec $(BIN)/splicer run $(ARGS)

test: setup-test lint ## setup, ruff, mypy and all tests; a missing prerequisite is a failure
	SPLICER_KERNEL_TESTS=1 $(BIN)/python -m pytest $(ARGS)

lint: setup-test ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

unit: setup-test ## the tests that need no root
	$(BIN)/python -m pytest tests/unit $(ARGS)

kernel: setup-test ## the tests on real sockets (root)
	SPLICER_KERNEL_TESTS=1 $(BIN)/python -m pytest tests/kernel $(ARGS)

bench: setup-test ## plain against spliced TCP, in network namespaces (root); ARGS="--help"
	@exec examples/netns-benchmark/run $(ARGS)

clean: ## remove what make and the tools made
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
