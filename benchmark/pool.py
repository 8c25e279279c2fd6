"""Runs side by side, each in a process of its own with a log beside its folder.

For campaigns of one machine that need no more; run.py makes the figures' runs with Ray.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple


class Job(NamedTuple):
    folder: Path  # of the run, absolute
    command: list[str]  # what follows `python` in the repository's root

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")


def start(job: Job) -> subprocess.Popen:
    with open(job.log, "a") as log:
        return subprocess.Popen(
            [sys.executable, *job.command],
            cwd=Path(__file__).resolve().parent.parent,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def stop_all(running: list[tuple[Job, subprocess.Popen]]) -> None:
    for _, process in running:
        process.terminate()
    for _, process in running:
        process.wait()


def interrupt(number: int, frame) -> None:
    raise KeyboardInterrupt


def work_off(jobs: list[Job], workers: int) -> list[Job]:
    """Makes the runs, `workers` at a time, in order. Returns: those that failed."""
    running = []
    failed = []
    waiting = list(jobs)
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.pop(0)
                running.append((job, start(job)))
            time.sleep(0.5)
            for job, process in list(running):
                if process.poll() is None:
                    continue
                running.remove((job, process))
                if process.returncode != 0:
                    failed.append(job)
                outcome = "failed" if job in failed else "finished"
                name = job.folder.name
                print(f"{name}: {outcome}, {len(running)} running, {len(waiting)} waiting")
    finally:
        stop_all(running)
    return failed


def make(jobs: list[Job], workers: int) -> None:
    """Ctrl-C or SIGTERM stops all. Raises: SystemExit, with 1 if a run failed, 130 if stopped."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    try:
        failed = work_off(jobs, workers)
    except KeyboardInterrupt:
        print("stopped; the same command makes what is missing")
        raise SystemExit(130) from None
    for job in failed:
        print(f"failed: {job.folder.name}, see {job.log}", file=sys.stderr)
    raise SystemExit(1 if failed else 0)
