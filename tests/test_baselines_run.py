"""The baseline script as its users run it: interrupted and resumed, and given bad input."""

import subprocess
import sys

import pytest
import torch

import ne_td3_continuous as ne
from baselines import td3_continuous as td3
from helpers import (
    ROOT,
    assert_equal,
    assert_equal_runs,
    assert_limits,
    assert_one_line,
    assert_rows_have_all_episodes,
    count_calls,
    load,
    refused,
    rows,
    run_here,
)

# Episodes of 20 steps. Updates from 101 on, rows every 90 steps, checkpoints every 100
TINY = (
    "--env-id fake_task:Plain-v0 --total-timesteps 360 --learning-starts 100 "
    "--actor-hidden 16 12 --critic-hidden 16 12 --batch-size 16 --learning-rate 3e-3 "
    "--eval-frequency 90 --eval-episodes 2 --checkpoint-frequency 100 --buffer-size 300 --no-cuda "
)
# what acts before and after the checkpoint of step 200, from which the run killed at 270 goes on
FLAGS = {
    "none": "--replay-ratio 2",
    "layer-norm": "--method layer-norm",
    "reset": "--method reset --reset-interval 120",  # at 120, 240; 360 is the last step
    "redo": "--method redo --redo-interval 60",  # after updates 60, ..., 240
    "regrama": "--method regrama --regrama-interval 60",
    "injection": "--method injection --injection-step 250 --replay-ratio 2",
    "early injection": "--method injection --injection-step 200",  # saved at this very step
    "recency": "--method recency --recency-horizon 50",
}
CALLS = {"reset": {"reset": 2}, "redo": {"redo": 4}, "regrama": {"regrama": 4}}
CALLS |= {"injection": {"inject": 1}, "early injection": {"inject": 1}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs that were never interrupted: name -> (folder, calls of what acts)."""
    done = {}

    def uninterrupted(name: str):
        if name not in done:
            folder = tmp_path_factory.mktemp("runs") / "whole"
            with pytest.MonkeyPatch.context() as patch:
                calls = count_calls(patch, td3, "redo", "regrama", "reset", "inject")
                assert run_here(f"{TINY} {FLAGS[name]} --run-dir {folder}", td3) == 0
            done[name] = (folder, calls)
        return done[name]

    return uninterrupted


@pytest.mark.parametrize("name", FLAGS)
def test_each_method_acts_when_it_is_due_and_a_killed_run_resumes_exactly(whole, tmp_path, name):
    folder, calls = whole(name)
    assert calls == CALLS.get(name, {})
    killed = tmp_path / "killed"
    flags = f"{TINY} {FLAGS[name]} --run-dir {killed}"
    assert run_here(flags, td3, due={270: "SIGKILL"}) == -9
    assert load(killed)["step"] == 200
    assert run_here(f"--resume {killed}", td3) == 0
    assert_equal_runs(folder, killed)
    assert_rows_have_all_episodes(folder)


@pytest.mark.parametrize(
    ("name", "flags"), [("none", "--replay-ratio 2"), ("layer-norm", "--layer-norm")]
)
def test_without_a_method_it_is_the_ne_script_without_ne(whole, tmp_path, name, flags):
    """All columns of results.csv, and the parameters, Adam's state and what draws."""
    ours = whole(name)[0]
    theirs = tmp_path / "theirs"
    without_ne = f"{flags} --initial-density 1 --review-floor 1 --grow-interval 100"
    assert run_here(f"{TINY} {without_ne} --run-dir {theirs}", ne) == 0
    assert len(rows(ours)) == 4
    assert (ours / "results.csv").read_bytes() == (theirs / "results.csv").read_bytes()
    one = load(ours)["parts"]
    two = load(theirs)["parts"]
    weights = {key: value for key, value in one["agent"].items() if torch.is_tensor(value)}
    assert len(weights) == 36 if name == "none" else 60
    assert_equal(weights, {key: two["agent"][key] for key in weights})
    for name in ("optimizers", "noise_rng", "env_rngs", "numpy_rng", "python_rng"):
        assert_equal(one[name], two[name])


def test_before_an_injection_the_run_is_td3(whole):
    """The rows before it are the same bytes, those after it are not."""
    none = (whole("none")[0] / "results.csv").read_text().splitlines()
    injection = (whole("injection")[0] / "results.csv").read_text().splitlines()
    assert none[:3] == injection[:3]  # header, 90, 180
    assert none[3].split(",")[1] != injection[3].split(",")[1]  # 270


def test_an_injection_is_in_the_middle_if_no_step_is_given(tmp_path):
    flags = "--method injection --total-timesteps 41 --learning-starts 40"
    assert run_here(f"{TINY} {flags} --run-dir {tmp_path / 'run'}", td3) == 0
    assert load(tmp_path / "run")["args"]["injection_step"] == 20


@pytest.mark.slow
def test_a_compiled_injection_resumes_exactly(tmp_path, monkeypatch):
    calls = count_calls(monkeypatch, td3, "fast_updates")
    flags = f"{TINY} {FLAGS['injection']}"
    compiled = tmp_path / "compiled"
    killed = tmp_path / "killed"
    assert run_here(f"{flags} --compile --run-dir {compiled}", td3) == 0
    assert calls["fast_updates"] == 2
    assert run_here(f"{flags} --compile --run-dir {killed}", td3, due={270: "SIGKILL"}) == -9
    assert run_here(f"--resume {killed}", td3) == 0
    assert_equal_runs(compiled, killed)
    assert run_here(f"{flags} --run-dir {tmp_path / 'eager'}", td3) == 0
    for one, two in zip(rows(compiled), rows(tmp_path / "eager"), strict=True):
        # the same but for the order of additions
        expected = pytest.approx(float(two["eval/return_mean"]), rel=0.05)
        assert float(one["eval/return_mean"]) == expected


SCRIPTS = [*ROOT.glob("ne_*.py"), *ROOT.glob("baselines/*_*.py")]


# --- what is refused ----------------------------------------------------------
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--injection-step 3000 --method injection", "must be at most 360, got 3000"),
        ("--redo-tau 0.2", "--redo-tau needs --method redo, got --method none"),
        ("--reset-interval 5000 --method redo", "--reset-interval needs --method reset, got"),
        ("--batch-size 500 --buffer-size 400", "--batch-size must be at most 400, got 500"),
    ],
)
def test_flags_that_do_not_fit_are_refused_before_anything_is_written(
    tmp_path, capsys, flags, words
):
    refused(capsys, f"{TINY} --run-dir {tmp_path / 'run'} {flags}", words, module=td3)
    assert not (tmp_path / "run").exists()


def test_no_flag_of_numbers_takes_a_bad_one(capsys):
    assert_limits(capsys, td3)


def test_what_another_run_left_is_refused(whole, tmp_path, capsys):
    flags = f"--resume {whole('redo')[0]} --method none"
    refused(capsys, flags, "--method must be redo or left out with --resume", module=td3)
    assert run_here(f"{TINY} --run-dir {tmp_path / 'run'}", ne, due={101: "SIGTERM"}) == 0
    words = "it is of ne_td3_continuous"
    refused(capsys, f"--resume {tmp_path / 'run'}", words, module=td3, code=1)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_scripts_run_as_files_from_anywhere(script, tmp_path):
    command = [sys.executable, script, "--gamma", "3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert_one_line(done.stderr, "--gamma must be in [0, 1], got 3.0")
