"""The small process that stands between a sweep and one worker, so that nothing is ever orphaned.

The worker process forks at its very start. The first half stays behind as the *guard*: leader of the
trial's process group and reaper of everything the worker starts, even in sessions of their own. It
sleeps until the worker ends or until its standard input, whose other end only the sweep holds, is
closed. The kernel closes it when the sweep dies, whatever it died from. Then the guard kills all that
is left below it. If the guard itself is killed, the worker dies with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import sys
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
MAX_EVENT_BYTES = 4000
"""Writes to a pipe are atomic up to PIPE_BUF (4096 bytes on Linux)."""


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(option, value, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), f"prctl({option})")


def send_event(fd: int, event: str, *, must_arrive: bool = False, **values: Any) -> None:
    """Write one event, a line of JSON, to the sweep.

    The pipe does not block: progress that a stopped reader has no room for is dropped, so that it
    cannot slow the measured process, unless it `must_arrive`.
    """
    line = json.dumps({"event": event, **values}).encode()
    if len(line) >= MAX_EVENT_BYTES:
        values["message"] = str(values.get("message", ""))[: MAX_EVENT_BYTES // 8]
        line = json.dumps({"event": event, **values}).encode()
    while True:
        try:
            os.write(fd, line + b"\n")
        except BlockingIOError:
            if must_arrive:
                select.select([], [fd], [])
                continue
        except BrokenPipeError:
            pass  # the sweep is gone; the guard ends this process
        return


def _children() -> list[int]:
    """Direct children of this process that exist, in any session."""
    try:
        return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    except OSError:
        return []


def _kill_all_below() -> None:
    """Kill and reap until no descendant is left: orphans of the killed become our own children."""
    while True:
        for pid in _children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _reap(worker: int, events_fd: int) -> bool:
    """Reap what has ended; True once the worker is among it, after reporting its status."""
    while True:
        try:
            pid, status, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return True
        if pid == 0:
            return False
        if pid == worker:
            _kill_all_below()
            send_event(events_fd, "exit", must_arrive=True, status=status, maxrss_kib=usage.ru_maxrss)
            return True


def _watch(worker: int, events_fd: int) -> None:
    """Sleep until the worker ends or the sweep is gone; leave nothing behind."""
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    os.set_blocking(wake_read, False)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while not _reap(worker, events_fd):
        readable, _, _ = select.select([0, wake_read], [], [])
        if wake_read in readable:
            with contextlib.suppress(BlockingIOError):
                os.read(wake_read, 4096)
        if 0 in readable and os.read(0, 4096) == b"":
            _kill_all_below()
            return


def split(events_fd: int) -> None:
    """Fork. Returns in the worker; the guard watches and exits here, never to return.

    Call before anything starts a thread. Standard input must be the pipe from the sweep.
    """
    os.set_inheritable(events_fd, False)
    os.set_blocking(events_fd, False)
    # The sweep signals the whole group to end a trial; the guard has to survive that to clear up.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    guard = os.getpid()
    worker = os.fork()
    if worker == 0:
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != guard:
            os._exit(1)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        with Path(os.devnull).open("rb") as null:
            os.dup2(null.fileno(), 0)
        return
    status = 1
    try:
        _watch(worker, events_fd)
        status = 0
    finally:
        os._exit(status)
