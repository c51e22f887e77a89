"""The agent's side of a worker: start it, hear its status, end it.

The parent opens the model's files read-only and hands over the descriptors, so the bytes that the worker verifies
are the bytes that it loads, whatever happens to the paths. Standard input stays open for as long as the agent lives;
its end (the kernel closes it even after SIGKILL) ends the worker.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable

from garrison_agent.runtimes.cgroups import Group, Groups
from garrison_agent.runtimes.spec import WorkerSpec, encode_order
from garrison_agent.runtimes.status import (
    MAX_LINE_BYTES,
    Exited,
    Failed,
    Ready,
    RequestDone,
    RequestRecord,
    Verified,
    WorkerEvent,
    decode_event,
)

__all__ = ["Exited", "Failed", "Ready", "RequestDone", "RequestRecord", "Verified", "Worker", "WorkerEvent"]

_LOG = logging.getLogger(__name__)

_ENVIRONMENT = {
    # Linux wheels of onnxruntime upload telemetry unless told not to before the import.
    "ORT_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    # A crash in llama.cpp would start a debugger, if there is one, which takes seconds and prints what it finds.
    "GGML_NO_BACKTRACE": "1",
}
_EXIT_GRACE_S = 10.0
"""How long a worker that closed its status pipe may take to end by itself."""


class Worker:
    """One child process serving one model on ``spec.socket``.

    Every ``start`` is answered by exactly one ``Exited``, whatever happens. Events come from a thread of the worker's
    own (or from ``start`` itself when nothing could be started), so ``on_event`` must only pass them on. Use once.
    """

    def __init__(self, spec: WorkerSpec, on_event: Callable[[WorkerEvent], None], groups: Groups | None = None) -> None:
        """``groups`` gives the child a control group for ``spec.limits``; without one it limits itself."""
        self.spec = spec
        self._groups = groups
        self._group: Group | None = None
        self._killed_for: tuple[str, str] | None = None
        self._oom_kills = 0
        self._on_event = on_event
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()
        self._gone = threading.Event()

    @property
    def pid(self) -> int | None:
        """The child's process id while it runs."""
        return None if self._process is None or self._gone.is_set() else self._process.pid

    def start(self) -> None:
        """Start the child and return at once; ``Verified``, then ``Ready`` or ``Failed``, follow.

        What goes wrong here is an event too: ``model.file_missing`` or ``worker.start_failed``, then ``Exited(None)``.
        """
        assert self._process is None, "a worker is started once"
        with contextlib.ExitStack() as opened:
            descriptors = []
            for file in self.spec.files:
                try:
                    descriptor = os.open(file.disk_path, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    self._never_started("model.file_missing", f"{file.path} cannot be opened: {error.strerror}")
                    return
                opened.callback(os.close, descriptor)
                descriptors.append(descriptor)
            try:
                status = self._spawn(opened, tuple(descriptors))
            except OSError as error:
                self._never_started("worker.start_failed", f"no worker process could be started: {error}")
                return
        threading.Thread(target=self._follow, args=(status,), daemon=True, name=f"worker-{self.spec.model_id}").start()

    def _spawn(self, opened: contextlib.ExitStack, descriptors: tuple[int, ...]) -> int:
        """Start the child and return our end of its status pipe."""
        self.spec.socket.unlink(missing_ok=True)
        self._oom_kills = oom_kills()
        if self._groups is not None:
            self._group = self._groups.make(self.spec.limits)
        reading, writing = os.pipe()
        opened.callback(os.close, writing)
        try:
            # -P: nothing from the working directory is imported. A group of its own: Ctrl-C at a terminal reaches the
            # agent only, which ends its workers in order.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "garrison_agent.runtimes.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                pass_fds=(*descriptors, writing),
                env={**os.environ, **_ENVIRONMENT},
                process_group=0,
                bufsize=0,
            )
        except OSError:
            os.close(reading)
            if self._group is not None:
                self._group.remove()
            raise
        assert self._process.stdin is not None
        # A child that died at once is reported by the reader, not here.
        with contextlib.suppress(BrokenPipeError):
            group = None if self._group is None else str(self._group.path)
            self._process.stdin.write(encode_order(self.spec, descriptors, writing, group))
        return reading

    def stop(self, grace_s: float = 5.0) -> None:
        """Ask the child to finish its requests and end; kill it after ``grace_s``. Returns at once, may be repeated.

        ``Exited`` tells when it is gone; ``wait`` blocks until then.
        """
        self._stopping.set()
        if self._process is None or self._gone.is_set():
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        threading.Thread(target=self._kill_after, args=(grace_s,), daemon=True, name="worker-stop").start()

    def kill(self) -> None:
        """End the child at once."""
        self._stopping.set()
        if self._process is not None and not self._gone.is_set():
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    def kill_stalled(self, message: str) -> None:
        """End the child at once because it does not get on; its end then counts as a crash, for this reason."""
        self._killed_for = ("worker.stalled", message)
        if self._process is not None and not self._gone.is_set():
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    def wait(self, timeout_s: float) -> bool:
        """Wait until the child is gone and ``Exited`` was delivered; tell whether it is."""
        return self._gone.wait(timeout_s)

    def rss_mb(self) -> float | None:
        """Return the child's resident memory in MiB now, None when it is gone."""
        pid = self.pid
        return None if pid is None else resident_mb(pid)

    def peak_mb(self) -> int | None:
        """Return the most memory, in MiB, that the child has held at once since it was ready; None when it is gone."""
        pid = self.pid
        return None if pid is None else peak_mb(pid)

    def _kill_after(self, grace_s: float) -> None:
        if not self._gone.wait(grace_s):
            self.kill()

    def _never_started(self, code: str, message: str) -> None:
        self._gone.set()
        self._on_event(Failed(code, message))
        self._on_event(Exited(None))

    def _follow(self, status: int) -> None:
        """Read the status pipe to its end, then collect the child."""
        assert self._process is not None
        answered = False  # whether Ready or Failed came
        with open(status, "rb") as lines:
            while line := lines.readline(MAX_LINE_BYTES):
                try:
                    event = decode_event(line)
                except ValueError:
                    _LOG.exception("worker %s sent an unreadable status line; it is ended", self.spec.model_id)
                    self._process.kill()
                    break
                answered = answered or isinstance(event, Ready | Failed)
                self._on_event(event)
        try:
            returncode = self._process.wait(_EXIT_GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            returncode = self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        self.spec.socket.unlink(missing_ok=True)
        end = self._explain(returncode)
        if not answered and not self._stopping.is_set():
            code = end.code if end.code == "worker.out_of_memory" else "model.load_failed"
            self._on_event(Failed(code, f"the worker {_ending(returncode)} before it was ready"))
        self._on_event(end)
        self._gone.set()

    def _explain(self, returncode: int) -> Exited:
        """Return how the child ended, as far as that can be known."""
        out_of_memory = self._group is not None and self._group.out_of_memory
        if self._group is not None:
            self._group.remove()
        if self._stopping.is_set():
            return Exited(returncode)
        if self._killed_for is not None:
            return Exited(returncode, *self._killed_for)
        if returncode == -signal.SIGKILL and (out_of_memory or oom_kills() > self._oom_kills):
            return Exited(returncode, "worker.out_of_memory", "its worker was ended by the kernel, out of memory")
        if returncode == -signal.SIGKILL:
            return Exited(returncode, message="its worker was killed from outside (SIGKILL)")
        return Exited(returncode, message=f"its worker {_ending(returncode)}")


def resident_mb(pid: int | str) -> float | None:
    """Return the resident memory of process ``pid`` (or ``"self"``) in MiB, None when it is gone."""
    try:
        with open(f"/proc/{pid}/statm", encoding="ascii") as statm:
            pages = int(statm.read().split()[1])
    except (OSError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") / (1024 * 1024)


def peak_mb(pid: int | str) -> int | None:
    """Return the peak of the resident memory of process ``pid`` in MiB, rounded up; None when it is gone."""
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as status:
            kib = next((int(line.split()[1]) for line in status if line.startswith("VmHWM:")), None)
    except OSError:
        return None
    return None if kib is None else -(-kib // 1024)


def oom_kills() -> int:
    """Return how many processes the kernel has ended for want of memory since the board started."""
    try:
        with open("/proc/vmstat", encoding="ascii") as vmstat:
            return next((int(line.split()[1]) for line in vmstat if line.startswith("oom_kill ")), 0)
    except OSError:
        return 0


def _ending(returncode: int) -> str:
    return f"was ended by signal {-returncode}" if returncode < 0 else f"ended with status {returncode}"
