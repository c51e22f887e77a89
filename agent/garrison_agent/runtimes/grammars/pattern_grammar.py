"""The keyword ``pattern`` of JSON Schema as a grammar: a plain subset of regular expressions, with bounds.

Understood: literals, ``.``, classes, ``\\d \\w \\s`` and their opposites, groups, alternatives, ``* + ? {m,n}``, and
``^`` and ``$`` around a whole alternative. Everything else (lookaround, back-references, lazy quantifiers, ...) is
refused, and so is what makes a grammar slow: large repetitions, and repetitions of what may be empty.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NoReturn

from garrison_agent.runtimes.grammars.gbnf import Grammar, Part, Ref, Repeat, char_class
from garrison_protocol.errors import InvalidError

MAX_PATTERN_CHARS = 512
MAX_PATTERN_SIZE = 1000
"""Characters that a pattern may describe one after another, repetitions written out."""
_MAX_DEPTH = 16

Ranges = list[tuple[int, int]]

_DIGITS: Ranges = [(0x30, 0x39)]
_WORDS: Ranges = [(0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)]
_SPACES: Ranges = [(0x09, 0x0D), (0x20, 0x20)]
_CONTROLS = {"n": 0x0A, "r": 0x0D, "t": 0x09, "f": 0x0C, "v": 0x0B}
_QUOTED = {
    0x22: '"\\\\\\""',
    0x5C: '"\\\\\\\\"',
    0x08: '"\\\\b"',
    0x09: '"\\\\t"',
    0x0A: '"\\\\n"',
    0x0C: '"\\\\f"',
    0x0D: '"\\\\r"',
}
"""How JSON writes the characters that cannot stand in a string as they are; of the rest none is generated."""
_NEVER_PLAIN: Ranges = [(0x00, 0x1F), (0x22, 0x22), (0x5C, 0x5C), (0x7F, 0x7F), (0xD800, 0xDFFF)]
_LAST = 0x10FFFF


def pattern_rule(pattern: str, grammar: Grammar, param: str) -> Ref:
    """Return the rule, in ``grammar``, of the quoted strings in which ``pattern`` is found.

    Raises:
        InvalidError: ``inference.schema_unsupported``: not of the subset, or beyond the bounds; ``param`` is named.
    """
    if len(pattern) > MAX_PATTERN_CHARS:
        _unsupported(param, f"a pattern has at most {MAX_PATTERN_CHARS} characters")
    parser = _Parser(pattern, grammar, param)
    rule = parser.whole()
    return grammar.add(['"\\""', rule, '"\\""'])


@dataclass
class _Node:
    """A piece of a pattern: the parts to write, whether it may be empty, and how many characters it describes."""

    parts: list[Part] = field(default_factory=list)
    empty: bool = True
    size: int = 0


class _Parser:
    def __init__(self, pattern: str, grammar: Grammar, param: str) -> None:
        self._pattern = pattern
        self._grammar = grammar
        self._param = param
        self._at = 0
        self._depth = 0
        self._total = 0

    def whole(self) -> Ref:
        """Read all alternatives of the outermost level; only they may be anchored."""
        rules = []
        while True:
            starts = self._take("^")
            node = self._sequence()
            ends = self._take("$")
            anything = f"{self._grammar.builtin('char')}*"
            rules.append([*([] if starts else [anything]), *node.parts, *([] if ends else [anything])])
            if not self._take("|"):
                break
        if self._at < len(self._pattern):
            self._unsupported(f"at character {self._at + 1}")
        return self._grammar.add(*rules)

    def _sequence(self) -> _Node:
        whole = _Node()
        while self._at < len(self._pattern) and self._pattern[self._at] not in "|)$":
            node = self._quantified(self._atom())
            whole.parts += node.parts
            whole.empty = whole.empty and node.empty
            whole.size += node.size
        return whole

    def _atom(self) -> _Node:
        letter = self._next()
        if letter == "(":
            return self._group()
        if letter in "^*+?{}]":
            self._unsupported(f"{letter!r} at character {self._at}")
        if letter == "[":
            ranges = self._class()
        elif letter == ".":
            ranges = _without([(0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029)])
        elif letter == "\\":
            ranges = self._escape(inside=False)
        else:
            ranges = [(ord(letter), ord(letter))]
        return self._one_of(ranges)

    def _group(self) -> _Node:
        if self._take("?") and not self._take(":"):
            self._unsupported("groups are plain ( ) or (?: )")
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            self._unsupported("groups nest too deep")
        nodes = [self._sequence()]
        while self._take("|"):
            nodes.append(self._sequence())
        if not self._take(")"):
            self._unsupported("a group is not closed, or is anchored inside")
        self._depth -= 1
        rule = self._grammar.add(*(node.parts for node in nodes))
        return _Node([rule], any(node.empty for node in nodes), sum(node.size for node in nodes))

    def _quantified(self, node: _Node) -> _Node:
        low, high = 1, 1
        letter = self._pattern[self._at : self._at + 1]
        if letter and letter in "*+?":
            self._at += 1
            low, high = {"*": (0, -1), "+": (1, -1), "?": (0, 1)}[letter]
        elif letter == "{":
            low, high = self._counts()
        else:
            self._count(node.size)
            return node
        if self._pattern[self._at : self._at + 1] in ("?", "+", "*", "{"):
            self._unsupported("one quantifier after another")
        if node.empty and (low, high) != (0, 1):
            self._unsupported("a repetition of what may be empty")
        size = node.size * max(low, high, 1)
        self._count(size)
        rule = self._grammar.add(node.parts)
        return _Node([Repeat(rule.rule, low, None if high < 0 else high)], low == 0 or node.empty, size)

    def _counts(self) -> tuple[int, int]:
        end = self._pattern.find("}", self._at)
        given = self._pattern[self._at + 1 : end].split(",") if end > 0 else []
        if len(given) not in (1, 2) or not all(one.isascii() and one.isdigit() for one in given if one):
            self._unsupported(f"the repetition at character {self._at + 1}")
        if not given[0] or any(len(one) > 4 for one in given):
            self._unsupported(f"the repetition at character {self._at + 1}")
        self._at = end + 1
        low = int(given[0])
        high = low if len(given) == 1 else int(given[1]) if given[1] else -1
        if 0 <= high < low:
            self._unsupported("a repetition's bounds are the wrong way round")
        return low, high

    def _class(self) -> Ranges:
        negated = self._take("^")
        ranges: Ranges = []
        while not self._take("]"):
            low = self._class_part()
            if self._pattern[self._at : self._at + 1] == "-" and self._pattern[self._at + 1 : self._at + 2] != "]":
                self._at += 1
                high = self._class_part()
                if len(low) != 1 or len(high) != 1 or low[0][0] != low[0][1] or high[0][0] < low[0][1]:
                    self._unsupported("a range in a class has no order")
                low = [(low[0][0], high[0][1])]
            ranges += low
        return _without(ranges) if negated else ranges

    def _class_part(self) -> Ranges:
        letter = self._next()
        if letter == "\\":
            return self._escape(inside=True)
        return [(ord(letter), ord(letter))]

    def _escape(self, *, inside: bool) -> Ranges:
        letter = self._next()
        for small, ranges in (("d", _DIGITS), ("w", _WORDS), ("s", _SPACES)):
            if letter == small:
                return ranges
            if letter == small.upper():
                return _without(ranges)
        if letter in _CONTROLS:
            return [(_CONTROLS[letter], _CONTROLS[letter])]
        if letter in "xu":
            size = 2 if letter == "x" else 4
            digits = self._pattern[self._at : self._at + size]
            if len(digits) == size and all(one in "0123456789abcdefABCDEF" for one in digits):
                self._at += size
                return [(int(digits, 16), int(digits, 16))]
        if letter.isalnum() or (letter == "b" and inside):
            self._unsupported(f"the escape \\{letter}")
        return [(ord(letter), ord(letter))]

    def _one_of(self, ranges: Ranges) -> _Node:
        """Return the node of one character, as JSON writes it inside a string."""
        choices: list[list[Part]] = []
        plain = _without([*_NEVER_PLAIN, *_without(ranges)])
        if plain:
            choices.append([char_class(plain)])
        choices += [[text] for code, text in _QUOTED.items() if any(low <= code <= high for low, high in ranges)]
        if not choices:
            self._unsupported("a class holds no character that is generated")
        return _Node([self._grammar.add(*choices)], empty=False, size=1)

    def _count(self, size: int) -> None:
        self._total += size
        if self._total > MAX_PATTERN_SIZE:
            self._unsupported("its repetitions are too large")

    def _next(self) -> str:
        if self._at >= len(self._pattern):
            self._unsupported("it ends too early")
        self._at += 1
        return self._pattern[self._at - 1]

    def _take(self, text: str) -> bool:
        found = self._pattern.startswith(text, self._at)
        self._at += len(text) * found
        return found

    def _unsupported(self, why: str) -> NoReturn:
        _unsupported(self._param, f"pattern: {why} is not supported")


def _without(ranges: Ranges) -> Ranges:
    """Return all code points that are not in ``ranges``, in order."""
    left, start = [], 0
    for low, high in sorted(ranges):
        if low > start:
            left.append((start, low - 1))
        start = max(start, high + 1)
    if start <= _LAST:
        left.append((start, _LAST))
    return left


def _unsupported(param: str, message: str) -> NoReturn:
    raise InvalidError("inference.schema_unsupported", message, hint="simplify the pattern", param=param)
