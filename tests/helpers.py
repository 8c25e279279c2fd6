"""Runs scripts as their users do, compares what they leave behind; makes small agents.

- `run_here` runs a script in this process, where SIGKILL is an exception that only it catches;
  `refused` is for what ends in one line.
- `launch` starts a script in a process of its own, `finish` waits for it.
- `make_agent` and `train` work on small agents without an environment.
"""

import collections
import csv
import gc
import math
import os
import signal
import subprocess
import sys
import typing
from dataclasses import fields
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn as nn
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ne_td3_continuous as ne
from setups import signalling

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "ne_td3_continuous.py"
# what a run stops for
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")


# --- running a script ---------------------------------------------------------
def words_of(arguments: str | list) -> list[str]:
    """Arguments as a list: given as a string, they are split at spaces."""
    return arguments.split() if isinstance(arguments, str) else list(map(str, arguments))


def launch(
    arguments: str | list[str],
    setup: str = "",
    script: Path = SCRIPT,
    env: dict | None = None,
    **options,
) -> subprocess.Popen:
    """Starts a script in a process of its own, a baseline with `python -m`.

    Args:
        setup: words of tests/setups.py, for example "117:SIGKILL".
        env: environment variables in addition to those of this process.
        options: of subprocess.Popen.
    """
    path = Path(script)
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    before = [str(path)] if path.parent == ROOT else ["-m", module]
    if setup:
        before = [str(ROOT / "tests" / "setups.py"), module, setup]
    command = [sys.executable, *before, *words_of(arguments)]
    variables = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), **(env or {})}
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
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


class Killed(BaseException):
    """In place of SIGKILL."""


def send(number: signal.Signals) -> None:
    if number == signal.SIGKILL:
        raise Killed
    os.kill(os.getpid(), number)


def not_handled(number: int, frame) -> None:
    raise AssertionError(f"{signal.Signals(number).name} is not handled")


def run_here(arguments: str | list, module=ne, due: dict[int, str] | None = None) -> int:
    """Runs a script in this process. Returns its exit code, -9 if it was killed.

    Signals and lock are given back, as if its process had ended.

    Args:
        due: {117: "SIGKILL"} kills it while it stores its 117th transition.
    """
    main = sys.modules["__main__"]
    handlers = {name: signal.getsignal(signal.Signals[name]) for name in SIGNALS}
    for name in SIGNALS:  # so that a signal which is not handled fails the test only
        signal.signal(signal.Signals[name], not_handled)
    command_line = [module.__file__, *words_of(arguments)]
    add = signalling(module.ReplayBuffer.add, due or {}, send)
    try:
        with (
            mock.patch.object(sys, "argv", command_line),
            mock.patch.object(main, "__spec__", None),  # not of python -m pytest
            mock.patch.object(module.ReplayBuffer, "add", add),
        ):
            module.as_script(module.main)
    except Killed:
        return -signal.SIGKILL
    except SystemExit as stop:
        return stop.code or 0
    finally:
        for name, handler in handlers.items():
            signal.signal(signal.Signals[name], handler)
        gc.collect()  # the lock ends with the run
    return 0


def assert_one_line(error: str, *words: str) -> None:
    """There is one line that begins with "error: ", it says `words`; no traceback."""
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, error
    assert "Traceback" not in error
    for word in words:
        assert word in lines[0], lines[0]


def refused(capsys, arguments: str | list, *words: str, module=ne, code: int = 2) -> None:
    """A script ends with this code and one line, which says `words`."""
    capsys.readouterr()
    returned = run_here(arguments, module)
    error = capsys.readouterr().err
    assert returned == code, error
    assert_one_line(error, *words)


def call(capsys, module, *arguments) -> tuple[int, str, str]:
    """A tool in this process: exit code, stdout, stderr."""
    capsys.readouterr()
    code = 0
    with mock.patch.object(sys, "argv", [module.__file__, *map(str, arguments)]):
        try:
            module.main()
        except SystemExit as stop:
            code = stop.code or 0
    return code, *capsys.readouterr()


def count_calls(monkeypatch, module, *names: str) -> collections.Counter:
    """How often functions of a script are called from now on."""
    calls = collections.Counter()

    def counted(name: str):
        function = getattr(module, name)

        def call(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    for name in names:
        monkeypatch.setattr(module, name, counted(name))
    return calls


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
    """A run's checkpoint: script, step, finished, args, parts, results."""
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def assert_equal_runs(run: Path, other: Path) -> None:
    """results.csv and checkpoint are bit-identical, but for where and when they were written."""
    assert (run / "results.csv").read_bytes() == (other / "results.csv").read_bytes()
    one = load(run)
    two = load(other)
    for content in (one, two):
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
    options |= {"total_timesteps": 1_000, "learning_starts": 100}
    args = module.Args(**options | changes)
    if hasattr(module, "scale_to_run"):
        module.scale_to_run(args)
    device = torch.device(device)
    torch.manual_seed(0)
    agent = module.Agent(args, 4, 2, 1, device)
    buffer = module.ReplayBuffer(500, 4, 2, 2, device)
    buffer.data.copy_(torch.randn(500, 12, generator=torch.Generator().manual_seed(3)))
    buffer.data[:, 4:6].clamp_(-1, 1)
    buffer.data[:, 11] = (buffer.data[:, 11] > 1).float()
    buffer.size = 500
    return agent, buffer


def train(agent, buffer, updates: int, topology_round=None, rounds: int = 0) -> None:
    """`updates` updates, the actor's at every second one, with `rounds` rounds among them.

    Args:
        topology_round: called with (agent, batch, update), evenly spread.
    """
    size = agent.args.batch_size
    for update in range(1, updates + 1):
        batch = buffer.sample(size)
        agent.update_critic(batch)
        if update % 2 == 0:
            agent.update_actor(batch)
        if rounds and update % (updates // rounds) == 0:
            topology_round(agent, buffer.sample(size, rng=agent.rng), update)


def mlps_of(agent) -> dict[str, list[nn.Module]]:
    """The online MLPs of a TD3 agent."""
    return {"actor": [agent.actor], "critic": [agent.critic_1, agent.critic_2]}


def values(module: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def equal(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    """All tensors are equal, and there are some."""
    return len(one) == len(two) > 0 and all(map(torch.equal, one, two))


def none_equal(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    """No tensor is equal to its counterpart, and there are some."""
    return len(one) == len(two) > 0 and not any(map(torch.equal, one, two))


def silence_some(agent) -> None:
    """Makes every third hidden neuron of each MLP dormant, LayerNorm or not."""
    for mlps in mlps_of(agent).values():
        for mlp in mlps:
            for layer, norm in zip(mlp.layers, mlp.norms, strict=False):
                part = norm if isinstance(norm, nn.LayerNorm) else layer
                part.bias.data[::3] = -100.0


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


# --- neurons that start anew --------------------------------------------------
def fill_moments(*optimizers: torch.optim.Adam) -> None:
    """Adam's moments are 1 and 2 everywhere."""
    for optimizer in optimizers:
        for state in optimizer.state.values():
            state["exp_avg"].fill_(1.0)
            state["exp_avg_sq"].fill_(2.0)


def inputs_and_outputs(layers, chosen: list[torch.Tensor]):
    """Of each layer, which inputs (in,) and outputs (out,) are chosen hidden neurons."""
    none_in = torch.zeros(layers[0].in_features, dtype=torch.bool)
    none_out = torch.zeros(layers[-1].out_features, dtype=torch.bool)
    return zip([none_in, *chosen], [*chosen, none_out], strict=True)


def assert_started_anew(before, after, chosen: list[torch.Tensor], adam) -> None:
    """Chosen neurons were drawn as nn.Linear draws, within the masks; nothing else changed.

    What leaves them is 0, Adam's moments, 1 and 2 before, are 0.

    Args:
        before, after: an MLP.
        chosen: boolean (n,) of each hidden layer.
    """
    ends = inputs_and_outputs(after.layers, chosen)
    for old, new, (inputs, outputs) in zip(before.layers, after.layers, ends, strict=True):
        active = getattr(new, "mask", torch.ones_like(new.weight)) == 1
        assert not new.weight[~active].any()
        assert not new.weight[:, inputs].any()  # 0 wins where a neuron is chosen at both ends
        drawn = outputs[:, None] & ~inputs & active
        kept = ~outputs[:, None] & ~inputs
        limit = new.in_features**-0.5
        assert (new.weight != old.weight)[drawn].all()
        assert (new.weight[drawn].abs() <= limit).all()
        assert drawn.sum() < 20 or new.weight[drawn].abs().max() > limit / 2
        assert torch.equal(new.weight[kept], old.weight[kept])
        assert (new.bias != old.bias)[outputs].all()
        assert (new.bias[outputs].abs() <= limit).all()
        assert torch.equal(new.bias[~outputs], old.bias[~outputs])
        assert_moments_forgotten(adam, new, inputs, outputs)


def assert_moments_forgotten(adam: torch.optim.Adam, layer, inputs, outputs) -> None:
    """Adam's moments, 1 and 2 before, are 0 for what was drawn or silenced, and only there."""
    changed = outputs[:, None] | inputs  # (out, in)
    for moment, value in (("exp_avg", 1.0), ("exp_avg_sq", 2.0)):
        weight = adam.state[layer.weight][moment]
        bias = adam.state[layer.bias][moment]
        assert not weight[changed].any()
        assert (weight[~changed] == value).all()
        assert not bias[outputs].any()
        assert (bias[~outputs] == value).all()


# --- bad input ----------------------------------------------------------------
def assert_limits(capsys, module) -> None:
    """No flag of numbers takes a negative or huge number, NaN or infinity."""
    check_limits = getattr(module, "check_limits", ne.check_limits)
    for flag in fields(module.Args):
        kinds = typing.get_args(flag.type) or (flag.type,)
        bad = [-1, 10**30] if int in kinds else []
        if float in kinds:
            bad = [math.nan, math.inf, -0.5, 1e300]
        for number in bad:
            several = tuple in (typing.get_origin(flag.type), flag.type)
            value = (16, number) if several else number
            with pytest.raises(SystemExit) as stop:
                check_limits(module.Args(**{flag.name: value}))
            assert stop.value.code == 2
            name = "--" + flag.name.replace("_", "-")
            assert_one_line(capsys.readouterr().err, f"error: {name} must be in ", f"got {number}")


# (flags, what the message says)
REFUSED_TD3 = [
    ("--seed 4294967296", "--seed must be in [0, 2,147,483,647], got 4294967296"),
    ("--gamma 1.1", "--gamma must be in [0, 1], got 1.1"),
    ("--batch-size 500 --buffer-size 400", "--batch-size must be at most 400, got 500"),
    ("--actor-hidden 32 0", "--actor-hidden must be in [1, "),
    ("--cuda=False", "--cuda takes no value: give --cuda or --no-cuda"),
]
REFUSED_NE = [
    ("--initial-density 0.97", "--final-density must be below 1 and at least --initial-density"),
    ("--prune-ratio 1", "--prune-ratio must be in [0, 0.999], got 1.0"),
]
