# Every task of this repository. `make help` lists them.

VENV := .venv
ifeq ($(OS),Windows_NT)
PYTHON ?= python
BIN := $(abspath $(VENV))/Scripts
separator := ;
else
PYTHON ?= python3
BIN := $(abspath $(VENV))/bin
separator := :
endif
# Clients of other projects pin old versions of packages that nybble's own tools need.
CLIENTS := .venv-clients
RUST_SOURCES := $(shell find src -name '*.rs') Cargo.toml Cargo.lock
# Processes that run the Python tests. Some tests wait: three keep two cores busy.
TEST_WORKERS ?= 3

# Rust finds this Python and maturin this environment, whatever is active in the shell.
export VIRTUAL_ENV := $(abspath $(VENV))
export PATH := $(BIN)$(separator)$(PATH)
export PYO3_PYTHON := $(BIN)/python
unexport CONDA_PREFIX PYTHONPATH PYTHONHOME
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Linux wheels link against an old glibc, so that they run on current and older distributions.
ifeq ($(shell uname -s),Linux)
WHEEL_PLATFORM := --zig --compatibility manylinux_2_28
endif

.NOTPARALLEL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

help:  ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

## Use

demo: $(VENV)/.installed  ## Build, download the default model, and generate a short story.
	$(BIN)/python scripts/demo.py

## Check

check: $(VENV)/.installed-once $(VENV)/.check  ## In under a minute: format, lint, types and the unit tests of what changed.
	cargo fmt --all --check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python scripts/check_language.py
	cargo clippy --locked --all-targets --features python -- -D warnings
	$(BIN)/mypy
	$(BIN)/python scripts/test_changes.py

test: lint test-rust test-python  ## Run every check and every test.

# The slowest check takes one core for as long as the others together.
lint: $(VENV)/.installed $(VENV)/.check  ## Check format, lints, documentation, types and language.
	cargo fmt --all --check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=python $(BIN)/python -m mypy.stubtest nybble._native & \
		cargo clippy --locked --all-targets --features python -- -D warnings && \
		cargo clippy --locked --lib -- -D warnings && \
		cargo clippy --locked --lib --no-default-features -- -D warnings && \
		$(BIN)/mypy && $(BIN)/python scripts/check_language.py && export RUSTDOCFLAGS="-D warnings" && \
		cargo doc --locked --no-deps --features python --document-private-items && \
		$(BIN)/python scripts/public_api.py && wait $$!

# What runs a kernel directly or through a model's forward pass runs a second time on the scalar kernel, except tests that
# choose kernels themselves (all of `bits`), which would be the same, and a slow one of reading experts, of which another
# one compares all kernels. The engine and quantization compute through the same calls, on a kernel that is ten times
# slower. No test writes measurements of this machine to the cache folder of the user.
# They write many small files, for which disks are slow. Containers often have little shared memory.
SHM_KB = $(shell df --output=avail /dev/shm 2>/dev/null | tail -n 1)
test-rust: export NYBBLE_TUNING = off
test-rust: export TMPDIR := $(or $(TMPDIR),$(shell [ "$(SHM_KB)" -gt 2000000 ] 2>/dev/null && echo /dev/shm),/tmp)
test-rust:  ## Run the Rust tests with this CPU's best kernel, then with the scalar one, and the benchmarks once.
	cargo test --locked
	NYBBLE_KERNEL=scalar cargo test --locked --lib --test kernels --test models --test no_allocation -- \
		--skip every_kernel --skip bits:: --skip quantize::calibration --skip quantize::recipes \
		--skip experts_that_are_read_again
	cargo test --locked --bench '*'

test-arm:  ## Run the kernel and model tests for 64-bit Arm in an emulator. Installs Debian packages.
	scripts/test_arm.sh

test-windows: $(VENV)/.wheel  ## Run all Rust tests and the Python tests for Windows under wine. Installs Debian packages.
	scripts/test_windows.sh

test-wheel-arm: $(VENV)/.wheel  ## Run the Python tests with the wheel for 64-bit Arm in an emulator. Installs Debian packages.
	scripts/test_wheel_arm.sh

test-amx:  ## Run the kernel and model tests on an emulated CPU with AMX, in an hour or two. Installs Debian packages.
	scripts/test_amx.sh

# Threads of NumPy's linear algebra wait for work by spinning. Hundreds of processes import the package, and each would
# compile it if bytecode was not kept.
test-python: export OPENBLAS_NUM_THREADS = 1
test-python: export PYTHONDONTWRITEBYTECODE =
test-python: $(VENV)/.installed $(VENV)/.check  ## Run the Python tests on a release build.
	$(BIN)/python -m pytest --numprocesses $(TEST_WORKERS) --dist worksteal

# Their packages are compatible with few versions of each other, which uv finds in seconds and pip in an hour.
test-clients: $(VENV)/.installed $(CLIENTS)/.installed  ## Run clients of other projects against the server.
	PYTHONPATH=python $(CLIENTS)/bin/python -m pytest --numprocesses $(TEST_WORKERS) \
		tests/python/clients tests/python/integrations/test_lm_eval.py tests/python/server/protocols/test_ollama.py

fmt: $(VENV)/.check  ## Format everything.
	cargo fmt --all
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench:  ## Measure the kernels of this CPU.
	cargo bench --locked --bench '*'

docs: $(VENV)/.docs  ## Build the documentation site into site/, with warnings as errors.
	$(BIN)/mkdocs build --strict

## Ship

man: $(VENV)/.installed  ## Write the man pages of the command line into dist/man.
	$(BIN)/python scripts/man_pages.py dist/man

wheel: $(VENV)/.wheel  ## Build the wheel into dist/ and check its tag, size and libraries.
	rm -rf dist
	$(BIN)/python scripts/notices.py --target host -- $(BIN)/maturin build --release --locked $(WHEEL_PLATFORM) --out dist
	$(BIN)/python scripts/check_wheel.py dist

# Wheels for other platforms, built on Linux. What a machine of that platform builds is the same but for the compiler.
wheel-windows wheel-macos wheel-arm wheel-musl wheel-freethreaded: wheel-%: $(VENV)/.wheel  ## Build the wheel for this platform on Debian, into target/wheels.
	rm -rf target/wheels
	scripts/wheel.sh $*
	$(BIN)/python scripts/check_wheel.py target/wheels

wheels: $(VENV)/.wheel wheel  ## Build the wheels for all platforms on Debian, into target/wheels.
	rm -rf target/wheels
	scripts/wheel.sh windows macos arm musl freethreaded
	cp dist/*.whl target/wheels
	$(BIN)/python scripts/check_wheel.py target/wheels

test-wheel: wheel  ## Install the wheel into an empty environment without a compiler, and generate.
	$(BIN)/python scripts/check_wheel.py dist --generate

release: $(VENV)/.wheel  ## Check version, tree and tests, then build and check the wheel and the source distribution.
	$(BIN)/python scripts/release.py --prepare
	$(BIN)/python scripts/notices.py --check
	cargo publish --locked --dry-run
	$(MAKE) test test-clients docs test-wheel
	$(BIN)/maturin sdist --out dist
	$(BIN)/python scripts/release.py --verify dist

clean:  ## Remove everything that was built, the environment included.
	cargo clean
	rm -rf $(VENV) $(CLIENTS) dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find python scripts tests benches -name __pycache__ -prune -exec rm -rf {} +
	find python -name '_native*.so' -delete

.PHONY: help demo check test lint test-rust test-arm test-windows test-wheel-arm test-amx test-python test-clients fmt bench \
	docs man wheel wheels wheel-windows wheel-macos wheel-arm wheel-musl wheel-freethreaded test-wheel release clean

## The environment: one stamp per part, renewed when its input changes

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "nybble needs Python 3.10 or later: make PYTHON=...")'
	@command -v cargo >/dev/null || { echo "building nybble needs Rust 1.89 or later: https://rustup.rs" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	touch $@

$(addprefix $(VENV)/.,build check docs wheel): $(VENV)/.%: pyproject.toml $(VENV)/.created
	$(BIN)/python -m pip install --quiet --group $*
	touch $@

$(CLIENTS)/.installed: pyproject.toml $(VENV)/.created
	$(PYTHON) -m venv --clear $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet uv
	$(CLIENTS)/bin/uv pip install --quiet --python $(CLIENTS)/bin/python -r pyproject.toml --extra serve --group test-clients
	touch $@

# Editable: changes in python/ take effect at once, changes in src/ at the next make.
$(VENV)/.installed: $(RUST_SOURCES) $(VENV)/.build
	$(BIN)/maturin develop --release --locked
	touch $@ $(VENV)/.installed-once

# Any build of the package, of older sources too.
$(VENV)/.installed-once: | $(VENV)/.build
	$(MAKE) $(VENV)/.installed
