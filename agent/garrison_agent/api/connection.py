"""One client's connection: uvicorn's HTTP protocol with the bounds that it leaves to a proxy in front of it.

A board has no proxy. Headers are bounded in size and time, a reader that takes nothing is cut off, and where too many
connections are open, the one that has been idle for longest gives way. One that ends while its client may still be
sending is closed in steps, so that the answer arrives (RFC 9112, section 9.6). Everything runs on the API's event loop.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httptools

from garrison_agent.api.guards import peer_of
from garrison_agent.http_server import HttpToolsProtocol

PEER_STATE = "garrison.peer"
"""Key in the ASGI scope's ``state`` under which the unix door puts the ``Peer``."""

MAX_CONNECTIONS = 512
"""Of one door."""
MAX_HEADER_BYTES = 64 * 1024
HEADER_S = 15.0
"""From the first byte of a request (or the begin of the connection) to the end of its headers."""
READER_S = 60.0
"""A client that has taken no byte for so long, while there are some for it, is cut off after at most twice that."""
LINGER_S = 5.0
"""After the last answer, for a client that may still be sending to read it and to close."""
MAX_PIPELINED = 16
WRITE_BUFFER_BYTES = 64 * 1024


class _HeadersTooLargeError(Exception):
    """The request's headers exceed ``MAX_HEADER_BYTES``."""


class ClientConnection(HttpToolsProtocol):
    """A connection over TCP."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._wire: asyncio.Transport
        self._linger_timer: asyncio.TimerHandle | None = None
        self._end_timer: asyncio.TimerHandle | None = None
        self.written_bytes = 0
        self._sent_away = False
        self.idle_since_s = 0.0
        self._header_bytes = 0
        self._unparsed_bytes = 0
        self._too_large = False
        self._header_timer: asyncio.TimerHandle | None = None
        self._reader_timer: asyncio.TimerHandle | None = None
        self._running: Any = None
        """The request that is being answered; uvicorn's ``cycle`` is the one that was read last."""
        self._rest: _BodyOf | None = None
        """Of a request that offered another protocol: the last on its connection."""
        self._stopping = False
        self._more = False
        """The client has begun a request that is not read to its end, or never will be."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn's own
        """Begin; make room among the connections first, if need be."""
        self._wire = transport
        super().connection_made(_ClosedInSteps(transport, self))  # type: ignore[arg-type] # passes on the rest
        transport.set_write_buffer_limits(WRITE_BUFFER_BYTES)  # with TLS it would be half a MiB
        self.idle_since_s = self.loop.time()
        if len(self.connections) > MAX_CONNECTIONS:
            self._make_room()
        self._await_headers()

    @property
    def idle(self) -> bool:
        """Whether no request is being answered."""
        return self._running is None or bool(self._running.response_complete)

    @property
    def _taken_bytes(self) -> int:
        """How much of what was written the client has taken, as far as can be seen."""
        return self.written_bytes - self._wire.get_write_buffer_size()

    @property
    def _worth(self) -> int | None:
        """How little is lost if it gives way to another, least first; None: it does not."""
        if self._sent_away or not self.idle:
            return None
        if self._wire.is_closing():
            return 2  # its last answer may not have arrived
        if self.lingers:
            return 2 if self._wire.get_write_buffer_size() else 0
        return 1

    @property
    def lingers(self) -> bool:
        """Whether all has been said, and the client has yet to close."""
        return self._linger_timer is not None

    def linger(self) -> None:
        """Send nothing more; close at once, or, where more may come, when the client has, or after ``LINGER_S``.

        Closed with bytes of the client unread, TCP would reset the connection, and the client might lose the answer.
        TLS has no end of one direction alone: there, who does not know the answer's length would wait for nothing. What
        is closed but not taken is cut off after ``READER_S``: nobody sees how much of it is left.
        """
        if self.lingers or self._wire.is_closing():
            return
        if not self._more or self._stopping or not self._wire.can_write_eof():
            self._wire.close()
            if not self._wire.can_write_eof():
                self._end_timer = self.loop.call_later(READER_S, self._wire.abort)
            return
        self._linger_timer = self.loop.call_later(LINGER_S, self._wire.close)
        self._stop_header_timer()
        self._wire.write_eof()
        self._wire.resume_reading()

    def shutdown(self) -> None:
        """End with the agent, which waits for nobody to close: after the answer that is running, if there is one."""
        self._stopping = True
        if self.lingers:
            self._wire.close()
        super().shutdown()

    def connection_lost(self, exc: Exception | None) -> None:
        """End; also what is being answered, where uvicorn tells only what was read last."""
        running = self._running
        self._stop_header_timer()
        self._stop_reader_timer()
        super().connection_lost(exc)
        for timer in (self._linger_timer, self._end_timer):
            if timer is not None:
                timer.cancel()
        if running is not None and not running.response_complete:
            running.disconnected = True
            running.message_event.set()

    def data_received(self, data: bytes) -> None:
        """Parse what came; refuse what is no HTTP, or has no end of headers."""
        if self.lingers:
            return
        self._unset_keepalive_if_required()
        in_headers = self._header_timer is not None
        try:
            self._feed(data)
        except httptools.HttpParserError:
            self._refuse(too_large=self._too_large)
            return
        if in_headers and self._header_timer is not None:
            self._unparsed_bytes += len(data)
            if self._unparsed_bytes > MAX_HEADER_BYTES:
                self._refuse(too_large=True)
        elif self.idle:  # blank lines, or the rest of a body that nobody wants
            self._await_headers()

    def _feed(self, data: bytes) -> None:
        rest = self._rest
        if rest is not None and rest.complete:
            return
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if rest is None:
                self._read_on(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            if rest is None or not rest.complete:
                raise

    def on_message_begin(self) -> None:
        """Begin to read a request."""
        super().on_message_begin()
        self._more = True
        self._header_bytes = self._unparsed_bytes = 0
        self._await_headers()

    def on_url(self, url: bytes) -> None:
        """Take in a part of the address."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take in one header."""
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Begin to answer, or queue the request behind those before it."""
        self._stop_header_timer()
        super().on_headers_complete()
        if self.parser.should_upgrade():
            self.cycle.keep_alive = False  # the parser reads nothing behind its body
        if self.pipeline:
            if len(self.pipeline) > MAX_PIPELINED:
                self.transport.abort()
            else:
                self.flow.resume_reading()  # else nobody would see that the client goes away

    def on_message_complete(self) -> None:
        """End the request; where another protocol was offered, its body has yet to come."""
        if not self.parser.should_upgrade() or self._framing() is None:
            self._more = self.parser.should_upgrade() or self._rest is not None
            super().on_message_complete()

    def _framing(self) -> bytes | None:
        """Return the header that says how long the body is."""
        for name, value in self.headers:
            if name in (b"content-length", b"transfer-encoding") and value != b"0":
                return name + b": " + value
        return None

    def _read_on(self, data: bytes) -> None:
        """Read the body of a request that offered another protocol, as Java's client does; HTTP/1.1 is spoken on.

        The parser takes the offer for accepted, so another one is told how long the body is. What stands behind the
        body is not read: the connection ends with the answer.
        """
        framing = self._framing()
        if framing is not None:
            self._rest = _BodyOf(self)
            self.parser = httptools.HttpRequestParser(self._rest)
            self._feed(b"POST / HTTP/1.1\r\n" + framing + b"\r\n\r\n" + data)

    def on_response_complete(self) -> None:
        """Go on with the next request, or wait for one."""
        super().on_response_complete()
        self.idle_since_s = self.loop.time()
        if self.transport.get_write_buffer_size():
            self._await_reader()

    def pause_writing(self) -> None:
        """The client takes less than it is sent."""
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        """The client has taken most of what there was."""
        self._stop_reader_timer()
        super().resume_writing()

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._running = cycle
        send = cycle.send

        async def send_to_client(message: Any) -> None:
            if cycle.more_body:  # behind a body that nobody reads, no next request would be found
                cycle.keep_alive = False
            await send(message)

        cycle.send = send_to_client
        super()._start_asgi_task(cycle, app)

    def _make_room(self) -> None:
        """Close one that lingers, or has been idle for longest, or is closing; this one, where every other is busy."""
        connections: set[Any] = self.connections
        others = [one for one in connections if one is not self and one._worth is not None]
        one = min(others, key=lambda one: (one._worth, one.idle_since_s), default=self)
        one._sent_away = True  # it is among the connections until the loop comes round to it
        one._wire.abort()

    def _count(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > MAX_HEADER_BYTES:
            self._too_large = True
            raise _HeadersTooLargeError

    def _refuse(self, *, too_large: bool) -> None:
        """Answer what no handler will see, and close."""
        self._more = True
        if too_large:
            status, code = b"431 Request Header Fields Too Large", "headers_too_large"
            message = f"the headers are longer than {MAX_HEADER_BYTES} bytes"
        else:
            status, code, message = b"400 Bad Request", "malformed_request", "this is no HTTP request"
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
        body = json.dumps({"error": error}, separators=(",", ":")).encode()
        if self.idle:
            self.transport.write(
                b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s"
                % (status, len(body), body)
            )
            self.transport.close()
        else:  # in the middle of another answer
            self.transport.abort()

    def _await_headers(self) -> None:
        if self._header_timer is None:
            self._header_timer = self.loop.call_later(HEADER_S, self.transport.abort)

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _await_reader(self) -> None:
        if self._reader_timer is None:
            self._look_again()

    def _look_again(self) -> None:
        self._reader_timer = self.loop.call_later(READER_S, self._look_at_reader, self._taken_bytes)

    def _look_at_reader(self, taken_before: int) -> None:
        self._reader_timer = None
        if self._wire.get_write_buffer_size() == 0:
            return
        if self._taken_bytes <= taken_before:
            self._wire.abort()
        else:
            self._look_again()

    def _stop_reader_timer(self) -> None:
        if self._reader_timer is not None:
            self._reader_timer.cancel()
            self._reader_timer = None


class _ClosedInSteps:
    """The transport as uvicorn is given it."""

    def __init__(self, transport: asyncio.Transport, connection: ClientConnection) -> None:
        self._transport, self._connection = transport, connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Send, and count."""
        self._connection.written_bytes += len(data)
        self._transport.write(data)

    def close(self) -> None:
        """Close as soon as the client has."""
        self._connection.linger()

    def is_closing(self) -> bool:
        """Whether nothing more will be sent."""
        return self._connection.lingers or self._transport.is_closing()


class _BodyOf:
    """Passes on what a parser finds of one body; the method names are httptools' callbacks."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self.complete = False

    def on_body(self, data: bytes) -> None:
        """Take in a part of the body."""
        if not self.complete:
            self._connection.on_body(data)

    def on_message_complete(self) -> None:
        """End the body."""
        if not self.complete:
            self.complete = True
            self._connection.on_message_complete()


class UnixConnection(ClientConnection):
    """A connection over the unix socket: each request says who is at the other end."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn's own
        """Begin, and ask the kernel who connected."""
        super().connection_made(transport)
        self.app_state = {**self.app_state, PEER_STATE: peer_of(transport.get_extra_info("socket"))}
