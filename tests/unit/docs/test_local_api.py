"""docs/local-api.md against the route table; and that its examples are read, and answers compared, with teeth."""

from __future__ import annotations

import pytest

from tests.fakes.route_list import served
from tests.integration.curl import Answer, UnknownOptionError, parse_curl
from tests.integration.examples import PAGE, Example, check_answer, check_value, read_examples

EXAMPLES = list(read_examples(PAGE.read_text(encoding="utf-8")))


def test_every_route_has_an_example() -> None:
    asked = [(command.method, command.path) for command in (example.parse() for example in EXAMPLES)]
    without = [route for route in served() if not any(route.serves(method, path) for method, path in asked)]
    assert without == []


def test_every_example_names_a_route_that_is_there() -> None:
    routes = served()
    assert len(routes) > 50
    commands = {example.line: example.parse() for example in EXAMPLES}
    assert {
        line: command.path
        for line, command in commands.items()
        if not any(route.serves(command.method, command.path) for route in routes)
    } == {}


@pytest.mark.parametrize(
    "words",
    [
        "-k http://x/",
        "--retry 3 http://x/",
        "-H nothing http://x/",
        "http://x/ http://y/",
        "-s",
        "-d a --data-binary b x",
    ],
)
def test_what_was_never_tried_is_refused(words: str) -> None:
    with pytest.raises(UnknownOptionError):
        parse_curl(["curl", *words.split()])


def test_a_command_is_read_as_curl_reads_it() -> None:
    command = parse_curl(["curl", "-s", "-H", "a: b", "-d", "{}", "http://127.0.0.1:5273/v1/x?y=1"])
    assert (command.method, command.path, command.headers, command.data) == ("POST", "/v1/x", {"a": "b"}, "{}")
    assert parse_curl(["curl", "-X", "DELETE", "http://x/"]).method == "DELETE"


@pytest.mark.parametrize(
    "body",
    [
        "curl -s http://x/\n```\n\nno answer\n",
        "curl -s http://x/\ncurl -s http://y/\n```\n\n```json\n{}\n```\n",
        "rm -rf x\ncurl -s http://x/\n```\n\n```json\n{}\n```\n",
        "curl -s http://x/\n```\n\n```sh\ntrue\n```\n",
    ],
)
def test_a_block_that_is_no_example_is_an_error(body: str) -> None:
    with pytest.raises(AssertionError):
        list(read_examples(f"```sh\n{body}"))


@pytest.mark.parametrize(
    ("promised", "came"),
    [
        ({"a": 1}, {"a": 1, "more": 2}),
        ({"a": "..."}, {"a": "any"}),
        ({"a": "sha256:..."}, {"a": "sha256:ab"}),
        ([1, "..."], [1, 2, 3]),
        (["..."], []),
    ],
)
def test_an_answer_that_keeps_the_promise(promised: object, came: object) -> None:
    check_value(promised, came)


@pytest.mark.parametrize(
    ("promised", "came"),
    [
        ({"a": 1}, {"b": 1}),
        ({"a": 1}, {"a": 2}),
        ({"a": 1}, {"a": True}),
        ({"a": "..."}, {"a": None}),
        ({"a": "sha256:..."}, {"a": "md5:ab"}),
        ([1], [1, 2]),
        ([1, 2, "..."], [1]),
        ({"a": None}, {"a": 1}),
    ],
)
def test_an_answer_that_breaks_it(promised: object, came: object) -> None:
    with pytest.raises(AssertionError):
        check_value(promised, came)


def test_numbers_with_an_exponent_are_any_number_and_others_are_literal() -> None:
    def check(answer: bytes) -> None:
        check_answer(
            Example(1, (), "curl http://x/", "json", '{"at": 1.8e9, "n": 0.5}'),
            Answer(200, "HTTP/1.1 200 OK", {"content-type": "application/json"}, answer),
        )

    check(b'{"at": 17, "n": 0.5}')
    for wrong in (b'{"at": "x", "n": 0.5}', b'{"at": 17, "n": 0.25}', b'{"at": null, "n": 0.5}'):
        with pytest.raises(AssertionError):
            check(wrong)


def test_a_status_and_headers_are_held_to() -> None:
    example = Example(1, (), "curl -i http://x/", "http", "HTTP/1.1 503 Service Unavailable\nRetry-After: 2\n")
    check_answer(example, Answer(503, "HTTP/1.1 503 Service Unavailable", {"retry-after": "2"}, b""))
    for status, retry in ((500, "2"), (503, "3")):
        with pytest.raises(AssertionError):
            check_answer(example, Answer(status, f"HTTP/1.1 {status} Service Unavailable", {"retry-after": retry}, b""))
