import pytest
from hypothesis import given
from hypothesis import strategies as st

from garrison_protocol import topics
from garrison_protocol.errors import InvalidError
from garrison_protocol.ids import is_device_id

DEVICES = st.from_regex(r"[a-z0-9][a-z0-9-]{0,62}", fullmatch=True).filter(is_device_id)


@given(DEVICES, st.sampled_from(topics.Up))
def test_up_topics_parse_to_what_built_them(device: str, kind: topics.Up) -> None:
    assert topics.parse(topics.up(device, kind)) == topics.Topic(device, kind)


@given(DEVICES, st.sampled_from(topics.Down))
def test_down_topics_parse_to_what_built_them(device: str, kind: topics.Down) -> None:
    assert topics.parse(topics.down(device, kind)) == topics.Topic(device, kind)


@pytest.mark.parametrize(
    "topic",
    [
        "",
        "garrison/v1",
        "garrison/v2/up/a/status",
        "garrison/v1/up/a/desired",
        "garrison/v1/down/a/status",
        "garrison/v1/up/+/status",
        "garrison/v1/up/#",
        "garrison/v1/up/A/status",
        "garrison/v1/up/a/status/x",
        "garrison/v1/up//status",
        "garrison/v1/up/controller-1/status",
        "garrison/v1/up/" + "a" * 64 + "/status",
        "garrison/v1/up/a\n/status",
        "$SYS/broker/uptime",
    ],
)
def test_everything_else_is_unknown(topic: str) -> None:
    with pytest.raises(InvalidError) as caught:
        topics.parse(topic)
    assert caught.value.code == "topic.unknown"


@given(st.text(max_size=400))
def test_no_text_crashes_the_parser(topic: str) -> None:
    try:
        parsed = topics.parse(topic)
    except InvalidError:
        return
    assert is_device_id(parsed.device)
