"""``python -m demo``: the main job, end to end, on real parts. Exits 0 only if every step held."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from demo.fleet import ROOT, Fleet
from demo.processes import StepError
from demo.screen import Steps, console
from demo.steps import CHAT, MainJob

FOLDER = ROOT / ".demo"
BOARDS = ("edge-1", "edge-2", "edge-3")


def main() -> int:
    """Run the demo and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave everything running at the end")
    parser.add_argument("--mqtt", choices=("5", "3.1.1"), default="5", help="MQTT version of controller and boards")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where all state goes (made anew)")
    arguments = parser.parse_args()
    shutil.rmtree(arguments.folder, ignore_errors=True)
    arguments.folder.mkdir(parents=True)
    fleet = Fleet(arguments.folder.resolve(), BOARDS, mqtt_protocol=arguments.mqtt)
    job = MainJob(fleet)
    steps = Steps(len(job.steps()))
    keep = arguments.keep
    console.print(f"All state and logs: {arguments.folder}")
    try:
        for title, action in job.steps():
            steps.run(title, action)
        steps.summary()
    except StepError as error:
        keep = False
        console.print(f"[red]FAILED[/red] at step {steps.failed_number}: {error.cause}")
        console.print(f"  log: {error.log or fleet.logs}")
        return 1
    except KeyboardInterrupt:
        keep = False
        console.print("interrupted")
        return 130
    finally:
        if keep:
            explain(fleet)
        else:
            fleet.stop()
    return 0


def explain(fleet: Fleet) -> None:
    """Print how to talk to what is left running."""
    board = fleet.boards[0]
    for name, token in fleet.tokens.items():
        login = f"export GARRISON_URL={fleet.url} GARRISON_CA={fleet.server_ca} GARRISON_TOKEN={token}\n"
        path = fleet.folder / f"as-{name}"
        path.touch(0o600)
        path.write_text(login)
    pids = [fleet.broker.pid, fleet.controller.pid, *(one.agent.pid for one in fleet.boards)]
    console.print(
        f"\nEverything is still running. Be {', '.join(fleet.tokens)} (what each may: `garrison access whoami`):\n"
        f"  . {fleet.folder}/as-olga\n"
        f"  .venv/bin/garrison device list\n"
        f"  .venv/bin/garrison audit verify\n"
        f"On a board:\n"
        f"  .venv/bin/garrison-agent status --config {board.config}\n"
        f"  curl {board.url}/v1/chat/completions -H 'content-type: application/json' \\\n"
        f'    -d \'{{"model": "{CHAT}", "messages": [{{"role": "user", "content": "Hello"}}]}}\'\n'
        f"Stop it all:\n"
        f"  kill {' '.join(map(str, pids))}",
        markup=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    sys.exit(main())
