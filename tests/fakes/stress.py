"""Kill a sweep again and again, and look at what is left. Run by ``test_stress.py`` as a process of its own.

Each round is one run folder. A forked child sweeps; this process kills the child, a worker, a guard or a
sampler with a random signal at a random moment, and lets a new child resume, until the round's trials are all
recorded. Prints a report as JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from megafold_bench.launchers import LocalLauncher
from megafold_bench.points import Phase, Trial
from megafold_bench.records import read_results
from megafold_bench.runs import RunFolder
from megafold_bench.sweep import Runner, SweepSpec, plan, run_plan

TRIALS_PER_ROUND = 24
LIMIT_S = 30.0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)


class Silent:
    def on_trial(self, trial: Any, number: int, of: int) -> None: ...

    def on_event(self, event: Any) -> None: ...

    def on_tick(self) -> None: ...

    def on_record(self, record: Any) -> None: ...


def marked(mark: str) -> list[int]:
    """Workers, guards and samplers: processes whose environment holds the mark."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if mark.encode() in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                continue
    return found


class Round:
    """One run folder, from its first trial to its last record."""

    def __init__(self, path: Path, mark: str, sampling: bool, report: dict[str, Any]) -> None:
        self.path = path
        self.mark = mark
        self.report = report
        self.sample_interval_s = 0.01 if sampling else None
        self.touched = path.with_suffix(".touched")
        self.touched.touch()
        self.spec = SweepSpec(
            variants=("fake",),
            seq_lens=tuple(range(1, TRIALS_PER_ROUND + 1)),
            device="cpu",
            options={"touch": str(self.touched), "step_ms": 2.0},
            steps=3,
            warmup=1,
            repeats=1,
            timeout_s=LIMIT_S,
        )
        self.trials: list[Trial] = [t for t in plan(self.spec) if t.point.phase is Phase.TIME]
        self.seen = b""
        self.safe: set[int] = set()
        self.counts: Counter[int] = Counter()
        self.interrupted = False

    def sweep(self) -> int:
        """Fork a child that sweeps, resuming what is there. Returns its process id."""
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
            environment = {**os.environ, "STRESS_MARK": self.mark}
            launcher = LocalLauncher(environment=environment, grace_s=0.5)
            with RunFolder.open(
                self.path,
                kind="sweep",
                spec=self.spec.as_dict(),
                environment=dict,
                resume=(self.path / "manifest.json").exists(),
            ) as folder:
                runner = Runner(folder, launcher, Silent(), LIMIT_S, self.sample_interval_s)
                run_plan(self.trials, runner)
            status = 0
        except (KeyboardInterrupt, SystemExit):
            status = 130
        finally:
            os._exit(status)

    def wrong(self, what: str) -> None:
        self.report["violations"].append(f"{self.path.name}: {what}")

    def look(self) -> None:
        """After the child's death: nothing runs, nothing recorded is gone, nothing done is done again."""
        deadline = time.monotonic() + 10
        while marked(self.mark):
            if time.monotonic() > deadline:
                self.wrong(f"orphans {marked(self.mark)}")
                break
            time.sleep(0.002)
        results = self.path / "results.jsonl"
        content = results.read_bytes() if results.exists() else b""
        if not content.startswith(self.seen):
            self.wrong("results.jsonl was rewritten")
        self.seen = content
        runs_before = [int(line.split()[1]) for line in self.touched.read_text().splitlines()]
        again = {length for length in self.safe if runs_before.count(length) > self.counts[length]}
        if again:
            self.wrong(f"lengths {sorted(again)} were run again though they had a record")
        done = {record["factors"]["seq_len_tokens"] for record in read_results(results)}
        for path in self.path.glob("pending/*.json"):
            done.add(json.loads(path.read_bytes())["factors"]["seq_len_tokens"])
        self.safe = done
        self.counts = Counter(runs_before)

    def finish(self) -> None:
        """Every trial has exactly one record, of an ending that the kills explain."""
        records = read_results(self.path / "results.jsonl")
        ids = [record["trial_id"] for record in records]
        if sorted(ids) != sorted(trial.trial_id for trial in self.trials):
            self.wrong(f"{len(ids)} records, {len(set(ids))} trials of {len(self.trials)}")
        for record in records:
            outcome = record["outcome"]
            self.report["outcomes"][outcome["status"]] += 1
            if outcome["status"] == "ok":
                if len(record["losses"]) != 4:
                    self.wrong(f"an ok record with {len(record['losses'])} losses")
            elif outcome["status"] != "crash" or not self.is_killed(outcome):
                self.wrong(
                    f"{outcome['status']}: {outcome['status_detail']} ({outcome['signal']}): {outcome['log_tail']}"
                )
        if list(self.path.glob("pending/*")):
            self.wrong("something is still pending")

    def is_killed(self, outcome: dict[str, Any]) -> bool:
        """By its signal, or by what SIGINT became: the exception, or another one where C code was importing."""
        by_signal = outcome["signal"] in {number.name for number in SIGNALS}
        return by_signal or (self.interrupted and outcome["exit_code"] == 1)


def kill_somebody(rng: random.Random, sweep_pid: int, current: Round) -> None:
    """One kill: the sweep in every other case, else one of the trial's processes if there is one."""
    trial_processes = marked(current.mark)
    target = sweep_pid
    if trial_processes and rng.random() < 1 / 2:
        target = rng.choice(trial_processes)
    number = rng.choice(SIGNALS)
    try:
        os.kill(target, number)
    except ProcessLookupError:
        return
    of_trial = target != sweep_pid
    current.interrupted |= of_trial and number is signal.SIGINT
    current.report["kills"][f"{'trial' if of_trial else 'sweep'} {number.name}"] += 1


def main(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Stress until `kills` signals have been sent; then let the last round finish."""
    rng = random.Random(seed)
    report: dict[str, Any] = {"kills": Counter(), "outcomes": Counter(), "violations": [], "rounds": 0}
    while sum(report["kills"].values()) < kills:
        report["rounds"] += 1
        mark = f"stress-{os.getpid()}-{report['rounds']}"
        current = Round(folder / f"round{report['rounds']}", mark, report["rounds"] % 4 == 0, report)
        done = False
        while not done:
            pid = current.sweep()
            ended = (0, 0)
            while ended[0] == 0:
                time.sleep(rng.uniform(0.0, 0.25))
                if sum(report["kills"].values()) < kills:
                    kill_somebody(rng, pid, current)
                ended = os.waitpid(pid, os.WNOHANG)
            done = ended[1] == 0
            current.look()
        current.finish()
    return report


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
