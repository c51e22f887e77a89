from pathlib import Path

import pytest

from garrison_protocol.canonical import canonical_json
from garrison_protocol.errors import RefusedError
from garrison_protocol.keys import SigningKey, verify


def test_a_saved_key_signs_as_before(tmp_path: Path) -> None:
    key = SigningKey.generate()
    key.save(tmp_path / "key")
    again = SigningKey.load(tmp_path / "key")
    assert verify(key.public_hex, again.sign(b"data"), b"data")
    assert not verify(key.public_hex, again.sign(b"data"), b"other")
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    SigningKey.generate().save(tmp_path / "key")
    (tmp_path / "key").chmod(0o640)
    with pytest.raises(RefusedError) as caught:
        SigningKey.load(tmp_path / "key")
    assert caught.value.code == "key.readable_by_others"


def test_a_key_file_is_never_overwritten(tmp_path: Path) -> None:
    SigningKey.generate().save(tmp_path / "key")
    with pytest.raises(FileExistsError):
        SigningKey.generate().save(tmp_path / "key")


def test_garbage_is_no_signature() -> None:
    assert not verify("zz", b"", b"")
    assert not verify("00" * 32, b"\0" * 64, b"data")


@pytest.mark.parametrize("value", [1.5, 2**53, {1: 2}, {"a": object()}, [float("nan")]])
def test_canonical_json_refuses_what_writers_differ_on(value: object) -> None:
    with pytest.raises(ValueError, match="canonical JSON"):
        canonical_json(value)


def test_canonical_json_sorts_and_keeps_unicode() -> None:
    assert canonical_json({"b": 1, "a": ["ü", None, True]}) == '{"a":["ü",null,true],"b":1}'.encode()
