"""benchmark/shifts.py: its commands, what it resumes, the table and the picture."""

import csv
import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import pool
import shifts


def write_rows(folder: Path, rows: list[dict]) -> None:
    folder.mkdir(parents=True)
    with open(folder / "results.csv", "w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)


def sequence(folder: Path, share: float, last_task: int = 10) -> None:
    """A run that reaches `share` of the fresh network's 1,000 at the end of each stretch."""
    rows = []
    for number, trained in enumerate(shifts.TASKS[:last_task]):
        for step in (10, 20, 30):
            for evaluated in shifts.TASKS:
                row = {"step": 30 * number + step, "task_trained": trained}
                row["task_evaluated"] = evaluated
                own = evaluated == trained and step > 10
                row["eval/return_mean"] = 1_000 * share if own else -5_000
                row["charts/episodic_return"] = 0.0
                rows.append(row)
    write_rows(folder, rows)


def fresh(out: Path) -> None:
    for task in shifts.TASKS:
        rows = [{"step": step, "eval/return_mean": 1_000} for step in (10, 20, 30)]
        write_rows(out / f"fresh_{shifts.short_name(task)}_seed1", rows)


def call(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["shifts.py", *map(str, arguments)])
    monkeypatch.setattr(sys.stdout, "reconfigure", lambda **_: None, raising=False)
    shifts.main()


@pytest.mark.parametrize("arm", [*shifts.ARMS, shifts.FRESH])
def test_the_scripts_accept_the_commands(arm, monkeypatch):
    task = shifts.TASKS[1] if arm == shifts.FRESH else ""
    command = shifts.command_of(arm, 3, task, 50_000, "--compile")
    script = command[1] if command[0] == "-m" else command[0].removesuffix(".py")
    module = importlib.import_module(script)
    monkeypatch.setattr(sys, "argv", [script, *command[2 if command[0] == "-m" else 1 :]])
    args, _ = module.parse_args(module.Args)
    assert (args.seed, args.compile, args.learning_starts) == (3, True, 5_000)
    if arm == shifts.FRESH:
        assert (args.env_id, args.total_timesteps) == (task, 50_000)
    else:
        assert args.tasks == shifts.TASKS and args.clear_buffer
        assert (args.steps_per_task, args.cycles) == (50_000, 1)


def test_makes_what_is_missing_and_resumes(monkeypatch, tmp_path):
    sequence(tmp_path / "ne_seed1", 1.0)  # finished at step 300
    sequence(tmp_path / "reset_seed1", 1.0, last_task=4)
    (tmp_path / "reset_seed1" / "checkpoint.pt").touch()
    sequence(tmp_path / "td3_seed1", 1.0, last_task=1)
    made = []

    def start(job):
        made.append(job)
        return subprocess.Popen([sys.executable, "-c", ""])

    monkeypatch.setattr(pool, "start", start)
    monkeypatch.setattr(pool.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as stop:
        flags = ["--arms", "ne", "reset", "td3", "--seeds", 1, "--stretch", 30]
        call(monkeypatch, "run", *flags, "--out", tmp_path)
    assert stop.value.code == 0
    reset, td3 = made
    folder = str(tmp_path / "reset_seed1")
    assert reset.command == ["-m", "baselines.td3_continual", "--resume", folder]
    assert td3.command[-2:] == ["--run-dir", str(tmp_path / "td3_seed1")]
    assert not (tmp_path / "td3_seed1").exists()


def test_table_and_picture(monkeypatch, tmp_path, capsys):
    fresh(tmp_path)
    for seed, share in ((1, 0.5), (2, 0.7)):
        sequence(tmp_path / f"td3_seed{seed}", share)
        sequence(tmp_path / f"ne_seed{seed}", share + 0.2)
    sequence(tmp_path / "ne_seed3", 0.1, last_task=6)
    call(monkeypatch, "table", tmp_path, "--out", tmp_path / "shifts.png")
    out, err = capsys.readouterr()
    assert "left out: ne_seed3 is not at its end" in err
    rows = {line.split()[1]: line for line in out.splitlines() if line.startswith("| ")}
    assert rows["td3"].startswith("| td3 | 2 | 0.60 [-0.67, 1.87] | 0.60 ")
    assert rows["td3"].endswith("| 0.00 | – |")
    assert rows["ne"].endswith("| 0.20 [-0.41, 0.81] |")
    assert rows["10"] == "| 10 | CheetahBackwardSticky | 600 | 800 | 1,000 |"
    assert (tmp_path / "shifts.png").stat().st_size > 10_000


def test_shares_are_of_the_sum_of_the_mean_fresh_returns(tmp_path):
    fresh(tmp_path)
    task = shifts.TASKS[2]
    rows = [{"step": step, "eval/return_mean": 5_000} for step in (10, 20, 30)]
    write_rows(tmp_path / f"fresh_{shifts.short_name(task)}_seed2", rows)
    sequence(tmp_path / "ne_seed1", 0.9)
    yardstick = shifts.fresh_returns(tmp_path)
    own = shifts.returns_of_arms(tmp_path)["ne"]
    assert yardstick.tolist() == [1_000, 1_000, 3_000] + [1_000] * 7
    assert own == pytest.approx(np.full((1, 10), 900))
    assert shifts.share(own, yardstick, slice(1, 5)) == pytest.approx([0.6])
    assert shifts.share(own, yardstick, slice(5, None)) == pytest.approx([0.9])


def test_refuses_a_folder_without_the_yardstick(monkeypatch, tmp_path, capsys):
    sequence(tmp_path / "ne_seed1", 1.0)
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, "table", tmp_path)
    assert stop.value.code == 2
    assert "there is no fresh run on" in capsys.readouterr().err
    fresh(tmp_path)
    (tmp_path / "ne_seed1" / "results.csv").unlink()
    with pytest.raises(SystemExit):
        call(monkeypatch, "table", tmp_path)
    assert "there are no finished runs" in capsys.readouterr().err
