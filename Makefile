# Everything that is done with this repository, each by one command. `make help` lists them.

PYTHON ?= python3
VENV := .venv
BIN := $(abspath $(VENV))/bin
RUST_SOURCES := $(shell find src -name '*.rs') Cargo.toml Cargo.lock

# Rust finds this Python, maturin this environment and this zig, whatever else is active in the shell.
export VIRTUAL_ENV := $(abspath $(VENV))
export PATH := $(BIN):$(PATH)
export PYO3_PYTHON := $(BIN)/python
unexport CONDA_PREFIX PYTHONPATH PYTHONHOME
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Linux wheels are linked against an old glibc, so that they run on any distribution of the last years.
ifeq ($(shell uname -s),Linux)
WHEEL_PLATFORM := --zig --compatibility manylinux_2_28
endif

.NOTPARALLEL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

help:  ## List what can be made.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

## Use

demo: $(VENV)/.installed  ## Build, fetch the default model, and have it write a short story.
	$(BIN)/python scripts/demo.py

## Check

test: lint test-rust test-python  ## Run every check and every test.

lint: $(VENV)/.installed $(VENV)/.check  ## Format and lint, documentation and types, Rust and Python.
	cargo fmt --all --check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cargo clippy --locked --all-targets -- -D warnings
	cargo clippy --locked --all-targets --features python -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps --features python --document-private-items
	$(BIN)/mypy
	MYPYPATH=python $(BIN)/python -m mypy.stubtest nybble._native

test-rust:  ## Run the Rust tests with the best kernel of this CPU, then with the scalar one, and try the benchmarks.
	cargo test --locked
	NYBBLE_KERNEL=scalar cargo test --locked --lib --tests
	cargo test --locked --bench '*'

test-arm:  ## Run the tests of kernels and models for 64-bit Arm, in an emulator. Installs Debian packages.
	scripts/test_arm.sh

test-python: $(VENV)/.installed $(VENV)/.check  ## Run the Python tests on a release build.
	$(BIN)/python -m pytest

fmt: $(VENV)/.check  ## Format everything.
	cargo fmt --all
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench:  ## Measure the kernels of this CPU.
	cargo bench --locked --bench '*'

## Ship

wheel: $(VENV)/.wheel  ## Build the wheel into dist/ and check its tag, its size and what it links to.
	rm -rf dist
	$(BIN)/maturin build --release --locked $(WHEEL_PLATFORM) --out dist
	$(BIN)/python scripts/check_wheel.py dist

test-wheel: wheel  ## Install the wheel into an empty environment without a compiler, and generate.
	$(BIN)/python scripts/check_wheel.py dist --generate

clean:  ## Remove everything that was built, the environment included.
	cargo clean
	rm -rf $(VENV) dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find python scripts tests -name __pycache__ -prune -exec rm -rf {} +
	find python -name '_native*.so' -delete

.PHONY: help demo test lint test-rust test-arm test-python fmt bench wheel test-wheel clean

## The environment: a stamp for each part, made again when what it stands for has changed

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "nybble needs Python 3.10 or later: make PYTHON=...")'
	@command -v cargo >/dev/null || { echo "nybble is built with Rust 1.95 or later: https://rustup.rs" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	touch $@

$(VENV)/.build: pyproject.toml $(VENV)/.created
	$(BIN)/python -m pip install --quiet --group build
	touch $@

$(VENV)/.check: pyproject.toml $(VENV)/.created
	$(BIN)/python -m pip install --quiet --group check
	touch $@

$(VENV)/.wheel: pyproject.toml $(VENV)/.created
	$(BIN)/python -m pip install --quiet --group wheel
	touch $@

# Editable: a change in python/ counts at once, a change in src/ at the next make.
$(VENV)/.installed: $(RUST_SOURCES) $(VENV)/.build
	$(BIN)/maturin develop --release --locked
	touch $@
