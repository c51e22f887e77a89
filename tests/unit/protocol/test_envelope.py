import base64
import json
import os
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from garrison_protocol import envelope
from garrison_protocol.errors import GarrisonError, InvalidError, RefusedError
from garrison_protocol.keys import SigningKey, key_id

KEY = SigningKey.generate()
OTHER = SigningKey.generate()


def trusted(signer: str) -> str | None:
    return {KEY.key_id: KEY.public_hex}.get(signer)


def signed(payload_type: str, payload: bytes, key: SigningKey = KEY) -> bytes:
    signature = key.sign(envelope.pae(payload_type, payload))
    return json.dumps(
        {
            "payloadType": payload_type,
            "payload": base64.b64encode(payload).decode(),
            "signatures": [{"keyid": key.key_id, "sig": base64.b64encode(signature).decode()}],
        }
    ).encode()


@given(st.binary(max_size=5000))
def test_a_sealed_body_comes_back_exactly(body: bytes) -> None:
    opened = envelope.unseal(envelope.seal("status", body, KEY), trusted)
    assert (opened.kind, opened.body, opened.key_id) == ("status", body, KEY.key_id)


def test_dsse_encoding_is_the_specifications() -> None:
    # The example of the DSSE protocol document.
    assert envelope.pae("http://example.com/HelloWorld", b"hello world") == (
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )


def test_a_large_body_is_compressed_and_a_small_one_is_not() -> None:
    large = json.loads(envelope.seal("telemetry", b"a" * 100_000, KEY))
    small = json.loads(envelope.seal("telemetry", b"a", KEY))
    assert large["payloadType"].endswith("+json+zlib")
    assert len(large["payload"]) < 1000
    assert small["payloadType"].endswith("v1.telemetry+json")


def test_a_key_that_is_not_trusted_for_this_use_is_refused() -> None:
    with pytest.raises(RefusedError) as caught:
        envelope.unseal(envelope.seal("status", b"{}", OTHER), trusted)
    assert caught.value.code == "envelope.key_unknown"


def test_claiming_a_trusted_key_id_does_not_help() -> None:
    outer = json.loads(envelope.seal("status", b"{}", OTHER))
    outer["signatures"][0]["keyid"] = KEY.key_id
    with pytest.raises(RefusedError) as caught:
        envelope.unseal(json.dumps(outer).encode(), trusted)
    assert caught.value.code == "envelope.bad_signature"


@pytest.mark.parametrize("field", ["payload", "payloadType"])
def test_any_change_of_what_is_signed_is_refused(field: str) -> None:
    outer = json.loads(envelope.seal("status", b'{"a":1}', KEY))
    outer["payload"] = base64.b64encode(b'{"a":2}').decode() if field == "payload" else outer["payload"]
    outer["payloadType"] = envelope.TYPE_PREFIX + "report+json" if field == "payloadType" else outer["payloadType"]
    with pytest.raises(RefusedError) as caught:
        envelope.unseal(json.dumps(outer).encode(), trusted)
    assert caught.value.code == "envelope.bad_signature"


def test_a_compression_bomb_stops_at_the_bound() -> None:
    bomb = zlib.compress(b"\0" * (envelope.MAX_BODY_BYTES + 1), 9)
    with pytest.raises(InvalidError) as caught:
        envelope.unseal(signed(envelope.TYPE_PREFIX + "audit+json+zlib", bomb), trusted)
    assert caught.value.code == "envelope.too_large"


@pytest.mark.parametrize("cut", [slice(None, -3), slice(None, 0)])
def test_a_damaged_compressed_body_is_refused(cut: slice) -> None:
    payload = zlib.compress(b"x" * 2000)[cut]
    with pytest.raises(InvalidError) as caught:
        envelope.unseal(signed(envelope.TYPE_PREFIX + "audit+json+zlib", payload), trusted)
    assert caught.value.code == "envelope.malformed"


def test_bytes_behind_a_compressed_body_are_refused() -> None:
    payload = zlib.compress(b"x" * 2000) + b"more"
    with pytest.raises(InvalidError, match="bytes behind"):
        envelope.unseal(signed(envelope.TYPE_PREFIX + "audit+json+zlib", payload), trusted)


def test_an_unknown_payload_type_is_refused_even_when_signed() -> None:
    with pytest.raises(InvalidError) as caught:
        envelope.unseal(signed("text/plain", b"{}"), trusted)
    assert caught.value.code == "envelope.kind_unknown"


def test_an_envelope_above_the_cap_is_neither_made_nor_read() -> None:
    body = bytes(range(256)) * 4096
    with pytest.raises(InvalidError) as caught:
        envelope.seal("audit", os.urandom(len(body)), KEY)
    assert caught.value.code == "envelope.too_large"
    with pytest.raises(InvalidError) as caught:
        envelope.unseal(b" " * (envelope.MAX_ENVELOPE_BYTES + 1), trusted)
    assert caught.value.code == "envelope.too_large"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


@given(st.binary(max_size=300) | JSON.map(lambda value: json.dumps(value).encode()))
def test_anything_else_is_refused_with_a_code(data: bytes) -> None:
    with pytest.raises(GarrisonError) as caught:
        envelope.unseal(data, trusted)
    assert caught.value.code.startswith("envelope.")


def test_a_payload_type_that_has_no_bytes_is_refused() -> None:
    outer = {"payloadType": "\ud800", "payload": "", "signatures": [{"keyid": KEY.key_id, "sig": ""}]}
    with pytest.raises(InvalidError) as caught:
        envelope.unseal(json.dumps(outer).encode(), trusted)
    assert caught.value.code == "envelope.malformed"


def test_deeply_nested_json_is_refused() -> None:
    with pytest.raises(InvalidError) as caught:
        envelope.unseal(b"[" * 200_000, trusted)
    assert caught.value.code == "envelope.malformed"


def test_a_key_id_is_the_digest_of_the_public_key() -> None:
    assert KEY.key_id == key_id(KEY.public_hex)
    assert len(KEY.key_id) == 64
