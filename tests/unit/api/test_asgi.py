from __future__ import annotations

import asyncio
from typing import Any

import pytest

from garrison_agent.api.asgi import BodyBudget, ClientGoneError, Message, Request, RouteBook, parse_object
from garrison_agent.api.errors import BadRequestError, MethodError, TooLargeError
from garrison_protocol.errors import NotFoundError, UnavailableError


def make_request(
    *messages: Message,
    method: str = "POST",
    path: str = "/",
    headers: dict[bytes, bytes] | None = None,
    budget: BodyBudget | None = None,
) -> Request:
    left = list(messages)

    async def receive() -> Message:
        return left.pop(0) if left else {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        raise AssertionError("nothing is answered here")

    scope: dict[str, Any] = {"method": method, "path": path, "headers": list((headers or {}).items())}
    return Request(scope, receive, send, budget or BodyBudget(), None)


def part(data: bytes, *, more: bool = False) -> Message:
    return {"type": "http.request", "body": data, "more_body": more}


async def handler(request: Request) -> None:
    raise AssertionError


def test_a_path_gives_its_parameters() -> None:
    book = RouteBook()
    book.add("GET POST", "/v2/models/{name}/versions/{version}", handler)
    request = make_request(path="/v2/models/magika:3.3/versions/3.3")
    assert book.find(request) is handler
    assert request.params == {"name": "magika:3.3", "version": "3.3"}
    assert book.find(make_request(method="HEAD", path="/v2/models/a/versions/1")) is handler


@pytest.mark.parametrize(
    "path", ["/v2/models/a/b/versions/1", "/v2/models//versions/1", "/v2/models/a/versions/1/", ""]
)
def test_a_parameter_is_one_segment(path: str) -> None:
    book = RouteBook()
    book.add("POST", "/v2/models/{name}/versions/{version}", handler)
    with pytest.raises(NotFoundError, match=r"api\.path_unknown"):
        book.find(make_request(path=path))


def test_a_wrong_method_is_told_the_right_ones() -> None:
    book = RouteBook()
    book.add("POST", "/x", handler)
    book.add("DELETE", "/x", handler)
    with pytest.raises(MethodError) as caught:
        book.find(make_request(method="GET", path="/x"))
    assert caught.value.hint == "use DELETE, POST"


def test_a_body_is_joined_and_counted_until_the_request_closes() -> None:
    async def scenario() -> None:
        budget = BodyBudget(limit=10)
        first = make_request(part(b"123", more=True), part(b"456"), budget=budget)
        assert await first.body() == b"123456"
        assert budget.in_use == 6
        second = make_request(part(b"12345"), budget=budget)
        with pytest.raises(UnavailableError, match=r"api\.busy"):
            await second.body()
        await second.close()
        await first.close()
        assert budget.in_use == 0
        third = make_request(part(b"1234567890"), budget=budget)
        assert len(await third.body()) == 10
        await third.close()

    asyncio.run(scenario())


def test_a_body_that_breaks_off_or_is_too_large() -> None:
    async def scenario() -> None:
        with pytest.raises(ClientGoneError):
            await make_request(part(b"1", more=True)).body()
        with pytest.raises(TooLargeError):
            await make_request(headers={b"content-length": b"999999999999"}).body()
        mebibytes = [part(bytes(1024 * 1024), more=True) for _ in range(17)]
        with pytest.raises(TooLargeError):
            await make_request(*mebibytes).body()

    asyncio.run(scenario())


def test_gone_ends_when_the_client_does_and_not_before() -> None:
    async def scenario() -> None:
        request = make_request(part(b"x"))
        assert await request.body() == b"x"
        await asyncio.wait_for(request.gone(), 5)
        await request.close()

    asyncio.run(scenario())


def test_only_objects_are_bodies() -> None:
    assert parse_object(b' {"a": 1} ') == {"a": 1}
    for bad in (b"", b"null", b"[]", b'"x"', b"{'a': 1}", b"\xff", b"[" * 200_000):
        with pytest.raises(BadRequestError) as caught:
            parse_object(bad)
        assert caught.value.code == "api.bad_json"


def test_a_rare_surface_is_registered_by_its_first_request() -> None:
    book, registered = RouteBook(), []

    def register(into: RouteBook) -> None:
        registered.append("rare")
        into.add("GET", "/rare/{name}", handler)

    book.add_rare(r"/rare/.*", register)
    with pytest.raises(NotFoundError, match=r"api\.path_unknown"):
        book.find(make_request(method="GET", path="/other"))
    assert registered == []
    for name in ("a", "b"):
        request = make_request(method="GET", path=f"/rare/{name}")
        assert book.find(request) is handler
        assert request.params == {"name": name}
    assert registered == ["rare"]
    with pytest.raises(MethodError):
        book.find(make_request(method="POST", path="/rare/a"))


@pytest.mark.parametrize(
    ("query", "value"),
    [(b"", None), (b"ttl=5", "5"), (b"a=1&ttl=5&ttl=6", "6"), (b"ttl=", ""), (b"ttl=%2B5", "+5"), (b"\xff=\xfe", None)],
)
def test_a_query_string_gives_its_values(query: bytes, value: str | None) -> None:
    async def receive() -> Message:
        raise AssertionError

    async def send(message: Message) -> None:
        raise AssertionError

    scope: dict[str, Any] = {"method": "GET", "path": "/", "headers": [], "query_string": query}
    assert Request(scope, receive, send, BodyBudget(), None).query("ttl") == value
