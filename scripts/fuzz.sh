#!/usr/bin/env bash
# Fuzzes each target for SECONDS (default 60), starting from small valid files: scripts/fuzz.sh [SECONDS] [TARGET...]
#
# AddressSanitizer needs RUSTC_BOOTSTRAP=1 SANITIZER=address, which makes the stable compiler accept nightly flags.
# Without it, overflow checks, debug assertions and the checks of safe Rust are active.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-60}
shift || true
targets=("$@")
((${#targets[@]})) || targets=(gguf model checkpoint packings vocabulary session states)
cargo fuzz --version >/dev/null 2>&1 || cargo install --locked cargo-fuzz

mkdir -p fuzz/corpus/{gguf,model,checkpoint,packings,vocabulary,session,states}
${PYTHON:-.venv/bin/python} scripts/fuzz_seeds.py fuzz/corpus
for target in "${targets[@]}"; do
    dictionary=fuzz/dictionaries/gguf.dict
    [[ $target == checkpoint || $target == packings ]] && dictionary=fuzz/dictionaries/checkpoint.dict
    cargo fuzz run --sanitizer "${SANITIZER:-none}" "$target" -- \
        -dict="$dictionary" -max_total_time="$seconds" -max_len=65536 -timeout=10 -rss_limit_mb=1024 -print_final_stats=1
done
