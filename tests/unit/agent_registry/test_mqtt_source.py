"""The board's side of fetches: time-outs, reconnects, questions that are asked once, and who is blamed."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from garrison_agent.registry.download import Cancelled, download_variant
from garrison_agent.registry.files import BlobStore
from garrison_agent.registry.mqtt_source import MqttSource, Patience
from garrison_protocol.canonical import sha256_hex
from garrison_protocol.errors import RefusedError, UnavailableError
from garrison_protocol.messages.fetch import Chunk, Fetch, FetchKind, FetchRefusal
from tests.fakes.frame_controller import FrameController
from tests.fakes.memory_source import RegistryContent
from tests.fakes.packages import make_package, noise

PACKAGE = make_package(files={"model.gguf": noise(600_000)})
CONTENT = RegistryContent(metadata={"timestamp.json": noise(100_000)}, blobs=dict(PACKAGE.blobs))
SHA = PACKAGE.variant.files[0].sha256
SLOWLY = Patience(stall_s=3000, give_up_s=6000, tick_s=0.005)


def test_nothing_is_asked_while_the_broker_is_away() -> None:
    frames = FrameController(CONTENT, connected=False)
    with pytest.raises(UnavailableError, match="not connected to the broker"):
        frames.source().metadata("timestamp.json", 100_000)
    assert frames.asked == []


def test_an_answer_that_got_lost_is_asked_for_again_in_smaller_windows() -> None:
    frames = FrameController(CONTENT)
    frames.tamper = lambda _fetch, chunks: [] if len(frames.asked) <= 2 else chunks
    assert frames.source().metadata("timestamp.json", 100_000) == CONTENT.metadata["timestamp.json"]
    assert frames.asked[0].length > frames.asked[2].length
    assert len({fetch.request for fetch in frames.asked}) == len(frames.asked)


def test_after_a_reconnect_it_asks_at_once_and_goes_on_where_it_was() -> None:
    frames = FrameController(CONTENT)
    source = frames.source(SLOWLY)

    def cut(fetch: Fetch, chunks: list[Chunk]) -> list[Chunk]:
        if fetch.offset == 0:
            threading.Timer(0.01, source.reconnected).start()
            return chunks[:2]
        return chunks if len(frames.asked) > 2 else []

    frames.tamper = cut
    assert b"".join(source.blob(SHA, 0)) == CONTENT.blobs[SHA]
    assert frames.asked[2].offset == 2 * frames.asked[0].piece


def test_a_transfer_can_be_cancelled_while_nothing_comes(tmp_path: Path) -> None:
    frames = FrameController(CONTENT, silent=True)
    with pytest.raises(Cancelled):
        download(frames.source(SLOWLY), tmp_path, cancelled=True)


def test_two_transfers_at_once_do_not_mix() -> None:
    frames = FrameController(CONTENT)
    source = frames.source()
    one, two = source.blob(SHA, 0), source.blob(SHA, 100_000)
    got = [b"", b""]
    for second, first in zip(two, one, strict=False):  # the second one ends earlier
        got[0] += first
        got[1] += second
    got[0] += b"".join(one)
    assert got == [CONTENT.blobs[SHA], CONTENT.blobs[SHA][100_000:]]
    assert source._transfers == {}


def test_what_was_left_in_the_middle_is_forgotten() -> None:
    frames = FrameController(CONTENT)
    frames.tamper = lambda _fetch, chunks: chunks[:1]
    source = frames.source()
    stream = source.blob(SHA, 0)
    assert next(stream)
    assert source._transfers
    stream.close()
    assert source._transfers == {}


def test_documents_come_in_one_window() -> None:
    frames = FrameController(CONTENT, {FetchKind.ANCHOR: lambda fetch: fetch.name.encode() * 1000})
    assert frames.source().ask(FetchKind.ANCHOR, "ab" * 16, "") == b"ab" * 16_000
    assert [(fetch.offset, fetch.name) for fetch in frames.asked] == [(0, "ab" * 16)]


def test_a_renewal_is_never_sent_twice() -> None:
    frames = FrameController(CONTENT, silent=True)
    with pytest.raises(UnavailableError, match=r"source\.unreachable"):
        frames.source().ask(FetchKind.CERTIFICATE, "", "{}")
    assert len(frames.asked) == 1


def test_a_refusal_of_a_renewal_has_its_own_code() -> None:
    frames = FrameController(CONTENT, refuse=FetchRefusal(code="renewal.grace_over", message="too late", status=403))
    with pytest.raises(RefusedError) as caught:
        frames.source().ask(FetchKind.CERTIFICATE, "", "{}")
    assert (caught.value.code, caught.value.message, caught.value.retryable) == ("renewal.grace_over", "too late", True)


def test_wrong_bytes_delay_a_deployment_and_do_not_end_it(tmp_path: Path) -> None:
    content = RegistryContent(blobs={**CONTENT.blobs, SHA: noise(600_000, seed=2)})
    source = FrameController(content).source()
    with pytest.raises(UnavailableError) as caught, source.blamed():
        download(source, tmp_path)
    assert (caught.value.code, caught.value.retryable) == ("source.damaged", True)
    with pytest.raises(RefusedError, match=r"disk\.bad"), source.blamed():
        raise RefusedError("disk.bad", "nothing of this came over the broker")
    assert sha256_hex(content.blobs[SHA]) != SHA


def download(source: MqttSource, folder: Path, *, cancelled: bool = False) -> None:
    download_variant(
        PACKAGE.manifest,
        PACKAGE.variant,
        source,
        BlobStore(folder / "blobs"),
        progress=lambda _done, _total: None,
        cancelled=lambda: cancelled,
    )
