"""The DrQ-v2 scripts as their users run them: end to end, interrupted, given bad input, and on the real task."""

import contextlib
import io
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import drq_dmc as drq
import fake_task
import helpers
import ne_drq_dmc as ne
from helpers import assert_equal_runs, assert_one_line, assert_refused, finish, in_process, kill_at, launch, rows

BOTH = pytest.mark.parametrize("script", [ne, drq], ids=["ne_drq_dmc", "drq_dmc"])
# The fake task's episodes are 20 frames, 10 agent steps. Update u is at frame 60 + 4 u, rows are every 100 frames,
# checkpoints every 60; the ring of 60 frames wraps at about frame 110. A kill is at frame 272, after the one of 240.
SIZES = "--frame-size 16 --channels 4 --hidden-dim 16 --batch-size 8 --buffer-size 60 --no-cuda --eval-episodes 2 "
SMALL = SIZES + "--total-timesteps 400 --learning-starts 60 --eval-frequency 100 --checkpoint-frequency 60 "
RUNS = {  # script and its flags
    "NE": (ne, "--grow-interval 50 --review-interval 10 --redo-interval 30 --reset-interval 150 --capture-video"),
    "DrQ": (ne, "--initial-density 1 --review-floor 1"),
    "none": (drq, ""),
    "layer-norm": (drq, "--method layer-norm --capture-video"),
    "reset": (drq, "--method reset --reset-interval 100"),  # at 100, 200, 300; 400 is the last step
    "redo": (drq, "--method redo --redo-interval 30"),  # at 180, 300
    "injection": (drq, "--method injection --injection-step 250"),
    "early injection": (drq, "--method injection --injection-step 240"),  # saved at this very step
    "injection by default": (drq, "--method injection"),  # at 200
}
FAKE = f"sys.path.insert(0, {str(Path(fake_task.__file__).parent)!r})\nimport fake_task\n"
FAKE += "ne.load_task = fake_task.load_task\n"
KILL_AT = 150
RIVALS = ("redo", "reset", "inject")


class Output(io.StringIO):
    def reconfigure(self, **options) -> None:
        pass


def counted(name: str, function):
    return lambda *args: print("called:", name) or function(*args)


def interrupt(patch, script, event: str) -> None:
    """Lets something else happen where a run would be killed."""
    patch.setattr(script.ReplayBuffer, "add", script.ReplayBuffer.add)  # to be put back
    exec(kill_at(KILL_AT, event), {"ne": script})


@pytest.fixture(autouse=True)
def without_gl(monkeypatch):
    for script in (ne, drq):
        monkeypatch.setattr(script, "load_task", fake_task.load_task)


def run(monkeypatch, script, arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [script.__file__, *arguments.split()])
    script.main()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs that were never interrupted, made when first asked for: name -> (folder, standard output)."""
    done = {}

    def make(name: str) -> tuple[Path, str]:
        if name not in done:
            (script, flags), folder = RUNS[name], tmp_path_factory.mktemp("runs") / "whole"
            with pytest.MonkeyPatch.context() as monkeypatch, contextlib.redirect_stdout(Output()) as out:
                monkeypatch.setattr(script, "load_task", fake_task.load_task)
                for function in RIVALS if script is drq else ():
                    monkeypatch.setattr(script, function, counted(function, getattr(script, function)))
                run(monkeypatch, script, f"{SMALL} {flags} --run-dir {folder}")
            done[name] = folder, out.getvalue()
        return done[name]

    return make


def test_a_run_leaves_rows_a_checkpoint_and_videos(whole):
    folder, _ = whole("NE")
    results = rows(folder)
    assert [int(row["step"]) for row in results] == [100, 200, 300, 400]
    for name, final in (("actor", 0.75), ("critic", 0.95)):
        density = [float(row[f"ne/{name}/density"]) for row in results]
        assert density == sorted(density) and 0.25 < density[0] < density[-1]
        assert final - 0.25 < density[-1] < final + 0.05  # less what was pruned
        assert int(results[-1][f"ne/{name}/grown"]) > 0
    assert all(0 < float(row["eval/return_mean"]) < 20 for row in results)  # 20 rewards of at most 1 in an episode


@pytest.mark.parametrize("name", ["NE", "layer-norm"])
def test_a_run_leaves_a_checkpoint_and_videos(whole, name):
    folder, _ = whole(name)
    content = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert content["run"]["step"] == 400 and content["run"]["updates"] == 85  # agent steps 32, 34, ..., 200
    videos = sorted(path.name for path in (folder / "videos").iterdir())
    assert videos == ["step_100.gif", "step_200.gif", "step_300.gif", "step_400.gif"]
    with Image.open(folder / "videos" / "step_400.gif") as video:
        assert video.size == (16, 16) and video.n_frames == 10 and video.info["duration"] == 40


@pytest.mark.parametrize(
    ("name", "kill", "saved"),  # at 117, frame 212, there is a row more than when the checkpoint was written
    [("NE", 117, 180), ("reset", KILL_AT, 240), ("redo", KILL_AT, 240), ("injection", KILL_AT, 240)],
)
def test_a_killed_run_resumes_exactly(whole, tmp_path, monkeypatch, name, kill, saved):
    (script, flags), folder = RUNS[name], tmp_path / "run"
    process = launch(f"{SMALL} {flags} --run-dir {folder}", FAKE + kill_at(kill), script=Path(script.__file__))
    code, _, err = finish(process)
    assert code == -9, err
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["run"]["step"] == saved
    assert len(rows(folder)) == 2
    run(monkeypatch, script, f"--resume {folder}")
    assert_equal_runs(whole(name)[0], folder)


@pytest.mark.parametrize("name", ["early injection", "injection by default"])
def test_a_run_interrupted_after_its_injection_resumes_exactly(whole, tmp_path, monkeypatch, name):
    """From a checkpoint of the very step of the injection and from a later one."""
    folder = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(EOFError):
        interrupt(patch, drq, "raise EOFError")
        run(patch, drq, f"{SMALL} {RUNS[name][1]} --run-dir {folder}")
    run(monkeypatch, drq, f"--resume {folder}")
    assert_equal_runs(whole(name)[0], folder)


@pytest.mark.parametrize(
    ("name", "signal", "code"), [("NE", "SIGTERM", 0), ("redo", "SIGTERM", 0), ("redo", "SIGINT", 130)]
)
def test_a_signal_ends_a_run_after_its_episode_and_it_resumes_exactly(
    whole, tmp_path, monkeypatch, capsys, name, signal, code
):
    (script, flags), folder = RUNS[name], tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        event = f"import signal; signal.raise_signal(signal.{signal})"
        interrupt(patch, script, event)
        run(patch, script, f"{SMALL} {flags} --run-dir {folder}")
    assert stop.value.code == code and "stopped at step 280; continue with: python " in capsys.readouterr().out
    run(monkeypatch, script, f"--resume {folder}")
    assert_equal_runs(whole(name)[0], folder)


@pytest.mark.parametrize("name", ["NE", "none"])
def test_a_finished_run_is_left_alone(whole, monkeypatch, capsys, name):
    run(monkeypatch, RUNS[name][0], f"--resume {whole(name)[0]}")
    assert "is finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "calls", "plan"),
    [
        ("none", {}, "method: none"),
        ("layer-norm", {}, "method: layer-norm"),
        ("reset", {"reset": 3}, "method: reset 100 200 300"),
        ("redo", {"redo": 2}, "method: redo"),
        ("injection", {"inject": 1}, "method: injection 250"),
        ("injection by default", {"inject": 1}, "method: injection 200"),
    ],
)
def test_each_method_acts_when_it_is_due_and_no_other_does(whole, name, calls, plan):
    out = whole(name)[1].splitlines()
    for function in RIVALS:
        assert out.count(f"called: {function}") == calls.get(function, 0)
    assert plan in out


def test_without_a_method_it_is_the_ne_script_without_ne(whole):
    """Every number of results.csv, all weights and Adam's whole state."""
    ours, theirs = whole("none")[0], whole("DrQ")[0]
    for one, two in zip(rows(ours), rows(theirs), strict=True):
        assert one.items() <= two.items() and len(one) == 18
    one, two = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (ours, theirs))
    of_masks = ("mask", "keep", "bound")
    weights = [value for name, value in two["agent"].items() if not name.endswith(of_masks)]
    helpers.assert_equal([*one["agent"].values()], weights)
    for name, adam in one["optimizers"].items():
        assert len(adam["state"]) >= 8
        helpers.assert_equal(adam["state"], two["optimizers"][name]["state"])


def test_before_an_injection_the_run_is_drq_v2(whole):
    """The rows before it are the same bytes, those after it are not."""
    none, injection = (
        whole(name)[0].joinpath("results.csv").read_text().splitlines() for name in ("none", "injection")
    )
    assert none[:3] == injection[:3] and none[3] != injection[3]  # header, 100, 200; 300
    at_its_step = whole("injection by default")[0].joinpath("results.csv").read_text().splitlines()
    assert at_its_step[2].split(",")[:7] == none[2].split(",")[:7] and at_its_step[2] != none[2]  # return and losses


def test_the_baseline_runs_from_anywhere_without_the_rest_of_the_repository(tmp_path):
    shutil.copy(drq.__file__, tmp_path)
    shutil.copy(fake_task.__file__, tmp_path)
    code = f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\nimport drq_dmc as ne, fake_task\n"
    code += f"ne.load_task = fake_task.load_task\nsys.argv += {[*SMALL.split(), '--method', 'redo']}\nne.main()"
    command = [sys.executable, "-I", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("walker_walk__drq_dmc__1__") and len(rows(folder)) == 4


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--frame-size 14", "at least 15"),
        ("--action-repeat 0", "at least 1"),
        ("--total-timesteps 401", "a multiple of --action-repeat"),
        ("--batch-size 500 --buffer-size 400", "--buffer-size must be at least 500"),
        ("--buffer-size 11 --batch-size 2", "at least 12"),
        ("--learning-starts 5", "at least 6"),
        ("--gamma 1.1", "in [0, 1], got 1.1"),
        ("--stddev 1.0 -0.1", "two numbers of at least 0"),
        ("--buffer-size 1000000000", "--buffer-size must be at most"),
    ],
)
@BOTH
def test_values_out_of_range_are_refused_before_anything_is_written(
    tmp_path, monkeypatch, capsys, script, flags, words
):
    assert_refused(monkeypatch, capsys, f"--run-dir {tmp_path / 'run'}", words, flags, script)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--grow-interval 25 --action-repeat 2", "a multiple of --action-repeat"),
        ("--actor-final-density 0.2", "in [--initial-density (0.25), 1), got 0.2"),
        ("--critic-grow-rate 2", "in [0, 1], got 2.0"),
        ("--prune-ratio 1", "in [0, 1)"),
    ],
)
def test_flags_of_ne_out_of_range_are_refused(tmp_path, monkeypatch, capsys, flags, words):
    assert_refused(monkeypatch, capsys, f"--run-dir {tmp_path / 'run'}", words, flags, ne)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--reset-interval 0 --method reset", "at least 1, got 0"),
        ("--reset-interval 101 --method reset", "a multiple of --action-repeat, got 101"),
        ("--redo-interval 0 --method redo", "at least 1, got 0"),
        ("--redo-tau -1 --method redo", "at least 0, got -1"),
        ("--injection-step 0 --method injection", "at least 1, got 0"),
        ("--injection-step 101 --method injection", "a multiple of --action-repeat, got 101"),
        ("--injection-step 402 --method injection --total-timesteps 400", "at most 400, got 402"),
        ("--redo-tau 0.2", "needs --method redo, got --method none"),
        ("--redo-interval 9 --method layer-norm", "needs --method redo, got --method layer-norm"),
        ("--reset-interval 5000 --method redo", "needs --method reset, got --method redo"),
        ("--injection-step 5000 --method reset", "needs --method injection, got --method reset"),
    ],
)
def test_flags_of_methods_out_of_range_or_place_are_refused(tmp_path, monkeypatch, capsys, flags, words):
    assert_refused(monkeypatch, capsys, f"--run-dir {tmp_path / 'run'}", words, flags, drq)
    assert not (tmp_path / "run").exists()


def test_an_action_repeat_that_does_not_divide_the_resets_matters_to_reset_alone(monkeypatch, capsys):
    flags = "--action-repeat 3 --total-timesteps 300 --eval-frequency 300"
    monkeypatch.setattr(sys, "argv", ["script", *flags.split()])
    assert drq.parse_args()[0].reset_interval == 200_000
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--method", "reset"])
    with pytest.raises(SystemExit):
        drq.parse_args()
    assert_one_line(capsys.readouterr().err, "--reset-interval must be a multiple of --action-repeat, got 200000")


def test_an_unknown_method_and_a_checkpoint_of_the_ne_script_are_refused(whole, monkeypatch, capsys):
    code, err = in_process(monkeypatch, capsys, "--method recency", drq)
    assert code == 2 and "Traceback" not in err
    code, err = in_process(monkeypatch, capsys, f"--resume {whole('NE')[0]}", drq)
    assert code == 1
    assert_one_line(err, "checkpoint.pt is damaged or not a checkpoint of drq_dmc.py")


@BOTH
def test_the_length_of_a_run_and_of_its_noise_depend_on_the_task(monkeypatch, script):
    for task, lengths in (("walker_walk", (1_100_000, 100_000)), ("reacher_hard", (3_100_000, 500_000))):
        monkeypatch.setattr(sys, "argv", ["script", "--env-id", task])
        args, _ = script.parse_args()
        assert (args.total_timesteps, args.stddev_duration) == lengths


@BOTH
def test_a_missing_gl_library_is_one_line_that_names_the_package(monkeypatch, capsys, tmp_path, script):
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
        code, err = in_process(monkeypatch, capsys, f"{SIZES} --run-dir {tmp_path / 'run'}", script)
        assert code == 2 and not (tmp_path / "run").exists()
        assert_one_line(err, package, f"MUJOCO_GL={backend}", "eglQueryString")


# Episodes of 8 steps, 8 frames of the run; checkpoints at the end of each; killed in the fourth episode.
REAL = SIZES + "--env-id walker_walk --total-timesteps 48 --learning-starts 12 --eval-frequency 24 "
REAL += "--checkpoint-frequency 8 "
SHORT_EPISODES = """
def short(env_id, rng, load=ne.load_task):
    task, backend = load(env_id, rng)
    task._step_limit = 8
    return task, backend
ne.load_task = short
"""


def run_the_real_walker(monkeypatch, capsys, script, flags: str) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(script, "load_task", script.load_task)  # to be put back
    exec(SHORT_EPISODES, {"ne": script})
    run(monkeypatch, script, f"{REAL} {flags}")
    out = capsys.readouterr().out
    assert "6 actions, 3 frames of 16x16, " in out and "replay buffer: 60 frames, 0.00 GiB on cpu" in out


def test_the_real_walker_is_rendered_and_a_killed_run_resumes_exactly(tmp_path, monkeypatch, capsys):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_the_real_walker(monkeypatch, capsys, ne, f"--grow-interval 8 --run-dir {whole}")
    assert len(rows(whole)) == 2 and all(0 <= float(row["eval/return_mean"]) < 8 for row in rows(whole))
    flags, kill = f"{REAL} --grow-interval 8 --run-dir {killed}", kill_at(18)
    code, _, err = finish(launch(flags, SHORT_EPISODES + kill, script=Path(ne.__file__)))
    assert code == -9, err
    frames = torch.load(killed / "checkpoint.pt", weights_only=True)["buffer"]["frames"]
    assert frames.shape == (15, 3, 16, 16) and frames.float().std() > 10 and len(frames.unique(dim=0)) > 9
    run(monkeypatch, ne, f"--resume {killed}")
    assert_equal_runs(whole, killed)


def test_the_baseline_renders_the_real_walker(tmp_path, monkeypatch, capsys):
    flags = f"--method injection --eval-episodes 1 --capture-video --run-dir {tmp_path / 'run'}"
    run_the_real_walker(monkeypatch, capsys, drq, flags)
    assert len(rows(tmp_path / "run")) == 2 and 0 <= float(rows(tmp_path / "run")[1]["eval/return_mean"]) < 8
    with Image.open(tmp_path / "run" / "videos" / "step_48.gif") as video:
        assert video.n_frames == 4 and np.asarray(video.convert("RGB")).std() > 10


@BOTH
def test_a_wrong_task_name_lists_near_ones(tmp_path, monkeypatch, capsys, script):
    monkeypatch.undo()
    for name, near in (
        ("walker_wlk", "walker_walk"),
        ("cup_catch", "ball_in_cup_catch"),
        ("lqr_lqr_2_1", "walker_walk"),
    ):
        code, err = in_process(monkeypatch, capsys, f"{SIZES} --env-id {name} --run-dir {tmp_path / 'run'}", script)
        assert code == 2 and not (tmp_path / "run").exists()
        assert_one_line(err, f"--env-id must be a task of the DeepMind Control Suite, got {name}", near)
