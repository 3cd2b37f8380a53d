#!/usr/bin/env bash
# Runs the Python tests with the wheel for 64-bit Arm on any Debian machine under QEMU, for `make test-wheel-arm`: Debian's
# Python for Arm is unpacked, not installed. Arguments are those of pytest. Installs what is missing and fails if it cannot.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/cross.sh

work=$target_folder/arm-python
root=$work/root
need qemu-user
# Python, and all that it depends on.
if [[ ! -e $root/.installed ]]; then
    rm -rf "$work"
    mkdir -p "$root" "$work/packages"
    dpkg --add-architecture arm64
    apt-get update -qq
    mapfile -t packages < <(apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks \
        --no-replaces --no-enhances python3:arm64 libstdc++6:arm64 | grep -E '^[a-z].*:arm64$' | sort -u)
    (cd "$work/packages" && apt-get download -qq "${packages[@]}" 2>/dev/null)
    for package in "$work"/packages/*.deb; do dpkg-deb --extract "$package" "$root"; done
    touch "$root/.installed"
fi
version=$(basename "$(readlink -f "$root/usr/bin/python3")")

build_quickly
scripts/wheel.sh arm
wheel=$(ls -t target/wheels/nybble-*-manylinux_2_28_aarch64.whl | head -n 1)
stamp=$(sha256sum "$0" "$wheel" pyproject.toml | sha256sum)
if [[ "$(cat "$work/.installed" 2>/dev/null)" != "$stamp" ]]; then
    rm -rf "$work/packages-of-python"
    python -m pip install --quiet --target "$work/packages-of-python" \
        --platform manylinux_2_28_aarch64 --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 \
        --implementation cp --python-version "${version#python}" --only-binary :all: \
        "$wheel" --group test --group serve-test
    echo "$stamp" >"$work/.installed"
fi

# The emulator runs programs of its own machine only through this, so Python has to know it by this name.
cat >"$work/python" <<END
#!/bin/sh
exec qemu-aarch64 -L "$root" -cpu max -0 "$work/python" "$root/usr/bin/$version" "\$@"
END
chmod +x "$work/python"
cat >"$work/packages-of-python/sitecustomize.py" <<END
import sys

sys.executable = "$work/python"
END

export PYTHONPATH="$work/packages-of-python" PYTHONDONTWRITEBYTECODE=1 NYBBLE_TUNING=off
"$work/python" -c 'import nybble, platform; print(platform.machine(), platform.python_version(), nybble.kernels())'
"$work/python" -m pytest -p no:cacheprovider "$@"
