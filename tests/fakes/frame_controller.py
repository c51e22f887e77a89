"""Answers a ``MqttSource`` in this process, frame by frame, in the thread that asks; and misbehaves on demand."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from garrison_agent.registry.mqtt_source import MqttSource, Patience
from garrison_protocol import topics
from garrison_protocol.envelope import unseal
from garrison_protocol.keys import SigningKey
from garrison_protocol.messages.base import parse_message
from garrison_protocol.messages.fetch import Chunk, ChunkStatus, Fetch, FetchKind, FetchRefusal, pack_chunk
from tests.fakes.memory_source import RegistryContent
from tests.fakes.ticks import Ticks

DEVICE = "edge-1"
Tamper = Callable[[Fetch, list[Chunk]], Iterable[Chunk | bytes]]
"""Turns the honest answer to a fetch into what arrives: chunks, or raw frames."""
AT_ONCE = Patience(tick_s=0)
"""As long as ever, by a clock that ``Ticks``: nobody waits."""


@dataclass
class FrameController:
    """A controller and a broker in one. The fields after ``content`` are faults, changeable at any time."""

    content: RegistryContent
    documents: dict[FetchKind, Callable[[Fetch], bytes]] = field(default_factory=dict)
    """How it answers what is no file."""
    tamper: Tamper | None = None
    late: Callable[[Chunk], float] | None = None
    """How many seconds each chunk needs. Then they come one by one, and while none is asked for."""
    silent: bool = False
    connected: bool = True
    refuse: FetchRefusal | None = None
    """Answers everything with this."""
    asked: list[Fetch] = field(default_factory=list)
    """Every request whose envelope held."""
    clock: Ticks = field(default_factory=lambda: Ticks(0.05))
    """The clock of its sources."""

    def __post_init__(self) -> None:
        self.key = SigningKey.generate()
        self._on_the_way: deque[Chunk] = deque()
        self._seen = 0

    def source(self, patience: Patience = AT_ONCE) -> MqttSource:
        """Return a board's source that asks this controller."""

        def send(topic: str, payload: bytes) -> bool:
            if not self.connected:
                return False
            assert topic == topics.up(DEVICE, topics.Up.FETCH)
            opened = unseal(payload, lambda signer: self.key.public_hex if signer == self.key.key_id else None)
            fetch = parse_message(Fetch, opened.body, device=DEVICE)
            self.asked.append(fetch)
            if self.silent:
                return True
            chunks = self._chunks(fetch)
            if self.late is not None:
                self._on_the_way += chunks
                return True
            for chunk in chunks if self.tamper is None else self.tamper(fetch, chunks):
                source.receive(chunk if isinstance(chunk, bytes) else pack_chunk(chunk))
            return True

        def connected() -> bool:
            if self._on_the_way and self._seen == len(self.asked):
                chunk = self._on_the_way.popleft()
                self.clock.now_s += 0 if self.late is None else self.late(chunk)
                source.receive(pack_chunk(chunk))
            self._seen = len(self.asked)
            return self.connected

        source = MqttSource(
            device=DEVICE,
            key=self.key,
            send=send,
            connected=connected,
            patience=patience,
            now_s=self.clock,
        )
        return source

    def _chunks(self, fetch: Fetch) -> list[Chunk]:
        whole = self._find(fetch)
        if self.refuse is not None or whole is None:
            refusal = self.refuse or FetchRefusal(code="blob.not_found", message="no such file", status=404)
            return [Chunk(fetch.request, fetch.offset, 0, ChunkStatus.ERROR, refusal.model_dump_json().encode())]
        end = min(fetch.offset + fetch.length, len(whole))
        starts = range(fetch.offset, end, fetch.piece) or [fetch.offset]
        return [
            Chunk(fetch.request, at, len(whole), ChunkStatus.DATA, whole[at : min(at + fetch.piece, end)])
            for at in starts
        ]

    def _find(self, fetch: Fetch) -> bytes | None:
        match fetch.kind:
            case FetchKind.METADATA:
                return self.content.metadata.get(fetch.name)
            case FetchKind.TARGET:
                return self.content.targets.get((fetch.sha256 or "", fetch.name))
            case FetchKind.BLOB:
                return self.content.blobs.get(fetch.sha256 or "")
            case _:
                answer = self.documents.get(fetch.kind)
                return None if answer is None else answer(fetch)
