"""``python -m bench [name ...]``: measure against the budgets of docs/performance.md and print a table."""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench import audit, batching, download, footprint, memory, metadata, relay, stream, tensors, turns, verify
from bench.machine import this_machine
from bench.result import Findings, as_json, as_markdown, run
from demo.processes import StepError
from garrison_protocol.errors import GarrisonError

BENCHMARKS: dict[str, Callable[[Path], Findings]] = {
    "audit": audit.measure,
    "batching": batching.measure,
    "download": download.measure,
    "footprint": footprint.measure,
    "memory": memory.measure,
    "metadata": metadata.measure,
    "relay": relay.measure,
    "stream": stream.measure,
    "tensors": tensors.measure,
    "turns": turns.measure,
    "verify": verify.measure,
}


def main(words: list[str] | None = None) -> int:
    """Run the benchmarks that ``words`` name. The status says whether they ran, not whether a budget is met."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, epilog="example: python -m bench audit download -o json"
    )
    parser.add_argument("name", nargs="*", metavar="name", help=f"one of {', '.join(BENCHMARKS)}; none: all")
    parser.add_argument("-o", "--output", choices=("table", "json"), default="table")
    parser.add_argument(
        "--folder", type=Path, default=Path("/var/tmp"), help="where to write; on the disk that is to be measured"
    )
    arguments = parser.parse_args(words)
    unknown = [name for name in arguments.name if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark is called {unknown[0]!r}; there are {', '.join(BENCHMARKS)}")
    command = shlex.join(["python", "-m", "bench", *(sys.argv[1:] if words is None else words)])
    folder = Path(tempfile.mkdtemp(prefix="garrison-bench-", dir=arguments.folder))
    failed = True
    try:
        runs = [run(name, partial(BENCHMARKS[name], folder / name)) for name in arguments.name or BENCHMARKS]
        report = as_json if arguments.output == "json" else as_markdown
        print(report(command, this_machine(folder), runs))
        failed = False
    except (StepError, GarrisonError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        failed = False
        return 130
    finally:
        if failed:
            print(f"State and logs: {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
