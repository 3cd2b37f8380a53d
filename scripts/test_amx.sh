#!/usr/bin/env bash
# Runs tests on an emulated CPU with AMX, for `make test-amx`: those of the kernels and of whole models, with AMX as the kernel
# wherever a test does not name another one. `run_amx.sh` describes the emulator.
set -euo pipefail
cd "$(dirname "$0")/.."

# Static programs, because the emulated machine has no libraries. Optimised, because an emulator is slow.
target=x86_64-unknown-linux-gnu
folder=${CARGO_TARGET_DIR:-target}/amx
build() { # The path of a test program.
    CARGO_TARGET_DIR=$folder CARGO_PROFILE_TEST_OPT_LEVEL=2 CARGO_PROFILE_TEST_DEBUG=0 RUSTFLAGS='-C target-feature=+crt-static' \
        cargo test --locked --target "$target" --no-run --message-format json "$@" |
        sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | tail -n 1
}
library=$(build --lib)
kernels=$(build --test kernels)
models=$(build --test models)

export NYBBLE_KERNEL=amx NYBBLE_REQUIRE_KERNELS=amx,avx512,avx2,scalar
export AMX_FILES=tests/data AMX_TIMEOUT=${AMX_TIMEOUT:-7200}
# One thread, which an emulated CPU runs as fast as several. Limits are measured by time, which an emulator stretches without end.
scripts/run_amx.sh "$library" --test-threads=1 kernels:: --skip limits
scripts/run_amx.sh "$kernels" --test-threads=1 --skip limits
scripts/run_amx.sh "$models" --test-threads=1 bits:: goldens:: encoders:: session_files::
