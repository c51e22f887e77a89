"""Coverage-guided fuzzing: ``python -m tests.fuzz.atheris_run SECONDS [ENTRY ...]``, or ``make fuzz SECONDS=60``.

Each entry runs in a process of its own for that long, beginning from its honest inputs and from ``.fuzz/<entry>``,
where what reached new code is kept. An input that broke a promise becomes a case in ``regressions/<entry>/``; commit
it with the fix.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CASES = Path(__file__).resolve().parent / "regressions"
CORPUS = ROOT / ".fuzz"
INSTRUMENTED = ["garrison_protocol", "garrison_agent", "garrison_controller", "tuf", "securesystemslib"]
FOUND = (70, 71, 77)
"""libFuzzer's exit status after a time-out, too much memory, and an exception."""
MEMORY_MB, ONE_INPUT_S, LONGEST = 2048, 20, 8192


def main(arguments: list[str]) -> int:
    """Fuzz the named entries, or all, for so many seconds each; return 1 if something was found."""
    if len(arguments) == 3 and arguments[0] == "--one":
        fuzz(arguments[1], int(arguments[2]))
        return 0
    try:
        import atheris  # noqa: F401
    except ImportError:
        sys.stderr.write("fuzz: atheris is missing\n  do this: .venv/bin/pip install -c constraints.txt -e '.[fuzz]'\n")
        return 2
    from tests.fuzz.entries import ENTRIES

    seconds, names = int(arguments[0]), arguments[1:] or list(ENTRIES)
    unknown = sorted(set(names) - set(ENTRIES))
    if unknown:
        sys.stderr.write(f"fuzz: no entry {unknown[0]}\n  do this: choose among {', '.join(ENTRIES)}\n")
        return 2
    found: list[str] = []
    broken: list[str] = []
    for name in names:
        command = [sys.executable, "-m", "tests.fuzz.atheris_run", "--one", name, str(seconds)]
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        if status:
            (found if status in FOUND else broken).append(name)
        with contextlib.suppress(OSError):  # made for libFuzzer, and of no use while empty
            (CASES / name).rmdir()
    print(f"fuzz: {len(names)} entries, {seconds} s each; found something in: {', '.join(found) or 'none'}")
    if broken:
        print(f"fuzz: these did not run: {', '.join(broken)}")
    return 1 if found or broken else 0


def fuzz(name: str, seconds: int) -> None:
    """Fuzz one entry in this process, which libFuzzer ends."""
    import atheris

    warnings.simplefilter("error")
    logging.disable(logging.CRITICAL)
    with atheris.instrument_imports(include=INSTRUMENTED):
        from tests.fuzz.entries import ENTRIES
        from tests.fuzz.seeds import seeds
    corpus, cases = CORPUS / name, CASES / name
    for folder in (corpus, cases):
        folder.mkdir(parents=True, exist_ok=True)
    for place, data in enumerate(seeds()[name]):
        (corpus / f"honest-{place}").write_bytes(data)
    entry = ENTRIES[name]
    options = [
        f"-max_total_time={seconds}",
        f"-rss_limit_mb={MEMORY_MB}",
        f"-timeout={ONE_INPUT_S}",
        f"-max_len={LONGEST}",
        f"-artifact_prefix={cases}{os.sep}",
        "-print_final_stats=1",
        "-verbosity=0",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus), str(cases)], entry)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
