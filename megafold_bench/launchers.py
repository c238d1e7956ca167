"""Start one worker in a process group of its own, sleep until it ends, and leave nothing behind.

The launcher holds the only other end of the worker's standard input. When the launcher's process dies
the kernel closes it, and the guard (`megafold_bench.guard`) kills what is left of the trial.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from megafold_bench.outcomes import Ending
from megafold_bench.trials import WorkerRequest

LOG_TAIL_BYTES = 4000
Event = Mapping[str, Any]


class Watcher(Protocol):
    """Is told what happens while a trial runs."""

    def on_event(self, event: Event) -> None:
        """The worker made progress: ``{"event": "built"}``, ``{"event": "step", "index": 3, "of": 24}``…"""

    def on_tick(self) -> None:
        """About a second has passed; called only if the launcher was made with `tick_s`."""


@dataclass(frozen=True)
class Launched:
    """What a launcher saw of one trial."""

    ending: Ending
    wall_s: float
    steps_done: int
    user_error: str | None = None
    """The worker found the user's input at fault; nothing was measured."""
    io_error: str | None = None
    """The worker could not write its record."""
    child_maxrss_bytes: int | None = None


class Launcher(Protocol):
    """Runs workers."""

    def run(self, request: WorkerRequest, timeout_s: float, watcher: Watcher) -> Launched:
        """Run one trial to its end, at most `timeout_s` seconds. Its processes are gone afterwards."""


def package_environment(base: Mapping[str, str]) -> dict[str, str]:
    """`base`, with this very package importable in a child that does not look in its working directory."""
    root = Path(__file__).resolve().parent.parent
    environment = dict(base)
    if root.name not in ("site-packages", "dist-packages"):
        parts = [str(root), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(parts)
    return environment


def log_tail(path: Path) -> str:
    """The last lines of a worker's output."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - LOG_TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


@dataclass
class _Progress:
    """The events of one trial as they come in."""

    watcher: Watcher
    started: float
    last_event: str = "started"
    last_at: float = 0.0
    step_gaps: list[float] = field(default_factory=list)
    steps_done: int = 0
    user_error: str | None = None
    io_error: str | None = None
    status: int | None = None
    maxrss_bytes: int | None = None
    _rest: bytes = b""

    def feed(self, data: bytes) -> bool:
        """Take in what was read; True once the guard has reported the worker's end."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._take(json.loads(line))
        return self.status is not None

    def _take(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "exit":
            self.status = event["status"]
            self.maxrss_bytes = event["maxrss_kib"] * 1024
        elif kind == "user_error":
            self.user_error = event["message"]
        elif kind == "io_error":
            self.io_error = event["message"]
        else:
            now = time.monotonic()
            if kind == "step":
                self.step_gaps.append(now - self.last_at)
                self.steps_done = event["index"] + 1
                kind = f"step {event['index']}"
            self.last_event, self.last_at = kind, now
            self.watcher.on_event(event)


@dataclass(frozen=True)
class LocalLauncher:
    """Workers as child processes of this one.

    `interpreter` starts Python; `grace_s` is how long a trial that is ended may take to print where it
    was; with `tick_s` the watcher hears from the launcher at least that often.
    """

    interpreter: tuple[str, ...] = (sys.executable,)
    environment: Mapping[str, str] | None = None
    grace_s: float = 2.0
    tick_s: float | None = None
    cgroup_root: Path = Path("/")

    def run(self, request: WorkerRequest, timeout_s: float, watcher: Watcher) -> Launched:
        """See `Launcher.run`."""
        kills_before = oom_kills(self.cgroup_root)
        started = time.monotonic()
        progress = _Progress(watcher, started, last_at=started)
        events_read, events_write = os.pipe()
        process = None
        try:
            try:
                process = self._start(request, events_write)
            finally:
                os.close(events_write)
            timed_out = self._follow(process, events_read, progress, started + timeout_s)
            silence = time.monotonic() - progress.last_at
            if timed_out:
                self._end(process, events_read, progress)
        finally:
            if process is not None:
                self._clear(process, events_read)
            os.close(events_read)
        code = _exit_code(progress.status, process.returncode)
        ending = Ending(
            exit_code=code if code >= 0 else None,
            signal=-code if code < 0 else None,
            timed_out=timed_out,
            oom_kills=oom_kills(self.cgroup_root) - kills_before,
            log_tail=log_tail(request.log_path),
            last_event=progress.last_event,
            silence_s=silence,
            step_gaps_s=tuple(progress.step_gaps),
            limit_s=timeout_s,
        )
        return Launched(
            ending,
            time.monotonic() - started,
            progress.steps_done,
            progress.user_error,
            progress.io_error,
            progress.maxrss_bytes,
        )

    def _start(self, request: WorkerRequest, events_fd: int) -> subprocess.Popen[bytes]:
        environment = package_environment(os.environ if self.environment is None else self.environment)
        arguments = ["-P", "-m", "megafold_bench.worker", "--events-fd", str(events_fd)]
        with request.log_path.open("ab") as log:
            process = subprocess.Popen(
                [*self.interpreter, *arguments],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(events_fd,),
                start_new_session=True,
                env=environment,
                bufsize=0,
            )
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died already: its exit code will tell
            process.stdin.write(request.to_json().encode() + b"\n")
        return process

    def _follow(
        self, process: subprocess.Popen[bytes], fd: int, progress: _Progress, deadline: float
    ) -> bool:
        """Sleep until the worker ends; True if the deadline came first."""
        with selectors.DefaultSelector() as selector:
            selector.register(fd, selectors.EVENT_READ)
            while True:
                left = deadline - time.monotonic()
                if left <= 0:
                    return True
                ready = selector.select(left if self.tick_s is None else min(left, self.tick_s))
                if ready:
                    data = os.read(fd, 65536)
                    if not data or progress.feed(data):
                        return False
                else:
                    progress.watcher.on_tick()

    def _end(self, process: subprocess.Popen[bytes], fd: int, progress: _Progress) -> None:
        """Ask the group to end, so that the worker can print its stack, before it is made to."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        self._follow(process, fd, progress, time.monotonic() + self.grace_s)

    def _clear(self, process: subprocess.Popen[bytes], events_fd: int) -> None:
        """End whatever is left. Closing standard input makes the guard kill all that is below it."""
        assert process.stdin is not None
        process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=max(self.grace_s, 5.0))
        if process.returncode != 0:
            # Only a guard that was itself killed, or is stuck, leaves anything of its group.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            _await_closed(events_fd, self.grace_s)


def _await_closed(events_fd: int, seconds: float) -> None:
    """Wait until no process holds the other end: a worker without its guard is nobody's child to wait for.

    Killed inside a system call it finishes that call first, which may be the one that puts its record in
    place. A process that it started may hold the end for longer, and matters no more.
    """
    deadline = time.monotonic() + seconds
    with selectors.DefaultSelector() as selector:
        selector.register(events_fd, selectors.EVENT_READ)
        while selector.select(max(0.0, deadline - time.monotonic())):
            if not os.read(events_fd, 65536):
                return


def _exit_code(worker_status: int | None, guard_code: int) -> int:
    """The worker's exit code, negative for a signal, as far as it is known.

    A guard that ended in order without reporting the worker has killed it.
    """
    if worker_status is not None:
        return os.waitstatus_to_exitcode(worker_status)
    return -signal.SIGKILL if guard_code == 0 else guard_code


def oom_kills(root: Path = Path("/")) -> int:
    """How many processes of our memory cgroup the kernel has killed for want of memory, so far.

    Reads version 2 (``memory.events``) and version 1 (``memory.oom_control``); 0 where neither is there.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return 0
    candidates: list[Path] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        inside = path.lstrip("/")
        if controllers == "":
            candidates += [root / "sys/fs/cgroup" / inside / "memory.events"]
            candidates += [root / "sys/fs/cgroup/memory.events"]
        elif "memory" in controllers.split(","):
            candidates += [root / "sys/fs/cgroup/memory" / inside / "memory.oom_control"]
            candidates += [root / "sys/fs/cgroup/memory/memory.oom_control"]
    for file in candidates:
        with contextlib.suppress(OSError):
            for line in file.read_text().splitlines():
                name, _, count = line.partition(" ")
                if name == "oom_kill":
                    return int(count)
    return 0
