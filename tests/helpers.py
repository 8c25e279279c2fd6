"""Running the scripts as their users do, and comparing what they leave behind."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import ne_td3_continuous as ne

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "ne_td3_continuous.py"
# Pendulum's episodes are 200 steps. Updates from 301, rounds every 200 steps, rows every 500, checkpoints every 600.
SMALL = "--env-id Pendulum-v1 --total-timesteps 2500 --learning-starts 300 --actor-hidden 24 16 --critic-hidden 24 16 "
SMALL += "--batch-size 32 --grow-interval 200 --review-interval 50 --eval-frequency 500 --eval-episodes 2 "
SMALL += "--checkpoint-frequency 600 --buffer-size 1500 --no-cuda"


def launch(arguments: str, setup: str = "", script: Path = SCRIPT, **options) -> subprocess.Popen:
    """Starts a script in a process of its own; `setup` is Python that runs before it, with the script as `ne`."""
    code = f"import os, signal, sys\nsys.path.insert(0, {str(script.parent)!r})\nimport {script.stem} as ne\n"
    code += f"sys.argv[0] = {str(script)!r}\n{setup}\nne.main()"
    command = [sys.executable, *(["-c", code] if setup else [str(script)]), *arguments.split()]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, **pipes, **options)


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def in_process(monkeypatch, capsys, arguments: str, module=ne) -> tuple[int, str]:
    """Runs a script's main() here, for bad input: (exit code, what it printed to stderr)."""
    monkeypatch.setattr(sys, "argv", [module.__file__, *arguments.split()])
    with pytest.raises(SystemExit) as stop:
        module.main()
    return stop.value.code, capsys.readouterr().err


def assert_one_line(error: str, *words: str) -> None:
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in error
    for word in words:
        assert word in lines[0]


PIXELS = {"frame_size": 24, "channels": 4, "hidden_dim": 32, "batch_size": 16, "buffer_size": 60}
PIXELS |= {"total_timesteps": 1_000, "stddev_duration": 100}


def pixel_agent(module, args, device: str = "cpu", **seed) -> tuple:
    """A small agent of a DrQ-v2 script (2 actions) and a buffer with 60 random frames in episodes of 20."""
    torch.manual_seed(0)
    device = torch.device(device)
    agent, buffer = module.Agent(args, 2, device=device, **seed), module.ReplayBuffer(args, 2, seed=2, device=device)
    rng = np.random.default_rng(3)
    for number in range(60):
        obs = rng.integers(256, size=(9, args.frame_size, args.frame_size), dtype=np.uint8)
        buffer.add(obs, *(() if number % 20 == 0 else (rng.uniform(-1, 1, 2), rng.normal(), 1.0)))
    return agent, buffer


def rows(folder: Path) -> list[dict]:
    results = folder / "results.csv"
    return list(csv.DictReader(results.open())) if results.exists() else []


def assert_equal_runs(run: Path, other: Path) -> None:
    """Bit-identical results.csv and final checkpoint, but for the flags that name the folder."""
    assert (run / "results.csv").read_bytes() == (other / "results.csv").read_bytes()
    one, two = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (run, other))
    for content in (one, two):
        content["run"]["args"].pop("run_dir")
        content["run"].pop("saved")
    assert_equal(one, two)


def assert_equal(one, two) -> None:
    assert type(one) is type(two)
    if torch.is_tensor(one):
        assert torch.equal(one, two)
    elif isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_equal(one[key], two[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            assert_equal(a, b)
    else:
        assert one == two


# --- set-ups that kill a run ------------------------------------------------------------------------------------------
KILL_IN_TRAINING = """
add, calls = ne.ReplayBuffer.add, []
def add_and_die(*args):
    calls.append(None)
    if len(calls) == 1730:
        os.kill(os.getpid(), signal.SIGKILL)
    add(*args)
ne.ReplayBuffer.add = add_and_die
"""
KILL_EARLIER = KILL_IN_TRAINING.replace("1730", "930")
KILL_IN_SAVING = """
fsync, calls = os.fsync, []
def fsync_and_die(descriptor):
    calls.append(None)
    if len(calls) == 2:
        os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(descriptor)
os.fsync = fsync_and_die
"""
