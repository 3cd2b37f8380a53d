#!/usr/bin/env bash
# Runs tests for 64-bit Arm on any Debian machine under QEMU, for `make test-arm`. Compiles with Debian's rustc-web, its
# only package of this Rust version. Installs missing packages and fails if it cannot.
set -euo pipefail
cd "$(dirname "$0")/.."

source scripts/cross.sh
need rustc-web libstd-rust-web-dev libstd-rust-web-dev:arm64 gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user

# Debian's compiler instead of rustup's, and a separate target folder.
export RUSTC=/usr/bin/rustc
export CARGO_TARGET_DIR=$target_folder/arm
export CARGO_BUILD_TARGET=aarch64-unknown-linux-gnu
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
# The C library comes with the cross compiler. QEMU's CPU has every instruction, so the NEON kernel must run.
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -L / -cpu max"
export NYBBLE_TEST_RUNNER="$CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER"
export NYBBLE_REQUIRE_KERNELS=neon
"$RUSTC" --version
cargo test --locked --lib --test kernels
cargo test --locked --test models -- bits:: goldens::
