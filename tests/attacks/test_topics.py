"""An enrolled board's attacks on its neighbours' topics, at a real broker with the configuration that Garrison writes.

Messages are signed, so nothing rests on this but confidentiality and quiet. The broker says "Not authorized" to a
denied publication; a denied subscription is granted and delivers nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from garrison_protocol import topics
from garrison_protocol.errors import InvalidError
from garrison_protocol.topics import ALL_UP_STATUS, REGISTRY_TIMESTAMP, Down, Up
from tests.attacks.site import CONTROLLER, Client, Site
from tests.integration.controllers import wait_until

pytestmark = pytest.mark.integration

A, B = "edge-1", "edge-2"
DENIED = "Not authorized"
SECRETS = {
    topics.down(B, Down.DESIRED): b"what B should run",
    topics.down(B, Down.RECEIPT): b"what B was confirmed",
    topics.down(B, Down.CHUNK): b"what B downloads",
}
END = topics.down(A, Down.RECEIPT)
"""The last message that the controller sends to A: when it has come, everything before it has, or never will."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(tmp_path_factory.mktemp("site"))
    for name in (A, B):
        site.certificate(name)
    yield site
    site.broker.stop()


@pytest.fixture
def controller(site: Site) -> Iterator[Client]:
    """The controller's own connection, which hears everything that boards manage to send."""
    with site.client(CONTROLLER) as client:
        client.subscribe("garrison/v1/up/#")
        yield client
        for topic in (*SECRETS, topics.up(A, Up.STATUS), topics.up(B, Up.STATUS), END):
            client.publish(topic, b"", retain=True)


def overheard(controller: Client, spy: Client) -> set[str]:
    """Let the controller and B talk, and return the topics of which ``spy`` heard."""
    for topic, secret in SECRETS.items():
        assert DENIED not in controller.publish(topic, secret)
    assert DENIED not in controller.publish(END, b"the end")
    wait_until(lambda: (END, b"the end") in spy.received, "the last message")
    return {topic for topic, _ in spy.received} - {END}


@pytest.mark.parametrize("kind", [*Up])
def test_writing_anothers_upward_topics(site: Site, controller: Client, kind: Up) -> None:
    """Board A publishes on a topic on which only board B speaks."""
    with site.client(A) as attacker:
        assert DENIED in attacker.publish(topics.up(B, kind))
        assert DENIED not in attacker.publish(topics.up(A, kind), b"honest")
    wait_until(lambda: bool(controller.received), "A's own message")
    assert controller.received == [(topics.up(A, kind), b"honest")]


@pytest.mark.parametrize("topic", [topics.down(B, Down.DESIRED), topics.down(A, Down.DESIRED), REGISTRY_TIMESTAMP])
def test_writing_what_only_the_controller_says(site: Site, controller: Client, topic: str) -> None:
    """Board A publishes desired state for B or for itself, or a notice that the registry changed."""
    with site.client(B) as neighbour, site.client(A) as attacker:
        neighbour.subscribe(topics.down(B, Down.DESIRED), REGISTRY_TIMESTAMP)
        assert DENIED in attacker.publish(topic, retain=True)
        assert DENIED not in controller.publish(topics.down(B, Down.DESIRED), b"honest")
        wait_until(lambda: bool(neighbour.received), "the controller's message")
        assert neighbour.received == [(topics.down(B, Down.DESIRED), b"honest")]


def test_reading_anothers_topics(site: Site, controller: Client) -> None:
    """Board A subscribes to board B's downward topics by name."""
    with site.client(A) as spy:
        spy.subscribe(END, *SECRETS)
        assert overheard(controller, spy) == set()


@pytest.mark.parametrize(
    "wildcard",
    ["#", "garrison/#", "garrison/v1/down/#", "garrison/v1/down/+/desired", "+/+/+/edge-2/+", "$SYS/#", ALL_UP_STATUS],
)
def test_reading_through_wildcards(site: Site, controller: Client, wildcard: str) -> None:
    """Board A subscribes with wildcards that cover board B's topics, everything, or the broker's own figures."""
    with site.client(B) as neighbour, site.client(A) as spy:
        spy.subscribe(END, wildcard)
        assert DENIED not in neighbour.publish(topics.up(B, Up.STATUS), b"what B reports")
        assert all(topic.startswith(f"garrison/v1/down/{A}/") for topic in overheard(controller, spy))


@pytest.mark.parametrize("shared", ["$share/spies/garrison/v1/down/edge-2/desired", "$share/spies/garrison/v1/#"])
def test_reading_through_a_shared_subscription(site: Site, controller: Client, shared: str) -> None:
    """Board A joins a shared subscription to board B's topics, to read B's messages or take them away from B."""
    with site.client(B) as neighbour, site.client(A) as spy:
        neighbour.subscribe(topics.down(B, Down.DESIRED))
        spy.subscribe(END, shared)
        assert overheard(controller, spy) == set()
        wait_until(lambda: (topics.down(B, Down.DESIRED), b"what B should run") in neighbour.received, "B's message")


def test_reading_what_was_retained(site: Site, controller: Client) -> None:
    """Board A subscribes to board B's topics after the controller has left retained messages there."""
    for topic, secret in SECRETS.items():
        controller.publish(topic, secret, retain=True)
    with site.client(A) as spy:
        spy.subscribe(END, *SECRETS, "garrison/v1/#")
        assert overheard(controller, spy) == set()


def test_deleting_what_was_retained(site: Site, controller: Client) -> None:
    """Board A replaces board B's retained desired state by nothing, so that B never hears of it."""
    desired = topics.down(B, Down.DESIRED)
    controller.publish(desired, b"what B should run", retain=True)
    with site.client(A) as attacker:
        assert DENIED in attacker.publish(desired, b"", retain=True)
    with site.client(B) as neighbour:
        neighbour.subscribe(desired)
        wait_until(lambda: (desired, b"what B should run") in neighbour.received, "the retained desired state")


@pytest.mark.parametrize("topic", [topics.up(B, Up.STATUS), topics.down(B, Down.DESIRED), REGISTRY_TIMESTAMP])
def test_a_last_will_on_anothers_topic(site: Site, controller: Client, topic: str) -> None:
    """Board A leaves a Last Will on board B's topic or the controller's, then breaks its connection."""
    with site.client(B) as neighbour:
        neighbour.subscribe(topics.down(B, Down.DESIRED), REGISTRY_TIMESTAMP)
        attacker = Client(site, A, will=(topic, b"forged"))
        wait_until(attacker.connected.is_set, "A's connection")
        attacker.vanish()
        with site.client(A) as again:  # the same name: by now the broker has ended the first connection
            again.publish(topics.up(A, Up.STATUS), b"the end")
        wait_until(lambda: (topics.up(A, Up.STATUS), b"the end") in controller.received, "A's last message")
        assert DENIED not in controller.publish(topics.down(B, Down.DESIRED), b"honest")
        wait_until(lambda: bool(neighbour.received), "the controller's message")
        assert neighbour.received == [(topics.down(B, Down.DESIRED), b"honest")]
        assert {topic for topic, _ in controller.received} == {topics.up(A, Up.STATUS)}


def test_a_topic_with_dots_is_not_anothers(site: Site, controller: Client) -> None:
    """Board A walks from its own topics to board B's with "..", which the broker lets pass as a name of A's."""
    walked = f"garrison/v1/up/{A}/../{B}/status"
    with site.client(A) as attacker:
        attacker.publish(walked)
        assert DENIED in attacker.publish(f"garrison/v1/up/../up/{B}/status")
        attacker.publish(topics.up(A, Up.STATUS), b"the end")
    wait_until(lambda: len(controller.received) >= 2, "A's messages")
    assert {topic for topic, _ in controller.received} == {walked, topics.up(A, Up.STATUS)}
    with pytest.raises(InvalidError) as caught:
        topics.parse(walked)
    assert caught.value.code == "topic.unknown"
