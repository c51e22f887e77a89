from __future__ import annotations

import os
from pathlib import Path

import pytest

from garrison_agent.runtimes.spec import OpenFile
from garrison_agent.runtimes.verify import verify_files
from garrison_protocol.errors import RefusedError


def test_a_file_that_cannot_be_read_is_one_to_repair(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)  # a folder opens, but every read of it fails
    try:
        file = OpenFile("model.gguf", "0" * 64, os.fstat(descriptor).st_size, descriptor)
        with pytest.raises(RefusedError, match=r"model\.digest_mismatch"):
            verify_files([file])
    finally:
        os.close(descriptor)
