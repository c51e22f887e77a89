"""What moves on a terminal while something takes time; where nobody looks, nothing is written. On standard error."""

from __future__ import annotations

import sys
import threading
import time

from garrison_agent.cli.output import duration, size

_FRAMES = "|/-\\"
_FRAME_S = 0.12
_FIRST_S = 0.3
"""What is over sooner is not worth a sign."""
_BAR = 20
_ERASE = "\r\x1b[K"


class Spinner:
    """Shows ``text`` and the seconds gone by; a context manager. Nothing else may write meanwhile."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._spin, name="spinner", daemon=True)

    def __enter__(self) -> Spinner:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Begin to turn, if somebody looks."""
        if sys.stderr.isatty():
            self._thread.start()

    def stop(self) -> None:
        """Take it off the screen; a second time it does nothing."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _spin(self) -> None:
        began, wait_s, turn = time.monotonic(), _FIRST_S, 0
        while not self._over.wait(wait_s):
            wait_s, turn = _FRAME_S, turn + 1
            gone = duration(time.monotonic() - began)
            sys.stderr.write(f"{_ERASE}{_FRAMES[turn % len(_FRAMES)]} {self._text} {gone}")
            sys.stderr.flush()
        if turn:
            sys.stderr.write(_ERASE)
            sys.stderr.flush()


class Bar:
    """A line with how much of something is done, in bytes, and how fast."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty()
        self._began_at = time.monotonic()
        self._drawn = False

    def draw(self, done: int, total: int, label: str) -> None:
        """Show ``done`` of ``total`` bytes."""
        if not self._shown:
            return
        share = min(1.0, done / total) if total else 1.0
        filled = round(share * _BAR)
        rate = done / max(time.monotonic() - self._began_at, 0.001)
        text = f"[{'#' * filled}{' ' * (_BAR - filled)}] {share:4.0%} of {size(total)}, {size(round(rate))}/s  {label}"
        sys.stderr.write(_ERASE + text[:79])
        sys.stderr.flush()
        self._drawn = True

    def close(self) -> None:
        """Take it off the screen."""
        if self._drawn:
            sys.stderr.write(_ERASE)
            sys.stderr.flush()
            self._drawn = False
