"""The anchor that came with an offline enrolment, for the agent's first start: read once, and then gone.

A store that is lost later must not find it again: it tells of the day of enrolment.
"""

from __future__ import annotations

from pydantic import ValidationError

from garrison_agent.identity import Folders
from garrison_agent.registry.files import disk_errors, sync_folder
from garrison_protocol.messages.enrolment import OfflineRequest


def take_enrolment_anchor(folders: Folders) -> tuple[str, bytes] | None:
    """Return the nonce of the offline request and the anchor (an envelope) that answered it; None: there is none.

    Raises:
        UnavailableError: ``disk.failed``; it could not be taken off the disk.
    """
    try:
        envelope = folders.anchor.read_bytes()
        request = OfflineRequest.model_validate_json(folders.offline_request.read_bytes())
    except (OSError, ValidationError):
        return None
    with disk_errors(folders.anchor):
        folders.anchor.unlink()
        sync_folder(folders.anchor.parent)
    return request.nonce, envelope
