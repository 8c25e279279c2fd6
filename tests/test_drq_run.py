"""The DrQ-v2 scripts as users run them: end to end, interrupted, bad input, the real task."""

import math
import sys
from pathlib import Path

import pytest

import baselines.drq_dmc as drq
import fake_task
import ne_drq_dmc as ne
from helpers import (
    assert_equal,
    assert_equal_runs,
    assert_rows_have_all_episodes,
    count_calls,
    load,
    refused,
    rows,
    run_here,
)

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
RUNS = {  # script and its flags, calls of what is counted
    "NE": (ne, "--grow-interval 50 --redo-interval 30 --reset-interval 150", None),
    "sparse trunk": (ne, "--sparse-trunk --review-rule level --grow-interval 50", None),
    "replay ratio": (ne, "--replay-ratio 3 --layer-norm --grow-interval 50", None),
    "DrQ": (ne, "--initial-density 1 --review-floor 1", None),
    "DrQ layer-norm": (ne, "--initial-density 1 --review-floor 1 --layer-norm --bf16", None),
    "none": (drq, "", {}),
    "layer-norm": (drq, "--method layer-norm --bf16", {}),
    # at 100, 200, 300; 400 is the last
    "reset": (drq, "--method reset --reset-interval 100", {"reset": 3}),
    "redo": (drq, "--method redo --redo-interval 30", {"redo": 2}),  # at 180, 300
    "injection": (drq, "--method injection --injection-step 250", {"inject": 1}),
    # saved at this very step
    "early injection": (drq, "--method injection --injection-step 240", {"inject": 1}),
    "injection by default": (drq, "--method injection", {"inject": 1}),  # at 200
}


PLAIN = ("DrQ", "DrQ layer-norm", "none", "layer-norm")


@pytest.fixture(autouse=True)
def without_gl(monkeypatch):
    monkeypatch.setattr(ne, "load_task", fake_task.load_task)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs that were never interrupted, made when asked for: name -> folder."""
    done = {}

    def make(name: str) -> Path:
        if name not in done:
            script, flags, expected = RUNS[name]
            done[name] = tmp_path_factory.mktemp("runs") / "whole"
            rivals = ("redo", "reset", "inject") if script is drq else ()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(ne, "load_task", fake_task.load_task)
                calls = count_calls(patch, script, *rivals)
                assert run_here(f"{SMALL} {flags} --run-dir {done[name]}", script) == 0
            assert expected is None or calls == expected
        return done[name]

    return make


# --- a whole run --------------------------------------------------------------
def test_a_run_leaves_rows_and_a_checkpoint(whole):
    results = rows(whole("NE"))
    assert [int(row["step"]) for row in results] == [100, 200, 300, 400]
    for name in ("actor", "critic"):
        density = [float(row[f"ne/{name}/density"]) for row in results]
        assert 0.25 < density[0] < density[-1]
        counts = [int(results[-1][f"ne/{name}/{key}"]) for key in ("planned", "grown", "pruned")]
        planned, grown, pruned = counts
        assert planned >= grown > 0
        assert 0 <= pruned <= 0.4 * grown
    assert_rows_have_all_episodes(whole("NE"))
    for row in results:  # 20 rewards of at most 1 in an episode
        assert 0 < float(row["eval/return_mean"]) < 20
    content = load(whole("NE"))
    assert (content["step"], content["finished"]) == (400, True)
    assert content["parts"]["progress"]["updates"] == 85  # agent steps 32, 34, ..., 200
    assert "buffer" not in content["parts"]
    # three at each of these steps
    assert load(whole("replay ratio"))["parts"]["progress"]["updates"] == 255


@pytest.mark.parametrize(("ours", "theirs"), [("none", "DrQ"), ("layer-norm", "DrQ layer-norm")])
def test_without_a_method_it_is_the_ne_script_without_ne(whole, ours, theirs):
    """Every number of results.csv, all weights and Adam's whole state."""
    one, two = load(whole(ours)), load(whole(theirs))
    assert one["results"] == two["results"]
    weights = []
    for content in (one, two):
        states = content["parts"]["agent"]
        not_ours = ("mask", "bound", "extra_state")
        weights.append([p for name, p in states.items() if not name.endswith(not_ours)])
        assert len(weights[-1]) > 40
    assert_equal(*weights)
    assert_equal(one["parts"]["optimizers"], two["parts"]["optimizers"])


def test_before_an_injection_the_run_is_drq_v2(whole):
    """The rows before it are the same bytes, those after it are not."""
    none, injection = [
        (whole(name) / "results.csv").read_text().splitlines() for name in ("none", "injection")
    ]
    assert none[:3] == injection[:3]  # header, 100, 200
    assert none[3] != injection[3]


# --- interrupted --------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "number", "code"),
    [
        *[(name, "SIGKILL", -9) for name in RUNS if name not in PLAIN],
        ("NE", "SIGTERM", 0),
    ],
)
def test_an_interrupted_run_resumes_exactly(whole, tmp_path, capsys, name, number, code):
    """From the checkpoint of 240: before, at, and after the injection."""
    script, flags, _ = RUNS[name]
    folder = tmp_path / "run"
    assert run_here(f"{SMALL} {flags} --run-dir {folder}", script, due={150: number}) == code
    stopped = code != -9  # after its episode
    assert load(folder)["step"] == (280 if stopped else 240)
    assert ("stopped at step 280: python " in capsys.readouterr().out) == stopped
    assert run_here(f"--resume {folder}", script) == 0
    assert_equal_runs(whole(name), folder)


# --- what stops a run ---------------------------------------------------------
class Faulty(fake_task.FakeTask):
    """Its reward is infinite in its ninth episode."""

    episodes = 0

    def reset(self):
        super().reset()
        self.episodes += 1

    def step(self, action):
        moment = super().step(action)
        return moment._replace(reward=math.inf) if self.episodes == 9 else moment


@pytest.mark.parametrize("script", [ne, drq])
def test_a_reward_that_is_none_stops_the_run(tmp_path, monkeypatch, capsys, script):
    monkeypatch.setattr(ne, "load_task", lambda env_id, rng: (Faulty(rng), "none"))
    flags = f"{SMALL} --eval-episodes 1 --run-dir {tmp_path / 'run'}"
    words = "the reward is NaN or infinite at step 162; --resume continues"
    refused(capsys, flags, words, module=script, code=1)
    assert load(tmp_path / "run")["step"] == 120


@pytest.mark.parametrize("script", [ne, drq])
def test_an_action_that_is_none_stops_the_run(tmp_path, monkeypatch, capsys, script):
    monkeypatch.setattr(script.Agent, "act", lambda agent, obs: math.nan)
    flags = f"{SMALL} --run-dir {tmp_path / 'run'}"
    refused(capsys, flags, "the action is NaN or infinite at step 62", module=script, code=1)


# --- refused ------------------------------------------------------------------
REFUSED = [
    ("--total-timesteps 401", "--total-timesteps must be a multiple of --action-repeat, got 401"),
    ("--learning-starts 5", "--learning-starts must be at least 6, got 5"),
    ("--batch-size 500 --buffer-size 400", "--batch-size must be at most 400, got 500"),
    ("--stddev 1.0 -0.1", "--stddev must be in [0, 1], got -0.1"),
]
REFUSED_NE = [
    ("--grow-interval 25", "--grow-interval must be a multiple of --action-repeat"),
    ("--actor-final-density 0.2", "must be below 1 and at least --initial-density (0.25), got 0.2"),
]
REFUSED_RIVALS = [
    ("--reset-interval 101 --method reset", "a multiple of --action-repeat, got 101"),
    ("--injection-step 101 --method injection", "a multiple of --action-repeat, got 101"),
    ("--redo-tau 0.2", "--redo-tau needs --method redo, got --method none"),
]
ALL_REFUSED = [(ne, *case) for case in REFUSED + REFUSED_NE]
ALL_REFUSED += [(drq, *case) for case in REFUSED + REFUSED_RIVALS]


@pytest.mark.parametrize(("script", "flags", "words"), ALL_REFUSED)
def test_bad_flags_are_refused_before_anything_is_written(tmp_path, capsys, script, flags, words):
    refused(capsys, f"--run-dir {tmp_path / 'run'} {flags}", words, module=script)
    assert not (tmp_path / "run").exists()


def test_a_buffer_that_does_not_fit_is_one_line(tmp_path, capsys):
    flags = f"--buffer-size 1000000000 --run-dir {tmp_path / 'run'}"
    refused(capsys, flags, "the replay buffer and the networks must fit", module=ne, code=1)
    assert not (tmp_path / "run").exists()


# --- the real task ------------------------------------------------------------
class Broken:
    """Importing dm_control fails as it does without libEGL."""

    def find_spec(self, name, path=None, target=None):
        if name.startswith("dm_control"):
            raise AttributeError("'NoneType' object has no attribute 'eglQueryString'")


def test_a_missing_gl_library_is_one_line_that_names_the_package(monkeypatch, capsys):
    monkeypatch.undo()
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    for name in list(sys.modules):
        if name.startswith("dm_control"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setattr(sys, "unraisablehook", None)
    words = ("cannot render with MUJOCO_GL=egl", "eglQueryString", "libegl1", "libosmesa6")
    refused(capsys, SIZES, *words, module=ne)


@pytest.mark.parametrize(
    ("name", "near"),
    [("walker_wlk", "walker_walk"), ("cup_catch", "ball_in_cup_catch")],
)
def test_a_wrong_task_name_lists_near_ones(monkeypatch, capsys, name, near):
    monkeypatch.undo()
    words = (f"--env-id must be a task of dm_control's suite, got {name}", near)
    refused(capsys, f"{SIZES} --env-id {name}", *words, module=ne)


def test_the_real_walker_is_rendered_and_a_killed_run_resumes_exactly(tmp_path, monkeypatch):
    """Episodes of 8 frames, checkpoints at the end of each."""
    monkeypatch.undo()
    load_task = ne.load_task

    def short(env_id: str, rng):
        task, backend = load_task(env_id, rng)
        task._step_limit = 8
        return task, backend

    monkeypatch.setattr(ne, "load_task", short)
    flags = f"{SIZES} --total-timesteps 48 --learning-starts 12 --eval-frequency 24 "
    flags += "--checkpoint-frequency 8 --grow-interval 8"
    reference = tmp_path / "whole"
    killed = tmp_path / "killed"
    assert run_here(f"{flags} --run-dir {reference}", ne) == 0
    assert len(rows(reference)) == 2
    for row in rows(reference):
        assert 0 <= float(row["eval/return_mean"]) < 8
    assert run_here(f"{flags} --run-dir {killed}", ne, due={18: "SIGKILL"}) == -9
    frames = load(killed)["parts"]["buffer"]["frames"]
    assert frames.shape == (15, 3, 16, 16)
    assert frames.float().std() > 10
    assert len(frames.unique(dim=0)) > 9
    assert run_here(f"--resume {killed}", ne) == 0
    assert_equal_runs(reference, killed)
