"""The certificate with which a server speaks HTTPS."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Certificate:
    """A certificate and its key, both in PEM.

    Raises:
        OSError: A file cannot be read.
        ValueError: A file is not valid, the key is encrypted, or they do not belong together.
    """

    file: Path
    key: Path

    def __post_init__(self) -> None:
        def refuse_password() -> str:
            raise ValueError(f"{self.key}: found an encrypted key, expected one without a password")

        for file in (self.file, self.key):
            file.open("rb").close()  # The error of `load_cert_chain` does not name the file.
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.file, self.key, refuse_password)
        except ssl.SSLError as error:
            raise ValueError(
                f"{self.file} and {self.key}: {error.reason or error}, expected a certificate and its key in PEM"
            ) from None
