"""Matches the gate's regular expressions in a process of their own, within a time limit.

``re`` backtracks: a pattern such as ``(a+)+$`` can take for ever, and holds the interpreter's lock meanwhile. In the
agent's own process one signed manifest could so stop a whole board.
"""

from __future__ import annotations

import json
import subprocess
import sys

MATCH_TIMEOUT_S = 10.0
"""An honest pattern takes milliseconds, even on a slow board."""
MAX_MATCHED_CHARS = 8192
"""A pattern sees no more than this of an answer, whatever the model writes."""
_CHILD = """\
import json, re, sys
pattern, text = json.load(sys.stdin)
try:
    found = re.search(pattern, text) is not None
except (re.error, RecursionError, OverflowError, MemoryError):
    found = False
sys.exit(0 if found else 3)
"""


def pattern_matches(pattern: str, text: str, *, timeout_s: float = MATCH_TIMEOUT_S) -> bool:
    """Tell whether ``pattern`` is found in ``text`` in time; one that is invalid or takes too long never is.

    Raises:
        OSError: The process could not be started.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _CHILD],
            input=json.dumps([pattern, text[:MAX_MATCHED_CHARS]]).encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0
