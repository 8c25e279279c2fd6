"""Running the scripts as their users do and comparing what they leave behind; small agents; what all refuse."""

import copy
import csv
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn

import ne_td3_continuous as ne
import utils_topology as topology

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
    """Bit-identical results.csv and final checkpoint, but for what says where and when checkpoints were written."""
    assert (run / "results.csv").read_bytes() == (other / "results.csv").read_bytes()
    one, two = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (run, other))
    for content in (one, two):
        content["run"].pop("saved")
        for name in ("run_dir", "checkpoint_frequency"):
            content["run"]["args"].pop(name)
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


def kill_at(addition: int, event: str = "os.kill(os.getpid(), signal.SIGKILL)") -> str:
    """A set-up that kills a run, or does something else, while it stores that transition, counted from 1."""
    return f"""
add, calls = ne.ReplayBuffer.add, []
def add_and_die(*args):
    calls.append(None)
    if len(calls) == {addition}:
        {event}
    add(*args)
ne.ReplayBuffer.add = add_and_die
"""


# --- agents -----------------------------------------------------------------------------------------------------------
def make_agent(module=ne, device: torch.device | str = "cpu", **changes):
    """A small TD3 agent of a script (4 observations, 2 actions) and a buffer with 500 random transitions."""
    options = {"actor_hidden": (32, 24), "critic_hidden": (32, 24), "batch_size": 64, "total_timesteps": 1_000}
    args, device = module.Args(**options | changes), torch.device(device)
    torch.manual_seed(0)
    agent = module.Agent(args, 4, 2, *([1] if module is ne else []), device=device)
    buffer = module.ReplayBuffer(500, 4, 2, args.batch_size, seed=2, device=device)
    buffer.data.copy_(torch.randn(500, 12, generator=torch.Generator().manual_seed(3)))
    buffer.data[:, 4:6].clamp_(-1, 1)
    buffer.data[:, 11] = (buffer.data[:, 11] > 1).float()
    buffer.size = 500
    return agent, buffer


def train(agent, buffer, updates: int, topology_round=None, rounds: int = 0) -> dict:
    """`updates` updates, the actor's at every second one, with `rounds` topology rounds evenly among them.

    `topology_round(agent, batch, update)` returns what it changed; returned is the sum over all rounds.
    """
    counts = Counter()
    for update in range(1, updates + 1):
        batch = buffer.sample()
        agent.update_critic(batch)
        if update % 2 == 0:
            agent.update_actor(batch)
        if rounds and update % (updates // rounds) == 0:
            counts.update(topology_round(agent, buffer.sample(rng=agent.ne_rng), update))
    return dict(counts)


def assert_updates_read_no_values(agent, batch, reads: str) -> None:
    """What a capture needs, seen on tensors without values: reading one raises, so does one from elsewhere."""
    losses = [*agent.update_critic(batch), agent.update_actor(batch)]
    assert [loss.device.type for loss in losses] == ["meta"] * 3
    with pytest.raises(RuntimeError):
        losses[0].item()
    elsewhere = torch.zeros(getattr(batch, reads).shape, device="cpu")
    with pytest.raises(RuntimeError, match="device"):
        agent.update_critic(batch._replace(**{reads: elsewhere}))


# --- what a method changes in the networks ----------------------------------------------------------------------------
def values(module: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def equal(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return len(one) == len(two) > 0 and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def none_equal(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return len(one) == len(two) > 0 and not any(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def linear_layers(mlp: nn.Module) -> list[nn.Linear]:
    return [part for part in mlp.modules() if isinstance(part, nn.Linear)]


def silence_some(agent) -> None:
    """Makes every third hidden neuron of each MLP dormant."""
    for layer in (layer for mlps in agent.mlps.values() for mlp in mlps for layer in linear_layers(mlp)[:-1]):
        layer.bias.data[::3] = -100.0


def redone(redo, agent, batch, tau: float):
    """An agent before and after one `redo` with every third neuron dormant: (before, after, which).

    Adam's moments are 1 and 2 everywhere before.
    """
    silence_some(agent)
    for state in (state for adam in agent.optimizers.values() for state in adam.state.values()):
        state["exp_avg"].fill_(1.0)
        state["exp_avg_sq"].fill_(2.0)
    dormant = {  # those silenced, and with tau > 0 weak ones too
        name: [[topology.dormant(h, tau) for h in mlp] for mlp in mlps] for name, mlps in agent.hidden(batch).items()
    }
    layers = [h for mlps in dormant.values() for mlp in mlps for h in mlp]
    assert all(h[::3].all() and not h.all() for h in layers)
    assert (sum(int(h.sum()) - len(h[::3]) for h in layers) > 20) == (tau > 0.5)
    before = copy.deepcopy(agent)
    redo(agent, batch)
    return before, agent, dormant


def walk(before, after, dormant: dict):
    """Yields (network, old layer, layer, dormant outputs (out,), dormant inputs (in,)) of every layer of the MLPs."""
    for name in after.mlps:
        for old, new, which in zip(before.mlps[name], after.mlps[name], dormant[name], strict=True):
            old, new = linear_layers(old), linear_layers(new)
            outputs = [*which, torch.zeros(new[-1].out_features, dtype=torch.bool)]
            inputs = [torch.zeros(new[0].in_features, dtype=torch.bool), *which]
            for layers in zip(old, new, outputs, inputs, strict=True):
                yield name, *layers


def assert_moments_forgotten(adam: torch.optim.Adam, layer, outputs: torch.Tensor, inputs: torch.Tensor) -> None:
    """Adam's moments, which were 1 and 2 everywhere, are 0 for what ReDo drew (`outputs`) or silenced (`inputs`)."""
    changed = outputs[:, None] | inputs  # (out, in)
    for moment, value in (("exp_avg", 1.0), ("exp_avg_sq", 2.0)):
        weight, bias = (adam.state[p][moment] for p in (layer.weight, layer.bias))
        assert not weight[changed].any() and (weight[~changed] == value).all()
        assert not bias[outputs].any() and (bias[~outputs] == value).all()


# --- bad input --------------------------------------------------------------------------------------------------------
# (flags, what the message says)
REFUSED_TD3 = [
    ("--eval-frequency 0", "at least 1"),
    ("--eval-episodes 0", "at least 1"),
    ("--checkpoint-frequency 0", "at least 1"),
    ("--policy-frequency 0", "at least 1"),
    ("--learning-starts -1", "at least 1"),
    ("--seed -1", "at least 0"),
    ("--gamma 1.1", "in [0, 1]"),
    ("--tau -0.1", "in [0, 1]"),
    ("--learning-rate 0", "in (0, 1]"),
    ("--policy-noise -0.1", "at least 0"),
    ("--torch-threads 0", "at least 1"),
    ("--buffer-size 0", "at least 1"),
    ("--batch-size 500 --buffer-size 400", "--batch-size must be at most --buffer-size (400), got 500"),
    ("--actor-hidden 32 0", "at least 1"),
    ("--buffer-size 1000000000000000", "fit in memory"),
]
REFUSED_NE = [
    ("--initial-density 0", "in (0, 1], got 0.0"),
    ("--initial-density 0.97", "--final-density must be in [--initial-density (0.97), 1), got 0.95"),
    ("--prune-ratio 1", "in [0, 1)"),
    ("--grow-rate -1", "in [0, 1]"),
    ("--grow-interval 0", "at least 1, got 0"),
    ("--growth-end 0", "at least 1"),
    ("--review-interval 0", "at least 1"),
    ("--review-fraction 0", "in (0, 1]"),
    ("--review-floor 2", "in [0, 1]"),
    ("--review-tau -1", "at least 0"),
    ("--weight-clip -1", "at least 0"),
]


def assert_refused(monkeypatch, capsys, arguments: str, words: str, flags: str = "", module=ne, code: int = 2) -> None:
    """Refuses `arguments` in one line that says `words` and, where `flags` are given, names the first of them."""
    returned, err = in_process(monkeypatch, capsys, f"{arguments} {flags}", module)
    assert returned == code
    assert_one_line(err, words, words.split()[0] if words.startswith("--") else (flags.split() or [""])[0])
