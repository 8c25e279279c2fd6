"""The continual scripts as their users run them: end to end, interrupted around a switch of tasks, given bad input."""

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import helpers
import ne_td3_continual as ne
import td3_continual as td3
from helpers import REFUSED_NE, REFUSED_TD3, assert_equal, assert_equal_runs, assert_refused, finish, kill_at, rows

ROOT = Path(__file__).parent.parent
NAMES = ("Pendulum-v1", "Reacher-v5")  # 3 observations, 1 action, 200 steps; 10 observations, 2 actions, 50 steps
# Updates from 101, a new task after 320, 640 and 960 steps, each time inside an episode.
SMALL = f"--tasks {' '.join(NAMES)} --cycles 2 --learning-starts 100 --actor-hidden 16 16 --critic-hidden 16 16 "
SMALL += "--batch-size 16 --eval-frequency 250 --eval-episodes 1 --buffer-size 700 --no-cuda "
STEPS = SMALL + "--steps-per-task 320 --checkpoint-frequency 200 "
NE = "--grow-interval 100 --review-interval 20 "
EVALUATED = [0, 250, 320, 500, 640, 750, 960, 1000, 1250, 1280]


def launch(script, arguments: str, setup: str = "") -> subprocess.Popen:
    return helpers.launch(arguments, setup, Path(script.__file__))


def run(script, arguments: str, folder: Path) -> Path:
    code, out, err = finish(launch(script, f"{arguments} --run-dir {folder}"))
    assert code == 0, err
    (folder / "stdout").write_text(out)
    return folder


def killed(script, arguments: str, folder: Path, step: int) -> int:
    """Starts a run and kills it while it stores the transition of that step. Returns the step of its checkpoint."""
    code, _, _ = finish(launch(script, f"{arguments} --run-dir {folder}", kill_at(step)))
    assert code == -signal.SIGKILL
    return torch.load(folder / "checkpoint.pt", weights_only=True)["run"]["step"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of an NE run that was never interrupted."""
    return run(ne, STEPS + NE, tmp_path_factory.mktemp("runs") / "whole")


# --- end to end -------------------------------------------------------------------------------------------------------
def test_a_row_for_every_task_at_every_evaluation(whole):
    results = rows(whole)
    assert [int(row["step"]) for row in results] == [step for step in EVALUATED for _ in NAMES]
    assert [row["task_evaluated"] for row in results] == [*NAMES] * len(EVALUATED)
    for row in results:
        stretch = max(int(row["step"]) - 1, 0) // 320
        expected = [str(1 + stretch // 2), str(stretch % 2), NAMES[stretch % 2]]
        assert [row["cycle"], row["task/id"], row["task_trained"]] == expected
        low, high = (-2000, 0) if row["task_evaluated"] == "Pendulum-v1" else (-300, 0)
        assert low < float(row["eval/return_mean"]) < high
    for name in ("actor", "critic"):
        density = [float(row[f"ne/{name}/density"]) for row in results]
        assert density == sorted(density) and density[0] == pytest.approx(0.25, abs=0.02) and density[-1] > 0.8
        assert [row[f"ne/{name}/active_ratio"] for row in results[:2]] == ["nan", "nan"]
        assert all(0 < float(row[f"ne/{name}/active_ratio"]) <= 1 for row in results[2:])
    returns = {(row["step"], row["task_evaluated"]): row["eval/return_mean"] for row in results}
    assert len(set(returns.values())) > len(EVALUATED)  # the policy changes

    events = EventAccumulator(str(whole))
    events.Reload()
    for name in NAMES:
        assert [e.step for e in events.Scalars(f"eval/{name}/return_mean")] == EVALUATED
    assert [e.value for e in events.Scalars("task/id")] == [0, 0, 0, 1, 1, 0, 0, 1, 1, 1]
    assert json.loads((whole / "args.json").read_text())["steps_per_task"] == 320


def test_the_buffer_holds_each_task_s_own_dimensions(tmp_path):
    folder = tmp_path / "run"
    assert killed(ne, STEPS + NE, folder, 500) == 420
    data = torch.load(folder / "checkpoint.pt", weights_only=True)["buffer"]["filled"]
    assert data.shape == (420, 10 + 2 + 10 + 2 + 2)
    pendulum, reacher = data[:320], data[320:]
    assert not pendulum[:, 3:10].any() and not pendulum[:, 11].any() and not pendulum[:, 15:22].any()
    assert pendulum[:, :3].all() and pendulum[:, 10].all() and (pendulum[:, -2:] == torch.tensor([1.0, 0.0])).all()
    assert reacher[:, 10:12].all() and (reacher[:, -2:] == 1).all() and reacher[:, :10].any(0).all()
    assert not data[:, 23].any()  # neither task terminates, and a cut at a switch is no termination
    assert torch.equal(pendulum[:199, 12:22], pendulum[1:200, :10])  # within an episode
    assert not torch.equal(pendulum[319, 12:22], reacher[0, :10])


def test_it_says_what_will_happen_and_what_came_out(whole):
    out = (whole / "stdout").read_text()
    assert "topology: actor and critics 25% -> 9" in out and "in 11 rounds" in out
    assert "density at the start: Pendulum-v1 25%, Reacher-v5 " in out and "replay buffer: 0.00 GiB" in out
    results = {(row["step"], row["task_evaluated"]): float(row["eval/return_mean"]) for row in rows(whole)}
    a, b = ([results[step, name] for step in ("0", "320", "640", "960", "1280")] for name in NAMES)
    lines = {line[:20].strip(): line[20:].split() for line in out.splitlines()[-4:]}
    assert lines[""] == [*NAMES, "mean"]
    assert lines["average performance"] == [f"{a[-1]:.1f}", f"{b[-1]:.1f}", f"{(a[-1] + b[-1]) / 2:.1f}"]
    assert lines["forgetting"] == [f"{max(a[1:-1]) - a[-1]:.1f}", "nan", f"{max(a[1:-1]) - a[-1]:.1f}"]
    assert lines["forward transfer"] == ["nan", f"{b[1] - b[0]:.1f}", f"{b[1] - b[0]:.1f}"]


def test_a_checkpoint_can_be_evaluated_and_a_finished_run_is_left_alone(whole, monkeypatch, capsys):
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    flags = ["--evaluate", str(whole / "checkpoint.pt"), "--eval-episodes", "1"]
    monkeypatch.setattr(sys, "argv", [ne.__file__, *flags])
    ne.main()
    for row in rows(whole)[-2:]:
        expected = f"{row['task_evaluated']}, step 1280: return {float(row['eval/return_mean']):.1f}"
        assert expected in capsys.readouterr().out or row is not rows(whole)[-2]
    monkeypatch.setattr(sys, "argv", [ne.__file__, "--resume", str(whole)])
    ne.main()
    assert "is finished" in capsys.readouterr().out
    assert before == {path.name: path.read_bytes() for path in whole.iterdir()}


# --- equal to the other scripts ---------------------------------------------------------------------------------------
def test_without_ne_it_is_td3_bit_for_bit(tmp_path):
    dense = run(ne, STEPS + "--initial-density 1 --review-floor 1", tmp_path / "dense")
    plain = run(td3, STEPS, tmp_path / "plain")
    one, two = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (dense, plain))
    for key, value in two["agent"].items():
        assert torch.equal(one["agent"][key], value), key
    assert_equal([*one["optimizers"].values()], [*two["optimizers"].values()])
    columns = rows(plain)[0].keys()
    assert [{key: row[key] for key in columns} for row in rows(dense)] == rows(plain)


def test_with_one_task_it_is_the_other_ne_script_bit_for_bit(tmp_path):
    shared = "--learning-starts 100 --actor-hidden 16 16 --critic-hidden 16 16 --batch-size 16 --eval-frequency 300 "
    shared += "--eval-episodes 1 --grow-interval 100 --review-interval 20 --buffer-size 400 --no-cuda "
    shared += "--redo-interval 70 --reset-interval 250 "
    run(ne, f"{shared} --tasks Pendulum-v1 --cycles 1 --steps-per-task 600", tmp_path / "one")
    command = [sys.executable, "ne_td3_continuous.py", *shared.split(), "--env-id", "Pendulum-v1"]
    command += ["--total-timesteps", "600", "--run-dir", str(tmp_path / "two")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    one, two = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("one", "two"))
    for name in ("agent", "optimizers", "ne_rng"):
        assert_equal(one[name], two[name])
    columns = rows(tmp_path / "two")[0].keys()
    assert [{key: row[key] for key in columns} for row in rows(tmp_path / "one")[1:]] == rows(tmp_path / "two")


@pytest.mark.parametrize("script", [ne, td3], ids=["ne", "td3"])
def test_videos_of_every_task_are_recorded(script, tmp_path):
    flags = "--tasks InvertedPendulum-v5 InvertedDoublePendulum-v5 --cycles 1 --steps-per-task 60 --eval-frequency 80 "
    run(script, f"{flags} --learning-starts 200 --eval-episodes 3 --no-cuda --capture-video", tmp_path / "run")
    for task in ("InvertedPendulum-v5", "InvertedDoublePendulum-v5"):
        videos = sorted(path.name for path in (tmp_path / "run" / "videos" / "from_step_0" / task).glob("*.mp4"))
        assert videos == [f"rl-video-episode-{n}.mp4" for n in (0, 3, 6, 9)]  # at steps 0, 60, 80, 120


# --- interrupted and resumed ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("step", "saved", "flags"),
    [(310, 200, ""), (500, 420, ""), (330, 320, "--checkpoint-frequency 320")],
    ids=["before a switch", "after one", "saved at one"],
)
def test_a_killed_run_resumes_exactly(whole, tmp_path, step, saved, flags):
    folder = tmp_path / "run"
    assert killed(ne, f"{STEPS} {NE} {flags}", folder, step) == saved
    code, out, err = finish(launch(ne, f"--resume {folder}"))
    assert code == 0 and "average performance" in out, err
    assert_equal_runs(whole, folder)
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [e.step for e in events.Scalars("task/id")] == EVALUATED


def test_a_run_with_reset_resumes_exactly(tmp_path):
    flags = STEPS + "--method reset"
    folder = tmp_path / "killed"
    assert killed(td3, flags, folder, 500) == 420
    code, _, err = finish(launch(td3, f"--resume {folder}"))
    assert code == 0, err
    setup = "reset = ne.reset\nne.reset = lambda agent: print('called: reset') or reset(agent)"
    code, out, err = finish(launch(td3, f"{flags} --run-dir {tmp_path / 'whole'}", setup))
    assert code == 0, err
    assert out.count("called: reset") == 3  # at 320, 640 and 960, not at the end
    assert_equal_runs(tmp_path / "whole", folder)


def test_episodes_and_an_emptied_buffer_resume_exactly(tmp_path):
    """A checkpoint at a switch, hence without transitions, and a row before there are enough for an update again."""
    flags = f"{SMALL} {NE} --episodes-per-task 2 --clear-buffer --checkpoint-frequency 100 --eval-frequency 405"
    whole, folder = run(ne, flags, tmp_path / "whole"), tmp_path / "killed"
    assert killed(ne, flags, folder, 410) == 400
    content = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert len(content["buffer"]["filled"]) == 0 and content["run"]["stretch"] == 1
    code, _, err = finish(launch(ne, f"--resume {folder}"))
    assert code == 0, err
    assert_equal_runs(whole, folder)
    steps = [int(row["step"]) for row in rows(whole)][::2]
    assert steps == [0, 400, 405, 500, 810, 900, 1000]  # tasks of 2 x 200 and 2 x 50 steps
    assert rows(whole)[4]["losses/qf_loss"] == rows(whole)[2]["losses/qf_loss"]
    updates = torch.load(whole / "checkpoint.pt", weights_only=True)["run"]["updates"]
    assert updates == 1000 - 100 - 3 * 16  # none in the 16 steps after a switch, until there is a batch


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_the_episode_saves_and_resumes_exactly(whole, tmp_path, number, code):
    folder = tmp_path / "run"
    process = launch(ne, f"{STEPS} {NE} --run-dir {folder}")
    deadline = time.time() + 120
    while time.time() < deadline and len(rows(folder)) < 6:
        time.sleep(0.02)
    process.send_signal(number)
    returned, out, err = finish(process)
    assert returned == code, err
    step = torch.load(folder / "checkpoint.pt", weights_only=True)["run"]["step"]
    assert 320 <= step < 1280 and f"stopped at step {step}" in out and f"--resume {folder}" in out
    returned, _, err = finish(launch(ne, f"--resume {folder}"))
    assert returned == 0, err
    assert_equal_runs(whole, folder)


# --- refused ----------------------------------------------------------------------------------------------------------
REFUSED = [
    ("--tasks HalfCheeta-v5", "HalfCheetah"),
    ("--tasks Pendulum-v1 CartPole-v1", "flat Box actions"),
    ("--tasks Pendulum-v1 Blackjack-v1", "flat Box observations"),
    ("--tasks", "one task or more, each once, got ()"),
    ("--tasks Pendulum-v1 Pendulum-v1", "one task or more, each once"),
    ("--cycles 0", "at least 1, got 0"),
    ("--steps-per-task 0", "at least 1, got 0"),
    ("--episodes-per-task -1", "at least 1, got -1"),
    ("--steps-per-task 500 --episodes-per-task 5", "must be left out with --episodes-per-task, got 500"),
]


REFUSED_SCALE = [("--scale 5", "1, 2, 3 or 4"), ("--scale 2 --critic-hidden 64 64", "--scale must be 1")]


@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [(ne, *case) for case in REFUSED + REFUSED_TD3 + REFUSED_NE + REFUSED_SCALE]
    + [(td3, *case) for case in REFUSED + REFUSED_TD3],
)
def test_values_out_of_range_are_refused_before_anything_is_written(
    tmp_path, monkeypatch, capsys, script, flags, words
):
    few = "" if "--tasks" in flags else "--tasks Pendulum-v1"
    assert_refused(monkeypatch, capsys, f"{few} --run-dir {tmp_path / 'run'}", words, flags, script)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--tasks Pendulum-v1", "--tasks must be ('Pendulum-v1', 'Reacher-v5') or left out"),
        ("--cycles 3", "--cycles must be 2 or left out"),
        ("--episodes-per-task 3", "--episodes-per-task must be None or left out"),
        ("--clear-buffer", "--clear-buffer must be False or left out"),
    ],
)
def test_resume_refuses_flags_that_contradict_the_run(whole, monkeypatch, capsys, flags, words):
    assert_refused(monkeypatch, capsys, f"--resume {whole}", words, flags, ne)


def test_checkpoints_of_other_scripts_and_other_tasks_are_refused(whole, tmp_path, monkeypatch, capsys):
    foreign = "checkpoint.pt is damaged or not a checkpoint of td3_continual.py"
    assert_refused(monkeypatch, capsys, f"--evaluate {whole / 'checkpoint.pt'}", foreign, module=td3, code=1)
    content = torch.load(whole / "checkpoint.pt", weights_only=True)
    content["run"]["args"]["tasks"] = ("Pendulum-v1",)
    torch.save(content, tmp_path / "checkpoint.pt")
    unfit = "does not fit ('Pendulum-v1',) with 3 observations and 1 actions"
    assert_refused(monkeypatch, capsys, f"--evaluate {tmp_path / 'checkpoint.pt'}", unfit, module=ne, code=1)


def test_the_results_can_be_read_as_a_table(whole):
    with open(whole / "results.csv", newline="") as file:
        header, *lines = csv.reader(file)
    assert len(set(header)) == len(header) and {len(line) for line in lines} == {len(header)}
