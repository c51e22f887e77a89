"""The last check before a model is loaded: every byte, on the descriptor that will be loaded.

No digest is ever cached: a flipped byte with a restored mtime looks unchanged to anything but the hash.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from typing import NoReturn

from garrison_agent.runtimes.spec import OpenFile
from garrison_protocol.errors import RefusedError


def verify_files(files: Iterable[OpenFile]) -> None:
    """Return if every file has exactly the stated size and SHA-256.

    Raises:
        RefusedError: ``model.digest_mismatch``, naming the first file that differs.
    """
    for file in files:
        size = os.fstat(file.descriptor).st_size
        if size != file.size:
            _refuse(file, f"{size} bytes instead of {file.size}")
        try:
            # Opened anew: a descriptor shared with the parent shares its offset too.
            with open(file.native_path, "rb", buffering=0) as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
        except OSError as error:  # an unreadable sector: what a repair is for
            _refuse(file, f"it cannot be read: {error.strerror}")
        if digest != file.sha256:
            _refuse(file, f"SHA-256 {digest} instead of {file.sha256}")


def _refuse(file: OpenFile, difference: str) -> NoReturn:
    raise RefusedError(
        "model.digest_mismatch",
        f"{file.path} is not what the manifest signs: {difference}",
        hint="repair the model; if it happens again, check the disk",
        path=file.path,
    )
