# Functions of the scripts that build and test for other platforms. Sourced in the root of the repository.

# Where Rust builds, as an absolute path.
target_folder=$(realpath --canonicalize-missing "${CARGO_TARGET_DIR:-target}")

# Installs the Debian packages named that are missing. `package:arm64` is one for another architecture.
need() {
    local package missing=()
    for package; do
        [[ "$(dpkg-query --show --showformat='${db:Status-Abbrev}' "$package" 2>/dev/null)" == ii* ]] || missing+=("$package")
    done
    if ((${#missing[@]} == 0)); then return; fi
    command -v apt-get >/dev/null || { echo "this needs Debian's packages ${missing[*]}" >&2; exit 1; }
    echo "installing ${missing[*]}"
    if [[ "${missing[*]}" == *:arm64* ]]; then dpkg --add-architecture arm64; fi
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
}

# Whether the compiler $1 has a standard library for the target $2.
has_target() {
    compgen -G "$("$1" --print target-libdir --target "$2" 2>/dev/null)/libstd-*.rlib" >/dev/null
}

# Prepares a build for the target $1: with the active Rust if it has a standard library for that target, else with Debian's
# rustc-web, which builds one from its source.
use_target() {
    export CARGO_BUILD_TARGET="$1"
    if ! has_target rustc "$1"; then
        need rustc-web cargo-web
        # rustup's cargo would run rustup's compiler.
        export PATH="/usr/bin:$PATH" RUSTC=/usr/bin/rustc CARGO=/usr/bin/cargo
        if ! has_target /usr/bin/rustc "$1"; then
            need rust-web-src libstd-rust-web-dev
            # The option is for compilers that are as old as their library, which this one is.
            export RUSTC_BOOTSTRAP=1 CARGO_UNSTABLE_BUILD_STD=std,panic_unwind
        fi
    fi
    echo "for $1: $("${RUSTC:-rustc}" --version)${CARGO_UNSTABLE_BUILD_STD:+, with a standard library from its source}"
}

# Lets wheels for tests build in less time. Results are the same, and nobody measures these wheels.
build_quickly() {
    export CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16 CARGO_PROFILE_RELEASE_DEBUG=false
}
