"""Upstreams: OpenAI-compatible servers that run already, offered under aliases of this board's configuration.

What they run is not signed and was not verified; they are shown so, and never take the place of a signed model. The
caller's own key and headers stay here; redirects are not followed; nothing of a prompt or an answer is kept or logged.
This module is imported where the configuration names an upstream.
"""

from __future__ import annotations

import asyncio
import functools
import json
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httptools

from garrison_agent.api.asgi import ClientGoneError, Request, parse_object
from garrison_agent.api.commands import ModelView, UpstreamView
from garrison_agent.api.errors import WorkerDiedError, openai_body, stopping
from garrison_agent.api.relay import Reader, Upstream, exchange
from garrison_agent.api.upstream_answer import AnswerReader
from garrison_agent.config import UpstreamConfig
from garrison_agent.runtimes.status import RequestRecord
from garrison_protocol.errors import GarrisonError

CONNECT_S = 10.0
PROBE_S = 3.0
"""How long a look at an upstream's health may take."""
FRESH_S = 5.0
"""How long what was seen then is believed."""
_READ_BYTES = 64 * 1024
_MAX_HEAD_BYTES = 64 * 1024
_MAX_ERROR_BYTES = 256 * 1024
_MAX_LIST_BYTES = 1024 * 1024
_MAX_MESSAGE = 2000
_MAX_KEY_BYTES = 4096
_PASSED_STATUS = frozenset({429, 503, 504})
"""Of 5xx and the like, those that tell a client what to do; other failures of an upstream are 502 here."""
_STREAM_OPTIONS = frozenset({"/v1/chat/completions", "/v1/completions"})
_ERROR_TYPES = {404: "not_found_error", 429: "rate_limit_error"}


class UpstreamError(WorkerDiedError):
    """An upstream could not be asked, or did not answer as it should (502)."""


class _AnsweredError(Exception):
    """The upstream's refusal has been passed to the client; there is nothing left to relay."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


@dataclass
class _Head:
    """What the parser has seen of an answer; the method names are httptools' callbacks."""

    headers: dict[bytes, bytes] = field(default_factory=dict)
    body: list[bytes] = field(default_factory=list)
    complete: bool = False
    ended: bool = False

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.lower()] = value.strip()

    def on_headers_complete(self) -> None:
        self.complete = True

    def on_body(self, body: bytes) -> None:
        self.body.append(body)

    def on_message_complete(self) -> None:
        self.ended = True


class _Replay:
    """Bytes that were read ahead, then the rest; a pause that is too long is an ``OSError``."""

    def __init__(self, ahead: bytes, reader: Reader, timeout_s: float) -> None:
        self._ahead = ahead
        self._reader = reader
        self._timeout_s = timeout_s

    async def read(self, size: int) -> bytes:
        ahead, self._ahead = self._ahead, b""
        if ahead:
            return ahead
        async with asyncio.timeout(self._timeout_s):
            return await self._reader.read(size)


class UpstreamServer:
    """One upstream. Event loop only."""

    def __init__(self, config: UpstreamConfig) -> None:
        self.alias = config.alias
        self.id = model_id(config.alias)
        self.model = config.model
        self._config = config
        parts = urlsplit(config.url)
        self._secure = parts.scheme == "https"
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if self._secure else 80)
        self._authority = parts.netloc
        self._base = parts.path.rstrip("/")
        self._seen: tuple[float, UpstreamView] | None = None

    async def forward(self, request: Request, body: bytes, record: Callable[[RequestRecord], None]) -> None:
        """Pass a request of the OpenAI surface on, under the upstream's own name of the model, and its answer back.

        ``record`` is given what happened, once.

        Raises:
            UpstreamError: ``upstream.unreachable``, ``upstream.bad_answer``, ``upstream.broke_off``,
                ``upstream.failed``, ``upstream.key_refused``, or ``upstream.key_unreadable``.
            GarrisonError: As ``relay.forward``.
        """
        asked = {**parse_object(body), "model": self.model}
        hide_usage = self._ask_for_usage(request.path, asked)
        reader = AnswerReader(request.path, request.caller.app, hide_usage=hide_usage)
        try:
            failure = await self._exchange(request, json.dumps(asked).encode(), reader)
        except _AnsweredError as refusal:
            record(reader.to_refusal(refusal.status))
        except ClientGoneError:
            record(reader.to_record(left=True))
            raise
        except asyncio.CancelledError:
            record(reader.to_record(stopping()))
            raise
        except GarrisonError as error:
            record(reader.to_record(error))
            raise
        else:
            record(reader.to_record(failure))

    async def _exchange(self, request: Request, body: bytes, reader: AnswerReader) -> GarrisonError | None:
        """Ask, and pass the answer on; return what it broke off with after it had begun."""
        key = self._key()
        upstream = await self._connect()
        failure: GarrisonError | None = None

        def shape(error: GarrisonError) -> dict[str, object]:
            nonlocal failure
            failure = self._broke_off() if error.code == "worker.died" else error
            return openai_body(failure)

        ask = functools.partial(self._ask, request, upstream, key, body)
        try:
            await exchange(request, upstream, ask, shape, reader.read)
        except UpstreamError:
            raise
        except WorkerDiedError as error:
            raise self._broke_off() from error
        return failure

    def _ask_for_usage(self, path: str, asked: dict[str, Any]) -> bool:
        """Have a stream tell its tokens in the end, if it can; tell whether its client would be surprised by that."""
        options = asked.get("stream_options")
        if not self._config.stream_usage or not asked.get("stream") or path not in _STREAM_OPTIONS:
            return False
        if not isinstance(options, dict | None) or (options or {}).get("include_usage"):
            return False
        asked["stream_options"] = {**(options or {}), "include_usage": True}
        return True

    async def view(self, *, shadowed: bool) -> UpstreamView:
        """Return what ``status`` shows. ``shadowed``: a signed model has its name. Asks the upstream now and then."""
        now_s = asyncio.get_running_loop().time()
        if self._seen is None or now_s - self._seen[0] > FRESH_S:
            state, detail = await self._probe()
            self._seen = (
                now_s,
                UpstreamView(alias=self.alias, url=self._config.url, model=self.model, state=state, detail=detail),
            )
        view = self._seen[1]
        if shadowed:
            return {**view, "state": "shadowed", "detail": "a signed model has this name, and answers to it"}
        return view

    def listed(self) -> dict[str, object]:
        """Return its entry in ``/v1/models``."""
        return {"id": self.alias, "object": "model", "created": 0, "owned_by": "upstream", "root": self.model}

    async def _probe(self) -> tuple[str, str]:
        try:
            async with asyncio.timeout(PROBE_S):
                status, body = await self._get_models()
        except UpstreamError as error:
            return error.code.removeprefix("upstream."), error.message
        except TimeoutError:
            return "unreachable", f"no answer within {PROBE_S:g} s"
        if status in (401, 403):
            return "key_refused", f"it answered {status}"
        names = _model_names(body) if status == 200 else None
        if names is None:
            return "bad_answer", f"GET {self._base}/models is answered with status {status}, and no list"
        if self.model not in names:
            return "model_unknown", f"it does not list {self.model}"
        return "ok", "not verified: what it runs is not signed"

    async def _get_models(self) -> tuple[int, bytes]:
        key = self._key()
        upstream = await self._connect()
        try:
            await self._write(upstream, "GET", f"{self._base}/models", key, b"")
            head, parser, _ = await self._read_head(upstream.reader)
            return parser.get_status_code(), await self._rest(upstream.reader, head, parser, _MAX_LIST_BYTES)
        finally:
            upstream.abort()

    def _key(self) -> str | None:
        """Return the key, read anew each time, so that a new one needs no restart."""
        path = self._config.api_key_file
        if path is None:
            return None
        try:
            with path.open("rb") as file:
                text = file.read(_MAX_KEY_BYTES).decode("ascii").strip()
        except (OSError, UnicodeDecodeError):
            text = ""
        if not text or not text.isprintable() or " " in text:
            raise UpstreamError(
                "upstream.key_unreadable",
                f"the key of the upstream {self.alias} cannot be read",
                hint=f"put the key alone into {path}, readable for the agent's user",
            )
        return text

    async def _connect(self) -> Upstream:
        try:
            async with asyncio.timeout(CONNECT_S):
                pair = await asyncio.open_connection(
                    self._host, self._port, limit=_READ_BYTES, ssl=self._tls if self._secure else None
                )
        except (OSError, ssl.SSLError) as error:  # also a certificate that does not hold, and no answer in time
            raise UpstreamError(
                "upstream.unreachable",
                f"the upstream {self.alias} at {self._authority} cannot be reached: {error or type(error).__name__}",
                hint="start it, or correct its [[upstream]] in agent.toml",
                retryable=True,
            ) from error
        return Upstream(*pair)

    @functools.cached_property
    def _tls(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self._config.ca_file)

    async def _ask(self, request: Request, upstream: Upstream, key: str | None, body: bytes) -> None:
        """Send the request, and read as much of the answer as tells whether it is one to pass on."""
        target = self._base + request.path.removeprefix("/v1")
        reader = upstream.reader
        try:
            async with asyncio.timeout(self._config.timeout_s):
                await self._write(upstream, "POST", target, key, body)
                head, parser, ahead = await self._read_head(reader)
                status = parser.get_status_code()
                if status == 200:
                    upstream.reader = _Replay(ahead, reader, self._config.timeout_s)
                    return
                error_body = await self._rest(reader, head, parser, _MAX_ERROR_BYTES)
        except TimeoutError as error:
            raise UpstreamError(
                "upstream.unreachable",
                f"the upstream {self.alias} did not answer within {self._config.timeout_s:g} s",
                hint="see what keeps it busy; timeout_s of its [[upstream]] in agent.toml may be too short",
                retryable=True,
            ) from error
        await self._refuse(request, status, head, error_body)

    async def _write(self, upstream: Upstream, method: str, target: str, key: str | None, body: bytes) -> None:
        head = [
            f"{method} {target} HTTP/1.1",
            f"host: {self._authority}",
            "connection: close",
            "user-agent: garrison-agent",
            "accept: application/json, text/event-stream",
            "content-type: application/json",
            f"content-length: {len(body)}",
        ]
        if key is not None:
            head.append(f"authorization: Bearer {key}")
        try:
            upstream.writer.write("\r\n".join([*head, "", ""]).encode("ascii"))
            upstream.writer.write(body)
            await upstream.writer.drain()
        except OSError as error:
            raise self._broke_off() from error

    async def _read_head(self, reader: Reader) -> tuple[_Head, httptools.HttpResponseParser, bytes]:
        """Return the answer's head, its parser, and all bytes that were read for it."""
        head = _Head()
        parser = httptools.HttpResponseParser(head)
        ahead = b""
        while not head.complete:
            if len(ahead) > _MAX_HEAD_BYTES:
                raise self._bad_answer("its headers do not end")
            data = await self._read(reader)
            ahead += data
            self._feed(parser, data)
        status = parser.get_status_code()
        if not 200 <= status < 300 and status < 400:
            raise self._bad_answer(f"it answered {status}; redirects are not followed")
        if head.headers.get(b"content-encoding", b"identity") != b"identity":
            raise self._bad_answer("it sent a compressed answer, for which it was not asked")
        if b"content-length" not in head.headers and b"transfer-encoding" not in head.headers:
            raise self._bad_answer("it tells neither the length nor the end of its answer")
        return head, parser, ahead

    async def _rest(self, reader: Reader, head: _Head, parser: httptools.HttpResponseParser, limit: int) -> bytes:
        while not head.ended and sum(map(len, head.body)) <= limit:
            self._feed(parser, await self._read(reader))
        return b"".join(head.body)[:limit]

    async def _read(self, reader: Reader) -> bytes:
        try:
            data = await reader.read(_READ_BYTES)
        except OSError as error:
            raise self._broke_off() from error
        if not data:
            raise self._broke_off()
        return data

    def _feed(self, parser: httptools.HttpResponseParser, data: bytes) -> None:
        try:
            parser.feed_data(data)
        except httptools.HttpParserError as error:
            raise self._bad_answer("it does not speak HTTP") from error

    async def _refuse(self, request: Request, status: int, head: _Head, body: bytes) -> None:
        """Pass a refusal on, in OpenAI's shape whatever shape it came in."""
        if status in (401, 403):
            raise UpstreamError(
                "upstream.key_refused",
                f"the upstream {self.alias} does not accept this board's key",
                hint="put a key that it knows into the api_key_file of its [[upstream]] in agent.toml",
            )
        error = _openai_error(body)
        message = error.get("message")
        if status >= 500 and status not in _PASSED_STATUS:
            raise UpstreamError(
                "upstream.failed",
                f"the upstream {self.alias} failed with status {status}",
                hint="see its own log",
                retryable=True,
            )
        headers = [(b"retry-after", value) for name, value in head.headers.items() if name == b"retry-after"]
        kind = _ERROR_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
        answer = {
            "message": str(message)[:_MAX_MESSAGE] if message else f"the upstream {self.alias} answered {status}",
            "type": _short_text(error.get("type")) or kind,
            "param": _short_text(error.get("param")),
            "code": _short_text(error.get("code")) or "upstream.refused",
        }
        passed = status if status >= 400 else 502
        await request.answer({"error": answer}, passed, headers)
        raise _AnsweredError(passed)

    def _broke_off(self) -> UpstreamError:
        return UpstreamError(
            "upstream.broke_off",
            f"the upstream {self.alias} broke off before its answer was complete",
            hint="retry; see its own log",
            retryable=True,
        )

    def _bad_answer(self, what: str) -> UpstreamError:
        return UpstreamError(
            "upstream.bad_answer",
            f"the upstream {self.alias} does not answer as an OpenAI-compatible server: {what}",
            hint="check url of its [[upstream]] in agent.toml; it usually ends with /v1",
        )


class Upstreams:
    """All of them, by alias."""

    def __init__(self, configs: Sequence[UpstreamConfig]) -> None:
        self._servers = {config.alias: UpstreamServer(config) for config in configs}

    def find(self, alias: str) -> UpstreamServer | None:
        """Return the upstream of this alias."""
        return self._servers.get(alias)

    @property
    def servers(self) -> list[UpstreamServer]:
        """All of them, in the configuration's order."""
        return list(self._servers.values())

    async def views(self, shadowed: Callable[[str], bool]) -> list[UpstreamView]:
        """Return what ``status`` shows of each."""
        return await asyncio.gather(*(one.view(shadowed=shadowed(one.alias)) for one in self._servers.values()))


def model_id(alias: str) -> str:
    """Return what stands for name and version in lists and records; no package has such a version."""
    return f"{alias}:upstream"


def model_view(view: UpstreamView) -> ModelView:
    """Return an upstream as ``model list`` shows it among packages."""
    return ModelView(
        id=model_id(view["alias"]),
        name=view["alias"],
        version="upstream",
        alias=view["alias"],
        display_name=view["model"],
        publisher="upstream, not verified",
        license="",
        license_description="",
        task="",
        engine="upstream",
        device_type="",
        execution_provider="",
        variant="",
        quantization="",
        file_size_mb=0,
        memory_mb=0,
        parameter_count=0,
        context_length=0,
        max_output_tokens=0,
        supports_tool_calling=False,
        input_modalities=[],
        output_modalities=[],
        capabilities=[],
        evaluation_cases=0,
        min_accuracy=0,
        manifest_sha256="",
        state="NOT VERIFIED",
        serving=view["state"] != "shadowed",
        loaded=view["state"] == "ok",
    )


def _model_names(body: bytes) -> list[str] | None:
    try:
        listed = json.loads(body)["data"]
        return [str(item["id"]) for item in listed]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def _openai_error(body: bytes) -> dict[str, Any]:
    """Return the error object in ``body``, also where it is the body itself, as older servers have it."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    inner = value.get("error", value) if isinstance(value, dict) else {}
    return inner if isinstance(inner, dict) else {}


def _short_text(value: object) -> str | None:
    return value if isinstance(value, str) and 0 < len(value) <= 100 else None
