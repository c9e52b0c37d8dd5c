"""Adding to a key file."""

from __future__ import annotations

import os
from pathlib import Path

from seamount.wire.errors import InvalidArgument


def append_line(path: Path, line: str) -> None:
    """Append a line to a file that only its owner may read; a new file is made so.

    Raises ``InvalidArgument`` where the file cannot be written.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "r+b") as file:
            size = file.seek(0, os.SEEK_END)
            if size and (file.seek(size - 1), file.read(1))[1] != b"\n":
                file.write(b"\n")
            file.write(line.encode() + b"\n")
    except OSError as error:
        raise InvalidArgument(f"--file: cannot write {path}: {error.strerror}", field="file") from None
