# SPDX-License-Identifier: Apache-2.0
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup setup-test setup-e2e setup-apps setup-stack setup-vm run image deb test test-all lint unit kernel conformance e2e test-apps test-vm soak bench bench-stack bench-example pictures clean

BIN := .venv/bin
# Passed through to the command of the target: make run ARGS="--mode eager"
ARGS ?=

help: ## this list
	@echo 'make TARGET [ARGS="..."]'
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'

setup: ## make .venv and install what `splicer run` needs (apt, pip); quick when it is there
	@scripts/setup.sh run

setup-test: ## the same, and what the tests and the benchmark need
	@scripts/setup.sh test

setup-e2e: ## the same, what the tests with containers need (Docker), and the small programs of tests/apps
	@scripts/setup.sh e2e

setup-apps: ## as setup-test, and the programs that test-apps runs (Redis, PostgreSQL, Java, Go and others)
	@scripts/setup.sh apps

setup-stack: ## as setup-test, and the programs that bench-stack runs (PHP, MariaDB, Redis, PostgreSQL, gunicorn)
	@scripts/setup.sh stack

setup-vm: ## what test-vm needs: QEMU, debootstrap
	@scripts/setup.sh vm

run: setup ## setup, then `splicer run $(ARGS)` in the foreground; Ctrl-C drains and stops it
	@exec $(BIN)/splicer run $(ARGS)

image: ## the container image `splicer`, with version and commit in its labels; ARGS goes to docker build
	docker build --tag splicer \
		--build-arg VERSION="$$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)" \
		--build-arg REVISION="$$(git rev-parse HEAD 2>/dev/null || echo unknown)" $(ARGS) .

deb: ## the Debian package, into dist/; for Debian 12 and later, Ubuntu 24.04 and later
	@scripts/deb.sh $(ARGS)

test: setup-e2e lint ## setup, ruff, mypy, and every guarantee once; a missing prerequisite is a failure
	@scripts/test.sh $(ARGS)

test-all: setup-e2e lint ## all tests and 10 minutes of soak: what a change to bpf/ passes before it is called done
	@scripts/test.sh --all $(ARGS)
	@tests/soak/run --minutes 10

lint: setup-test ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

unit: setup-test ## the tests that need no root
	$(BIN)/python -m pytest --all tests/unit $(ARGS)

kernel: setup-test ## the tests on real sockets (root)
	SPLICER_KERNEL_TESTS=1 $(BIN)/python -m pytest --all tests/kernel $(ARGS)

conformance: setup-test ## plain TCP against spliced, call by call (root)
	SPLICER_KERNEL_TESTS=1 $(BIN)/python -m pytest --all tests/conformance $(ARGS)

e2e: setup-e2e ## the tests with containers: a Docker of their own, images from this tree (root)
	SPLICER_E2E_TESTS=1 $(BIN)/python -m pytest --all tests/e2e $(ARGS)

test-apps: setup-apps ## real programs, plain and spliced (root); ARGS="--only redis --seconds 10"
	@exec tests/apps/run --all $(ARGS)

test-vm: setup-vm ## other kernels: Debian's, under QEMU (root); KERNEL=6.1 for one of them, ARGS="--only nginx"
	@exec tests/vm/run $(if $(KERNEL),--kernel $(KERNEL)) $(ARGS)

soak: setup-test ## connections that check themselves while things go wrong (root); ARGS="--minutes 30"
	@exec tests/soak/run $(ARGS)

bench: setup-test ## `splicer bench $(ARGS)`: plain against spliced TCP, in network namespaces (root); ARGS="--help"
	@exec $(BIN)/splicer bench $(ARGS)

bench-stack: setup-stack ## which part of a stack's bytes is redirected, and why not the rest (root); ARGS="-n 3"
	@exec $(BIN)/splicer bench stack $(ARGS)

bench-example: setup-test ## docs/bench-url.html and .png, measured anew (root): a service before and after
	@exec $(BIN)/python docs/measure.py

pictures: ## the pictures and the table in docs/, drawn anew from docs/figures.json
	@python3 docs/draw.py

clean: ## remove what make and the tools made
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
