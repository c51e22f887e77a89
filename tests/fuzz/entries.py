"""What is fuzzed: a function for each reader of bytes that others wrote. See the package's docstring."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from pydantic import BaseModel
from securesystemslib.formats import encode_canonical
from securesystemslib.signer import CryptoSigner
from uvicorn.server import ServerState

from garrison_agent.adapters.renewal import MqttCarrier, Renewal
from garrison_agent.api.access import ModelAccess
from garrison_agent.api.app import LocalApp, TcpRules
from garrison_agent.api.applications import parse_new_app
from garrison_agent.api.asgi import parse_object
from garrison_agent.api.connection import MAX_HEADER_BYTES, ClientConnection
from garrison_agent.api.ollama import parse_keep_alive
from garrison_agent.api.relay import whole_events
from garrison_agent.api.routes import RouteTable
from garrison_agent.api.upstream_answer import AnswerReader
from garrison_agent.cli.conversation import Conversation, parse_conversation
from garrison_agent.core.applications import ApplicationTable
from garrison_agent.core.health import row, summarize
from garrison_agent.core.meters import Meters
from garrison_agent.core.progress import MAX_STEP_S, Watch, watch
from garrison_agent.http_server import Config
from garrison_agent.identity import Folders, Identity
from garrison_agent.registry import trust
from garrison_agent.registry.selection import choose_variant
from garrison_agent.runtimes.embeddings.requests import EmbeddingRequest, OllamaEmbedRequest, OllamaOlderRequest
from garrison_agent.runtimes.grammars.gbnf import MAX_GRAMMAR_BYTES
from garrison_agent.runtimes.grammars.grammar import json_schema_grammar
from garrison_agent.runtimes.ollama.requests import ChatRequest as OllamaChatRequest
from garrison_agent.runtimes.ollama.requests import GenerateRequest
from garrison_agent.runtimes.openai.api_errors import ApiError
from garrison_agent.runtimes.openai.chat_requests import ChatRequest
from garrison_agent.runtimes.openai.requests import CompletionRequest, ScoreRequest, parse_request
from garrison_agent.runtimes.openai.responses_requests import ResponseRequest
from garrison_agent.runtimes.openai.tool_calls import CallParser, CallPiece
from garrison_agent.runtimes.openai.tool_calls_grammar import Constraint
from garrison_agent.runtimes.openai.tool_calls_prompt import with_tools_in_words
from garrison_agent.runtimes.status import RequestDone, decode_event, encode_event
from garrison_agent.runtimes.tensors.oip import parse_infer
from garrison_agent.runtimes.tensors.tensor import TensorSpec
from garrison_controller.devices.ca import csr_public_key
from garrison_controller.devices.filter import DeviceFacts, holds, parse_filter
from garrison_protocol import bundle, envelope, topics
from garrison_protocol.canonical import canonical_json
from garrison_protocol.errors import GarrisonError
from garrison_protocol.fleet import parse_fleet
from garrison_protocol.keys import SigningKey
from garrison_protocol.manifest import PackageRef, parse_manifest, unpack_chunks
from garrison_protocol.messages import anchor, desired, fetch, report, streams
from garrison_protocol.messages.base import Message, encode, parse_message
from garrison_protocol.messages.enrolment import (
    EnrolmentString,
    EnrolRequest,
    OfflineRequest,
    OfflineResponse,
    RenewRequest,
    RenewResponse,
    SessionRequest,
    parse_enrolment,
)
from garrison_protocol.messages.fetch import FetchKind
from garrison_protocol.states import KeyPurpose
from tests.fakes.memory_source import MemorySource, RegistryContent
from tests.fakes.packages import make_package
from tests.fakes.pki import FleetPki
from tests.fakes.tuf_repository import FakeRepository
from tests.unit.loop.rig import DIRECTOR, INVENTORY, RECEIPTS, Rig
from tests.unit.rollouts.fleet import Fleet

DEVICE = "edge-1"
TOOLS = ("get_weather", "f")
MESSAGES: Mapping[str, type[Message]] = {
    "status": report.Status,
    "report": report.Report,
    "audit": streams.Batch,
    "receipt": streams.Receipt,
    "desired": desired.Desired,
    "anchor": anchor.Anchor,
    "fetch": fetch.Fetch,
}
_CODE = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+){0,2}")
_KEY = SigningKey.generate()
_NOW = datetime(2027, 1, 1, tzinfo=UTC)
Entry = Callable[[bytes], None]


class Found(Exception):  # noqa: N818 - a finding, not an error of the program
    """The reader broke a promise on this input."""


READ = "read"
"""The outcome of a block that took its input."""
_RECORDINGS: list[list[str]] = []


@contextlib.contextmanager
def recorded() -> Iterator[list[str]]:
    """Collect the outcome of each ``only_coded`` block within, in their order: ``READ``, or why it refused."""
    outcomes: list[str] = []
    _RECORDINGS.append(outcomes)
    try:
        yield outcomes
    finally:
        _RECORDINGS.pop()


def _record(outcome: str) -> None:
    for outcomes in _RECORDINGS:
        outcomes.append(outcome)


@contextlib.contextmanager
def only_coded(*others: type[Exception]) -> Iterator[None]:
    """Let the block refuse its input with a coded error (or one of ``others``); anything else is a finding."""
    try:
        yield
    except GarrisonError as error:
        _check_error(error)
        _record(error.code)
    except others as error:
        _record(type(error).__name__)
    except Found:
        raise
    except Exception as error:
        raise Found(f"{type(error).__name__}: {error}") from error
    else:
        _record(READ)


def _check_error(error: GarrisonError) -> None:
    if _CODE.fullmatch(error.code) is None:
        raise Found(f"a code like no other: {error.code!r}") from error
    json.dumps(error.to_dict()).encode()
    error.message.encode()  # half a surrogate pair would end a log line, an audit entry, or a report
    if len(error.message) > MAX_MESSAGE_LENGTH:
        raise Found(f"{error.code}: a message of {len(error.message)} characters") from error


MAX_MESSAGE_LENGTH = 20_000


def _promise(holds_: bool, what: str) -> None:
    if not holds_:
        raise Found(what)


# --- protocol --------------------------------------------------------------------------------------------------------


def read_envelope(data: bytes) -> None:
    """Any bytes as an envelope, by anybody."""
    with only_coded():
        envelope.unseal(data, lambda _signer: _KEY.public_hex)
        raise Found("an envelope that nobody signed was opened")


def read_signed(data: bytes) -> None:
    """Any bytes as the body of a message that a stolen key signed; the first byte chooses kind and compression."""
    choice, body = (data[0], data[1:]) if data else (0, b"")
    kind = list(MESSAGES)[choice % len(MESSAGES)]
    suffix = "+json+zlib" if choice >= 128 else "+json"
    with only_coded():
        opened = envelope.unseal(_seal(kind + suffix, body), lambda _signer: _KEY.public_hex)
        message = parse_message(MESSAGES[kind], opened.body, device=DEVICE)
        _promise(message.device == DEVICE, "a message of another board was accepted")
        again = parse_message(MESSAGES[kind], encode(message), device=DEVICE)
        _promise(encode(again) == encode(message), "a message changes when it is written and read again")


def _seal(suffix: str, payload: bytes) -> bytes:
    payload_type = envelope.TYPE_PREFIX + suffix
    outer = {
        "payloadType": payload_type,
        "payload": base64.b64encode(payload).decode(),
        "signatures": [
            {
                "keyid": _KEY.key_id,
                "sig": base64.b64encode(_KEY.sign(envelope.pae(payload_type, payload))).decode(),
            }
        ],
    }
    return json.dumps(outer).encode()


def read_topic(data: bytes) -> None:
    """Any text as a topic."""
    text = data.decode("utf-8", "surrogateescape")
    with only_coded():
        topic = topics.parse(text)
        built = (topics.up if isinstance(topic.kind, topics.Up) else topics.down)(topic.device, topic.kind)  # type: ignore[arg-type]
        _promise(built == text, "a topic was read that is never built")


def read_manifest(data: bytes) -> None:
    """Any bytes as a signed manifest, through everything that a board asks of it before it downloads."""
    with only_coded():
        manifest = parse_manifest(data)
        choose_variant(manifest, INVENTORY, 1000)
        _ = manifest.id, manifest.parameter_class, manifest.evaluation.cases_sha256
        for variant in manifest.variants:
            _promise(variant.size_bytes >= 0, "a negative size")
            for file in variant.files:
                _promise(".." not in Path(file.path).parts and not file.path.startswith("/"), "a path that leads out")
                with contextlib.suppress(GarrisonError):
                    unpack_chunks(b"", file)
        again = parse_manifest(manifest.model_dump_json().encode())
        _promise(again == manifest or b"NaN" in data or b"nan" in data, "a manifest changes when it is written")


def read_fleet(data: bytes) -> None:
    """Any bytes as a signed ``fleet.json``."""
    with only_coded():
        fleet = parse_fleet(data)
        for purpose in KeyPurpose:
            fleet.public_key(purpose, "0" * 64, _NOW)
        for key in fleet.keys:
            fleet.public_key(key.purpose, hashlib.sha256(bytes.fromhex(key.public)).hexdigest(), _NOW)
        for name in fleet.floors:
            fleet.below_floor(name, "1.0")


def read_message(data: bytes) -> None:
    """Any bytes as the body of every kind of message."""
    for model in MESSAGES.values():
        with only_coded():
            parse_message(model, data, device=DEVICE)


def read_chunk(data: bytes) -> None:
    """Any bytes as a chunk frame."""
    with only_coded():
        chunk = fetch.unpack_chunk(data)
        _promise(fetch.pack_chunk(chunk) == data, "a frame changes when it is written again")
    refusal: fetch.FetchRefusal | None = None
    with only_coded(ValueError):  # pydantic's ValidationError, which whoever asked expects
        refusal = fetch.FetchRefusal.model_validate_json(data)
    if refusal is not None:  # outside: what cannot be encoded is a ValueError too
        _check_error(GarrisonError(refusal.code, refusal.message, hint=refusal.hint))


def read_enrolment(data: bytes) -> None:
    """Any text as an enrolment string, and any bytes as the requests and answers of enrolment."""
    with only_coded():
        line = parse_enrolment(data.decode("utf-8", "surrogateescape"))
        _promise(parse_enrolment(line.encode()) == line, "an enrolment string changes when it is written")
    with only_coded():
        # What lies behind the prefix, so that not every input fails at the first character.
        parse_enrolment("garrison-enroll:" + data.decode("latin-1"))
    models: tuple[type[BaseModel], ...] = (
        EnrolmentString,
        EnrolRequest,
        SessionRequest,
        RenewRequest,
        OfflineRequest,
        OfflineResponse,
    )
    for model in models:
        with only_coded(ValueError):  # pydantic's ValidationError is one; every caller of these expects it
            model.model_validate_json(data)


def read_bundle(data: bytes) -> None:
    """Any text as a path on a stick, and any bytes as the documents there."""
    text = data.decode("utf-8", "surrogateescape")
    with only_coded():
        place = bundle.parse(text)
        built = {
            bundle.Kind.METADATA: lambda: bundle.metadata_path(place.name),
            bundle.Kind.TARGET: lambda: bundle.target_path(place.name, place.sha256),
            bundle.Kind.BLOB: lambda: bundle.blob_path(place.sha256),
        }.get(place.kind)
        _promise(built is None or built() == text, "a path was read that is never built")
        _promise(".." not in text.split("/") and not text.startswith("/"), "a path that leads out")
    for model in (bundle.Head, bundle.HomeRequest):
        with only_coded():
            bundle.parse_document(model, data, "a document")


def read_csr(data: bytes) -> None:
    """Any text as a board's certificate request."""
    with only_coded():
        csr_public_key(data.decode("utf-8", "surrogateescape"))
    with only_coded():
        der = base64.encodebytes(data).decode()
        csr_public_key(f"-----BEGIN CERTIFICATE REQUEST-----\n{der}-----END CERTIFICATE REQUEST-----\n")


@dataclass(frozen=True)
class Enrolled:
    """A board's identity, a certificate for it (DER), and the fleet's device CA (PEM)."""

    identity: Identity
    certificate: bytes
    device_ca: str
    hold: tempfile.TemporaryDirectory[str]


@cache
def enrolled() -> Enrolled:
    """Return one board for the whole run: whatever it is answered, it never gets a certificate for its new key."""
    hold = tempfile.TemporaryDirectory(prefix="garrison-fuzz-")
    pki = FleetPki(Path(hold.name) / "pki")
    folders = Folders(Path(hold.name) / "board")
    folders.identity.mkdir(parents=True)
    SigningKey.generate().save(folders.signing_key)
    record = {"device": DEVICE, "url": "https://x", "mqtt_host": "x", "mqtt_port": 1, "token_sha256": "0" * 64}
    folders.record.write_text(json.dumps(record))
    certificate = pki.issue(DEVICE).certificate.public_bytes(serialization.Encoding.DER)
    return Enrolled(Identity.load(folders.state), certificate, pki.device_ca.pem.read_text(), hold)


def read_renewal(data: bytes) -> None:
    """Any bytes as a broker's answer to a renewal; the first byte chooses: nonce, whole answer, or certificate."""
    choice, rest = (data[0] % 3, data[1:]) if data else (0, b"")
    board = enrolled()

    def ask(kind: FetchKind, name: str, body: str) -> bytes:
        if kind is FetchKind.NONCE:
            return rest if choice == 0 else b'{"nonce": "n", "time": 0}'
        der = base64.encodebytes(rest).decode()
        pem = f"-----BEGIN CERTIFICATE-----\n{der}-----END CERTIFICATE-----\n"
        return (
            rest
            if choice == 1
            else RenewResponse(certificate_pem=pem, mqtt_host="x", mqtt_port=1).model_dump_json().encode()
        )

    with only_coded():
        Renewal(board.identity, [MqttCarrier(ask)], lambda: board.device_ca).renew()
        raise Found("a certificate for another key was taken")


# --- the registry's metadata through the board's chain ---------------------------------------------------------------


@dataclass(frozen=True)
class Registry:
    """An honest registry, and the folder of a board that has refreshed from it once."""

    repository: FakeRepository
    content: RegistryContent
    wanted: str
    folder: Path
    high_water: dict[str, int]
    trusted_at: int
    hold: tempfile.TemporaryDirectory[str]


FILES = ("2.root.json", "timestamp.json", "3.snapshot.json", "3.targets.json", "target")
ROLES = ("root", "timestamp", "snapshot", "targets")


@cache
def registry() -> Registry:
    """Return one registry for the whole run; inputs are tried on copies of its content."""
    hold = tempfile.TemporaryDirectory(prefix="garrison-fuzz-")
    repository = FakeRepository()
    package = make_package()
    repository.add(package)
    repository.publish()
    folder = Path(hold.name) / "registry"
    view = trust.refresh(
        MemorySource(repository.content),
        folder,
        bootstrap=repository.bootstrap,
        high_water={},
        floor=datetime.now(UTC),
        want=[package.path],
    )
    repository.rotate("snapshot")
    repository.publish()
    return Registry(repository, repository.content, package.path, folder, view.high_water, view.refreshed_at, hold)


def read_metadata(data: bytes) -> None:
    """Any bytes in place of one file of the registry's next publication; the first byte chooses which."""
    choice, rest = (data[0], data[1:]) if data else (0, b"")
    name = FILES[choice % len(FILES)]
    honest = registry()
    metadata, targets = dict(honest.content.metadata), dict(honest.content.targets)
    if name == "target":
        targets |= {(sha256, path): rest for sha256, path in targets if path == honest.wanted}
    else:
        metadata[name] = rest
    _try_refresh(RegistryContent(metadata, targets, {}))


def read_resigned_metadata(data: bytes) -> None:
    """Metadata that thieves of a whole role changed and signed: a JSON value replaces one at some place in it.

    The first byte chooses the role, the second the place; the rest is the JSON of the new value.
    """
    if len(data) < 3:
        return
    role = ROLES[data[0] % len(ROLES)]
    honest = registry()
    metadata = dict(honest.content.metadata)
    name = next(one for one in FILES if role in one)
    document = json.loads(metadata[name])
    try:
        value = json.loads(data[2:])
    except (ValueError, RecursionError):
        value = data[2:].decode("latin-1")
    _replace(document["signed"], data[1], value)
    repository = honest.repository
    signers = repository.root_signers if role == "root" else repository.signers[role]
    with contextlib.suppress(Exception):  # what has no canonical form cannot be signed: served as it is
        document["signatures"] = [_sign(signer, document["signed"]) for signer in signers]
    try:
        metadata[name] = json.dumps(document).encode()
    except RecursionError:
        return
    _vouch(metadata, role, repository)
    _try_refresh(RegistryContent(metadata, dict(honest.content.targets), {}))


def _replace(document: dict[str, Any], place: int, value: object) -> None:
    """Put ``value`` at the ``place``-th value of the tree, counted over and over again."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, item in list(items):
            places.append((node, key))
            walk(item)

    walk(document)
    node, key = places[place % len(places)]
    node[key] = value


def _sign(signer: CryptoSigner, signed: Any) -> dict[str, str]:
    text = encode_canonical(signed)
    assert text is not None  # it would be written somewhere else
    return dict(signer.sign(text.encode()).to_dict())


def _vouch(metadata: dict[str, bytes], role: str, repository: FakeRepository) -> None:
    """Let the online roles name what was changed, as thieves of their keys would."""
    chain = {"targets": ("3.snapshot.json", "targets.json"), "snapshot": ("timestamp.json", "snapshot.json")}
    while role in chain:
        name, listed = chain[role]
        changed = metadata[f"3.{role}.json"]
        document = json.loads(metadata[name])
        entry = document["signed"]["meta"][listed]
        entry["length"], entry["hashes"] = len(changed), {"sha256": hashlib.sha256(changed).hexdigest()}
        role = "timestamp" if name == "timestamp.json" else "snapshot"
        document["signatures"] = [_sign(signer, document["signed"]) for signer in repository.signers[role]]
        metadata[name] = json.dumps(document).encode()


def _try_refresh(content: RegistryContent) -> None:
    honest = registry()
    with tempfile.TemporaryDirectory(prefix="garrison-fuzz-") as scratch, only_coded():
        view = trust.refresh(
            MemorySource(content),
            Path(scratch),
            bootstrap=honest.repository.bootstrap,
            high_water=honest.high_water,
            floor=datetime.fromtimestamp(honest.trusted_at, UTC),
            want=[honest.wanted],
        )
        _check_view(view, honest)


def read_cache(data: bytes) -> None:
    """Any bytes as the board's own cache of trusted metadata, after a power cut or by somebody's hand."""
    honest = registry()
    with tempfile.TemporaryDirectory(prefix="garrison-fuzz-") as scratch, only_coded():
        folder = Path(scratch)
        for name in ("roots", "targets"):
            (folder / name).mkdir()
            for path in (honest.folder / name).iterdir():
                (folder / name / path.name).write_bytes(path.read_bytes())
        (folder / "trusted.json").write_bytes(data)
        view = trust.offline(
            folder,
            bootstrap=honest.repository.bootstrap,
            high_water=honest.high_water,
            trusted_at=honest.trusted_at,
            want=[honest.wanted],
            floor=datetime.fromtimestamp(honest.trusted_at, UTC) + timedelta(days=1),
        )
        _check_view(view, honest)


def _check_view(view: trust.Refresh, honest: Registry) -> None:
    """What was accepted must fit the store and the audit chain, and must be what somebody signed."""
    for role, mark in view.high_water.items():
        _promise(0 < mark < 2**53, f"version {mark} of {role} was accepted")
    for path, manifest in view.manifests.items():
        digest = hashlib.sha256(manifest).hexdigest()
        known = honest.content.targets.get((digest, path))
        _promise(known == manifest, "a manifest that nobody signed was accepted")
        name, version = path.split("/")[1:3]
        with contextlib.suppress(GarrisonError):
            trust.admit(view, PackageRef(name=name, version=version, manifest_sha256=digest))


# --- the local API and the controller --------------------------------------------------------------------------------

_INPUTS = (
    TensorSpec("x", "FP32", (-1, 2)),
    TensorSpec("n", "INT8", (-1,)),
    TensorSpec("s", "BYTES", (1,)),
    TensorSpec("b", "BOOL", (-1,)),
    TensorSpec("u", "UINT64", (-1,)),
)


def read_infer(data: bytes) -> None:
    """Any bytes as a request of the Open Inference Protocol, for models of one and of many inputs."""
    for specs in (_INPUTS, *((one,) for one in _INPUTS)):
        with only_coded():
            request = parse_infer(data, specs, (TensorSpec("y", "FP32", (-1,)),))
            for spec in specs:
                _promise(spec.fits(request.inputs[spec.name].shape), "a tensor that does not fit was accepted")


def read_binary_infer(data: bytes) -> None:
    """Any bytes as a request with binary tensors; the first two say where its JSON ends."""
    length, body = int.from_bytes(data[:2], "big"), data[2:]
    for specs in (_INPUTS, *((one,) for one in _INPUTS)):
        with only_coded():
            request = parse_infer(body, specs, (TensorSpec("y", "FP32", (-1,)),), length)
            for spec in specs:
                tensor = request.inputs[spec.name]
                _promise(tensor.flags.aligned, "the runtime would read an unaligned tensor")
                _promise(spec.fits(request.inputs[spec.name].shape), "a tensor that does not fit was accepted")


def read_worker(data: bytes) -> None:
    """Any bytes as a line that a worker wrote, and as what it says of its health."""
    with only_coded(ValueError):
        event = decode_event(data)
        if isinstance(event, RequestDone):
            meters = Meters()
            meters.add("chat", event.record)
            canonical_json([*meters.rows(), row("chat", "smollm2:1.0.0", event.record), summarize([event.record])])
    with only_coded(ValueError, RecursionError):
        health = json.loads(data)
        if isinstance(health, dict):
            _promise(watch(Watch(0.0), health, 1.0).step_timeout_s <= MAX_STEP_S, "a step that never ends")


def read_upstream(data: bytes) -> None:
    """Any bytes as an upstream's answer, in pieces; the first byte says of what size, and whether it is a stream."""
    choice, body = (data[0], data[1:]) if data else (0, b"")
    events, size = bool(choice % 2), choice // 2 + 1
    for hide_usage in (False, True):
        with only_coded():
            reader = AnswerReader("/v1/chat/completions", "camera", hide_usage=hide_usage)
            passed, held = b"", b""
            for at in range(0, len(body), size):
                held += body[at : at + size]
                whole, held = whole_events(held) if events else (held, b"")
                passed += reader.read(whole, events)
            passed += reader.read(held, events)
            record = reader.to_record()
            _promise(decode_event(encode_event(RequestDone(record))) == RequestDone(record), "a record out of bounds")
            canonical_json([row("big", "big:upstream", record), summarize([record])])
        _promise(passed == body or (hide_usage and events), "an answer was changed")


def read_application(data: bytes) -> None:
    """Any bytes as the description of an application that shall get a key."""
    with only_coded():
        wanted = parse_new_app(data)
        _promise(min(wanted.requests_per_min, wanted.tokens_per_min, wanted.concurrent) >= 0, "a limit below zero")


class _Wire(asyncio.Transport):
    """A connection's other end that takes everything."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.ended = self.closed = False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 5273) if name in ("sockname", "peername") else default

    def write(self, data: Any) -> None:
        _promise(not self.ended, "something is written behind the end")
        self.written += data

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.ended = True

    def close(self) -> None:
        self.closed = True

    abort = close

    def is_closing(self) -> bool:
        return self.closed

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


def read_http(data: bytes) -> None:
    """Any bytes as what a client of the local API sends, in pieces whose size the first one says."""
    size, text = (data[0] + 1, data[1:]) if data else (1, b"")

    async def talk() -> bytes:
        access = ModelAccess(RouteTable, lambda command: Future())
        app = LocalApp(access, Path("/"), list, applications=ApplicationTable, tcp=TcpRules())
        settings: dict[str, Any] = {"app": app, "http": ClientConnection}
        config = Config(**settings, ws="none", lifespan="off", interface="asgi3", log_config=None, date_header=False)
        state, wire = ServerState(), _Wire()
        connection = ClientConnection(config, state, {})
        connection.connection_made(wire)
        for at in range(0, len(text), size):
            if wire.closed:
                break
            connection.data_received(text[at : at + size])
            await asyncio.sleep(0)
        held = sum(len(name) + len(value) for name, value in connection.headers or ())
        _promise(held <= MAX_HEADER_BYTES, "headers beyond the bound are held")
        connection.connection_lost(None)
        if state.tasks:
            await asyncio.wait(state.tasks)
        return wire.written

    with only_coded():
        answered = asyncio.run(talk())
        _promise(b"HTTP/1.1 500" not in answered, "the API met what it did not expect")
        if not answered.startswith((b"HTTP/1.1 200", b"HTTP/1.1 404")):
            raise GarrisonError("http.refused", "refused, or never asked")


def read_openai(data: bytes) -> None:
    """Any bytes as a request in OpenAI's words, at the API and at the worker."""
    with only_coded():
        parse_object(data)
    for model in (ChatRequest, CompletionRequest, ResponseRequest, ScoreRequest):
        with only_coded(ApiError):
            try:
                parsed = parse_request(model, data)
            except ApiError as error:
                json.dumps(error.body()).encode()
                error.message.encode()
                raise
            if isinstance(parsed, ChatRequest | CompletionRequest):
                parsed.options(None)
                _ = parsed.include_usage
            if isinstance(parsed, ChatRequest | ResponseRequest):
                _ = parsed.wanted_schema, parsed.wanted_logprobs
                with_tools_in_words(parsed.turns, parsed.template_tools)


def read_embedding(data: bytes) -> None:
    """Any bytes as a request for embeddings, in OpenAI's words and Ollama's."""
    models: tuple[type[EmbeddingRequest | OllamaEmbedRequest | OllamaOlderRequest], ...] = (
        EmbeddingRequest,
        OllamaEmbedRequest,
        OllamaOlderRequest,
    )
    for model in models:
        with only_coded(ApiError):
            try:
                parsed = parse_request(model, data)
            except ApiError as error:
                json.dumps(error.body()).encode()
                error.message.encode()
                raise
            _promise(all(isinstance(one, str | tuple) for one in parsed.inputs), "an input is neither text nor tokens")


def read_schema(data: bytes) -> None:
    """Any bytes as a JSON schema."""
    with contextlib.suppress(ValueError, RecursionError):
        schema = json.loads(data)
        with only_coded():
            text = json_schema_grammar(schema)
            _promise(text.startswith("root ::= "), "a grammar without its root")
            _promise(len(text.encode()) <= MAX_GRAMMAR_BYTES, "a grammar beyond its bound")


def read_ollama(data: bytes) -> None:
    """Any bytes as a request in Ollama's words, at the API and at the worker."""
    with only_coded():
        parse_keep_alive(parse_object(data).get("keep_alive"))
    for model in (OllamaChatRequest, GenerateRequest):
        with only_coded(ApiError):
            try:
                parsed = parse_request(model, data)
                parsed.to_options(2048, Constraint())
            except ApiError as error:
                error.message.encode()
                raise
            _ = parsed.wanted_schema
            if isinstance(parsed, GenerateRequest):
                _ = parsed.turns
            if isinstance(parsed, OllamaChatRequest):
                _ = parsed.tool_use
                with_tools_in_words(parsed.turns, parsed.template_tools)


def read_tool_calls(data: bytes) -> None:
    """Any text as a model's answer with tools at hand, in pieces; the first byte says of what size."""
    text = data[1:].decode("utf-8", "replace")
    size = 1 + (data[0] % 16 if data else 0)
    with only_coded():
        whole, pieces = _told(text, len(text) or 1), _told(text, size)
    _promise(whole == pieces, "an answer depends on how it came in pieces")
    said, calls = whole
    for name, arguments in calls:
        _promise(name in TOOLS and arguments.startswith("{"), "what is no call was told as one")
    _promise(bool(calls) or said == text or "<tool_call>" in text or "[TOOL_CALLS]" in text or '"name"' in text, "lost")


def _told(text: str, size: int) -> tuple[str, list[tuple[str, str]]]:
    """Return the text and the calls of an answer that comes in pieces of ``size``."""
    parser = CallParser(TOOLS)
    items = [item for at in range(0, len(text), size) for item in parser.push(text[at : at + size])]
    items += parser.finish()
    calls: list[tuple[str, str]] = []
    for item in items:
        if isinstance(item, CallPiece):
            if item.name is not None:
                calls.append((item.name, ""))
            calls[item.number] = (calls[item.number][0], calls[item.number][1] + item.arguments)
    return "".join(item for item in items if isinstance(item, str)), calls[: parser.complete]


def read_conversation(data: bytes) -> None:
    """Any bytes as a file of a conversation; what is taken can be asked on, kept, and taken again."""
    with only_coded():
        stored = parse_conversation(data)
        talk = Conversation("m", stored.system, stored.parameters, messages=stored.messages)
        _promise(len(talk.request("x")["messages"]) == len(stored.messages) + 1 + bool(stored.system), "turns got lost")
        _promise(parse_conversation(stored.model_dump_json().encode()) == stored, "it reads back differently")


def read_filter(data: bytes) -> None:
    """Any text as a target filter."""
    with only_coded():
        terms = parse_filter(data.decode("utf-8", "surrogateescape"))
        holds(DeviceFacts("edge-1", "/demo/", {"site": "x"}), terms)


# --- whole sides, from the message to the store ----------------------------------------------------------------------


TOLD = (("desired", DIRECTOR), ("receipt", RECEIPTS), (anchor.ANCHOR_KIND, DIRECTOR))
NONCE = b"@nonce@"
"""Stands in generated anchors where the board's nonce is due."""


class ToldBoard(Rig):
    """A board to whose nonces somebody with the director key answers ``told``."""

    told: bytes | None = None

    def answer(self, nonce: str) -> bytes:
        if self.told is None:
            return super().answer(nonce)
        return envelope.seal(anchor.ANCHOR_KIND, self.told.replace(NONCE, nonce.encode()), DIRECTOR)


def tell_board(data: bytes) -> None:
    """Any bytes as what stolen director and receipt keys sign, or nobody, told to a whole board that then restarts."""
    choice, body = (data[0], data[1:]) if data else (0, b"")
    kind, key = TOLD[choice % len(TOLD)]
    with tempfile.TemporaryDirectory(prefix="garrison-fuzz-") as scratch, only_coded():
        board = ToldBoard(Path(scratch))
        try:
            board.told = body if kind == anchor.ANCHOR_KIND else None
            board.settle()
            board.connect()
            topic = topics.down(DEVICE, topics.Down.RECEIPT if kind == "receipt" else topics.Down.DESIRED)
            board.receive(topic, body if choice >= 128 else envelope.seal(kind, body, key))
            board.forward(5)
            refused = set(board.parts.inbound.refused)
            board.restart()
            board.connect()
        finally:
            board.database.close()
        if kind == anchor.ANCHOR_KIND:
            refused.discard("envelope.kind_unexpected")  # as a message; as an answer to a nonce it is due
        _refused_inside(refused)


def _refused_inside(codes: Collection[str]) -> None:
    """Raise what a whole side did not raise, but count."""
    for code in sorted(codes):
        raise GarrisonError(code, "refused and counted")


@cache
def _controller() -> tuple[Fleet, tempfile.TemporaryDirectory[str]]:
    hold = tempfile.TemporaryDirectory(prefix="garrison-fuzz-")
    return Fleet(Path(hold.name)), hold


def tell_controller(data: bytes) -> None:
    """Any bytes as what an enrolled board signs, or nobody, told to the controller's database."""
    choice, body = (data[0], data[1:]) if data else (0, b"")
    fleet, _ = _controller()
    board, kind = fleet.boards[DEVICE], list(topics.Up)[choice % len(topics.Up)]
    before = fleet.refusals()
    with only_coded():
        payload = body if choice >= 128 else envelope.seal(kind.value, body, board.key)
        fleet.ingest.handle(topics.up(DEVICE, kind), payload)
        _refused_inside(
            {code for (sender, code), count in fleet.refusals().items() if count > before.get((sender, code), 0)}
        )
    _promise((DEVICE, "message.handler_failed") not in fleet.refusals(), "the handler met what it did not expect")


ENTRIES: Mapping[str, Entry] = {
    "envelope": read_envelope,
    "signed": read_signed,
    "topic": read_topic,
    "manifest": read_manifest,
    "fleet": read_fleet,
    "message": read_message,
    "chunk": read_chunk,
    "enrolment": read_enrolment,
    "bundle": read_bundle,
    "csr": read_csr,
    "renewal": read_renewal,
    "metadata": read_metadata,
    "resigned": read_resigned_metadata,
    "cache": read_cache,
    "infer": read_infer,
    "binary infer": read_binary_infer,
    "worker": read_worker,
    "upstream": read_upstream,
    "application": read_application,
    "http": read_http,
    "openai": read_openai,
    "ollama": read_ollama,
    "embedding": read_embedding,
    "schema": read_schema,
    "tool calls": read_tool_calls,
    "conversation": read_conversation,
    "filter": read_filter,
    "board": tell_board,
    "controller": tell_controller,
}
"""Readers by name: what ``make fuzz`` and the regression cases call them."""
