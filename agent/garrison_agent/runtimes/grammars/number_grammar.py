"""Numbers within bounds as GBNF text, exactly: digit by digit, as a person would check them.

Texts have at most 15 significant digits, so that a reader's binary fractions keep them apart, and no exponent.
"""

from __future__ import annotations

from decimal import Decimal
from typing import NamedTuple

MAX_WHOLE = 10**15 - 1


class _Digits(NamedTuple):
    """Which digits may follow the point: ``text`` (None: none at all), or, where ``empty``, nothing."""

    empty: bool
    text: str | None


_NEVER = _Digits(False, None)


def integer_between(low: int, high: int) -> str | None:
    """Return the text of the integers from ``low`` to ``high``, None if there are none."""
    found = []
    if low < 0:
        found += [f'"-" {text}' for text in _wholes(max(1, -high), -low)]
    if high >= 0:
        found += _wholes(max(0, low), high)
    return _either(found)


def number_between(low: Decimal, high: Decimal, *, above: bool, below: bool, places: int) -> str | None:
    """Return the text of the decimals from ``low`` to ``high`` with up to ``places`` digits after the point.

    ``above`` and ``below`` leave out the bound itself. None if there are none.
    """
    found = []
    if low < 0:
        nearest = max(Decimal(0), -high)
        found += [
            f'"-" {text}'
            for text in _magnitudes(nearest, -low, above=below or nearest == 0, below=above, places=places)
        ]
    if high >= 0:
        floor = max(Decimal(0), low)
        found += _magnitudes(floor, high, above=above and floor == low, below=below, places=places)
    return _either(found)


def _magnitudes(low: Decimal, high: Decimal, *, above: bool, below: bool, places: int) -> list[str]:
    if low > high:
        return []
    (whole, fraction), (last, last_fraction) = _split(low), _split(high)
    if whole == last:
        return _with_fraction(whole, _between(fraction, above, last_fraction, below, places))
    found = _with_fraction(whole, _at_least(fraction, above, places))
    middle = _either(_wholes(whole + 1, last - 1))
    if middle is not None:
        found.append(f"{middle}{_optional(places)}")
    return found + _with_fraction(last, _at_most(last_fraction, below, places))


def _optional(places: int) -> str:
    return f' ("." [0-9]{{1,{places}}})?' if places else ""


def _with_fraction(whole: int, digits: _Digits) -> list[str]:
    found = [f'"{whole}"'] if digits.empty else []
    if digits.text is not None:
        found.append(f'"{whole}." {digits.text}')
    return found


def _at_least(bound: str, above: bool, places: int) -> _Digits:
    """Which fractions are at least ``0.bound`` (or above it); ``bound`` has no trailing zeros."""
    if not bound and not above:
        return _Digits(True, f"[0-9]{{1,{places}}}" if places else None)
    if places == 0:
        return _NEVER
    first = int(bound[:1] or 0)
    found = [f"[{first + 1}-9]{_more(places - 1)}"] if first < 9 else []
    return _Digits(False, _either(found + _after(first, _at_least(bound[1:], above, places - 1))))


def _at_most(bound: str, below: bool, places: int) -> _Digits:
    """Which fractions are at most ``0.bound`` (or below it)."""
    if not bound:
        return _NEVER if below else _Digits(True, '"0"' if places else None)
    if places == 0:
        return _Digits(True, None)
    first = int(bound[0])
    found = [f"[0-{first - 1}]{_more(places - 1)}"] if first > 0 else []
    return _Digits(True, _either(found + _after(first, _at_most(bound[1:], below, places - 1))))


def _between(low: str, above: bool, high: str, below: bool, places: int) -> _Digits:
    if not low and not above:
        return _at_most(high, below, places)
    if not high or places == 0:
        return _NEVER
    first, last = int(low[:1] or 0), int(high[0])
    if first > last:
        return _NEVER
    if first == last:
        return _Digits(False, _either(_after(first, _between(low[1:], above, high[1:], below, places - 1))))
    found = _after(first, _at_least(low[1:], above, places - 1))
    if last - first > 1:
        found.append(f"[{first + 1}-{last - 1}]{_more(places - 1)}")
    return _Digits(False, _either(found + _after(last, _at_most(high[1:], below, places - 1))))


def _after(digit: int, rest: _Digits) -> list[str]:
    if rest.text is None:
        return [f'"{digit}"'] if rest.empty else []
    return [f'"{digit}" ({rest.text})' + ("?" if rest.empty else "")]


def _wholes(low: int, high: int) -> list[str]:
    """Return the texts of the whole numbers from ``low`` to ``high``, one for each number of digits."""
    found = []
    for size in range(len(str(low)), len(str(max(high, 0))) + 1):
        least = max(low, 10 ** (size - 1) if size > 1 else 0)
        most = min(high, 10**size - 1)
        if least <= most:
            found.append(_same_length(str(least), str(most)))
    return found


def _same_length(low: str, high: str) -> str:
    if low == high:
        return f'"{low}"'
    size = len(low) - 1
    first, last = int(low[0]), int(high[0])
    if set(low[1:]) <= {"0"} and set(high[1:]) <= {"9"}:
        return f"[{first}-{last}]" + (f" [0-9]{{{size}}}" if size else "")
    if first == last:
        return f'"{first}" {_same_length(low[1:], high[1:])}'
    found = [f'"{first}" {_same_length(low[1:], "9" * size)}']
    if last - first > 1:
        found.append(f"[{first + 1}-{last - 1}] [0-9]{{{size}}}")
    found.append(f'"{last}" {_same_length("0" * size, high[1:])}')
    return "(" + " | ".join(found) + ")"


def _more(places: int) -> str:
    return f" [0-9]{{0,{places}}}" if places else ""


def _split(value: Decimal) -> tuple[int, str]:
    whole, _, fraction = f"{value:f}".partition(".")
    return int(whole), fraction.rstrip("0")


def _either(found: list[str]) -> str | None:
    return "(" + " | ".join(found) + ")" if found else None
