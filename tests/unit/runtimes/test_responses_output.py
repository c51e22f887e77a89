from __future__ import annotations

import json
from typing import Any

from garrison_agent.runtimes.openai.responses_output import Events, Output
from garrison_agent.runtimes.openai.tool_calls import CallPiece


def bodies(data: bytes) -> list[dict[str, Any]]:
    """Return the events in ``data``, each of which must name its own type."""
    found = []
    for block in data.decode().split("\n\n")[:-1]:
        name, body = block.split("\n")
        value = json.loads(body.removeprefix("data: "))
        assert name == f"event: {value['type']}"
        found.append(value)
    return found


def test_text_then_a_call_then_text_are_three_items() -> None:
    output = Output()
    events = [
        *output.add_text("a"),
        *output.add_call(CallPiece(0, "f", "")),
        *output.add_call(CallPiece(0, None, '{"x"')),
        *output.add_call(CallPiece(0, None, ": 1}")),
        *output.add_text("b"),
        *output.end_item("completed"),
    ]
    message, call, last = output.items
    assert message["content"][0]["text"] == "a"
    assert (call["name"], call["arguments"], call["status"]) == ("f", '{"x": 1}', "completed")
    assert last["content"][0]["text"] == "b"
    assert [name for name, _ in events if name.startswith("response.output_item")] == [
        "response.output_item.added",
        "response.output_item.done",
    ] * 3
    places = [fields["output_index"] for _, fields in events]
    assert places == sorted(places)


def test_what_an_item_was_when_it_began_is_not_changed_by_what_it_became() -> None:
    output = Output()
    (name, began), *_ = list(output.add_text("a"))
    list(output.end_item("incomplete"))
    assert name == "response.output_item.added"
    assert (began["item"]["status"], output.items[0]["status"]) == ("in_progress", "incomplete")


def test_the_short_way_for_text_says_the_same_as_the_long_one() -> None:
    output, events = Output(), Events()
    data = events.encode(output.add_text('"é\n'))
    place = output.text_place
    assert place is not None
    data += events.encode_text('"é\n', place) + events.encode_text("x", place)
    *_, long, short, last = bodies(data)
    assert {**short, "sequence_number": 0} == {**long, "sequence_number": 0}
    numbers = [body["sequence_number"] for body in bodies(data)]
    assert numbers == list(range(len(numbers)))
    assert last["delta"] == "x"


def test_text_of_another_item_has_its_own_place() -> None:
    output, events = Output(), Events()
    events.encode(output.add_text("a"))
    first = output.text_place
    assert first is not None
    events.encode_text("b", first)
    events.encode(output.add_call(CallPiece(0, "f", "")))
    assert output.text_place is None
    events.encode(output.add_text("c"))
    second = output.text_place
    assert second is not None
    (body,) = bodies(events.encode_text("d", second))
    assert (body["output_index"], body["item_id"]) == (2, output.items[2]["id"])
