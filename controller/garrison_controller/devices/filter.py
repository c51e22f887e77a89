"""Target filters: which boards a list or a rollout means. PURE.

``name=edge-1,group=/demo/*,label.site=x,name!=y``: a comma means *and*; a trailing ``*`` matches any rest; an empty
filter or ``*`` matches every board. ``group=/demo/`` matches that group alone, ``group=/demo/*`` what is under it too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from garrison_protocol.errors import InvalidError

MAX_FILTER_LENGTH = 1024
_TERM = re.compile(r"(?P<key>name|group|label\.[A-Za-z0-9._-]{1,64})(?P<sign>!?=)(?P<value>[^,=!*]*)(?P<star>\*?)")


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What a filter can ask about a board. ``name`` is its id."""

    name: str
    group: str
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Term:
    """One condition. A board without the label never equals anything, so ``!=`` holds for it."""

    key: str
    value: str
    prefix: bool
    negated: bool

    def holds(self, device: DeviceFacts) -> bool:
        """Tell whether ``device`` meets this condition."""
        actual = _fact(device, self.key)
        equal = actual is not None and (actual.startswith(self.value) if self.prefix else actual == self.value)
        return equal != self.negated


def parse_filter(text: str) -> tuple[Term, ...]:
    """Return the conditions of a filter; none for one that matches every board.

    Raises:
        InvalidError: ``filter.malformed``.
    """
    stripped = text.strip()
    if stripped in {"", "*"}:
        return ()
    if len(stripped) > MAX_FILTER_LENGTH:
        raise InvalidError("filter.malformed", f"a filter of {len(stripped)} characters", hint="use labels or groups")
    return tuple(_term(part.strip()) for part in stripped.split(","))


def matches(device: DeviceFacts, text: str) -> bool:
    """Tell whether ``device`` is among the boards that the filter ``text`` means.

    Raises:
        InvalidError: ``filter.malformed``.
    """
    return holds(device, parse_filter(text))


def holds(device: DeviceFacts, terms: tuple[Term, ...]) -> bool:
    """Tell whether ``device`` meets every condition; for many boards, after one ``parse_filter``."""
    return all(term.holds(device) for term in terms)


def _term(part: str) -> Term:
    found = _TERM.fullmatch(part)
    if found is None:
        raise InvalidError(
            "filter.malformed",
            f"{part[:80]!r} is no condition",
            hint="write conditions like name=edge-1, group=/demo/*, label.site=x, name!=y, with commas between them",
        )
    return Term(found["key"], found["value"], found["star"] == "*", found["sign"] == "!=")


def _fact(device: DeviceFacts, key: str) -> str | None:
    match key:
        case "name":
            return device.name
        case "group":
            return device.group
        case _:
            return device.labels.get(key.removeprefix("label."))
