"""A Debian with a booted systemd, in a folder: ``debootstrap`` makes it once, ``systemd-nspawn`` boots a copy.

The container shares this machine's loopback, so a controller and a broker out here can be reached from inside.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PACKAGES = "systemd,systemd-sysv,dbus,python3,python3-venv,libgomp1"
TOOLS = {"debootstrap": "debootstrap", "systemd-nspawn": "systemd-container", "nsenter": "util-linux"}


class ContainerError(Exception):
    """The container could not be made, or a command in it failed."""


def require_tools() -> None:
    """Check what the test needs of this machine.

    Raises:
        ContainerError: Not root, or a tool is missing; says what to run.
    """
    if os.geteuid() != 0:
        raise ContainerError("booting a container needs root: sudo make test-install")
    missing = sorted({package for tool, package in TOOLS.items() if shutil.which(tool) is None})
    if missing:
        raise ContainerError(f"missing tools: apt-get install {' '.join(missing)}")


def base_system(cache: Path) -> Path:
    """Return a folder with a minimal Debian 12, made on first use."""
    base = cache / "rootfs"
    done = cache / "rootfs.complete"
    if not done.exists():
        shutil.rmtree(base, ignore_errors=True)
        cache.mkdir(parents=True, exist_ok=True)
        command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(base)]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if made.returncode != 0:
            raise ContainerError(f"debootstrap failed: {made.stdout[-800:]}{made.stderr[-800:]}")
        done.touch()
    return base


class Container:
    """One booted container."""

    def __init__(self, root: Path, log: Path, binds: dict[Path, str]) -> None:
        self.root = root
        self._log = log
        self._binds = binds
        self._nspawn: subprocess.Popen[bytes] | None = None
        self._leader = 0

    def boot(self) -> None:
        """Boot systemd inside and return once the system is up.

        Raises:
            ContainerError: It did not come up.
        """
        command = ["systemd-nspawn", "--quiet", "-D", str(self.root), "--boot", "--register=no", "--keep-unit"]
        command += ["--console=pipe", f"--machine=garrison-test-{os.getpid()}"]
        command += [f"--bind-ro={outside}:{inside}" for outside, inside in self._binds.items()]
        with self._log.open("ab") as log:
            self._nspawn = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.wait_for("the container's systemd", self._is_up, timeout_s=60)

    def _is_up(self) -> bool:
        assert self._nspawn is not None
        if self._nspawn.poll() is not None:
            raise ContainerError(f"systemd-nspawn ended: {self._log.read_text(errors='replace')[-800:]}")
        children = Path(f"/proc/{self._nspawn.pid}/task/{self._nspawn.pid}/children").read_text().split()
        if not children:
            return False
        self._leader = int(children[0])
        return self.try_run("systemctl", "is-system-running").stdout.strip() in {"running", "degraded"}

    def try_run(self, *command: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        """Run a command inside, whatever comes of it."""
        return subprocess.run(
            ["nsenter", "-t", str(self._leader), "--all", "--", *command],
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
            env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"},
        )

    def run(self, *command: str, timeout_s: float = 300) -> str:
        """Run a command inside and return its output.

        Raises:
            ContainerError: It failed.
        """
        done = self.try_run(*command, timeout_s=timeout_s)
        if done.returncode != 0:
            raise ContainerError(f"{' '.join(command)}: {done.stdout[-1500:]}{done.stderr[-1500:]}")
        return done.stdout

    def wait_for(self, what: str, condition: Callable[[], bool], *, timeout_s: float) -> None:
        """Return once ``condition`` holds.

        Raises:
            ContainerError: Time ran out.
        """
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                journal = self.try_run("journalctl", "--no-pager", "-n", "60", "-u", "garrison-agent").stdout
                raise ContainerError(f"after {timeout_s:.0f} s still waiting for {what}\n{journal}")
            time.sleep(0.3)

    def shut_down(self) -> None:
        """Power the container off."""
        if self._nspawn is None:
            return
        if self._leader:
            self.try_run("systemctl", "poweroff", timeout_s=30)
        try:
            self._nspawn.wait(30)
        except subprocess.TimeoutExpired:
            self._nspawn.kill()
            self._nspawn.wait(10)


@contextlib.contextmanager
def booted(cache: Path, folder: Path, binds: dict[Path, str]) -> Iterator[Container]:
    """Give a freshly booted container on a copy of the base system, and remove it afterwards."""
    root = folder / "root"
    subprocess.run(["cp", "-a", "--reflink=auto", str(base_system(cache)), str(root)], check=True)
    container = Container(root, folder / "nspawn.log", binds)
    try:
        container.boot()
        yield container
    finally:
        container.shut_down()
        subprocess.run(["rm", "-rf", "--one-file-system", str(root)], check=False)
