"""``garrison-agent`` and ``python -m garrison_agent``."""

from __future__ import annotations

import sys

from garrison_agent.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
