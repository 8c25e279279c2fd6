"""The benchmark: trainings that take turns, what it counts, and what it refuses."""

import csv
import io
import json
import os
import sys

import gymnasium as gym
import pytest
import torch

from benchmark import paced, speed

SMALL = speed.Setting(env_id="Pendulum-v1", widths=(16, 16), batch_size=16)


@pytest.fixture
def contender():
    """Our script at the gate, before its first step."""
    contender = speed.Contender("NE-TD3", speed.ours(SMALL), 50, speed.cores(1))
    yield contender
    contender.close()


def test_a_contender_takes_as_many_steps_as_a_turn_has(contender):
    assert contender.wait()["steps"] == 0
    reports = [contender.turn() for _ in range(4)]
    assert [report["steps"] for report in reports] == [50, 100, 150, 200]
    for report in reports:
        assert 0 < report["seconds"] < 60 and report["rss_mib"] > 50
    assert contender.process.poll() is None  # it waits for its next turn


def test_the_gate_lets_as_many_steps_through_as_it_says(monkeypatch):
    read, write = os.pipe()
    monkeypatch.setenv("SPEED_REPORT", str(write))
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n\n"))
    steps = 0
    env = gym.make("Pendulum-v1")
    env.reset(seed=0)
    gate = paced.Gate(env, 7)
    with pytest.raises(SystemExit):  # at the third report nobody answers any more
        while True:
            gate.step(env.action_space.sample())
            steps += 1
    gate.report.close()
    with os.fdopen(read) as reports:
        assert [json.loads(line)["steps"] for line in reports] == [0, 7, 14]
    assert steps == 14


def test_turns_begin_after_the_first_updates(contender, tmp_path):
    speed.warm_up([contender])
    speed.take_turns([contender], 3)
    assert len(contender.turns) == 3
    assert contender.turns[0]["steps"] >= speed.RANDOM_STEPS + 150
    assert contender.process.poll() is not None
    speed.write_csv(tmp_path / "turns.csv", speed.turns_of([contender]))
    rows = list(csv.DictReader((tmp_path / "turns.csv").open()))
    assert [row["turn"] for row in rows] == ["1", "2", "3"]
    for row, turn in zip(rows, contender.turns, strict=True):
        rate = 50 / turn["seconds"]
        assert float(row["steps_per_second"]) == pytest.approx(rate, abs=0.01)
    speed.draw_bars([contender], tmp_path / "bars.png", "Pendulum-v1")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_a_contender_that_fails_is_named_with_its_own_words(capsys):
    command = speed.ours(SMALL, "--gamma", "2")
    contender = speed.Contender("broken", command, 50, speed.cores(1))
    with pytest.raises(SystemExit) as stop:
        contender.wait()
    contender.close()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: broken ended with exit code 2: error: --gamma must be in")


def test_the_operations_of_an_update_are_those_of_its_matrix_products():
    setting = speed.Setting(env_id="Pendulum-v1", widths=(128, 128), batch_size=512)
    limits = {row["ceiling"]: float(row["value"]) for row in speed.ceilings(setting)}
    n_obs, n_act, width = 3, 1, 128
    actor = n_obs * width + width * width + width * n_act
    critic = (n_obs + n_act) * width + width * width + width
    # of a critic or an actor: the gradient of what goes into all layers but the first
    inputs = width * width + width
    targets = actor + 2 * critic
    critic_update = targets + 2 * (critic + critic + inputs)  # forward, weights, inputs
    through_critic = critic + inputs + (n_obs + n_act) * width
    actor_update = actor + through_critic + actor + width * n_act + width * width
    expected = 2 * 512 * (critic_update + actor_update / 2) / 1e6
    measured = limits["matrix products of one environment step"]
    assert measured == pytest.approx(expected, abs=0.051)
    assert all(value > 0 for value in limits.values())


@pytest.mark.parametrize("compiled", [True, False])
def test_ours_take_part_compiled_if_asked_for(compiled):
    commands = speed.all_commands(SMALL, (), (), compiled)
    assert ("NE-TD3, compiled" in commands) == compiled
    for name, command in commands.items():
        assert ("--compile" in command) == name.endswith(", compiled")
        assert ("--initial-density" in command) == name.startswith("TD3")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"peers": ("CleanRL",)}, "--peers must be from Stable-Baselines3, SBX, got CleanRL"),
        (
            {"peers": (), "command": ("CleanRL",)},
            "--command must be LABEL=PYTHON SCRIPT [ARGS...], got CleanRL",
        ),
        ({"peers": (), "setting": speed.Setting(threads=10_000)}, "--threads must be 1 to"),
        pytest.param(
            {"peers": (), "setting": speed.Setting(cuda=True)},
            "--setting.cuda needs a GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(monkeypatch, capsys, arguments, words):
    monkeypatch.setattr(speed, "Contender", None)  # none starts
    with pytest.raises(SystemExit) as stop:
        speed.compare(**arguments)
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_the_buffer_is_neither_copied_by_updates_nor_by_a_checkpoint(tmp_path):
    speed.memory(transitions=100_000, out=tmp_path)
    row = next(csv.DictReader((tmp_path / "speed_memory.csv").open()))
    mebibytes = 100_000 * (2 * 348 + 17 + 2) * 4 / 2**20
    assert float(row["buffer_mib"]) == pytest.approx(mebibytes, abs=1)
    assert float(row["ratio"]) < 1.2


def test_a_process_that_dies_is_not_waited_for(monkeypatch, capsys, one_minute):
    monkeypatch.setattr(speed, "peak_after", os._exit)  # as if it had run out of memory
    for transitions, code, words in (
        (255, 2, "--transitions must be at least 256"),
        (300, 1, "the process with 256 transitions died, exit code 1"),
    ):
        with pytest.raises(SystemExit) as stop:
            speed.memory(transitions)
        assert stop.value.code == code and words in capsys.readouterr().err


def test_a_round_is_timed_with_and_without_growth(tmp_path, monkeypatch):
    grown = []
    round_of = speed.ne.topology_round

    def counted(args, agent, batch, progress, step):
        round_of(args, agent, batch, progress, step)
        grown.append((args.growth, sum(progress.grown["critic"])))

    monkeypatch.setattr(speed.ne, "topology_round", counted)
    speed.rounds(widths=(32,), out=tmp_path)
    (row,) = csv.DictReader((tmp_path / "speed_round.csv").open())
    assert int(row["weights"]) == (17 + 32 + 6) * 32 + 2 * (17 + 6 + 32 + 1) * 32
    assert 0 < float(row["whole round, ms"]) < 10_000
    assert max(count for growth, count in grown if growth == "none") == 0
    assert max(count for growth, count in grown if growth == "gradient") > 0


def test_measurements_go_to_a_folder_that_is_not_tracked():
    ignored = (speed.ROOT / ".gitignore").read_text().splitlines()
    assert "runs/" in ignored and speed.OUT == speed.ROOT / "runs" / "speed"


class Fake(speed.Contender):
    def __init__(self, name: str, seconds: list[float]):
        self.name = name
        self.chunk = 100
        self.turns = [{"seconds": s, "cpu_seconds": s, "rss_mib": 1} for s in seconds]


def test_ratios_are_those_of_neighbouring_turns(capsys):
    td3, half = Fake("TD3", [1.0, 2.0, 4.0]), Fake("half", [2.0, 4.0, 80.0])
    speed.print_ratios([td3, half], td3)
    head, first, second = capsys.readouterr().out.splitlines()
    assert "against TD3" in head
    assert first.split()[1:4] == ["50.0", "1.00", "(1.00-1.00)"]
    assert second.split()[1:4] == ["25.0", "0.50", "(0.28-0.50)"]


def test_turns_are_written_before_the_ceilings_are_measured(monkeypatch, tmp_path):
    """An hour of turns is not lost to what may fail after it."""
    monkeypatch.setattr(speed, "all_commands", lambda *_: {"NE-TD3": []})
    monkeypatch.setattr(speed, "Contender", lambda name, *_: Fake(name, [1.0, 2.0]))
    monkeypatch.setattr(speed, "warm_up", lambda contenders: None)
    monkeypatch.setattr(speed, "take_turns", lambda contenders, turns: None)
    monkeypatch.setattr(speed, "ceilings", lambda setting: speed.die("no memory", 1))
    with pytest.raises(SystemExit):
        speed.compare(SMALL, out=tmp_path)
    rows = list(csv.DictReader((tmp_path / "speed_compare.csv").open()))
    assert [row["steps_per_second"] for row in rows] == ["100.00", "50.00"]


def test_the_agent_without_an_environment_has_a_full_buffer():
    _, agent, buffer = speed.make_agent(SMALL, transitions=64)
    assert buffer.size == len(buffer.data) == 64 and torch.isfinite(buffer.data).all()
    assert len(agent.networks["critic"].layers) == 6
