"""String formats of JSON Schema as GBNF: never more than the format allows, sometimes less.

February has 28 days, years begin at 1000, hosts are names of letters and digits, and URIs are http(s). Sources: RFC
3339 (date, time), RFC 9562 (uuid), ISO 8601 as RFC 3339, appendix A (duration), RFC 3986, 4291, 5321.
"""

from __future__ import annotations

_DAY = '("0" [1-9] | "1" [0-9] | "2" [0-8])'
_DATE = (
    f'[1-9] [0-9]{{3}} "-" (("0" [1-9] | "1" [0-2]) "-" {_DAY}'
    ' | ("0" [13-9] | "1" [0-2]) "-" ("29" | "30") | ("0" [13578] | "1" [02]) "-31")'
)
_CLOCK = '([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9]'
_TIME = f'{_CLOCK} ":" [0-5] [0-9] ("." [0-9]{{1,6}})? ("Z" | [+-] {_CLOCK})'
_LABEL = "[a-z0-9] ([a-z0-9-]{0,20} [a-z0-9])?"
_HOST = f'{_LABEL} ("." {_LABEL}){{0,3}}'
_DOMAIN = f'{_LABEL} ("." {_LABEL}){{0,2}} "." [a-z]{{2,10}}'
_OCTET = '("25" [0-5] | "2" [0-4] [0-9] | "1" [0-9] [0-9] | [1-9] [0-9] | [0-9])'
_GROUP = "[0-9a-f]{1,4}"
_HEX = "[0-9a-f]"
_CLOCK_SPAN = (
    '"T" ([0-9]{1,3} "H" ([0-9]{1,3} "M" ([0-9]{1,3} "S")?)? | [0-9]{1,3} "M" ([0-9]{1,3} "S")? | [0-9]{1,3} "S")'
)
_DAY_SPAN = '([0-9]{1,3} "Y" ([0-9]{1,3} "M" ([0-9]{1,3} "D")?)? | [0-9]{1,3} "M" ([0-9]{1,3} "D")? | [0-9]{1,3} "D")'

FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f'{_DATE} "T" {_TIME}',
    "duration": f'"P" ({_DAY_SPAN} ({_CLOCK_SPAN})? | {_CLOCK_SPAN} | [0-9]{{1,3}} "W")',
    "uuid": f'{_HEX}{{8}} "-" {_HEX}{{4}} "-" {_HEX}{{4}} "-" {_HEX}{{4}} "-" {_HEX}{{12}}',
    "hostname": _HOST,
    "email": f'[a-z0-9] ([._+-]? [a-z0-9]){{0,30}} "@" {_DOMAIN}',
    "ipv4": f'{_OCTET} ("." {_OCTET}){{3}}',
    "ipv6": f'{_GROUP} (":" {_GROUP}){{7}}',
    "uri": f'"http" "s"? "://" {_DOMAIN} ("/" [a-zA-Z0-9._~-]{{1,60}}){{0,10}} "/"?',
}
"""Format -> the text between the quotes."""


def quoted_format(name: str) -> str:
    """Return the GBNF text of a quoted string of a known format."""
    return f'"\\"" {FORMATS[name]} "\\""'
