"""A run folder: who holds it, what was asked, what is recorded. Records are only ever appended.

::

    manifest.json    what was asked and where; written once
    results.jsonl    one line per trial
    pending/         records that workers have left and the sweep has not yet appended
    logs/            the output of each worker
    samples/         what the device sampler saw beside each trial
    snapshots/       what held the device's memory as it ran out, where that was asked for
    lock             held (flock) by the sweep that writes here, and naming it

A trial's record is whole in ``pending/`` before its line is appended, and stays there until the line
is on the disk. So a sweep killed at any moment loses nothing: the next one adopts what is pending,
unless its line is already there.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
import shlex
import socket
import sys
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from megafold_bench.errors import UserError
from megafold_bench.records import (
    MANIFEST_NAME,
    RESULTS_NAME,
    SCHEMA_VERSION,
    Manifest,
    Record,
    ResultsWarning,
    jsonable,
    read_manifest,
    read_results,
)
from megafold_bench.trials import utc_now

LOCK_NAME = "lock"
PENDING_NAME = "pending"
LOGS_NAME = "logs"
MUTABLE_SPEC = frozenset({"timeout_s"})
"""Parts of a spec that a resumed run may change: they do not change what is measured."""


def explain_os_error(error: OSError, path: Path, doing: str) -> UserError:
    """What an operating system error means to the person who chose the folder."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"the disk under {path} is full: free some space, then continue with --resume")
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return UserError(f"cannot {doing} {path}: {error.strerror}; choose a writable folder with --out")
    return UserError(f"cannot {doing} {path}: {error.strerror or error}")


def encode(value: Any) -> bytes:
    """One line of strict JSON, without the newline."""
    return json.dumps(jsonable(value), separators=(",", ":"), allow_nan=False).encode()


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomically(path: Path, content: bytes) -> None:
    """Either the whole of `content` is at `path`, durably, or nothing is. Raises OSError.

    A process killed as it writes leaves ``.<name>.<pid>`` beside `path`: `remove_with_halves` removes it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        with os.fdopen(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def remove_with_halves(path: Path) -> None:
    """Remove `path`, if it is there, and what writers of it left that were killed as they wrote."""
    path.unlink(missing_ok=True)
    for half in path.parent.glob(f".{glob.escape(path.name)}.*"):
        half.unlink(missing_ok=True)


def append_line(path: Path, line: bytes) -> None:
    """Append one line durably. A line that was torn before it is closed first, never altered.

    Raises OSError; the line may then be torn, which the next append mends.
    """
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(fd).st_size
        torn = size > 0 and os.pread(fd, 1, size - 1) != b"\n"
        data = (b"\n" if torn else b"") + line + b"\n"
        written = os.write(fd, data)
        while written < len(data):  # a short write means that the next one will name the cause
            written += os.write(fd, data[written:])
        os.fsync(fd)
    finally:
        os.close(fd)
    if size == 0:
        sync_folder(path.parent)


class FolderLock:
    """An exclusive lock on a run folder, gone with the process that holds it."""

    def __init__(self, path: Path) -> None:
        """Raises `UserError` naming the holder if another process has it."""
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _read_holder(self._fd)
            os.close(self._fd)
            raise UserError(
                f"{path.parent} is in use by {holder}: wait for it, or choose another --out"
            ) from None
        except OSError as error:
            os.close(self._fd)
            raise UserError(
                f"cannot lock {path} ({error.strerror}): choose a folder on a local disk with --out"
            ) from error
        holder_line = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "command": shlex.join(sys.argv),
            "since": utc_now(),
        }
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, encode(holder_line), 0)

    def release(self) -> None:
        """Let go of the folder. The file stays: removing it would race with the next holder."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _read_holder(fd: int) -> str:
    try:
        holder = json.loads(os.pread(fd, 4096, 0))
        return f"process {holder['pid']} on {holder['host']} since {holder['since']} ({holder['command']})"
    except (ValueError, KeyError, TypeError):
        return "another process"


def spec_differences(asked: Mapping[str, Any], recorded: Mapping[str, Any]) -> list[str]:
    """``name: asked, recorded`` for each part that differs and may not."""
    names = sorted((asked.keys() | recorded.keys()) - MUTABLE_SPEC)
    return [
        f"{name}: {asked.get(name)!r} now, {recorded.get(name)!r} in the run"
        for name in names
        if jsonable(asked.get(name)) != recorded.get(name)
    ]


class RunFolder:
    """A run folder, locked for writing. Use as a context manager; make one with `RunFolder.open`."""

    def __init__(self, path: Path, manifest: Manifest, lock: FolderLock) -> None:
        self.path = path
        self.manifest = manifest
        self._lock = lock
        self._session = uuid.uuid4().hex[:8]
        self.records: list[Record] = read_results(self.results_path)
        self._seen = {(record["trial_id"], record["attempt"]) for record in self.records}
        self._warn_if_clock_is_behind()

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        kind: str,
        spec: Mapping[str, Any],
        environment: Callable[[], Mapping[str, Any]],
        resume: bool,
    ) -> Self:
        """Make the folder, or with `resume` go on with the run in it.

        Raises `UserError` if the folder is not a run, holds a run that asked for something else, holds
        the same run and `resume` is not set, is held by another process, or cannot be written.
        """
        cls._check(path, resume)
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = FolderLock(path / LOCK_NAME)
        except OSError as error:
            raise explain_os_error(error, path, "write to") from error
        try:
            if (path / MANIFEST_NAME).exists():
                manifest = cls._continue(path, kind, spec, resume)
            else:
                manifest = cls._begin(path, kind, spec, environment)
            for name in (PENDING_NAME, LOGS_NAME):
                (path / name).mkdir(exist_ok=True)
            return cls(path, manifest, lock)
        except OSError as error:
            lock.release()
            raise explain_os_error(error, path, "write to") from error
        except BaseException:
            lock.release()
            raise

    @staticmethod
    def _check(path: Path, resume: bool) -> None:
        """Refuse what is certainly not a run folder, before anything is written into it."""
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file, not a folder: choose another --out")
        is_run = (path / MANIFEST_NAME).exists()
        try:
            strangers = [] if is_run or not path.exists() else sorted(p.name for p in path.iterdir())
        except OSError as error:
            raise explain_os_error(error, path, "read") from error
        if [name for name in strangers if name != LOCK_NAME and not name.startswith(f".{MANIFEST_NAME}.")]:
            raise UserError(f"{path} exists and is not a run folder: choose a new folder with --out")
        if resume and not is_run:
            raise UserError(f"there is no run to resume in {path}: leave out --resume to begin one")

    @staticmethod
    def _begin(
        path: Path, kind: str, spec: Mapping[str, Any], environment: Callable[[], Mapping[str, Any]]
    ) -> Manifest:
        manifest: Manifest = {
            "schema_version": SCHEMA_VERSION,
            "run_id": uuid.uuid4().hex[:12],
            "kind": kind,
            "created_at": utc_now(),
            "spec": jsonable(dict(spec)),
            "argv": list(sys.argv),
            "environment": jsonable(dict(environment())),
        }
        content = json.dumps(manifest, indent=2, allow_nan=False).encode() + b"\n"
        write_atomically(path / MANIFEST_NAME, content)
        return manifest

    @staticmethod
    def _continue(path: Path, kind: str, spec: Mapping[str, Any], resume: bool) -> Manifest:
        manifest = read_manifest(path)
        if manifest["kind"] != kind:
            raise UserError(f"{path} holds a {manifest['kind']} run, not a {kind}: choose another --out")
        differences = spec_differences(spec, manifest["spec"])
        if differences:
            raise UserError(
                f"{path} holds a run with other settings ({'; '.join(differences)}): choose another --out"
            )
        if not resume:
            raise UserError(
                f"{path} already holds this run: add --resume to continue it, or choose another --out"
            )
        return manifest

    @property
    def results_path(self) -> Path:
        """The results file."""
        return self.path / RESULTS_NAME

    def record_path(self, trial_id: str, attempt: int) -> Path:
        """Where a worker of this sweep leaves its record. No other sweep's worker writes there."""
        return self.path / PENDING_NAME / f"{trial_id}.{attempt}.{self._session}.json"

    def log_path(self, trial_id: str, attempt: int) -> Path:
        """Where the worker's output goes."""
        return self.path / LOGS_NAME / f"{trial_id}.{attempt}.log"

    def append(self, record: Record) -> None:
        """Record one trial for good. Raises `UserError` if the disk is full or read-only.

        Raises ValueError if this attempt at the trial is already recorded.
        """
        key = (record["trial_id"], record["attempt"])
        if key in self._seen:
            raise ValueError(f"attempt {key[1]} at trial {key[0]} is already recorded")
        try:
            append_line(self.results_path, encode(record))
        except OSError as error:
            raise explain_os_error(error, self.results_path, "append to") from error
        self._seen.add(key)
        self.records.append(record)

    def adopt_pending(self, finish: Callable[[Record], Record]) -> list[Record]:
        """Append what earlier workers left behind, each trial once; `finish` completes each record."""
        adopted = []
        recorded = {record["trial_id"] for record in self.records}
        for path in sorted((self.path / PENDING_NAME).glob("*.json")):
            record: Record = json.loads(path.read_bytes())
            key = (record["trial_id"], record["attempt"])
            # A first attempt whose trial has a record by now was run again; a later one replaces it.
            if key not in self._seen and (record["attempt"] > 1 or record["trial_id"] not in recorded):
                record = finish(record)
                self.append(record)
                adopted.append(record)
            path.unlink()
        for leftover in (self.path / PENDING_NAME).glob(".*"):
            leftover.unlink()
        return adopted

    def _warn_if_clock_is_behind(self) -> None:
        now = datetime.fromisoformat(utc_now())
        for record in self.records[-1:]:
            ahead = (datetime.fromisoformat(record["ended_at"]) - now).total_seconds()
            if ahead > 1.0:
                warnings.warn(
                    f"the clock is {ahead:.0f} s behind the last record of {self.path}: "
                    "times of day in this run are not in order (durations are not affected)",
                    ResultsWarning,
                    stacklevel=4,
                )

    def close(self) -> None:
        """Let go of the folder."""
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def resume_command(path: Path, command: Sequence[str] = ("megafold-bench", "sweep")) -> str:
    """What to type to continue the run in `path`."""
    return shlex.join([*command, "--out", str(path), "--resume"])
