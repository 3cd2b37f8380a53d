#!/usr/bin/env bash
# Runs tests under AddressSanitizer, which finds loads, stores and casts that leave their buffer:
# scripts/sanitize.sh [--test NAME | --lib ...] (default: library, kernels, formats, models, engine)
#
# The sanitizer is a nightly flag; RUSTC_BOOTSTRAP=1 makes the stable compiler accept it. Linux on x86-64 only. Miri does
# not support the kernels' instructions.
set -euo pipefail
cd "$(dirname "$0")/.."
tests=("$@")
((${#tests[@]})) || tests=(--lib --test kernels --test formats --test models --test engine)

export RUSTC_BOOTSTRAP=1
export RUSTFLAGS="-Zsanitizer=address ${RUSTFLAGS:-}"
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-target}/sanitize"
# Memory that workers and models keep until the process ends is not a leak.
export ASAN_OPTIONS="detect_leaks=0:detect_stack_use_after_return=1:strict_init_order=1${ASAN_OPTIONS:+:$ASAN_OPTIONS}"
# With an explicit target, build scripts and macros are built without the sanitizer.
cargo test --locked --target x86_64-unknown-linux-gnu "${tests[@]}"
