"""A board follows ``fleet.json`` in whose certificates it believes."""

from __future__ import annotations

from garrison_protocol.errors import InvalidError, UnavailableError
from garrison_protocol.fleet import parse_fleet
from tests.unit.loop.rig import FLEET, Rig


def publish(rig: Rig, **fields: str) -> None:
    """Let fresh metadata say this of the authorities."""
    rig.work.fleet = parse_fleet(FLEET).model_copy(update=fields).model_dump_json().encode()
    rig.parts.trust.refresh()
    rig.settle()


def test_server_cas_are_pinned_before_anything_counts(rig: Rig) -> None:
    rig.connect()
    publish(rig, server_ca="old new")
    assert (rig.pinned, rig.link.reconnects) == (["old new"], 0)
    publish(rig, server_ca="new")
    assert (rig.pinned, rig.link.reconnects) == (["old new", "new"], 1)
    publish(rig, server_ca="")  # a fleet.json that says nothing of them
    assert rig.pinned == ["old new", "new"]


def test_what_could_not_be_written_is_not_reported_as_known(rig: Rig) -> None:
    rig.connect()
    publish(rig, server_ca="old")
    known = rig.parts.trust.fleet
    rig.unpinnable = UnavailableError("disk.failed", "read-only", hint="check the disk")
    publish(rig, server_ca="old new")
    assert (rig.parts.trust.fleet, rig.parts.trust.last_error) == (known, "disk.failed")
    rig.unpinnable = None
    rig.parts.trust.refresh()
    rig.settle()
    assert (rig.pinned[-1], rig.parts.trust.last_error) == ("old new", None)


def test_a_server_ca_that_is_none_is_recorded_and_holds_up_nothing(rig: Rig) -> None:
    rig.connect()
    rig.unpinnable = InvalidError("fleet.server_ca_unusable", "no PEM", hint="publish another")
    publish(rig, server_ca="nonsense")
    assert rig.parts.trust.last_error == "fleet.server_ca_unusable"
    assert rig.headers("metadata.refused")[-1]["code"] == "fleet.server_ca_unusable"
    assert rig.parts.trust.fleet is not None
    assert rig.parts.trust.fleet.server_ca == "nonsense"


def test_a_certificate_by_an_authority_that_went_is_renewed_at_once(rig: Rig) -> None:
    rig.connect()
    publish(rig, device_ca="device CA, another")
    rig.forward(60)
    assert rig.renew.tries == 0
    publish(rig, device_ca="another")
    rig.forward(60)
    assert rig.renew.tries == 1
    assert len(rig.headers("certificate.renewed")) == 1


def test_a_certificate_by_an_authority_that_is_not_listed_yet_stays(rig: Rig) -> None:
    rig.connect()
    publish(rig, device_ca="device CA")
    rig.renew.issuer = "the next"  # the controller is ahead
    rig.forward(60)
    assert rig.renew.tries == 0
    publish(rig, device_ca="device CA, the next")
    rig.forward(60)
    assert rig.renew.tries == 0
