"""The main job in eleven steps, each ending in evidence."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.table import Table

from demo.damage import damage_gguf
from demo.evidence import heads
from demo.file_types import FileTypes
from demo.fleet import ROOT_SIGNERS, TARGETS_SIGNERS, Board, Fleet
from demo.packages import magika_file, pack, smollm2_file
from demo.processes import StepError, is_open, wait_for
from demo.screen import coloured, console, note, watch
from garrison_protocol.errors import RefusedError

CHAT = "smollm2"
FILES = "magika"
SOAK_S = 5
PEOPLE = {
    "dora": ["device-admin", "viewer"],
    "piet": ["model-publisher", "viewer"],
    "rolf": ["release-manager", "approver", "viewer"],
    "anna": ["approver", "viewer"],
    "olga": ["auditor", "viewer"],
}
QUESTIONS = (
    "Write one sentence about the sea.",
    "What is 2 plus 2?",
    "How many days are in a week?",
    "Why is the sky blue?",
)


class MainJob:
    """The fleet under demonstration and what the steps hand to each other."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.classified: list[Path] = []
        self.pending_before: dict[str, int] = {}
        self.outage_began_ms = 0

    @property
    def canary(self) -> Board:
        """The board of the first group."""
        return self.fleet.boards[0]

    def steps(self) -> list[tuple[str, Callable[[], str]]]:
        """Return the steps in order."""
        return [
            ("Start the broker and the controller", self.start),
            ("Create the registry's keys", self.ceremony),
            ("Enrol three boards", self.enrol),
            ("Publish two models, each signed by two people", self.publish),
            ("Create rollouts; another person approves", self.approve),
            ("Boards download, verify, evaluate, soak", self.roll_out),
            ("Chat, and classify 20 files", self.use),
            ("Stop broker and controller; boards go on", self.outage),
            ("Start them again; everything arrives once", self.reunite),
            ("Damage a model; publish a bad one", self.damage),
            ("Verify the audit chains; find an altered entry", self.audit),
        ]

    def start(self) -> str:
        """Step 1."""
        fleet = self.fleet
        fleet.initialise()
        fleet.start_broker()
        fleet.start_controller()
        fleet.create_principals(PEOPLE)
        return (
            f"mosquitto pid {fleet.broker.pid} on 127.0.0.1:{fleet.mqtt_port} (TLS, client certificates), "
            f"controller pid {fleet.controller.pid} on {fleet.url}, {len(PEOPLE) + 1} people"
        )

    def ceremony(self) -> str:
        """Step 2."""
        self.fleet.create_registry()
        self.fleet.push_registry(who="piet")
        return (
            f"root 2 of {len(ROOT_SIGNERS)} ({', '.join(ROOT_SIGNERS)}), targets 2 of {len(TARGETS_SIGNERS)} "
            f"({', '.join(TARGETS_SIGNERS)}); snapshot and timestamp online"
        )

    def enrol(self) -> str:
        """Step 3."""
        for index, board in enumerate(self.fleet.boards):
            board.configure()
            group = "/demo/canary/" if index == 0 else "/demo/rest/"
            token = self.fleet.json("device", "token", "create", board.name, "--group", group, who="dora")
            board.enrol(token["enrolment"])
            board.start()
        wait_for("all boards online", self._all_online, timeout_s=60, log=self.fleet.controller.log)
        thief = Board(self.fleet, "thief")
        thief.configure()
        again = thief.try_run("enroll", token["enrolment"])
        if again.returncode == 0 or "enrolment.token_used" not in again.stderr:
            raise StepError(f"a used token was not refused as such: {again.stderr}", self.fleet.controller.log)
        names = ", ".join(f"{board.name} (pid {board.agent.pid})" for board in self.fleet.boards)
        return f"{names}: own keys, CSR, certificate, pinned root; a used token is refused"

    def publish(self) -> str:
        """Step 4."""
        for draft, file, path in ((CHAT, smollm2_file(), "model.gguf"), (FILES, magika_file(), "model.onnx")):
            package = pack(self.fleet, draft, file, path=path)
            self.fleet.publish(package, who="piet")
            note(f"{draft} 1.0.0: {file.stat().st_size / 1e6:.0f} MB, signed by {' and '.join(TARGETS_SIGNERS)}")
        models = self.fleet.json("model", "list", who="anna")["models"]
        return ", ".join(f"{one['name']}:{one['version']} {one['manifest_sha256'][:12]}" for one in models)

    def approve(self) -> str:
        """Step 5."""
        names = {one["alias"]: one["name"] for one in self.fleet.json("model", "list", who="anna")["models"]}
        for alias in (FILES, CHAT):
            self._create_rollout(f"{alias}-1.0.0", names[alias], "1.0.0")
        own = self.fleet.try_garrison("rollout", "approve", f"{CHAT}-1.0.0", who="rolf")
        if own.returncode == 0:
            raise StepError("the creator approved their own rollout", self.fleet.controller.log)
        for alias in (FILES, CHAT):
            self.fleet.garrison("rollout", "approve", f"{alias}-1.0.0", who="anna")
        refusal = own.stderr.strip().splitlines()[0]
        return f"rolf's own approval refused ({refusal}); anna approved both"

    def roll_out(self) -> str:
        """Step 6."""
        names = [f"{FILES}-1.0.0", f"{CHAT}-1.0.0"]
        watch(
            lambda: self._rollout_table(names),
            lambda: all(self._rollout(name)["status"] == "FINISHED" for name in names),
            timeout_s=300,
            what="both rollouts FINISHED",
        )
        for name in names:
            targets = self._rollout(name)["targets"]
            first_done = max(one["finished_at"] for one in targets if one["group"] == "canary")
            second_began = min(one["assigned_at"] for one in targets if one["group"] == "rest")
            if datetime.fromisoformat(second_began) < datetime.fromisoformat(first_done):
                raise StepError(f"{name}: group rest began before canary had succeeded", self.fleet.controller.log)
        return (
            f"2 models ACTIVE on {len(targets)} boards; {CHAT}: canary ended at {first_done[11:23]}, "
            f"group rest began at {second_began[11:23]}"
        )

    def use(self) -> str:
        """Step 7."""
        text, pieces, first_s, speed = chat(self.canary, QUESTIONS[0])
        note(f"[italic]{QUESTIONS[0]}[/italic] -> {text.strip()!r}")
        agreed = self._classify(self.canary)
        return (
            f"{pieces} streamed pieces, first after {first_s * 1000:.0f} ms, {speed:.0f} pieces/s; {len(agreed)} of "
            f"{len(self.classified)} files labelled as magika does, {len(set(agreed.values()))} types"
        )

    def outage(self) -> str:
        """Step 8."""
        fleet = self.fleet
        for board in fleet.boards:
            fleet.delivered(board)
        fleet.broker.kill()
        fleet.controller.kill()
        self.outage_began_ms = int(time.time() * 1000)
        self.pending_before = {board.name: board.pending() for board in fleet.boards}
        answers = 0
        victim = fleet.boards[1]
        for turn in range(4):
            for board in fleet.boards:
                chat(board, QUESTIONS[turn % len(QUESTIONS)], max_tokens=12)
                FileTypes(board.url, FILES).identify(self.classified[turn])
                FileTypes(board.url, FILES).identify(self.classified[-1 - turn])
                answers += 3
            note(f"{answers} answers; outbox " + ", ".join(f"{b.name} {b.pending()} rows" for b in fleet.boards))
        served = [victim.alias(alias)["serving"] for alias in (CHAT, FILES)]
        victim.agent.kill()
        victim.start()
        wait_for(
            f"{victim.name} serving again",
            lambda: self._serves(victim),
            timeout_s=60,
            log=victim.log,
            alive=[victim.agent],
        )
        if [victim.alias(alias)["serving"] for alias in (CHAT, FILES)] != served:
            raise StepError(f"{victim.name} does not serve {served} any more", victim.log)
        chat(victim, QUESTIONS[1], max_tokens=12)
        answers += 1
        open_ports = [port for port in (fleet.mqtt_port, fleet.http_port) if is_open(port)]
        if open_ports:
            raise StepError(f"the outage is none: ports {open_ports} are open")
        grown = [f"{b.name} {self.pending_before[b.name]}->{b.pending()}" for b in fleet.boards]
        if any(board.pending() <= self.pending_before[board.name] for board in fleet.boards):
            raise StepError(f"an outbox did not grow: {grown}", victim.log)
        return (
            f"{answers} answers offline; {victim.name} killed with SIGKILL and serving again; "
            f"outbox rows {', '.join(grown)}"
        )

    def reunite(self) -> str:
        """Step 9."""
        fleet = self.fleet
        queued = {board.name: heads(board.database) for board in fleet.boards}
        fleet.start_broker()
        fleet.start_controller()
        rows = [row for board in fleet.boards for row in fleet.delivered(board, queued[board.name], timeout_s=120)]
        table = Table("board", "stream", "sent", "received", "duplicates", "missing")
        for row in rows:
            table.add_row(row.board, row.stream, *map(str, (row.sent, row.received, row.duplicates, row.missing)))
        note("rows by (epoch, seq, hash): board's database against the controller's")
        console.print(table)
        if not all(row.exact for row in rows):
            raise StepError("a row is missing or stands twice", fleet.controller.log)
        metrics = {
            board.name: fleet.json("device", "metrics", board.name, who="olga")["rows"] for board in fleet.boards
        }
        offline = {
            name: sum(1 for row in rows if not row["online"] and row["time_ms"] >= self.outage_began_ms)
            for name, rows in metrics.items()
        }
        if not all(offline.values()):
            raise StepError(f"telemetry of the outage is missing: {offline}", fleet.controller.log)
        sent, received = sum(row.sent for row in rows), sum(row.received for row in rows)
        samples = ", ".join(f"{name} {count}" for name, count in offline.items())
        return f"{sent} rows sent, {received} received, 0 missing, 0 twice; samples taken in the outage: {samples}"

    def damage(self) -> str:
        """Step 10."""
        repaired = self._flip_a_byte(self.fleet.boards[2])
        rolled_back = self._bad_model()
        return f"{repaired}; {rolled_back}"

    def audit(self) -> str:
        """Step 11."""
        verified = self.fleet.json("audit", "verify", who="olga")
        copy = self.fleet.folder / "altered-copy.db"
        with sqlite3.connect(f"file:{self.fleet.database}?mode=ro", uri=True) as store, sqlite3.connect(copy) as target:
            store.backup(target)
        with sqlite3.connect(copy) as target:
            seq, header = target.execute(
                "SELECT seq, header FROM stream_row WHERE device_id = ? AND stream = 'audit' AND header LIKE ? LIMIT 1",
                (self.canary.name, "%deployment.active%"),
            ).fetchone()
            target.execute(
                "UPDATE stream_row SET header = ? WHERE device_id = ? AND stream = 'audit' AND seq = ?",
                (header.replace("deployment.active", "deployment.failed"), self.canary.name, seq),
            )
        found = self.fleet.try_garrison("audit", "verify", "--database", str(copy))
        named = re.search(rf"{self.canary.name} audit epoch [0-9a-f]+ entry {seq}:", found.stderr)
        if found.returncode != RefusedError.exit_status or named is None:
            raise StepError(f"an altered entry (seq {seq}) was not named: {found.stdout}{found.stderr}")
        rows = sum(one["rows"] for one in verified["chains"])
        return (
            f"{len(verified['chains'])} chains, {rows} entries verified; "
            f"altered entry {self.canary.name}/audit/{seq} named"
        )

    def _all_online(self) -> bool:
        devices = self.fleet.json("device", "list", who="dora")
        return sum(bool(one["online"]) for one in devices) == len(self.fleet.boards)

    def _create_rollout(self, name: str, model: str, version: str) -> None:
        words = ["rollout", "create", name, "--model", model, "--version", version]
        words += ["--group", f"canary=name={self.canary.name}", "--group", "rest=*"]
        words += ["--soak", f"{SOAK_S}s", "--success-threshold", "100", "--error-threshold", "0"]
        self.fleet.garrison(*words, who="rolf")

    def _rollout(self, name: str) -> dict[str, Any]:
        rollout = dict(self.fleet.json("rollout", "show", name, who="anna"))
        rollout["targets"] = [
            {**board, "group": group["name"]} for group in rollout["groups"] for board in group["boards"]
        ]
        return rollout

    def _rollout_table(self, names: list[str]) -> Table:
        table = Table("rollout", "status", "group", "board", "verdict", "board says", "fetched", "error")
        for name in names:
            rollout = self._rollout(name)
            for one in rollout["targets"]:
                total, done = one["total_bytes"], one["progress_bytes"]
                table.add_row(
                    name,
                    coloured(rollout["status"]),
                    one["group"],
                    one["device"],
                    coloured(one["state"]),
                    coloured(one["deployment"] or "-"),
                    f"{100 * min(done, total) // total} %" if total else "-",
                    one["error_code"] or "",
                )
            table.add_section()
        return table

    def _classify(self, board: Board) -> dict[Path, str]:
        import magika

        reference = magika.Magika()
        client = FileTypes(board.url, FILES)
        self.classified = choose_files(reference)
        agreed: dict[Path, str] = {}
        for path in self.classified:
            ours, theirs = client.identify(path), reference.identify_path(path)
            if ours.label != str(theirs.output.label) or abs(ours.score - theirs.score) > 1e-4:
                raise StepError(
                    f"{path.name}: board says {ours}, magika says {theirs.output.label} {theirs.score}", board.log
                )
            agreed[path] = ours.label
        if len(agreed) < 20 or len(set(agreed.values())) < 8:
            raise StepError(f"only {len(agreed)} files of {len(set(agreed.values()))} types could be found")
        return agreed

    def _serves(self, board: Board) -> bool:
        return all(board.alias(alias).get("loaded") for alias in (CHAT, FILES))

    def _flip_a_byte(self, board: Board) -> str:
        """Flip one byte of the installed GGUF, keep its times, and see the board refuse, report, and repair."""
        blob = max((board.state / "blobs").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
        before = blob.stat()
        board.run("model", "unload", CHAT)
        blob.chmod(0o600)
        with blob.open("r+b") as file:
            file.seek(before.st_size // 2)
            byte = file.read(1)[0]
            file.seek(before.st_size // 2)
            file.write(bytes([byte ^ 1]))
        blob.chmod(before.st_mode)
        os.utime(blob, ns=(before.st_atime_ns, before.st_mtime_ns))
        refused = board.try_run("model", "load", CHAT)
        wait_for(f"{board.name}'s repair", lambda: bool(board.alias(CHAT).get("loaded")), timeout_s=90, log=board.log)
        chat(board, QUESTIONS[0], max_tokens=8)
        kinds = self._audit_kinds(board, {"model.corrupt", "model.repaired"})
        what = "load refused" if refused.returncode else "load repaired before it answered"
        return f"{board.name}: one byte flipped, {what}, recorded as {', '.join(kinds)}, serving again"

    def _audit_kinds(self, board: Board, wanted: set[str]) -> list[str]:
        found: set[str] = set()

        def reported() -> bool:
            for one in self.fleet.json("audit", "list", "--device", board.name, "--limit", "500", who="olga")[
                "entries"
            ]:
                found.add(str(one["kind"]))
            return wanted <= found

        wait_for(f"{board.name}'s report of {wanted}", reported, timeout_s=60, log=board.log)
        return sorted(wanted)

    def _bad_model(self) -> str:
        """Publish a properly signed but damaged model and see the first group's board refuse it by itself."""
        bad = self.fleet.folder / "bad.gguf"
        damage_gguf(smollm2_file(), bad)
        package = pack(self.fleet, CHAT, bad, version="1.0.1", path="model.gguf")
        bad.unlink()
        self.fleet.publish(package, who="piet")
        model = next(
            one["name"] for one in self.fleet.json("model", "list", who="anna")["models"] if one["alias"] == CHAT
        )
        name = f"{CHAT}-1.0.1"
        self._create_rollout(name, model, "1.0.1")
        self.fleet.garrison("rollout", "approve", name, who="anna")
        watch(
            lambda: self._rollout_table([name]),
            lambda: self._rollout(name)["status"] in {"PAUSED", "FINISHED"},
            timeout_s=240,
            what="the bad rollout to stop",
        )
        rollout = self._rollout(name)
        first = next(one for one in rollout["targets"] if one["device"] == self.canary.name)
        if rollout["status"] != "PAUSED" or first["deployment"] != "ROLLED_BACK":
            raise StepError(f"the bad model came to {rollout['status']}, board {first['deployment']}", self.canary.log)
        wait_for(
            "the old model", lambda: bool(self.canary.alias(CHAT).get("loaded")), timeout_s=60, log=self.canary.log
        )
        serving = self.canary.alias(CHAT)["serving"]
        chat(self.canary, QUESTIONS[0], max_tokens=8)
        for board in self.fleet.boards[1:]:
            with sqlite3.connect(f"file:{board.database}?mode=ro", uri=True) as store:
                (seen,) = store.execute("SELECT count(*) FROM entry WHERE header LIKE '%1.0.1%'").fetchone()
            if seen:
                raise StepError(f"{board.name} saw the bad model", board.log)
        return (
            f"bad {CHAT} 1.0.1: {self.canary.name} {first['deployment']} ({first['error_code']}), serves {serving}; "
            f"rollout {rollout['status']}; the other boards never saw it"
        )


def chat(board: Board, question: str, *, max_tokens: int = 48) -> tuple[str, int, float, float]:
    """Ask a board through the official client, streaming: (text, pieces, seconds to the first, pieces a second).

    Raises:
        StepError: No answer came.
    """
    import openai

    client = openai.OpenAI(base_url=f"{board.url}/v1", api_key="none", max_retries=0, timeout=120)
    began = time.monotonic()
    first: float | None = None
    pieces: list[str] = []
    stream = client.chat.completions.create(
        model=CHAT, messages=[{"role": "user", "content": question}], max_tokens=max_tokens, temperature=0, stream=True
    )
    for event in stream:
        if event.choices and event.choices[0].delta.content:
            first = first or time.monotonic() - began
            pieces.append(event.choices[0].delta.content)
    if first is None:
        raise StepError(f"{board.name} answered nothing", board.log)
    took = time.monotonic() - began - first
    return "".join(pieces), len(pieces), first, (len(pieces) - 1) / took if took > 0 else 0.0


def choose_files(reference: Any) -> list[Path]:
    """Return 20 real files of at least 8 types from this checkout and what is installed with it."""
    root = Path(__file__).resolve().parent.parent
    site = Path(next(p for p in Path(shutil.__file__).parents if p.name.startswith("python3")))
    candidates = [
        root / "README.md",
        root / "pyproject.toml",
        root / "Makefile",
        root / "scripts/broker.sh",
        Path("/bin/ls"),
    ]
    for folder, pattern in (
        (site, "*.py"),
        (root / ".venv", "lib/python3*/site-packages/*/*.json"),
        (root / ".venv", "lib/python3*/site-packages/*/*.so"),
        (root / ".venv", "lib/python3*/site-packages/*/*.pem"),
        (root / ".venv", "lib/python3*/site-packages/**/*.html"),
        (root / ".venv", "lib/python3*/site-packages/**/*.css"),
        (root / ".venv", "lib/python3*/site-packages/**/*.js"),
        (root / ".venv", "lib/python3*/site-packages/**/*.c"),
        (root / ".venv", "lib/python3*/site-packages/**/*.h"),
        (root / ".venv", "lib/python3*/site-packages/**/*.onnx"),
        (root / ".venv", "lib/python3*/site-packages/**/*.pyc"),
        (root / ".venv", "lib/python3*/site-packages/**/*.png"),
    ):
        candidates += [path for path in sorted(folder.glob(pattern)) if 200 < path.stat().st_size < 20_000_000][:3]
    chosen: list[Path] = []
    by_label: dict[str, int] = {}
    for path in candidates:
        if not path.is_file() or len(chosen) == 20:
            continue
        label = str(reference.identify_path(path).output.label)
        if by_label.get(label, 0) < 3:
            by_label[label] = by_label.get(label, 0) + 1
            chosen.append(path)
    return chosen
