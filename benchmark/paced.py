"""Runs a training whose environment waits at a gate after every chunk of steps, for speed.py.

Run:   python benchmark/paced.py CHUNK SCRIPT [ARGS...]

The first environment that the script makes with `gymnasium.make` gets the gate. There the process
reports on the file descriptor SPEED_REPORT what the chunk took, and waits for a line on stdin. So
several trainings of any library take turns of a second or two in one run, and whatever else the
machine does hits all of them alike.
"""

import json
import os
import resource
import runpy
import sys
import time
from pathlib import Path

import gymnasium as gym


class Gate(gym.Wrapper):
    """Before every `chunk`-th step: reports what the last ones took, then waits for its turn."""

    def __init__(self, env: gym.Env, chunk: int):
        super().__init__(env)
        self.chunk = chunk
        self.steps = 0
        self.report = os.fdopen(int(os.environ["SPEED_REPORT"]), "w")
        self.wall = 0.0

    def step(self, action):
        if self.steps % self.chunk == 0:
            self.wait()
        self.steps += 1
        return self.env.step(action)

    def wait(self) -> None:
        report = {
            "steps": self.steps,
            "seconds": time.perf_counter() - self.wall,
            # kibibytes on Linux
            "rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        print(json.dumps(report), file=self.report, flush=True)
        if not sys.stdin.readline():
            raise SystemExit  # speed.py has seen enough
        self.wall = time.perf_counter()


def main() -> None:
    chunk = int(sys.argv[1])
    script = sys.argv[2]
    make = gym.make

    def make_with_gate(*args, **kwargs) -> gym.Env:
        gym.make = make  # environments made later, for evaluation, do not wait
        return Gate(make(*args, **kwargs), chunk)

    gym.make = make_with_gate
    sys.argv = sys.argv[2:]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
