#!/usr/bin/env bash
# Builds wheels for other platforms on Linux, into target/wheels: scripts/wheel.sh PLATFORM..., for `make wheel-PLATFORM`.
# The platforms are windows, macos, arm (Linux), musl (Linux) and freethreaded (Linux). What is missing is installed.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/cross.sh

out=target/wheels
# Separate from the folder of other builds, whose compiler may be another one.
export CARGO_TARGET_DIR=$target_folder/cross

# Builds the wheel for the target $1 with maturin's options that follow.
build() (
    local target=$1
    shift
    use_target "$target"
    python scripts/notices.py --target "$target" -- maturin build --release --locked --target "$target" --out "$out" "$@"
)

# Apple's linker and tools are those of LLVM here. rustc strips by a tool of this name.
macos() {
    local tools=$CARGO_TARGET_DIR/tools
    need llvm
    mkdir -p "$tools"
    ln -sf "$(command -v llvm-objcopy)" "$tools/rust-objcopy"
    ln -sf "$(command -v llvm-strip)" "$tools/strip"
    PATH="$tools:$PATH" build "$1" --zig
}

for platform; do
    case $platform in
        windows)
            need gcc-mingw-w64-x86-64-win32
            export CARGO_TARGET_X86_64_PC_WINDOWS_GNU_LINKER=x86_64-w64-mingw32-gcc-win32
            build x86_64-pc-windows-gnu
            ;;
        macos)
            macos aarch64-apple-darwin
            macos x86_64-apple-darwin
            ;;
        arm) build aarch64-unknown-linux-gnu --zig --compatibility manylinux_2_28 ;;
        musl)
            build x86_64-unknown-linux-musl --zig --compatibility musllinux_1_2
            build aarch64-unknown-linux-musl --zig --compatibility musllinux_1_2
            ;;
        freethreaded)
            build x86_64-unknown-linux-gnu --zig --compatibility manylinux_2_28 --interpreter python3.14t
            ;;
        *)
            echo "$platform: expected windows, macos, arm, musl or freethreaded" >&2
            exit 2
            ;;
    esac
done
