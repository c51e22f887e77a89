"""The file of pinned server CAs follows ``fleet.json``, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from garrison_agent.identity import Folders, pin_server_ca
from garrison_protocol.errors import InvalidError, UnavailableError
from tests.fakes.pki import Authority


@pytest.fixture
def old(tmp_path: Path) -> str:
    return Authority(tmp_path / "old", "old").pem.read_text()


@pytest.fixture
def new(tmp_path: Path) -> str:
    return Authority(tmp_path / "new", "new").pem.read_text()


def test_one_then_both_then_the_other(tmp_path: Path, old: str, new: str) -> None:
    file = Folders(tmp_path / "state").server_ca
    assert pin_server_ca(tmp_path / "state", old) is False  # there was none
    before = file.stat().st_ino
    assert pin_server_ca(tmp_path / "state", old) is False
    assert pin_server_ca(tmp_path / "state", "") is False
    assert (file.read_text(), file.stat().st_ino) == (old, before)
    assert pin_server_ca(tmp_path / "state", old + new) is False
    assert pin_server_ca(tmp_path / "state", new + old) is False  # the order means nothing
    assert pin_server_ca(tmp_path / "state", new) is True
    assert file.read_text() == new


@pytest.mark.parametrize("pem", ["nonsense", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "\0"])
def test_what_is_no_certificate_changes_nothing(tmp_path: Path, old: str, pem: str) -> None:
    pin_server_ca(tmp_path / "state", old)
    with pytest.raises(InvalidError, match=r"fleet\.server_ca_unusable"):
        pin_server_ca(tmp_path / "state", pem)
    assert Folders(tmp_path / "state").server_ca.read_text() == old


def test_a_file_that_cannot_be_read(tmp_path: Path, new: str) -> None:
    Folders(tmp_path / "state").server_ca.mkdir(parents=True)
    with pytest.raises(UnavailableError, match=r"disk\.failed"):
        pin_server_ca(tmp_path / "state", new)
