"""The DrQ-v2 scripts as users run them: end to end, interrupted, bad input, the real task."""

import contextlib
import functools
import gc
import io
import signal
import sys
from pathlib import Path

import pytest

import baselines.drq_dmc as drq
import fake_task
import helpers
import ne_drq_dmc as ne
from helpers import (
    assert_equal_runs,
    assert_one_line,
    assert_refused,
    assert_rows_have_all_episodes,
    bad_numbers,
    finish,
    in_process,
    launch,
    load,
    rows,
)

BOTH = pytest.mark.parametrize("script", [ne, drq], ids=["ne_drq_dmc", "drq_dmc"])
# The fake task's episodes are 20 frames, 10 agent steps. Update u is at frame 60 + 4 u, rows
# are every 100 frames, checkpoints every 60; the ring of 60 frames wraps at about frame 110.
# Addition 150 is at frame 272, after the checkpoint of 240.
SIZES = (
    "--frame-size 16 --channels 4 --hidden-dim 16 --batch-size 8 --buffer-size 60 --no-cuda "
    "--eval-episodes 2 "
)
SMALL = SIZES + (
    "--total-timesteps 400 --learning-starts 60 --eval-frequency 100 --checkpoint-frequency 60 "
)
NE_FLAGS = "--grow-interval 50 --redo-interval 30 --reset-interval 150"
RUNS = {  # script and its flags
    "NE": (ne, NE_FLAGS),
    "sparse trunk": (ne, "--sparse-trunk --review-rule level --grow-interval 50"),
    "DrQ": (ne, "--initial-density 1 --review-floor 1"),
    "none": (drq, ""),
    "layer-norm": (drq, "--method layer-norm"),
    "reset": (drq, "--method reset --reset-interval 100"),  # at 100, 200, 300; 400 is the last
    "redo": (drq, "--method redo --redo-interval 30"),  # at 180, 300
    "injection": (drq, "--method injection --injection-step 250"),
    "early injection": (drq, "--method injection --injection-step 240"),  # saved at this step
    "injection by default": (drq, "--method injection"),  # at 200
}
RIVALS = ("redo", "reset", "inject")


@pytest.fixture(autouse=True)
def without_gl(monkeypatch):
    monkeypatch.setattr(ne, "load_task", fake_task.load_task)


def run(monkeypatch, script, arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [script.__file__, *arguments.split()])
    script.main()


def at_addition(patch, number: int, event) -> None:
    """Calls `event` while a run stores a frame, counted from 1."""
    add = ne.ReplayBuffer.add
    additions = []

    def add_and_more(*args, **kwargs):
        additions.append(None)
        if len(additions) == number:
            event()
        return add(*args, **kwargs)

    patch.setattr(ne.ReplayBuffer, "add", add_and_more)


def counted(name: str, function):
    @functools.wraps(function)
    def call(*args):
        print("called:", name)
        return function(*args)

    return call


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs that were never interrupted, made when asked for: name -> (folder, stdout)."""
    done = {}

    def make(name: str) -> tuple[Path, str]:
        if name not in done:
            script, flags = RUNS[name]
            folder = tmp_path_factory.mktemp("runs") / "whole"
            out = io.StringIO()
            with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
                patch.setattr(ne, "load_task", fake_task.load_task)
                for function in RIVALS if script is drq else ():
                    patch.setattr(script, function, counted(function, getattr(script, function)))
                run(patch, script, f"{SMALL} {flags} --run-dir {folder}")
            done[name] = (folder, out.getvalue())
        return done[name]

    return make


# --- a whole run --------------------------------------------------------------
def test_a_run_leaves_rows_and_a_checkpoint(whole):
    folder, out = whole("NE")
    assert "topology: actor 25% -> 79%, critic 25% -> 99% in 6 rounds" in out
    assert "2 actions, 3 frames of 16x16, no OpenGL" in out
    assert "replay buffer: 60 frames, 0.00 GiB on cpu" in out
    results = rows(folder)
    assert [int(row["step"]) for row in results] == [100, 200, 300, 400]
    for name in ("actor", "critic"):
        last = results[-1]
        density = [float(row[f"ne/{name}/density"]) for row in results]
        assert 0.25 < density[0] < density[-1]
        planned, grown, pruned = (
            int(last[f"ne/{name}/{key}"]) for key in ("planned", "grown", "pruned")
        )
        assert planned >= grown > 0
        assert 0 <= pruned <= 0.4 * grown
    assert_rows_have_all_episodes(folder)
    for row in results:  # 20 rewards of at most 1 in an episode
        assert 0 < float(row["eval/return_mean"]) < 20
    content = load(folder)
    assert content["step"] == 400
    assert content["finished"]
    assert content["parts"]["progress"]["updates"] == 85  # agent steps 32, 34, ..., 200
    assert "buffer" not in content["parts"]


def test_a_sparse_trunk_grows_with_its_heads(whole):
    folder, _ = whole("sparse trunk")
    progress = load(folder)["parts"]["progress"]
    assert {name: len(counts) for name, counts in progress["grown"].items()} == {
        "actor": 2,
        "critic": 3,
    }
    for name in ("actor", "critic"):
        assert all(count > 0 for count in progress["grown"][name])
        assert progress["pruned"][name][0] == 0  # a trunk has no hidden layer


def test_losses_are_those_of_uniform_batches(tmp_path, monkeypatch):
    """From the first count on, at frame 100, all batches are reviews here."""
    flags = f"{SMALL} --review-rule level --review-interval 10 --run-dir {tmp_path / 'run'}"
    dormant = [(0, n) for n in range(64)]  # of 64
    monkeypatch.setattr(ne.topology, "dormant_neurons", lambda hidden, tau: dormant)
    monkeypatch.setattr(ne.topology, "prune", lambda *args: 0)
    run(monkeypatch, ne, flags)
    results = rows(tmp_path / "run")
    assert len({row["losses/qf_loss"] for row in results}) == 1
    assert results[-1]["ne/review_epsilon"] == "0.0"
    assert float(results[-1]["ne/review_share"]) == pytest.approx(75 / 85)


def test_without_a_method_it_is_the_ne_script_without_ne(whole):
    """Every number of results.csv, all weights and Adam's whole state."""
    ours, _ = whole("none")
    theirs, _ = whole("DrQ")
    assert (ours / "results.csv").read_bytes() == (theirs / "results.csv").read_bytes()
    one = load(ours)["parts"]
    two = load(theirs)["parts"]
    for parts in (one, two):
        weights = parts["agent"]
        for name in list(weights):
            if name.endswith(("mask", "bound", "extra_state")):
                del weights[name]
        assert len(weights) > 40
    helpers.assert_equal(list(one["agent"].values()), list(two["agent"].values()))
    for name in ("encoder", "actor", "critic"):
        states = [parts[f"{name}_optimizer"]["state"] for parts in (one, two)]
        assert len(states[0]) >= 8
        helpers.assert_equal(states[0], states[1])


@pytest.mark.parametrize(
    ("name", "calls", "plan"),
    [
        ("none", {}, "method: none"),
        ("layer-norm", {}, "method: layer-norm"),
        ("reset", {"reset": 3}, "method: reset, 3 times"),
        ("redo", {"redo": 2}, "method: redo"),
        ("injection", {"inject": 1}, "method: injection, at frame 250"),
        ("injection by default", {"inject": 1}, "method: injection, at frame 200"),
    ],
)
def test_each_method_acts_when_it_is_due_and_no_other_does(whole, name, calls, plan):
    out = whole(name)[1].splitlines()
    for function in RIVALS:
        assert out.count(f"called: {function}") == calls.get(function, 0)
    assert plan in out
    assert_rows_have_all_episodes(whole(name)[0])


def test_before_an_injection_the_run_is_drq_v2(whole):
    """The rows before it are the same bytes, those after it are not."""
    none, injection, by_default = (
        (whole(name)[0] / "results.csv").read_text().splitlines()
        for name in ("none", "injection", "injection by default")
    )
    assert none[:3] == injection[:3]  # header, 100, 200
    assert none[3] != injection[3]
    # at its very step: returns and losses are the same, dormant neurons are not
    assert by_default[2].split(",")[:6] == none[2].split(",")[:6]
    assert by_default[2] != none[2]


# --- interrupted --------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "kill", "saved"),  # at 117, frame 212, there is a row more than when it was saved
    [("NE", 117, 180), ("redo", 150, 240)],
)
def test_a_killed_run_resumes_exactly(whole, tmp_path, monkeypatch, name, kill, saved):
    script, flags = RUNS[name]
    folder = tmp_path / "run"
    setup = f"fake_pixels signal_at {kill}:SIGKILL"
    arguments = f"{SMALL} {flags} --run-dir {folder}"
    code, _, err = finish(launch(arguments, setup, Path(script.__file__)))
    assert code == -signal.SIGKILL, err
    assert load(folder)["step"] == saved
    assert len(rows(folder)) == 2
    run(monkeypatch, script, f"--resume {folder}")
    assert_equal_runs(whole(name)[0], folder)


@pytest.mark.parametrize(
    "name",
    ["sparse trunk", "reset", "injection", "early injection", "injection by default"],
)
def test_a_run_that_died_resumes_exactly(whole, tmp_path, monkeypatch, name):
    """From the checkpoint of 240: before, at, and after the injection."""
    script, flags = RUNS[name]
    folder = tmp_path / "run"

    def die():
        raise EOFError

    with monkeypatch.context() as patch, pytest.raises(EOFError):
        at_addition(patch, 150, die)
        patch.setattr(ne.Run, "install_handlers", lambda run: None)  # they would keep it
        run(patch, script, f"{SMALL} {flags} --run-dir {folder}")
    gc.collect()  # the lock of the folder ends with what is left of the run
    assert load(folder)["step"] == 240
    run(monkeypatch, script, f"--resume {folder}")
    assert_equal_runs(whole(name)[0], folder)


@pytest.mark.parametrize(
    ("name", "number", "code"),
    [
        ("NE", signal.SIGTERM, 0),
        ("redo", signal.SIGTERM, 0),
        ("redo", signal.SIGINT, 130),
    ],
)
def test_a_signal_ends_a_run_after_its_episode_and_it_resumes_exactly(
    whole, tmp_path, monkeypatch, capsys, name, number, code
):
    script, flags = RUNS[name]
    folder = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        at_addition(patch, 150, lambda: signal.raise_signal(number))
        run(patch, script, f"{SMALL} {flags} --run-dir {folder}")
    assert stop.value.code == code
    assert "stopped at step 280; continue with: python " in capsys.readouterr().out
    run(monkeypatch, script, f"--resume {folder}")
    assert_equal_runs(whole(name)[0], folder)


def long_episodes(env_id: str, rng) -> tuple:
    return fake_task.FakeTask(rng, 250), "no OpenGL"


@pytest.mark.parametrize("name", ["NE", "redo"])
def test_a_stopping_run_postpones_its_evaluations(whole, tmp_path, monkeypatch, name):
    """The rows of 100 and 200 fall due after the signal, that of 300 after the resumption."""
    script, flags = RUNS[name]
    folder = tmp_path / "run"
    reference = tmp_path / "whole"
    monkeypatch.setattr(ne, "load_task", long_episodes)
    run(monkeypatch, script, f"{SMALL} {flags} --run-dir {reference}")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(ne, "evaluate", None)  # is not called
        at_addition(patch, 40, lambda: signal.raise_signal(signal.SIGTERM))
        run(patch, script, f"{SMALL} {flags} --run-dir {folder}")
    content = load(folder)
    assert content["step"] == 250
    assert len(content["parts"]["progress"]["postponed"]) == 2
    assert rows(folder) == []
    run(monkeypatch, script, f"--resume {folder}")
    assert_equal_runs(reference, folder)


def test_a_signal_in_an_evaluation_leaves_the_rest_of_it_to_the_resumed_run(
    whole, tmp_path, monkeypatch
):
    script, flags = RUNS["NE"]
    folder = tmp_path / "run"
    evaluate = ne.evaluate
    calls = []

    def interrupted(*args):
        calls.append(None)
        if len(calls) == 3:  # the first of two episodes of the second row
            signal.raise_signal(signal.SIGTERM)
        return evaluate(*args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(ne, "evaluate", interrupted)
        run(patch, script, f"{SMALL} {flags} --run-dir {folder}")
    assert len(calls) == 3
    assert load(folder)["step"] == 200
    assert len(rows(folder)) == 1
    run(monkeypatch, script, f"--resume {folder}")
    assert_equal_runs(whole("NE")[0], folder)


def test_a_signal_in_the_last_episode_loses_no_row(tmp_path, monkeypatch):
    """The run is over before the episode is, and finished."""
    script, flags = RUNS["NE"]
    folders = [tmp_path / "whole", tmp_path / "run"]
    monkeypatch.setattr(ne, "load_task", long_episodes)
    run(monkeypatch, script, f"{SMALL} {flags} --run-dir {folders[0]}")
    at_addition(monkeypatch, 140, lambda: signal.raise_signal(signal.SIGTERM))  # frame 276
    run(monkeypatch, script, f"{SMALL} {flags} --run-dir {folders[1]}")
    assert_equal_runs(*folders)
    assert len(rows(folders[1])) == 4


@pytest.mark.parametrize("name", ["NE", "none"])
def test_a_finished_run_is_left_alone(whole, monkeypatch, capsys, name):
    code, _ = in_process(monkeypatch, capsys, f"--resume {whole(name)[0]}", RUNS[name][0])
    assert code == 0


@BOTH
def test_a_fault_of_the_environment_names_the_step_and_what_can_be_continued(
    tmp_path, monkeypatch, capsys, script
):
    class Explodes(fake_task.FakeTask):
        total_steps = 0

        def step(self, action):
            Explodes.total_steps += 1
            if Explodes.total_steps == 150:  # of these, 40 in the evaluation at 100
                raise ArithmeticError("the simulation\nexploded")
            return super().step(action)

    monkeypatch.setattr(ne, "load_task", lambda env_id, rng: (Explodes(rng), "fake"))
    flags = f"{SMALL} --run-dir {tmp_path / 'run'}"
    code, err = in_process(monkeypatch, capsys, flags, script)
    assert code == 1
    fault = "walker_walk: ArithmeticError in step: the simulation exploded, at step 110"
    assert_one_line(err, fault, "continues from step 60")
    assert load(tmp_path / "run")["step"] == 60


# --- refused ------------------------------------------------------------------
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--frame-size 14", "at least 15"),
        ("--frame-size 1025", "in [15, "),
        ("--action-repeat 0", "in [1, "),
        ("--total-timesteps 401", "a multiple of --action-repeat"),
        ("--eval-frequency 401", "a multiple of --action-repeat"),
        ("--batch-size 500 --buffer-size 400", "--buffer-size must be at least 500"),
        ("--buffer-size 11 --batch-size 2", "at least 12"),
        ("--learning-starts 5", "at least 6"),
        ("--max-episode-steps 5", "at least 6"),
        ("--gamma 1.1", "in [0, 1], got 1.1"),
        ("--stddev 1.0 -0.1", "in [0, 1], got -0.1"),
        ("--seed 4294967200", "in [0, 2,147,483,647]"),
        ("--buffer-size 1000000000", "--buffer-size must be at most"),
    ],
)
@BOTH
def test_values_out_of_range_are_refused_before_anything_is_written(
    tmp_path, monkeypatch, capsys, script, flags, words
):
    words = words.replace("at least 15", "in [15, 1024]")
    arguments = f"--run-dir {tmp_path / 'run'}"
    assert_refused(monkeypatch, capsys, arguments, words, flags, script)
    assert not (tmp_path / "run").exists()


def bad_flags() -> list[str]:
    one_value = [flags for flags in bad_numbers(ne.Args) if not flags.startswith("--stddev ")]
    return one_value + [f"--stddev 1.0 {value}" for value in ("nan", "inf", "-inf", "1e300")]


@pytest.mark.parametrize("flags", bad_flags())
def test_no_flag_of_numbers_takes_what_is_none(tmp_path, monkeypatch, capsys, flags):
    assert_refused(monkeypatch, capsys, f"--run-dir {tmp_path / 'run'}", "", flags, ne)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--grow-interval 25 --action-repeat 2", "a multiple of --action-repeat"),
        ("--reset-interval 25 --action-repeat 2", "a multiple of --action-repeat"),
        ("--actor-final-density 0.2", "below 1 and at least --initial-density (0.25), got 0.2"),
        ("--critic-final-density 1", "below 1 and at least --initial-density (0.25), got 1.0"),
        ("--critic-grow-rate 2", "in [0, 1], got 2.0"),
        ("--prune-ratio 1", "in [0, 0.999]"),
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
        ("--redo-tau -1 --method redo", "in [0, 1,000], got -1"),
        ("--injection-step 0 --method injection", "in [1, "),
        ("--injection-step 101 --method injection", "a multiple of --action-repeat, got 101"),
        ("--injection-step 402 --method injection --total-timesteps 400", "at most 400, got 402"),
        ("--redo-tau 0.2", "needs --method redo, got --method none"),
        ("--redo-interval 9 --method layer-norm", "needs --method redo, got --method layer-norm"),
        ("--reset-interval 5000 --method redo", "needs --method reset, got --method redo"),
        ("--injection-step 5000 --method reset", "needs --method injection, got --method reset"),
    ],
)
def test_flags_of_methods_out_of_range_or_place_are_refused(
    tmp_path, monkeypatch, capsys, flags, words
):
    assert_refused(monkeypatch, capsys, f"--run-dir {tmp_path / 'run'}", words, flags, drq)
    assert not (tmp_path / "run").exists()


def test_an_action_repeat_that_does_not_divide_the_resets_matters_to_reset_alone(capsys):
    args = drq.Args(action_repeat=3, total_timesteps=300, eval_frequency=300)
    drq.check_method(args)
    args.method = "reset"
    with pytest.raises(SystemExit):
        drq.check_method(args)
    err = capsys.readouterr().err
    assert_one_line(err, "--reset-interval must be a multiple of --action-repeat, got 200000")


def test_an_unknown_method_and_a_checkpoint_of_the_ne_script_are_refused(
    whole, monkeypatch, capsys
):
    code, err = in_process(monkeypatch, capsys, "--method recency", drq)
    assert code == 2
    assert "Traceback" not in err
    code, err = in_process(monkeypatch, capsys, f"--resume {whole('NE')[0]}", drq)
    assert code == 1
    assert_one_line(err, "is a checkpoint of ne_drq_dmc, this is drq_dmc")


@pytest.mark.parametrize(
    ("task", "lengths"),
    [("walker_walk", (1_100_000, 100_000)), ("reacher_hard", (3_100_000, 500_000))],
)
def test_the_length_of_a_run_and_of_its_noise_depend_on_the_task(task, lengths):
    args = ne.Args(env_id=task)
    ne.scale_to_task(args)
    assert (args.total_timesteps, args.stddev_duration) == lengths


class Broken:
    """Importing dm_control fails as it does without libEGL."""

    def find_spec(self, name, path=None, target=None):
        if name.startswith("dm_control"):
            raise AttributeError("'NoneType' object has no attribute 'eglQueryString'")


@pytest.mark.parametrize(
    ("backend", "package"),
    [("egl", "apt-get install libegl1 libgl1"), ("osmesa", "apt-get install libosmesa6")],
)
@BOTH
def test_a_missing_gl_library_is_one_line_that_names_the_package(
    monkeypatch, capsys, tmp_path, script, backend, package
):
    monkeypatch.undo()
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    for name in list(sys.modules):
        if name.startswith("dm_control"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setenv("MUJOCO_GL", backend)
    code, err = in_process(monkeypatch, capsys, f"{SIZES} --run-dir {tmp_path / 'run'}", script)
    assert code == 2
    assert not (tmp_path / "run").exists()
    assert_one_line(err, package, f"MUJOCO_GL={backend}", "eglQueryString")


def test_a_renderer_that_is_half_made():
    """It fails once more, with a traceback, when it is deleted."""
    environment = {"MUJOCO_GL": "glfw", "DISPLAY": ""}
    code, _, err = finish(launch(SIZES, script=ne.__file__, env=environment))
    assert code == 2
    assert_one_line(err, "cannot render with MUJOCO_GL=glfw")


# --- the real task ------------------------------------------------------------
# Episodes of 8 frames, checkpoints at the end of each.
REAL = SIZES + (
    "--env-id walker_walk --total-timesteps 48 --learning-starts 12 --eval-frequency 24 "
    "--checkpoint-frequency 8 --max-episode-steps 8 "
)


def assert_rendered(out: str) -> None:
    assert "6 actions, 3 frames of 16x16, " in out
    assert "replay buffer: 60 frames, 0.00 GiB on cpu" in out


def test_the_real_walker_is_rendered_and_a_killed_run_resumes_exactly(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.undo()
    reference = tmp_path / "whole"
    killed = tmp_path / "killed"
    run(monkeypatch, ne, f"{REAL} --grow-interval 8 --run-dir {reference}")
    assert_rendered(capsys.readouterr().out)
    assert len(rows(reference)) == 2
    for row in rows(reference):
        assert 0 <= float(row["eval/return_mean"]) < 8
    flags = f"{REAL} --grow-interval 8 --run-dir {killed}"
    setup = "signal_at 18:SIGKILL"  # in the fourth episode
    code, _, err = finish(launch(flags, setup, Path(ne.__file__)))
    assert code == -signal.SIGKILL, err
    frames = load(killed)["parts"]["buffer"]["frames"]
    assert frames.shape == (15, 3, 16, 16)
    assert frames.float().std() > 10
    assert len(frames.unique(dim=0)) > 9
    run(monkeypatch, ne, f"--resume {killed}")
    assert_equal_runs(reference, killed)


def test_the_baseline_renders_the_real_walker(tmp_path):
    folder = tmp_path / "run"
    flags = f"{REAL} --method injection --eval-episodes 1 --run-dir {folder}"
    code, out, err = finish(launch(flags, script=Path(drq.__file__)))  # python -m
    assert code == 0, err
    assert_rendered(out)
    assert len(rows(folder)) == 2
    assert 0 <= float(rows(folder)[1]["eval/return_mean"]) < 8


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("walker_wlk", "walker_walk"),
        ("cup_catch", "ball_in_cup_catch"),
        ("lqr_lqr_2_1", "walker_walk"),
    ],
)
@BOTH
def test_a_wrong_task_name_lists_near_ones(tmp_path, monkeypatch, capsys, script, name, near):
    monkeypatch.undo()
    flags = f"{SIZES} --env-id {name} --run-dir {tmp_path / 'run'}"
    code, err = in_process(monkeypatch, capsys, flags, script)
    assert code == 2
    assert not (tmp_path / "run").exists()
    wanted = "--env-id must be a task of the DeepMind Control Suite"
    assert_one_line(err, f"{wanted}, got {name}", near)


@BOTH
def test_missing_packages_are_named_with_what_to_install(tmp_path, monkeypatch, capsys, script):
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "dm_control", None)  # as if it were not installed
    flags = f"{SIZES} --env-id walker_walk --run-dir {tmp_path / 'run'}"
    code, err = in_process(monkeypatch, capsys, flags, script)
    assert code == 2
    assert_one_line(err, "pip install -r requirements-pixels.txt")
