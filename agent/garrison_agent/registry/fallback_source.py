"""Which way registry bytes come: over HTTP, over MQTT, or over HTTP while it works and over MQTT while it does not."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Literal, TypeVar

from garrison_agent.registry.source import MetadataSource, Source
from garrison_agent.registry.trust import Refresh
from garrison_agent.registry.verifier import Verifier
from garrison_protocol.errors import GarrisonError, UnavailableError

HTTP_PAUSE_S = 300.0
"""After a failure of HTTP, MQTT is asked first for this long."""

Carrier = Literal["http", "mqtt"]
T = TypeVar("T")
_log = logging.getLogger(__name__)


class Route:
    """Decides the order in which carriers are tried, and remembers what worked. Safe in any thread."""

    def __init__(
        self,
        carrier: Carrier | Literal["auto"],
        *,
        link_up: Callable[[], bool],
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """``link_up`` tells whether the broker has accepted the board's connection."""
        self.carriers: tuple[Carrier, ...] = ("http", "mqtt") if carrier == "auto" else (carrier,)
        """Those that may be used, the preferred one first."""
        self._link_up = link_up
        self._monotonic_s = monotonic_s
        self._lock = threading.Lock()
        self._http_failed_at: float | None = None

    def take(self, over_http: Callable[[], T], over_mqtt: Callable[[], T]) -> T:
        """Return what the first carrier that reaches the controller brings; an answer of any other kind is final.

        Raises:
            GarrisonError: ``source.unreachable`` of the last one tried; what the controller answers.
        """

        def carry(carrier: Carrier) -> T:
            with self.watching(carrier):
                return over_http() if carrier == "http" else over_mqtt()

        *others, last = self.order()
        for carrier in others:
            try:
                return carry(carrier)
            except UnavailableError as error:
                if not is_unreachable(error):
                    raise
        return carry(last)

    def order(self) -> tuple[Carrier, ...]:
        """Return the carriers to try now, the likelier first."""
        if len(self.carriers) == 1:
            return self.carriers
        if not self._link_up():
            return ("http",)
        with self._lock:
            failed_at = self._http_failed_at
        paused = failed_at is not None and self._monotonic_s() - failed_at < HTTP_PAUSE_S
        return ("mqtt", "http") if paused else ("http", "mqtt")

    @contextlib.contextmanager
    def watching(self, carrier: Carrier) -> Iterator[None]:
        """Remember how a use of ``carrier`` in the block fares."""
        try:
            yield
        except GarrisonError as error:
            if carrier == "http":
                self._remember(not is_unreachable(error))
            raise
        if carrier == "http":
            self._remember(True)

    def _remember(self, http_worked: bool) -> None:
        with self._lock:
            before, self._http_failed_at = self._http_failed_at, None if http_worked else self._monotonic_s()
        if http_worked != (before is None):
            _log.info("the controller is %s over HTTP", "reachable again" if http_worked else "not reachable")


def is_unreachable(error: GarrisonError) -> bool:
    """Tell whether the other side was not reached, so that another way may succeed."""
    return error.code in ("source.unreachable", "controller.unreachable")


class FallbackSource:
    """A ``Source`` over HTTP or MQTT, as ``route`` decides for each request."""

    def __init__(self, http: Source, mqtt: Source, route: Route) -> None:
        self._http, self._mqtt, self._route = http, mqtt, route

    def metadata(self, name: str, max_bytes: int) -> bytes:
        """See ``MetadataSource.metadata``."""
        return self._route.take(
            lambda: self._http.metadata(name, max_bytes), lambda: self._mqtt.metadata(name, max_bytes)
        )

    def target(self, path: str, sha256: str, max_bytes: int) -> bytes:
        """See ``MetadataSource.target``."""
        return self._route.take(
            lambda: self._http.target(path, sha256, max_bytes), lambda: self._mqtt.target(path, sha256, max_bytes)
        )

    def blob(self, sha256: str, offset: int) -> Generator[bytes, None, None]:
        """See ``Source.blob``. Where one way breaks off, the other goes on from there."""
        *others, last = self._route.order()
        for carrier in others:
            try:
                for piece in self._pieces(carrier, sha256, offset):
                    offset += len(piece)
                    yield piece
            except UnavailableError as error:
                if not is_unreachable(error):
                    raise
            else:
                return
        yield from self._pieces(last, sha256, offset)

    def _pieces(self, carrier: Carrier, sha256: str, offset: int) -> Generator[bytes, None, None]:
        source = self._http if carrier == "http" else self._mqtt
        with self._route.watching(carrier), contextlib.closing(source.blob(sha256, offset)) as pieces:
            yield from pieces


class RoutedVerifier:
    """A ``Verifier`` whose refreshes take the way that ``route`` decides."""

    def __init__(self, verifier: Verifier, mqtt: MetadataSource, route: Route) -> None:
        self._verifier, self._mqtt, self._route = verifier, mqtt, route

    def refresh(
        self,
        high_water: Mapping[str, int],
        floor: datetime,
        want: Sequence[str],
        source: MetadataSource | None = None,
    ) -> Refresh:
        """See ``TrustVerifier.refresh``; with a ``source``, from there and nowhere else."""
        ask = self._verifier.refresh
        if source is not None:
            return ask(high_water, floor, want, source)
        return self._route.take(lambda: ask(high_water, floor, want), lambda: ask(high_water, floor, want, self._mqtt))

    def offline(
        self, high_water: Mapping[str, int], trusted_at: int, want: Sequence[str], floor: datetime | None = None
    ) -> Refresh:
        """See ``TrustVerifier.offline``."""
        return self._verifier.offline(high_water, trusted_at, want, floor)
