"""The continual scripts as users run them: end to end, interrupted, given bad input."""

import contextlib
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ne_td3_continual as ne
import ne_td3_continuous
from baselines import td3_continual as td3
from helpers import (
    REFUSED_NE,
    REFUSED_TD3,
    assert_equal,
    assert_equal_runs,
    assert_limits,
    assert_rows_have_all_episodes,
    count_calls,
    load,
    refused,
    rows,
    run_here,
)

SCRIPTS = pytest.mark.parametrize("script", [ne, td3], ids=["ne", "td3"])
# 3 observations, 1 action, 200 steps; 10 observations, 2 actions, 50 steps
NAMES = ("Pendulum-v1", "Reacher-v5")
# updates from 101 on
TINY = (
    "--learning-starts 100 --actor-hidden 16 16 --critic-hidden 16 16 --batch-size 16 "
    "--eval-episodes 1 --no-cuda "
)
SMALL = f"{TINY} --tasks {' '.join(NAMES)} --cycles 2 --eval-frequency 250 --buffer-size 700 "
# a new task after 320, 640 and 960 steps, each time inside an episode
STEPS = SMALL + "--steps-per-task 320 --checkpoint-frequency 200 "
NE = "--grow-interval 100 --review-interval 20 "
EVALUATED = [0, 250, 320, 500, 640, 750, 960, 1000, 1250, 1280]


def run(script, arguments: str, folder: Path, due: dict[int, str] | None = None) -> Path:
    """What it prints is in the file `stdout` of its folder."""
    folder.mkdir()
    with open(folder / "stdout", "w") as file, contextlib.redirect_stdout(file):
        assert run_here(f"{arguments} --run-dir {folder}", script, due) == 0
    return folder


def killed(script, arguments: str, folder: Path, step: int) -> dict:
    """Kills a run while it stores the transition of that step. Returns its checkpoint."""
    assert run_here(f"{arguments} --run-dir {folder}", script, {step: "SIGKILL"}) == -9
    return load(folder)


def scalars(folder: Path, key: str) -> list:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events.Scalars(key)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of an NE run that was never interrupted."""
    return run(ne, STEPS + NE, tmp_path_factory.mktemp("runs") / "whole")


# --- end to end ---------------------------------------------------------------
def test_a_row_for_every_task_at_every_evaluation(whole):
    results = rows(whole)
    assert [int(row["step"]) for row in results] == [step for step in EVALUATED for _ in NAMES]
    assert [row["task_evaluated"] for row in results] == [*NAMES] * len(EVALUATED)
    for row in results:
        stretch = max(int(row["step"]) - 1, 0) // 320
        expected = [str(1 + stretch // 2), str(stretch % 2), NAMES[stretch % 2]]
        assert [row["cycle"], row["task/id"], row["task_trained"]] == expected
        low = -2000 if row["task_evaluated"] == "Pendulum-v1" else -300
        assert low < float(row["eval/return_mean"]) < 0
    assert len({row["eval/return_mean"] for row in results}) > len(EVALUATED)  # it learns
    for one, two in zip(results[::2], results[1::2], strict=True):
        differ = {key for key in one if one[key] != two[key]}
        assert "task_evaluated" in differ
        assert differ <= {"task_evaluated", "eval/return_mean", "eval/return_std"}


def test_the_topology_grows_over_the_whole_sequence(whole):
    results = rows(whole)
    for name in ("actor", "critic"):
        density = [float(row[f"ne/{name}/density"]) for row in results]
        assert density[0] == pytest.approx(0.25, abs=0.02)
        assert density[-1] > 1.5 * density[0]
        assert [row[f"ne/{name}/active_ratio"] for row in results[:2]] == ["nan", "nan"]


def test_tensorboard_has_a_return_for_every_task(whole):
    for name in NAMES:
        logged = scalars(whole, f"eval/{name}/return_mean")
        assert [event.step for event in logged] == EVALUATED
    logged = [event.value for event in scalars(whole, "task/id")]
    assert logged == [0, 0, 0, 1, 1, 0, 0, 1, 1, 1]
    assert [event.step for event in scalars(whole, "ne/actor/density")] == EVALUATED


def test_it_says_what_will_happen_and_what_came_out(whole):
    out = (whole / "stdout").read_text()
    assert "topology: 25% -> 98% in 11 rounds, less what is pruned\n" in out
    lines = {line[:20].strip(): line[20:].split() for line in out.splitlines()[-4:]}
    assert lines.pop("") == [*NAMES, "mean"]
    metrics = ne.continual_metrics(rows(whole))
    assert list(lines) == list(metrics)
    for name, values in metrics.items():
        assert lines[name][-1] == f"{values['mean']:,.1f}"
    assert lines["forgetting"][1] == lines["forward transfer"][0] == "nan"


# --- equal to the other scripts -----------------------------------------------
def test_without_ne_it_is_td3_bit_for_bit(tmp_path):
    flags = STEPS + "--replay-ratio 2"
    without_ne = "--initial-density 1 --review-floor 1 --layer-norm"
    dense = run(ne, f"{flags} {without_ne}", tmp_path / "dense")
    plain = run(td3, f"{flags} --method layer-norm", tmp_path / "plain")
    one = load(dense)["parts"]
    two = load(plain)["parts"]
    compared = 0
    for key, value in two["agent"].items():
        if torch.is_tensor(value):
            assert torch.equal(one["agent"][key], value), key
            compared += 1
    assert compared == 6 * 2 * 5  # five layers, each with a weight and a bias, in six MLPs
    for name in ("optimizers", "noise_rng", "env_rngs"):
        assert_equal(one[name], two[name])
    assert one["progress"]["updates"] == two["progress"]["updates"] == 2 * (1280 - 100)
    assert (dense / "results.csv").read_bytes() == (plain / "results.csv").read_bytes()


def test_with_one_task_it_is_the_other_ne_script_bit_for_bit(tmp_path):
    shared = f"{TINY} {NE} --eval-frequency 300 --buffer-size 400 --replay-ratio 2 "
    shared += "--redo-interval 70 --reset-interval 250 "
    flags = f"{shared} --tasks Pendulum-v1 --cycles 1 --steps-per-task 600"
    one = run(ne, flags, tmp_path / "one")
    flags = f"{shared} --env-id Pendulum-v1 --total-timesteps 600"
    two = run(ne_td3_continuous, flags, tmp_path / "two")
    ours = load(one)["parts"]
    assert ours["progress"].pop("stretches") == 0 and ours["progress"].pop("episodes") == 3
    assert_equal(ours, load(two)["parts"])
    columns = rows(two)[0].keys()
    after_the_first = rows(one)[1:]  # which is of the untrained policy
    assert [{key: row[key] for key in columns} for row in after_the_first] == rows(two)


# --- interrupted and resumed --------------------------------------------------
@pytest.mark.parametrize(
    ("step", "saved", "flags"),
    [(310, 200, ""), (500, 420, ""), (330, 320, "--checkpoint-frequency 320")],
    ids=["before a switch", "after one", "saved at one"],
)
def test_a_killed_run_resumes_exactly(whole, tmp_path, step, saved, flags):
    folder = tmp_path / "run"
    content = killed(ne, f"{STEPS} {NE} {flags}", folder, step)
    assert content["step"] == saved
    if step == 500:
        assert_each_task_has_its_own_columns(content["parts"]["buffer"]["filled"])
    assert run_here(f"--resume {folder}", ne) == 0
    assert_equal_runs(whole, folder)


def assert_each_task_has_its_own_columns(data: torch.Tensor) -> None:
    """320 transitions of Pendulum, 100 of Reacher."""
    assert data.shape == (420, 10 + 2 + 10 + 2 + 2)
    pendulum = data[:320]
    reacher = data[320:]
    assert not pendulum[:, [*range(3, 10), 11, *range(15, 22)]].any()
    assert pendulum[:, :3].all() and pendulum[:, 10].all()
    assert (pendulum[:, -2:] == torch.tensor([1.0, 0.0])).all()
    assert reacher[:, 10:12].all() and reacher[:, :10].any(0).all()
    assert (reacher[:, -2:] == 1).all()
    # neither task terminates, and a cut at a switch is no termination
    assert not data[:, 23].any()
    # within an episode, but not across the switch
    assert torch.equal(pendulum[:199, 12:22], pendulum[1:200, :10])
    assert not torch.equal(pendulum[319, 12:22], reacher[0, :10])


def test_a_run_with_reset_resumes_exactly(tmp_path, monkeypatch):
    flags = STEPS + "--method reset"
    folder = tmp_path / "killed"
    assert killed(td3, flags, folder, 500)["step"] == 420
    assert run_here(f"--resume {folder}", td3) == 0
    calls = count_calls(monkeypatch, td3, "reset")
    undisturbed = run(td3, flags, tmp_path / "whole")
    assert calls["reset"] == 3  # at 320, 640 and 960, not at the end
    assert_equal_runs(undisturbed, folder)


@SCRIPTS
def test_episodes_and_an_emptied_buffer_resume_exactly(tmp_path, monkeypatch, script):
    """A checkpoint at a switch, hence without transitions, and a row before there is a batch."""
    flags = f"{SMALL} --episodes-per-task 2 --clear-buffer --checkpoint-frequency 100 "
    flags += "--eval-frequency 405 "
    if script is ne:
        calls = count_calls(monkeypatch, ne, "topology_round")
        flags += "--grow-interval 101 --review-interval 20"
    undisturbed = run(script, flags, tmp_path / "whole")
    if script is ne:
        # at 101, 202, ..., 909 without 404, 505 and 909: a few rows say nothing about dormancy
        assert calls["topology_round"] == 6
        out = (undisturbed / "stdout").read_text()
        assert "less what is pruned\n" in out
    folder = tmp_path / "killed"
    content = killed(script, flags, folder, 410)
    assert content["step"] == 400
    assert len(content["parts"]["buffer"]["filled"]) == 0
    assert content["parts"]["progress"]["stretches"] == 1
    assert content["parts"]["progress"]["episodes"] == 0
    assert run_here(f"--resume {folder}", script) == 0
    assert_equal_runs(undisturbed, folder)
    results = rows(undisturbed)
    # tasks of 2 x 200 and 2 x 50 steps
    assert [int(row["step"]) for row in results[::2]] == [0, 400, 405, 500, 810, 900, 1000]
    assert results[4]["losses/qf_loss"] == results[2]["losses/qf_loss"]
    # none in the 16 steps after a switch, until there is a batch
    assert load(undisturbed)["parts"]["progress"]["updates"] == 1000 - 100 - 3 * 16
    assert_rows_have_all_episodes(undisturbed)


def test_episodes_that_end_early_end_the_run_early(tmp_path):
    """Plain's limit is not in its spec."""
    flags = f"{TINY} --tasks fake_task:Plain-v0 fake_task:Parts-v0 --cycles 1"
    folder = run(ne, f"{flags} --episodes-per-task 4 --reset-interval 80", tmp_path / "run")
    assert [row["step"] for row in rows(folder)] == ["0", "0", "80", "80", "160", "160"]
    content = load(folder)
    assert content["finished"] and content["args"]["growth_end"] == 2 * 4 * 10_000
    moments = content["parts"]["optimizers"][0]["state"][0]["exp_avg_sq"]
    assert moments.any()  # there is no reset at the last step


# --- refused ------------------------------------------------------------------
@SCRIPTS
def test_what_is_not_finite_ends_the_run_and_is_not_kept(tmp_path, capsys, script):
    """After 150 steps of Pendulum, in the 130th of the faulty task."""
    folder = tmp_path / "run"
    flags = f"{TINY} --tasks Pendulum-v1 fake_task:NaNObs-v0 --cycles 1 --steps-per-task 150"
    flags += f" --checkpoint-frequency 50 --run-dir {folder}"
    words = "the observation is NaN or infinite at step 280"
    refused(capsys, flags, words, module=script, code=1)
    assert load(folder)["step"] == 270


REFUSED = [
    ("--tasks HalfCheeta-v5", "cannot make HalfCheeta-v5"),
    ("--tasks Pendulum-v1 CartPole-v1", "CartPole-v1 must have Boxes of floats"),
    ("--tasks Pendulum-v1 Pendulum-v1", "each once, got Pendulum-v1 Pendulum-v1"),
    ("--cycles 0", "--cycles must be in [1, 1,000,000,000], got 0"),
]
CASES = [(ne, *case) for case in [*REFUSED, REFUSED_NE[0]]]
CASES += [(td3, *case) for case in [REFUSED[0], REFUSED_TD3[-3]]]


@pytest.mark.parametrize(("script", "flags", "words"), CASES)
def test_values_out_of_range_are_refused_before_anything_is_written(
    tmp_path, capsys, script, flags, words
):
    folder = tmp_path / "run"
    few = "" if "--tasks" in flags else "--tasks Pendulum-v1"
    refused(capsys, f"{few} --run-dir {folder} {flags}", words, module=script)
    assert not folder.exists()


def test_no_number_is_without_limits(capsys):
    assert_limits(capsys, ne)


def test_resume_refuses_another_run_s_flags_and_another_script(whole, capsys):
    for flags, words in (
        ("--tasks Pendulum-v1", f"--tasks must be {NAMES} or left out"),
        ("--clear-buffer", "--clear-buffer must be False or left out"),
    ):
        refused(capsys, f"--resume {whole} {flags}", words, module=ne)
    refused(capsys, f"--resume {whole}", "it is of ne_td3_continual", module=td3, code=1)
