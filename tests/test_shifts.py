"""benchmark/shifts.py: its commands, what it resumes, the table and the picture."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import shifts
from helpers import ROOT


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


def cut_off(folder: Path, rows: int) -> None:
    file = folder / "results.csv"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-rows]))


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
    job = shifts.job_of(Path("runs"), arm, 3, task, 50_000, ["--compile"])
    wanted = job.wanted
    assert (wanted["seed"], wanted["compile"], wanted["learning_starts"]) == (3, True, 5_000)
    if arm == shifts.FRESH:
        assert (wanted["env_id"], job.steps) == (task, 50_000)
    else:
        assert tuple(wanted["tasks"]) == shifts.TASKS and wanted["clear_buffer"]
        assert (wanted["steps_per_task"], wanted["cycles"], job.steps) == (50_000, 1, 500_000)


RUN = ("run", "--arms", "td3", "--seeds", 1, "--workers", 1)
TINY = "--flags=--actor-hidden 8 --critic-hidden 8 --batch-size 8 --no-cuda --max-episode-steps 20"


def test_a_run_that_failed_without_a_checkpoint_is_set_aside_and_made_anew(
    monkeypatch, tmp_path, capsys
):
    sequence(tmp_path / "td3_seed1", 1.0, last_task=1)
    (tmp_path / "td3_seed1" / "failed.txt").write_text("exit code 1")
    flags = [*RUN, "--out", tmp_path, TINY, "--stretch"]
    command = [sys.executable, "benchmark/shifts.py", *map(str, flags), "20"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert "1 of 1 runs are finished" in made.stderr
    aside = {file.name for file in (tmp_path / "td3_seed1.stopped1").iterdir()}
    assert aside == {"results.csv", "failed.txt"}
    rows = (tmp_path / "td3_seed1" / "results.csv").read_text()
    assert rows.splitlines()[-1].startswith("200,")
    # the same command has nothing to do, another stretch is another run
    for stretch, code, words in ((20, 0, "1 finished"), (30, 2, "holds another run")):
        with pytest.raises(SystemExit) as stop:
            call(monkeypatch, *flags, stretch)
        assert stop.value.code == code and words in capsys.readouterr().err
        assert (tmp_path / "td3_seed1" / "results.csv").read_text() == rows


def test_seeds_are_made_one_after_the_other_by_so_many_workers(monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr(shifts.run, "make", lambda args, jobs: made.append((args, jobs)))
    flags = ["--arms", "td3", "fresh", "--seeds", 2, "--workers", 3, "--out", tmp_path]
    call(monkeypatch, "run", *flags)
    ((args, jobs),) = made
    names = [job.name for job in jobs]
    assert args.cpus == 3
    assert (names[0], names[11], len(set(names))) == ("td3_seed1", "td3_seed2", 22)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--flags='"], "--flags"),
        (["--flags=--nonsense"], "nonsense"),
        (["--flags=--seed 7"], "say what run it is: --seed"),
        (["--workers", 0], "--workers must be at least 1, got 0"),
        (["--seeds", 0], "--seeds must be at least 1, got 0"),
        (["--stretch", 9], "--stretch must be at least 10, got 9"),
    ],
)
def test_refusals(monkeypatch, tmp_path, capsys, flags, words):
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, *RUN, "--out", tmp_path / "runs", *flags)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_table_and_picture(monkeypatch, tmp_path, capsys):
    fresh(tmp_path)
    for seed, share in ((1, 0.5), (2, 0.7)):
        sequence(tmp_path / f"td3_seed{seed}", share)
        sequence(tmp_path / f"ne_seed{seed}", share + 0.2)
    sequence(tmp_path / "ne_seed3", 0.1)
    cut_off(tmp_path / "ne_seed3", rows=10)  # within its last stretch
    task = shifts.short_name(shifts.TASKS[0])
    write_rows(tmp_path / f"fresh_{task}_seed2", [{"step": 10, "eval/return_mean": -9_000}])
    sequence(tmp_path / "td3_seed1.stopped1", 5.0)  # set aside by run.py
    rows = [{"step": step, "eval/return_mean": -9_000} for step in (10, 20, 30)]
    write_rows(tmp_path / f"fresh_{task}_seed1.stopped1", rows)
    call(monkeypatch, "table", tmp_path, "--out", tmp_path / "shifts.png")
    out, err = capsys.readouterr()
    assert "left out: ne_seed3 is at step 290 of 300" in err
    assert f"left out: fresh_{task}_seed2 is at step 10 of 30" in err
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
    seeds = shifts.fresh_returns(tmp_path, 30)
    assert [own.tolist() for own in seeds[1:4]] == [[1_000], [1_000, 5_000], [1_000]]
    yardstick = np.array([own.mean() for own in seeds])
    returns, stretch = shifts.returns_of_arms(tmp_path)
    own = returns["ne"]
    assert stretch == 30
    assert yardstick.tolist() == [1_000, 1_000, 3_000] + [1_000] * 7
    assert own == pytest.approx(np.full((1, 10), 900))
    assert shifts.share(own, yardstick, slice(1, 5)) == pytest.approx([0.6])
    assert shifts.share(own, yardstick, slice(5, None)) == pytest.approx([0.9])


def test_refuses_a_folder_without_the_yardstick(monkeypatch, tmp_path, capsys):
    sequence(tmp_path / "ne_seed1", 1.0)
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, "table", tmp_path)
    assert stop.value.code == 2
    assert "there is no fresh run of 30 steps on" in capsys.readouterr().err
    fresh(tmp_path)
    (tmp_path / "ne_seed1" / "results.csv").unlink()
    with pytest.raises(SystemExit):
        call(monkeypatch, "table", tmp_path)
    assert "there are no runs through all tasks" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["ne_seed1", "fresh_CheetahHeavy_seed1"])
def test_a_damaged_file_is_refused(name, monkeypatch, tmp_path, capsys):
    fresh(tmp_path)
    sequence(tmp_path / "ne_seed1", 1.0)
    sequence(tmp_path / "ne_seed2", 1.0)
    file = tmp_path / name / "results.csv"
    head, first, *others = file.read_text().splitlines()
    file.write_text("\n".join([head, first.rpartition(",")[0], *others, ""]))
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, "table", tmp_path, "--out", tmp_path / "shifts.png")
    assert stop.value.code == 2
    assert f"{file} is damaged: a row of it is not complete" in capsys.readouterr().err


def test_a_run_with_one_evaluation_of_a_task_is_refused(monkeypatch, tmp_path, capsys):
    fresh(tmp_path)
    sequence(tmp_path / "ne_seed1", 1.0)
    file = tmp_path / "ne_seed1" / "results.csv"
    head, *lines = file.read_text().splitlines()
    ends = [line for line in lines if int(line.partition(",")[0]) % 30 == 0]
    file.write_text("\n".join([head, *ends, ""]))
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, "table", tmp_path, "--out", tmp_path / "shifts.png")
    assert stop.value.code == 2
    assert "ne_seed1 has fewer than two evaluations on" in capsys.readouterr().err
