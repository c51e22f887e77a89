"""Who is served next: one application after the other, each in the order it came. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Turns(Generic[T]):
    """A queue that takes from each ``key`` in turn, so that one application's hundred requests delay nobody else's."""

    def __init__(self) -> None:
        self._lines: dict[str, deque[T]] = {}
        """In the order of their turns; no line is empty."""

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[T]:
        """Go through all that wait, one application after the other."""
        for line in self._lines.values():
            yield from line

    def line(self, key: str) -> int:
        """Return how many of ``key`` wait."""
        return len(self._lines.get(key, ()))

    def add(self, key: str, item: T) -> None:
        """Put ``item`` at the end of its line; a new line is served after all that wait already."""
        self._lines.setdefault(key, deque()).append(item)

    def pop(self) -> T:
        """Take the next one; its line moves behind the others. There must be one."""
        key, line = next(iter(self._lines.items()))
        item = line.popleft()
        del self._lines[key]
        if line:
            self._lines[key] = line
        return item

    def remove(self, unwanted: Callable[[T], bool]) -> list[T]:
        """Take out and return all that are ``unwanted``."""
        gone = [item for item in self if unwanted(item)]
        if gone:
            kept = {key: deque(item for item in line if item not in gone) for key, line in self._lines.items()}
            self._lines = {key: line for key, line in kept.items() if line}
        return gone
