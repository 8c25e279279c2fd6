"""NE on DrQ-v2 as its users run it: end to end, killed and resumed, given bad input, and once on the real task."""

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import fake_task
import ne_drq_dmc as ne
from helpers import assert_equal_runs, assert_one_line, finish, in_process, launch, rows

SCRIPT = Path(ne.__file__)
# The fake task's episodes are 20 frames, 10 agent steps. Updates from frame 64, rounds every 50, rows every 100 frames,
# checkpoints every 60; the ring of 60 frames wraps at about frame 110.
SIZES = "--frame-size 16 --channels 4 --hidden-dim 16 --batch-size 8 --buffer-size 60 --no-cuda --eval-episodes 2 "
SMALL = SIZES + "--total-timesteps 400 --learning-starts 60 --grow-interval 50 --review-interval 10 "
SMALL += "--eval-frequency 100 --checkpoint-frequency 60 --redo-interval 30 --reset-interval 150"
FAKE = f"sys.path.insert(0, {str(Path(fake_task.__file__).parent)!r})\nimport fake_task\n"
FAKE += "ne.load_task = fake_task.load_task\n"
KILL = """
add, calls = ne.ReplayBuffer.add, []
def add_and_die(*args):
    calls.append(None)
    if len(calls) == 150:
        os.kill(os.getpid(), signal.SIGKILL)
    add(*args)
ne.ReplayBuffer.add = add_and_die
"""


@pytest.fixture(autouse=True)
def without_gl(monkeypatch):
    monkeypatch.setattr(ne, "load_task", fake_task.load_task)


def run(monkeypatch, arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments.split()])
    ne.main()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a run that was never interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(ne, "load_task", fake_task.load_task)
        run(monkeypatch, f"{SMALL} --capture-video --run-dir {folder}")
    return folder


def test_a_run_leaves_rows_a_checkpoint_and_videos(whole):
    results = rows(whole)
    assert [int(row["step"]) for row in results] == [100, 200, 300, 400]
    for name, final in (("actor", 0.75), ("critic", 0.95)):
        density = [float(row[f"ne/{name}/density"]) for row in results]
        assert density == sorted(density) and 0.25 < density[0] < density[-1]
        assert final - 0.25 < density[-1] < final + 0.05  # less what was pruned
        assert int(results[-1][f"ne/{name}/grown"]) > 0
    assert all(0 < float(row["eval/return_mean"]) < 20 for row in results)  # 20 rewards of at most 1 in an episode
    content = torch.load(whole / "checkpoint.pt", weights_only=True)
    assert content["run"]["step"] == 400 and content["run"]["updates"] == 85  # agent steps 32, 34, ..., 200
    videos = sorted(path.name for path in (whole / "videos").iterdir())
    assert videos == ["step_100.gif", "step_200.gif", "step_300.gif", "step_400.gif"]
    with Image.open(whole / "videos" / "step_400.gif") as video:
        assert video.size == (16, 16) and video.n_frames == 10 and video.info["duration"] == 40


def test_a_killed_run_resumes_exactly(whole, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    code, _, err = finish(launch(f"{SMALL} --capture-video --run-dir {folder}", FAKE + KILL, script=SCRIPT))
    assert code == -9, err
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["run"]["step"] == 240
    assert len(rows(folder)) == 2
    run(monkeypatch, f"--resume {folder}")
    assert_equal_runs(whole, folder)


def test_a_finished_run_is_left_alone(whole, monkeypatch, capsys):
    run(monkeypatch, f"--resume {whole}")
    assert "is finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--frame-size 14", "at least 15"),
        ("--action-repeat 0", "at least 1"),
        ("--total-timesteps 401", "a multiple of --action-repeat"),
        ("--grow-interval 25 --action-repeat 2", "a multiple of --action-repeat"),
        ("--batch-size 500 --buffer-size 400", "--buffer-size must be at least 500"),
        ("--buffer-size 11 --batch-size 2", "at least 12"),
        ("--learning-starts 5", "at least 6"),
        ("--stddev 1.0 -0.1", "two numbers of at least 0"),
        ("--actor-final-density 0.2", "in [--initial-density (0.25), 1), got 0.2"),
        ("--critic-grow-rate 2", "in [0, 1], got 2.0"),
        ("--prune-ratio 1", "in [0, 1)"),
        ("--buffer-size 1000000000", "--buffer-size must be at most"),
    ],
)
def test_values_out_of_range_are_refused_before_anything_is_written(tmp_path, monkeypatch, capsys, flags, words):
    code, err = in_process(monkeypatch, capsys, f"{flags} --run-dir {tmp_path / 'run'}", ne)
    assert code == 2 and not (tmp_path / "run").exists()
    assert_one_line(err, words, "--")


def test_the_length_of_a_run_and_of_its_noise_depend_on_the_task(monkeypatch):
    for task, lengths in (("walker_walk", (1_100_000, 100_000)), ("reacher_hard", (3_100_000, 500_000))):
        monkeypatch.setattr(sys, "argv", ["script", "--env-id", task])
        args, _ = ne.parse_args()
        assert (args.total_timesteps, args.stddev_duration) == lengths


def test_a_missing_gl_library_is_one_line_that_names_the_package(monkeypatch, capsys, tmp_path):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name.startswith("dm_control"):
                raise AttributeError("'NoneType' object has no attribute 'eglQueryString'")

    monkeypatch.undo()
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    for name in [name for name in sys.modules if name.startswith("dm_control")]:
        monkeypatch.delitem(sys.modules, name)
    for backend, package in (("egl", "apt-get install libegl1 libgl1"), ("osmesa", "apt-get install libosmesa6")):
        monkeypatch.setenv("MUJOCO_GL", backend)
        code, err = in_process(monkeypatch, capsys, f"{SIZES} --run-dir {tmp_path / 'run'}", ne)
        assert code == 2 and not (tmp_path / "run").exists()
        assert_one_line(err, package, f"MUJOCO_GL={backend}", "eglQueryString")


# Episodes of 8 steps, 8 frames of the run; checkpoints at the end of each; killed in the fourth episode.
REAL = SIZES + "--env-id walker_walk --total-timesteps 48 --learning-starts 12 --grow-interval 8 --eval-frequency 24 "
REAL += "--checkpoint-frequency 8"
SHORT_EPISODES = """
def short(env_id, rng, load=ne.load_task):
    task, backend = load(env_id, rng)
    task._step_limit = 8
    return task, backend
ne.load_task = short
"""


def test_the_real_walker_is_rendered_and_a_killed_run_resumes_exactly(tmp_path, monkeypatch, capsys):
    monkeypatch.undo()
    monkeypatch.setattr(ne, "load_task", ne.load_task)  # to be put back
    exec(SHORT_EPISODES, {"ne": ne})
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(monkeypatch, f"{REAL} --run-dir {whole}")
    out = capsys.readouterr().out
    assert "6 actions, 3 frames of 16x16, " in out and "replay buffer: 60 frames, 0.00 GiB on cpu" in out
    assert len(rows(whole)) == 2 and all(0 <= float(row["eval/return_mean"]) < 8 for row in rows(whole))
    kill = KILL.replace("150", "18")
    code, _, err = finish(launch(f"{REAL} --run-dir {killed}", SHORT_EPISODES + kill, script=SCRIPT))
    assert code == -9, err
    frames = torch.load(killed / "checkpoint.pt", weights_only=True)["buffer"]["frames"]
    assert frames.shape == (15, 3, 16, 16) and frames.float().std() > 10 and len(frames.unique(dim=0)) > 9
    run(monkeypatch, f"--resume {killed}")
    assert_equal_runs(whole, killed)


def test_a_wrong_task_name_lists_near_ones(tmp_path, monkeypatch, capsys):
    monkeypatch.undo()
    for name, near in (
        ("walker_wlk", "walker_walk"),
        ("cup_catch", "ball_in_cup_catch"),
        ("lqr_lqr_2_1", "walker_walk"),
    ):
        code, err = in_process(monkeypatch, capsys, f"{SIZES} --env-id {name} --run-dir {tmp_path / 'run'}", ne)
        assert code == 2 and not (tmp_path / "run").exists()
        assert_one_line(err, f"--env-id must be a task of the DeepMind Control Suite, got {name}", near)
