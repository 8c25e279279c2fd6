"""The benchmark: trainings that take turns, what it counts, and what it refuses."""

import csv
import sys

from benchmark import speed

SMALL = speed.Setting(env_id="Pendulum-v1", widths=(16, 16), batch_size=16)


def test_a_comparison(tmp_path, capsys):
    """Ours, compiled or not, and a script of one's own; the folder of each is removed."""
    script = speed.ROOT / "ne_td3_continuous.py"
    other = f"mine={sys.executable} {script} --env-id Pendulum-v1 --learning-starts 1000"
    speed.compare(
        SMALL, peers=(), command=(other,), compiled=False, chunk=50, turns=3, out=tmp_path
    )
    rows = list(csv.DictReader((tmp_path / "speed_compare.csv").open()))
    names = ["NE-TD3", "TD3 (ours, dense)", "mine"]
    assert [(row["contender"], row["turn"]) for row in rows] == [
        (name, turn) for name in names for turn in "123"
    ]
    for row in rows:
        assert 1 < float(row["steps_per_second"]) < 1e5 and int(row["peak_rss_mib"]) > 50
    out = capsys.readouterr().out
    for name in (*names, "simulator alone"):
        assert name in out
    limits = list(csv.DictReader((tmp_path / "speed_ceilings.csv").open()))
    assert len(limits) == 5 and all(float(row["value"]) > 0 for row in limits)


def test_turns_begin_after_the_first_updates():
    contender = speed.Contender("NE-TD3", speed.ours(SMALL), 50, speed.cores(1))
    contender.warm_up()
    steps = [contender.turn()["steps"] for _ in range(3)]
    assert steps[0] > speed.RANDOM_STEPS + 150
    assert [step - steps[0] for step in steps] == [0, 50, 100]
    assert contender.process.poll() is None  # it waits for its next turn
    contender.close()
    assert contender.process.returncode == 0


class Fake(speed.Contender):
    def __init__(self, name: str, seconds: list[float]):
        self.name = name
        self.chunk = 100
        self.turns = [{"seconds": s, "rss_mib": 1} for s in seconds]


def test_ratios_are_those_of_neighbouring_turns_to_the_fastest_peer():
    ours = Fake("NE-TD3", [1.0, 2.0, 4.0])
    slow = Fake("SBX", [9.0, 9.0, 90.0])
    half = Fake("Stable-Baselines3", [2.0, 4.0, 80.0])
    first, _, last = speed.ratios([ours, slow, half])
    assert first["steps/s"] == "50.0" and last["steps/s"] == "25.0"
    assert first["against Stable-Baselines3"] == "2.00 (2.00-11.00)"
    assert last["against Stable-Baselines3"] == "1.00 (1.00-1.00)"
