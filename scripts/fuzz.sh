#!/usr/bin/env bash
# Fuzzes every target for SECONDS each (60 unless given), from small valid files on: scripts/fuzz.sh [SECONDS] [TARGET...]
#
# Stable Rust cannot build with AddressSanitizer; RUSTC_BOOTSTRAP=1 SANITIZER=address does, by letting the stable compiler
# take the flags of the nightly one. Without it there are overflow checks, debug assertions and the checks of safe Rust.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-60}
shift || true
targets=("$@")
((${#targets[@]})) || targets=(gguf model checkpoint packings vocabulary session)
cargo fuzz --version >/dev/null 2>&1 || cargo install --locked cargo-fuzz

mkdir -p fuzz/corpus/{gguf,model,checkpoint,packings,vocabulary,session}
${PYTHON:-.venv/bin/python} scripts/fuzz_seeds.py fuzz/corpus
for target in "${targets[@]}"; do
    dictionary=fuzz/dictionaries/gguf.dict
    [[ $target == checkpoint || $target == packings ]] && dictionary=fuzz/dictionaries/checkpoint.dict
    cargo fuzz run --sanitizer "${SANITIZER:-none}" "$target" -- \
        -dict="$dictionary" -max_total_time="$seconds" -max_len=65536 -timeout=10 -rss_limit_mb=1024 -print_final_stats=1
done
