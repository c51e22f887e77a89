"""The part of curl that docs/local-api.md uses, so that its examples run as they stand, without a curl.

What is not known is refused: an example with an option that nobody tried must not be written.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

from garrison_agent.runtimes.gate import UnixConnection

TIMEOUT_S = 60.0
_FLAGS = {"-s", "-N", "-i"}
_VALUED = {"-X", "-H", "-d", "--data-binary", "--unix-socket"}


class UnknownOptionError(Exception):
    """The example uses what is not known here."""


@dataclass
class Curl:
    """One command. ``data`` is as it was written: text, or ``@`` and the name of a file."""

    method: str
    url: str
    headers: dict[str, str] = field(default_factory=dict)
    data: str | None = None
    binary: bool = False
    socket: str | None = None
    with_head: bool = False

    @property
    def path(self) -> str:
        """The URL's path, without its query."""
        return urlsplit(self.url).path or "/"


@dataclass(frozen=True)
class Answer:
    """What came: the status line, headers by their lower-case names, and the body."""

    status: int
    line: str
    headers: dict[str, str]
    body: bytes


def parse_curl(words: list[str]) -> Curl:
    """Return the command in ``words``, the first of which is ``curl``.

    Raises:
        UnknownOptionError: An option is not known, or there is more or less than one URL.
    """
    given: dict[str, str] = {}
    headers: dict[str, str] = {}
    urls: list[str] = []
    rest = iter(words[1:])
    for word in rest:
        if word in _FLAGS:
            given[word] = ""
        elif word == "-H":
            name, separator, value = next(rest).partition(": ")
            if not separator:
                raise UnknownOptionError(f"a header without a value: {name}")
            headers[name] = value
        elif word in _VALUED:
            given[word] = next(rest)
        elif word.startswith("-"):
            raise UnknownOptionError(word)
        else:
            urls.append(word)
    if len(urls) != 1 or not re.match(r"https?://", urls[0]) or {"-d", "--data-binary"} <= given.keys():
        raise UnknownOptionError(f"{urls}: one URL, and one body at most")
    data = given.get("-d", given.get("--data-binary"))
    method = given.get("-X", "GET" if data is None else "POST")
    binary, socket = "--data-binary" in given, given.get("--unix-socket")
    return Curl(method, urls[0], headers, data, binary, socket, with_head="-i" in given)


def run_curl(command: Curl, folder: Path) -> Answer:
    """Send the request as curl would; files are read from ``folder``."""
    parts = urlsplit(command.url)
    connection: HTTPConnection
    if command.socket is None:
        assert parts.hostname is not None
        connection = HTTPConnection(parts.hostname, parts.port, timeout=TIMEOUT_S)
    else:
        connection = UnixConnection(Path(command.socket), TIMEOUT_S)
    headers = {"accept": "*/*", **command.headers}
    if command.data is not None:
        headers = {"content-type": "application/x-www-form-urlencoded", **headers}
    try:
        target = f"{command.path}?{parts.query}" if parts.query else command.path
        connection.request(command.method, target, _body(command, folder), headers)
        response = connection.getresponse()
        body = response.read()
        fields = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, f"HTTP/1.1 {response.status} {response.reason}", fields, body)
    finally:
        connection.close()


def _body(command: Curl, folder: Path) -> bytes | None:
    if command.data is None or not command.data.startswith("@"):
        return None if command.data is None else command.data.encode()
    content = (folder / command.data[1:]).read_bytes()
    return content if command.binary else re.sub(rb"[\r\n\0]", b"", content)
