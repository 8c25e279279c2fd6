"""Runs scripts as their users do, compares what they leave behind; makes small agents.

- `launch` starts a script in a process of its own, `finish` waits for it; a set-up such as
  `kill_at(1730)` is done to the script before it starts (the modules in tests/setups/).
- `in_process` runs a script here, for bad input that ends before training; `run_here`
  runs it to its end, which is faster than a process of its own.
- `make_agent`, `sample` and `train` work on small agents without an environment.
"""

import copy
import csv
import gc
import inspect
import math
import os
import signal
import subprocess
import sys
import typing
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ne_td3_continuous as ne
import utils_topology as topology

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "ne_td3_continuous.py"
# what a run stops for
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# Pendulum's episodes have 200 steps. Updates from 301 on, rounds every 200 steps, rows
# every 500, checkpoints every 600.
SMALL = (
    "--env-id Pendulum-v1 --total-timesteps 2500 --learning-starts 300 "
    "--actor-hidden 24 16 --critic-hidden 24 16 --batch-size 32 "
    "--grow-interval 200 --review-interval 50 --eval-frequency 500 --eval-episodes 2 "
    "--checkpoint-frequency 600 --buffer-size 1500 --no-cuda "
)


# --- running a script ---------------------------------------------------------
def words_of(arguments: str | list[str]) -> list[str]:
    """Arguments as a list: given as a string, they are split at spaces."""
    return arguments.split() if isinstance(arguments, str) else arguments


def module_name(script: Path) -> str:
    """baselines/td3_continuous.py -> baselines.td3_continuous"""
    return ".".join(script.relative_to(ROOT).with_suffix("").parts)


def launch(
    arguments: str | list[str],
    setup: str = "",
    script: Path = SCRIPT,
    env: dict | None = None,
    **options,
) -> subprocess.Popen:
    """Starts a script in a process of its own, a baseline with `python -m`.

    Args:
        setup: what tests/setups/ does before it starts, for example `kill_at(1730)`.
        env: environment variables in addition to those of this process.
        options: of subprocess.Popen.
    """
    script = Path(script)
    if setup:
        before = [str(ROOT / "tests" / "setups" / "run.py"), module_name(script), setup]
    elif script.parent == ROOT:
        before = [str(script)]
    else:
        before = ["-m", module_name(script)]
    command = [sys.executable, *before, *words_of(arguments)]
    variables = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), **(env or {})}
    options.setdefault("cwd", ROOT)
    options.setdefault("stdout", subprocess.PIPE)
    options.setdefault("stderr", subprocess.PIPE)
    return subprocess.Popen(command, text=True, env=variables, **options)


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """Waits. Returns exit code, stdout, stderr."""
    try:
        out, err = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return process.returncode, out, err


def kill_at(addition: int) -> str:
    """A set-up that kills a run while it stores that transition, counted from 1."""
    return signal_at(addition, "SIGKILL")


def signal_at(addition: int, *names: str) -> str:
    """A set-up: signals to a run while it stores that transition, the next the next, ..."""
    pairs = [f"{addition + n}:{name}" for n, name in enumerate(names)]
    return " ".join(["signal_at", *pairs])


# kills a run in the middle of writing its second checkpoint
KILL_IN_SAVING = "kill_in_saving"


def count_calls(*names: str) -> str:
    """A set-up: each call of these functions of the script prints "called: name"."""
    return " ".join(["count_calls", *names])


def in_process(monkeypatch, capsys, arguments, module=ne) -> tuple[int, str]:
    """Runs a script here, for what ends early: (exit code, what it printed to stderr)."""
    monkeypatch.setattr(sys, "argv", [module.__file__, *words_of(arguments)])
    with pytest.raises(SystemExit) as stop:
        module.as_script(module.main)
    return stop.value.code, capsys.readouterr().err


def not_handled(number: int, frame) -> None:
    raise AssertionError(f"{signal.Signals(number).name} is not handled")


def run_here(arguments: str | list[str], module=ne) -> int:
    """Runs a script to its end in this process. Returns its exit code.

    A run that is broken off gives back signals and lock, as if its process had ended.
    """
    command_line = sys.argv
    main = sys.modules["__main__"]
    spec = main.__spec__
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    sys.argv = [module.__file__, *words_of(arguments)]
    main.__spec__ = None  # not of python -m pytest
    for number in SIGNALS:  # so that a signal which is not handled fails the test only
        signal.signal(number, not_handled)
    try:
        module.as_script(module.main)
    except SystemExit as stop:
        return stop.code or 0
    finally:
        sys.argv = command_line
        main.__spec__ = spec
        for number, handler in handlers.items():
            signal.signal(number, handler)
        gc.collect()  # the lock ends with the run
    return 0


def assert_one_line(error: str, *words: str) -> None:
    """There is one line that begins with "error: ", it says `words`; no traceback."""
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, error
    assert "Traceback" not in error
    for word in words:
        assert word in lines[0], lines[0]


def assert_refused(monkeypatch, capsys, arguments, words="", flags="", module=ne, code=2) -> None:
    """Refuses `arguments` in one line with `words` and, where `flags` are given, the first.

    What is no value of the flag's type at all is refused by tyro, in lines of its own.
    """
    arguments = words_of(arguments) + words_of(flags)
    returned, err = in_process(monkeypatch, capsys, arguments, module)
    assert returned == code, err
    assert_one_line(err, words)
    if flags and not words.startswith("--"):
        assert_one_line(err, words_of(flags)[0])


# --- what a run leaves behind -------------------------------------------------
def rows(folder: Path) -> list[dict]:
    """The rows of a run's results.csv, values as strings."""
    results = folder / "results.csv"
    if not results.exists():
        return []
    with results.open() as file:
        return list(csv.DictReader(file))


def assert_rows_have_all_episodes(folder: Path) -> None:
    """A row's charts/episodic_return is the mean of the episodes since the row before."""
    events = EventAccumulator(str(folder))
    events.Reload()
    episodes = [(e.step, e.value) for e in events.Scalars("charts/episodic_return")]
    reported = {int(row["step"]): float(row["charts/episodic_return"]) for row in rows(folder)}
    before = 0
    ended_there = []
    for step, value in reported.items():
        returns = [r for at, r in episodes if before < at <= step]
        expected = sum(returns) / len(returns) if returns else math.nan
        assert value == pytest.approx(expected, rel=1e-5, nan_ok=True)
        ended_there.append(any(at == step for at, _ in episodes))
        before = step
    assert any(ended_there)  # an episode on the row's own step is the row's


def load(folder: Path) -> dict:
    """A run's checkpoint: script, args, step, results_bytes, results_crc, name, ..."""
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def assert_equal_runs(run: Path, other: Path) -> None:
    """results.csv and checkpoint are bit-identical, but for where and when they were written."""
    assert (run / "results.csv").read_bytes() == (other / "results.csv").read_bytes()
    one = load(run)
    two = load(other)
    for content in (one, two):
        content.pop("name")
        content["args"].pop("run_dir")
        content["args"].pop("checkpoint_frequency")
    assert_equal(one, two)


def assert_equal(one, two) -> None:
    """Equal to the last bit: tensors, numbers, strings, and dictionaries and lists of them.

    NaN is equal to NaN.
    """
    assert type(one) is type(two)
    if torch.is_tensor(one):
        torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)
    elif isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_equal(one[key], two[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            assert_equal(a, b)
    else:
        assert one == two or one != one and two != two


# --- agents -------------------------------------------------------------------
def make_agent(module=ne, device="cpu", **changes):
    """A small TD3 agent of a script (4 observations, 2 actions), a buffer of 500 random rows.

    Args:
        changes: of the script's Args.
    """
    options = {"actor_hidden": (32, 24), "critic_hidden": (32, 24), "batch_size": 64}
    options["total_timesteps"] = 1_000
    options["learning_starts"] = 100
    args = module.Args(**options | changes)
    device = torch.device(device)
    torch.manual_seed(0)
    seed = {"ne_seed": 1} if "ne_seed" in inspect.signature(module.Agent).parameters else {}
    agent = module.Agent(args, 4, 2, **seed, device=device)
    buffer = module.ReplayBuffer(500, 4, 2, 2, device)
    buffer.data.copy_(torch.randn(500, 12, generator=torch.Generator().manual_seed(3)))
    buffer.data[:, 4:6].clamp_(-1, 1)
    buffer.data[:, 11] = (buffer.data[:, 11] > 1).float()
    buffer.size = 500
    return agent, buffer


def sample(buffer, size: int = 64, oldest: float = 1.0, rng=None):
    """A batch in memory of its own."""
    batch = buffer.new_batch(size)
    buffer.sample(batch, oldest, rng)
    return batch


def train(agent, buffer, updates: int, topology_round=None, rounds: int = 0) -> None:
    """`updates` updates, the actor's at every second one, with `rounds` rounds among them.

    Args:
        topology_round: called with (agent, batch, update), evenly spread.
    """
    size = agent.args.batch_size
    for update in range(1, updates + 1):
        batch = sample(buffer, size)
        agent.update_critic(batch)
        if update % 2 == 0:
            agent.update_actor(batch)
        if rounds and update % (updates // rounds) == 0:
            topology_round(agent, sample(buffer, size, rng=agent.ne_rng), update)


def mlps_of(agent) -> dict[str, list[nn.Module]]:
    """The online MLPs of a TD3 agent."""
    return {"actor": [agent.actor], "critic": [agent.critic_1, agent.critic_2]}


def linear_layers(mlp: nn.Module) -> list[nn.Linear]:
    return [part for part in mlp.modules() if isinstance(part, nn.Linear)]


def values(module: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def equal(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    """All tensors are equal, and there are some."""
    return len(one) == len(two) > 0 and all(map(torch.equal, one, two))


def none_equal(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    """No tensor is equal to its counterpart, and there are some."""
    return len(one) == len(two) > 0 and not any(map(torch.equal, one, two))


def silence_some(agent, mlps: dict[str, list[nn.Module]] | None = None) -> None:
    """Makes every third hidden neuron of each MLP dormant."""
    mlps = mlps or mlps_of(agent)
    for mlp in [*mlps["actor"], *mlps["critic"]]:
        for layer in linear_layers(mlp)[:-1]:
            layer.bias.data[::3] = -100.0


def assert_updates_read_no_values(agent, batch, reads: str) -> None:
    """What a CUDA graph needs, seen on tensors without values, on the device "meta".

    Reading a value raises there, so does a tensor that comes from elsewhere.

    Args:
        reads: a field of the batch that the critics' update reads.
    """
    losses = [*agent.update_critic(batch), agent.update_actor(batch)]
    assert [loss.device.type for loss in losses] == ["meta"] * 3
    with pytest.raises(RuntimeError):
        losses[0].item()
    elsewhere = torch.zeros(getattr(batch, reads).shape, device="cpu")
    with pytest.raises(RuntimeError, match="device"):
        agent.update_critic(batch._replace(**{reads: elsewhere}))


# --- what ReDo changes --------------------------------------------------------
def redone(redo, agent, batch, tau: float):
    """An agent before and after `redo(agent, batch)`, with every third neuron dormant.

    Adam's moments are 1 and 2 everywhere before.

    Returns:
        agent before, agent after, {network: [[dormant (n,) of each hidden layer] of each MLP]}
    """
    silence_some(agent)
    for network in agent.networks.values():
        for state in network.optimizer.state.values():
            state["exp_avg"].fill_(1.0)
            state["exp_avg_sq"].fill_(2.0)
    dormant = {"actor": [], "critic": []}
    weak = 0  # with tau > 0, more than those silenced
    for name, mlps in mlps_of(agent).items():
        for mlp in mlps:
            scores = [topology.dormancy_scores(h) for h in mlp.hidden(batch)]
            which = [score <= tau for score in scores]
            for layer in which:
                assert layer[::3].all() and not layer.all()
                weak += int(layer.sum()) - len(layer[::3])
            dormant[name].append(which)
    assert (weak > 20) == (tau > 0.5)
    before = copy.deepcopy(agent)
    redo(agent, batch)
    return before, agent, dormant


def walk(before, after, dormant: dict):
    """Yields (network, old layer, layer, dormant outputs (out,), dormant inputs (in,))."""
    for name, mlps in mlps_of(after).items():
        for old_mlp, mlp, which in zip(mlps_of(before)[name], mlps, dormant[name], strict=True):
            old = linear_layers(old_mlp)
            new = linear_layers(mlp)
            outputs = [*which, torch.zeros(new[-1].out_features, dtype=torch.bool)]
            inputs = [torch.zeros(new[0].in_features, dtype=torch.bool), *which]
            for layers in zip(old, new, outputs, inputs, strict=True):
                yield name, *layers


def assert_moments_forgotten(adam: torch.optim.Adam, layer, outputs, inputs) -> None:
    """Adam's moments, 1 and 2 before, are 0 for what ReDo drew or silenced, and only there."""
    changed = outputs[:, None] | inputs  # (out, in)
    for moment, value in (("exp_avg", 1.0), ("exp_avg_sq", 2.0)):
        weight = adam.state[layer.weight][moment]
        bias = adam.state[layer.bias][moment]
        assert not weight[changed].any()
        assert (weight[~changed] == value).all()
        assert not bias[outputs].any()
        assert (bias[~outputs] == value).all()


# --- bad input ----------------------------------------------------------------
def bad_numbers(Args: type) -> list[str]:
    """For every flag of numbers: what no such flag accepts. "--flag value" each.

    Negative, of 30 digits, and for floats NaN, infinite and 1e300. A flag added to the
    dataclass is tried without a change here.
    """
    tried = []
    for field in fields(Args):
        kinds = typing.get_args(field.type) or (field.type,)
        flag = "--" + field.name.replace("_", "-")
        if float in kinds:
            tried += [f"{flag} {value}" for value in ("nan", "inf", "-inf", "-0.5", "1e300")]
        elif int in kinds:
            many = "16 " if tuple in (typing.get_origin(field.type), field.type) else ""
            tried += [f"{flag} {many}{value}" for value in ("-1", "9" * 30)]
    return tried


# (flags, what the message says)
REFUSED_TD3 = [
    ("--eval-frequency 0", "in [1, "),
    ("--eval-episodes 0", "in [1, "),
    ("--checkpoint-frequency 0", "in [1, "),
    ("--policy-frequency 0", "in [1, "),
    ("--learning-starts 0", "in [1, "),
    ("--seed -1", "in [0, "),
    ("--seed 4294967296", "in [0, 2,147,483,647]"),
    ("--gamma 1.1", "in [0, 1], got 1.1"),
    ("--learning-rate 0", ", 1], got 0.0"),
    ("--torch-threads 0", "in [1, "),
    ("--buffer-size 0", "in [1, "),
    ("--batch-size 500 --buffer-size 400", "--batch-size must be at most 400, got 500"),
    ("--actor-hidden 32 0", "in [1, "),
    ("--actor-hidden 3000000 3000000", "in [1, "),
]
REFUSED_NE = [
    ("--initial-density 0", ", 1], got 0.0"),
    ("--initial-density nan", "got nan"),
    ("--initial-density 0.97", "--final-density must be below 1 and at least --initial-density"),
    ("--final-density 1", "--final-density must be below 1"),
    ("--prune-ratio 1", "in [0, 0.999], got 1.0"),
    ("--grow-rate 1.5", "in [0, 1]"),
    ("--grow-interval 0", "in [1, "),
    ("--growth-end 0", "in [1, "),
    ("--review-interval 0", "in [1, "),
    ("--review-fraction 0", ", 1], got 0.0"),
    ("--review-floor 2", "in [0, 1]"),
]


# --- pixels: a small agent of the DrQ-v2 scripts ------------------------------
PIXELS = {"frame_size": 24, "channels": 4, "hidden_dim": 32, "batch_size": 16, "buffer_size": 60}
PIXELS |= {"total_timesteps": 1_000, "stddev_duration": 100}
