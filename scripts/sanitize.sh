#!/usr/bin/env bash
# Runs tests under AddressSanitizer, which sees what a load or store of SIMD kernels, or a cast of bytes, does beyond its buffer:
# scripts/sanitize.sh [--test NAME | --lib ...] (formats, blocks, sampler, vocabularies, kernels, models and sessions unless given)
#
# The flag is one of the nightly compiler's; RUSTC_BOOTSTRAP=1 lets the stable one take it. Linux on x86-64. Miri is part of
# nightly toolchains only, and knows none of the instructions that kernels are made of.
set -euo pipefail
cd "$(dirname "$0")/.."
tests=("$@")
((${#tests[@]})) || tests=(--lib --test kernels --test formats --test models --test engine)

export RUSTC_BOOTSTRAP=1
export RUSTFLAGS="-Zsanitizer=address ${RUSTFLAGS:-}"
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-target}/sanitize"
# What workers and models keep until the process ends is no leak.
export ASAN_OPTIONS="detect_leaks=0:detect_stack_use_after_return=1:strict_init_order=1${ASAN_OPTIONS:+:$ASAN_OPTIONS}"
# With a target, so that build scripts and macros are built without it.
cargo test --locked --target x86_64-unknown-linux-gnu "${tests[@]}"
