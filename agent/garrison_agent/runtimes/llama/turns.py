"""Who is served next: one application after the other, each in the order it came. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
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

    @property
    def keys(self) -> Iterable[str]:
        """Return who waits, in the order of their turns."""
        return self._lines.keys()

    def line(self, key: str) -> int:
        """Return how many of ``key`` wait."""
        return len(self._lines.get(key, ()))

    def add(self, key: str, item: T) -> None:
        """Put ``item`` at the end of its line; a new line is served after all that wait already."""
        self._lines.setdefault(key, deque()).append(item)

    def add_first(self, key: str, item: T) -> None:
        """Put ``item``, whose turn was cut short, at the head of its line."""
        self._lines.setdefault(key, deque()).appendleft(item)

    def prefer(self, key: str) -> None:
        """Serve the line of ``key`` next. It must wait."""
        self._lines = {key: self._lines.pop(key), **self._lines}

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


def makes_way(holds: int, other_holds: int) -> bool:
    """Tell whether one that ``holds`` places gives up one of them for another that waits and holds fewer.

    Where there are more applications than places, those without one take turns with those that have one.
    """
    return holds > other_holds + 1 or holds > other_holds == 0
