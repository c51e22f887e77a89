"""Honest inputs of each entry, from which fuzzing starts, and strategies that stay near them."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import strategies as st

from garrison_agent.runtimes.status import Failed, Ready, RequestDone, RequestRecord, Verified, encode_event
from garrison_protocol import bundle, envelope, topics
from garrison_protocol.keys import SigningKey
from garrison_protocol.messages import anchor, desired, fetch, report, streams
from garrison_protocol.messages.base import Message, encode
from garrison_protocol.messages.enrolment import (
    EnrolmentString,
    EnrolRequest,
    OfflineRequest,
    OfflineResponse,
    RenewRequest,
    RenewResponse,
    SessionRequest,
)
from garrison_protocol.states import KeyPurpose, Stream
from tests.fakes.board_ports import FakeClock
from tests.fakes.packages import make_package
from tests.fuzz.entries import DEVICE, FILES, MESSAGES, NONCE, ROLES, enrolled, registry
from tests.unit.loop.rig import DIRECTOR, entry, fleet_json
from tests.unit.rollouts.fleet import FakeBoard

PACKAGE = make_package()
INPUTS = [
    {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [[1.5, 2]]},
    {"name": "n", "shape": [2], "datatype": "INT8", "data": [1, -128]},
    {"name": "s", "shape": [1], "datatype": "BYTES", "data": ["text"]},
    {"name": "b", "shape": [1], "datatype": "BOOL", "data": [True]},
    {"name": "u", "shape": [1], "datatype": "UINT64", "data": [18446744073709551615]},
]
WORKER_EVENTS: tuple[Verified | Ready | Failed | RequestDone, ...] = (
    Verified(12.5),
    Ready(100.0, 64.5, {"kv_bytes_per_token": 23040}),
    Failed("model.load_failed", "it is too large"),
    RequestDone(RequestRecord("chat", True, None, 3, 4, 1.5, 90.0, 9.0, 200, "camera")),
    RequestDone(RequestRecord("infer", False, "inference.deadline_exceeded", status=504)),
)
INFER = {"id": "1", "inputs": INPUTS, "outputs": [{"name": "y"}]}
BINARY = (
    struct.pack("<2f", 1.5, 2),
    struct.pack("2b", 1, -128),
    b"\4\0\0\0text",
    b"\1",
    struct.pack("<Q", 2**64 - 1),
)
"""The data of ``INPUTS``, in their order."""
TOOLS = {
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "n": 2,
    "logprobs": True,
    "top_logprobs": 3,
    "logit_bias": {"5": -100},
    "messages": [
        {"role": "user", "content": "x"},
        {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "1", "content": "y"},
    ],
}
RESPONSE = {
    "model": "m",
    "instructions": "short",
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "y"},
    ],
    "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}],
    "text": {"format": {"type": "json_schema", "name": "s", "schema": {"type": "object"}}},
}
CHAT = {
    "model": "chat",
    "messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}, {"role": "user", "content": "x"}],
    "stream": True,
    "stream_options": {"include_usage": True},
    "temperature": 0.5,
    "stop": ["a", "b"],
    "seed": 1,
}


def binary_infer(*tensors: tuple[dict[str, Any], bytes]) -> bytes:
    """Return a request with binary tensors, and before it, in two bytes, the length of its JSON."""
    inputs = [
        {key: value for key, value in tensor.items() if key != "data"} | {"parameters": {"binary_data_size": len(data)}}
        for tensor, data in tensors
    ]
    head = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
    return b"".join([len(head).to_bytes(2, "big"), head, *(data for _, data in tensors)])


PLACES = 60
"""More values than any signed part of the fake registry's metadata has."""


def bodies() -> dict[str, bytes]:
    """Return one honest body of each kind of message."""
    board = FakeBoard(DEVICE)
    board.record("test", {"a": 1}, alias="chat")
    digest = "0" * 64
    messages: dict[str, Message] = {
        "status": board.status(counter=3, sha256=digest),
        "report": report.Report(
            device=DEVICE,
            revision=1,
            aliases=(
                report.AliasReport.model_validate(
                    {"alias": "chat", "package": PACKAGE.ref, "rollout": "r", "state": "ACTIVE", "step": 1}
                ),
            ),
            refused={"envelope.malformed": 1},
        ),
        "audit": board.batch(),
        "receipt": streams.Receipt(device=DEVICE, stream=Stream.AUDIT, epoch="0" * 16, up_to=1, hash=digest),
        "desired": desired.Desired(device=DEVICE, counter=1, aliases=(entry(PACKAGE.ref, soak_s=1.5),)),
        "anchor": anchor.Anchor(
            device=DEVICE,
            nonce="0" * 32,
            time=int(FakeClock().wall_s),
            streams={"audit": anchor.Committed(epoch="0" * 16, seq=1)},
        ),
        "fetch": fetch.Fetch(device=DEVICE, request="0" * 16, kind=fetch.FetchKind.BLOB, sha256=digest),
    }
    return {kind: encode(messages[kind]) for kind in MESSAGES}


def telemetry() -> bytes:
    """Return an honest batch of telemetry: the other stream that batches bring."""
    board = FakeBoard(DEVICE)
    board.measure()
    return encode(board.batch(stream=Stream.TELEMETRY))


@cache
def seeds() -> Mapping[str, tuple[bytes, ...]]:
    """Return honest inputs by entry."""
    honest, of_kind = registry(), bodies()
    line = EnrolmentString(url="https://x:1", token="t", root_sha256="0" * 64, server_ca_sha256="0" * 64)
    request = EnrolRequest(token="t", csr_pem="pem", identity="0" * 64, proof="0" * 128)
    offline = OfflineRequest(csr_pem="pem", identity="0" * 64, proof="0" * 128, nonce="0" * 32)
    answer = OfflineResponse(
        device=DEVICE,
        url="https://x:1",
        certificate_pem="pem",
        mqtt_host="x",
        mqtt_port=1,
        root="{}",
        server_ca_pem="pem",
        anchor="{}",
    )
    refusal = fetch.FetchRefusal(code="device.revoked", message="no", hint="ask", status=403)
    frame = fetch.pack_chunk(fetch.Chunk("0" * 16, 0, 4, fetch.ChunkStatus.DATA, b"data"))
    names = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, DEVICE)])
    key = ec.generate_private_key(ec.SECP256R1())
    request_for = x509.CertificateSigningRequestBuilder().subject_name(names).sign(key, hashes.SHA256())
    csr = request_for.public_bytes(serialization.Encoding.PEM)
    trusted = (honest.folder / "trusted.json").read_bytes()
    files = [honest.content.metadata[name] for name in FILES[:-1]] + [PACKAGE.manifest_bytes]
    return {
        "envelope": (envelope.seal("status", of_kind["status"], SigningKey.generate()),),
        "signed": tuple(bytes([place]) + body for place, body in enumerate(of_kind.values())),
        "topic": (b"garrison/v1/up/edge-1/status", b"garrison/v1/down/edge-1/chunk", b"garrison/v1/registry/timestamp"),
        "manifest": (PACKAGE.manifest_bytes,),
        "fleet": (fleet_json((KeyPurpose.DIRECTOR, DIRECTOR), floors={"chat": "1.0"}),),
        "message": tuple(of_kind.values()),
        "chunk": (
            refusal.model_dump_json().encode(),
            frame,
            struct.pack(">4s8sQQB", b"GCH1", bytes(8), 2**64 - 1, 0, 1),
        ),
        "enrolment": (
            line.encode().encode(),
            line.encode().removeprefix("garrison-enroll:").encode(),
            line.model_dump_json().encode(),
            request.model_dump_json().encode(),
            SessionRequest(device=DEVICE, nonce="n", proof="0" * 128).model_dump_json().encode(),
            RenewRequest(device=DEVICE, nonce="n", csr_pem="pem", proof="0" * 128).model_dump_json().encode(),
            offline.model_dump_json().encode(),
            answer.model_dump_json().encode(),
        ),
        "bundle": (
            b"metadata/3.family-smollm.json",
            b"targets/" + b"0" * 64 + b"/models/con_/1.0/manifest.json",
            b"blobs/sha256/00/" + b"0" * 64,
            b"home/edge-1/audit/0123456789abcdef-000000000001.dsse",
            bundle.Head(fleet="demo", created=1, valid_until=2, devices=(DEVICE,)).model_dump_json().encode(),
            bundle.HomeRequest(nonce="0" * 32).model_dump_json().encode(),
        ),
        "csr": (csr, x509.load_pem_x509_csr(csr).public_bytes(serialization.Encoding.DER)),
        "renewal": (
            b'\x00{"nonce": "n", "time": 0}',
            b"\x01" + RenewResponse(certificate_pem="pem", mqtt_host="x", mqtt_port=1).model_dump_json().encode(),
            b"\x02" + enrolled().certificate,
        ),
        "metadata": tuple(bytes([place]) + data for place, data in enumerate(files)),
        "resigned": tuple(_other_end(role) for role in range(len(ROLES))),
        "cache": (trusted,),
        "infer": (json.dumps(INFER).encode(), *(json.dumps({"inputs": [one]}).encode() for one in INPUTS)),
        "binary infer": (
            binary_infer(*zip(INPUTS, BINARY, strict=True)),
            *(binary_infer(pair) for pair in zip(INPUTS, BINARY, strict=True)),
        ),
        "worker": tuple(encode_event(event) for event in WORKER_EVENTS),
        "upstream": (
            b'\x09data: {"choices": [{"delta": {"content": "a"}}]}\r\n\r\ndata: [DONE]\r\n\r\n',
            b'\xffdata: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}\n\n',
            b'\x31data: {"type": "response.completed", "response": {"usage": {"input_tokens": 3}}}\n\n',
            b'\x08{"choices": [{"text": "a"}], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}',
        ),
        "application": (
            b'{"name": "camera", "models": ["smollm2"], "requests_per_min": 60, "concurrent": 2}',
            b'{"name": "console", "tokens_per_min": 1000, "admin": true}',
        ),
        "http": (
            b"\xffGET /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n",
            b"\x10GET /v2 HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Api-Key: none\r\n\r\nGET /v1/models HTTP/1.1\r\n\r\n",
            b"\xffPOST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
            b'e\r\n{"model": "m"}\r\n0\r\n\r\n',
            b"\xffPOST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nconnection: Upgrade\r\nupgrade: h2c\r\n"
            b'x-garrison-timeout: 2\r\ncontent-length: 14\r\n\r\n{"model": "m"}',
        ),
        "openai": (
            json.dumps(CHAT).encode(),
            json.dumps({"model": "m", "prompt": ["text"], "max_tokens": 5}).encode(),
            json.dumps({"prompt": "a", "choices": ["b", "c"]}).encode(),
            json.dumps({**CHAT, **TOOLS}).encode(),
            json.dumps(RESPONSE).encode(),
        ),
        "embedding": (
            json.dumps({"model": "m", "input": ["a", "b"], "encoding_format": "base64", "dimensions": 8}).encode(),
            json.dumps({"input": [[1, 2], [3]]}).encode(),
            json.dumps({"model": "m", "input": "a", "prompt": "b", "truncate": False}).encode(),
        ),
        "schema": (
            json.dumps(
                {
                    "type": "object",
                    "properties": {
                        "a": {"type": ["integer", "null"], "minimum": -3, "exclusiveMaximum": 7.5},
                        "b": {"type": "string", "pattern": "^[a-z]{2,3}(x|y)?$"},
                        "c": {"type": "array", "items": {"$ref": "#/$defs/d"}, "maxItems": 3},
                        "e": {"oneOf": [{"const": 1}, {"enum": ["x", None]}]},
                    },
                    "required": ["a"],
                    "additionalProperties": False,
                    "$defs": {"d": {"type": "number", "multipleOf": 0.01}},
                }
            ).encode(),
        ),
        "ollama": (
            json.dumps(
                {
                    "model": "chat:latest",
                    "messages": [
                        {"role": "user", "content": "hello"},
                        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
                        {"role": "tool", "content": "5", "tool_name": "f"},
                    ],
                    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
                    "options": {"temperature": 0.5, "num_predict": -1, "stop": ["x"], "seed": 3, "num_ctx": 512},
                    "format": {"type": "object"},
                    "keep_alive": "5m",
                    "stream": True,
                }
            ).encode(),
            json.dumps(
                {"model": "m", "prompt": "p", "system": "s", "context": [1, 2], "keep_alive": -1, "logprobs": True}
            ).encode(),
        ),
        "tool calls": (
            b'\x00<tool_call>\n{"name": "f", "arguments": {"a": "}"}}\n</tool_call>',
            b'\x03Well: {"name": "get_weather", "parameters": {"a": [1]}} and more',
            b'\x07[TOOL_CALLS][{"name": "f", "arguments": {}}, {"arguments": {}, "name": "f"}]',
            b'\x02<tool_call>{"arguments": {}, "name": "f"}</tool_call> {"a": 1}',
        ),
        "conversation": (
            json.dumps(
                {
                    "format": "garrison-conversation/1",
                    "system": "Be brief.",
                    "parameters": {"temperature": 0.5, "seed": 1},
                    "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
                }
            ).encode(),
        ),
        "filter": (b"name=edge-1,group=/demo/*,label.site!=x", b"*"),
        "board": (
            b"\x00" + of_kind["desired"],
            b"\x01" + of_kind["receipt"],
            b"\x02" + of_kind["anchor"].replace(b"0" * 32, NONCE),
        ),
        "controller": tuple(
            bytes([place]) + (telemetry() if kind is topics.Up.TELEMETRY else of_kind[kind.value])
            for place, kind in enumerate(topics.Up)
        ),
    }


MUST_REFUSE: Mapping[tuple[str, int], str] = {
    ("envelope", 0): "envelope.bad_signature",  # its signer is not the one whose key the reader looks up
    ("topic", 2): "topic.unknown",  # of no board: who subscribes to it compares it whole
    **{("renewal", place): "renewal.wrong_certificate" for place in range(3)},  # nobody certifies the board's new key
    ("controller", 4): "topic.unexpected",  # this controller answers no fetches
}
"""Honest inputs, by entry and place, that their readers must refuse all the same, and how."""

ODD: tuple[object, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**53,
    2**63,
    2**64,
    10**400,
    0.5,
    -0.0,
    1e308,
    float("inf"),
    float("nan"),
    "",
    "\x00",
    "\ud800",
    "a" * 5000,
    "../../x",
    "0" * 64,
    "1.0",
    "2026-01-01T00:00:00Z",
    "9999-12-31T23:59:59Z",
    [],
    {},
    [[]],
    [{}],
    {"": {}},
    {"a": "\udfff"},
    ["x"] * 3000,
)
"""Values that programs are known to stumble over."""
WORST: tuple[object, ...] = (None, -1, 2**63, 10**400, float("inf"), "\ud800", "\x00", [], {})
"""A few of them, for readers that touch a disk."""


def near(entry_name: str) -> st.SearchStrategy[bytes]:
    """Return a strategy of honest inputs with a few changes: in their bytes, or in the JSON they hold."""
    honest = st.sampled_from(seeds()[entry_name])
    odd = st.one_of(st.sampled_from(ODD), st.integers(), st.text(max_size=20))
    return st.one_of(
        st.binary(max_size=300),
        honest,
        st.builds(_splice, honest, st.integers(0, 10_000), st.integers(0, 40), st.binary(max_size=40)),
        st.builds(_change, honest, st.integers(0, 10_000), odd),
        st.builds(_drop, honest, st.integers(0, 10_000)),
        st.builds(_nest, honest, st.integers(0, 10_000), st.sampled_from([10, 500, 50_000])),
    )


def odd_everywhere(data: bytes, values: Sequence[object] = ODD) -> Iterator[bytes]:
    """Yield ``data`` with each value of its JSON replaced by each odd value, one at a time, and each left out."""
    for place in range(_places(data)):
        yield _drop(data, place)
        for value in values:
            yield _change(data, place, value)


def resigned_everywhere() -> Iterator[bytes]:
    """Yield inputs of ``resigned``: every role, every place, and a few odd values."""
    for role, name in enumerate(FILES[: len(ROLES)]):
        signed = json.loads(registry().content.metadata[name])["signed"]
        for place in range(_places(json.dumps(signed).encode())):
            for value in WORST:
                yield bytes([role, place]) + json.dumps(value).encode()


def _other_end(role: int) -> bytes:
    """Return an input of ``resigned`` that is as good as what it changes: the role's metadata ends at another time."""
    signed = json.loads(registry().content.metadata[FILES[role]])["signed"]
    places: list[tuple[Any, Any]] = []
    _walk(signed, places)
    place = next(at for at, (node, key) in enumerate(places) if node is signed and key == "expires")
    return bytes([role, place]) + b'"2099-01-01T00:00:00Z"'


def _places(data: bytes) -> int:
    for skip in (0, 1):
        with contextlib.suppress(ValueError):
            places: list[tuple[Any, Any]] = []
            _walk(json.loads(data[skip:]), places)
            return len(places)
    return 0


def resigned() -> st.SearchStrategy[bytes]:
    """Return a strategy for ``resigned``: a role, a place, and an odd value."""
    value = st.sampled_from(ODD).map(lambda odd: json.dumps(odd).encode())
    return st.builds(
        lambda role, place, odd: bytes([role, place]) + odd, st.integers(0, 3), st.integers(0, PLACES), value
    )


def _splice(data: bytes, at: int, cut: int, new: bytes) -> bytes:
    at %= len(data) + 1
    return data[:at] + new + data[at + cut :]


def _change(data: bytes, place: int, value: object) -> bytes:
    return _edited(data, place, lambda node, key: node.__setitem__(key, value))


def _drop(data: bytes, place: int) -> bytes:
    return _edited(data, place, lambda node, key: node.__delitem__(key))


def _nest(data: bytes, place: int, depth: int) -> bytes:
    mark = "@nested@"
    text = _change(data, place, mark)
    return text.replace(f'"{mark}"'.encode(), b"[" * depth + b"]" * depth)


def _edited(data: bytes, place: int, edit: Callable[[Any, Any], None]) -> bytes:
    """Apply ``edit`` to one place of the JSON in ``data``, which may stand behind one byte."""
    for skip in (0, 1):
        try:
            document = json.loads(data[skip:])
        except ValueError:
            continue
        places: list[tuple[Any, Any]] = []
        _walk(document, places)
        if places:
            edit(*places[place % len(places)])
            return data[:skip] + json.dumps(document).encode()
    return data


def _walk(node: object, places: list[tuple[Any, Any]]) -> None:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, item in list(items):
        places.append((node, key))
        _walk(item, places)
