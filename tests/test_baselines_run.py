"""The baseline script as its users run it: interrupted and resumed, and given bad input."""

import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from baselines import td3_continuous as td3
from helpers import (
    ROOT,
    assert_equal_runs,
    assert_one_line,
    assert_refused,
    assert_rows_have_all_episodes,
    count_calls,
    finish,
    in_process,
    kill_at,
    launch,
    load,
    rows,
    signal_at,
)

SCRIPT = Path(td3.__file__)
# Updates from 301 on, rows every 300 steps, checkpoints at 400, 800 and 1200, where episodes end
TINY = (
    "--env-id Pendulum-v1 --total-timesteps 1300 --learning-starts 300 "
    "--actor-hidden 24 16 --critic-hidden 24 16 --batch-size 32 --eval-frequency 300 "
    "--eval-episodes 2 --checkpoint-frequency 400 --buffer-size 1500 --no-cuda "
)
# what acts before and after the checkpoint of step 800, from which the run killed at 930 goes on
FLAGS = {
    "none": "",
    "layer-norm": "--method layer-norm",
    "reset": "--method reset --reset-interval 325",  # at 325, 650, 975; 1300 is the last step
    "redo": "--method redo --redo-interval 350",  # after updates 350, 700: steps 650, 1000
    "regrama": "--method regrama --regrama-interval 350",
    "injection": "--method injection --injection-step 900",
    "early injection": "--method injection --injection-step 800",  # saved at this very step
    "late injection": "--method injection --injection-step 950",
    "recency": "--method recency --recency-horizon 500",
}
FUNCTIONS = ("redo", "regrama", "reset", "inject")


def run(folder: Path, flags: str, setup: str = "") -> tuple[int, str, str]:
    arguments = [*TINY.split(), *flags.split(), "--run-dir", str(folder)]
    return finish(launch(arguments, setup, script=SCRIPT))


def resume(folder: Path) -> None:
    code, _, err = finish(launch(["--resume", str(folder)], script=SCRIPT))
    assert code == 0, err


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs that were never interrupted, made when first asked for: name -> (folder, stdout)."""
    done = {}

    def uninterrupted(name: str) -> tuple[Path, str]:
        if name not in done:
            folder = tmp_path_factory.mktemp("runs") / "whole"
            code, out, err = run(folder, FLAGS[name], count_calls(*FUNCTIONS))
            assert code == 0, err
            done[name] = (folder, out)
        return done[name]

    return uninterrupted


# --- stopped and resumed ------------------------------------------------------
@pytest.mark.parametrize(
    "name", ["reset", "redo", "regrama", "injection", "early injection", "recency"]
)
def test_a_killed_run_resumes_exactly(whole, tmp_path, name):
    killed = tmp_path / "killed"
    code, _, _ = run(killed, FLAGS[name], kill_at(930))
    assert code == -signal.SIGKILL
    assert load(killed)["step"] == 800
    resume(killed)
    assert_equal_runs(whole(name)[0], killed)


def test_a_run_stopped_by_a_signal_resumes_exactly(whole, tmp_path):
    """The evaluation of step 900 is made up for, by the policy before the injection."""
    name = "late injection"
    stopped = tmp_path / "stopped"
    code, out, err = run(stopped, FLAGS[name], signal_at(870, "SIGTERM"))
    assert code == 0, err
    assert "stopped at step 1000" in out
    assert [int(row["step"]) for row in rows(stopped)] == [300, 600]
    resume(stopped)
    assert_equal_runs(whole(name)[0], stopped)
    assert_rows_have_all_episodes(stopped)


def test_the_command_that_a_stopped_run_prints_continues_it(tmp_path):
    folder = tmp_path / "a run"
    arguments = [*TINY.split(), "--method", "redo", "--run-dir", str(folder)]
    process = launch(arguments, script=SCRIPT)
    for line in process.stdout:
        if line.startswith("step 300"):
            break
    process.send_signal(signal.SIGTERM)
    code, out, err = finish(process)
    assert code == 0, err
    (line,) = [line for line in out.splitlines() if line.startswith("stopped")]
    python, *command = shlex.split(line.split("continue with: ")[1])
    assert python == "python"
    assert command == ["-m", "baselines.td3_continuous", "--resume", str(folder)]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(rows(folder)[-1]["step"]) == 1300


# --- what a run does ----------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "calls", "plan"),
    [
        ("none", {}, "method: none"),
        ("reset", {"reset": 3}, "method: reset, 3 times"),
        ("redo", {"redo": 2}, "method: redo"),
        ("regrama", {"regrama": 2}, "method: regrama"),
        ("injection", {"inject": 1}, "method: injection, at step 900"),
        ("layer-norm", {}, "method: layer-norm"),
        ("recency", {}, "method: recency"),
    ],
)
def test_each_method_acts_when_it_is_due_and_no_other_does(whole, name, calls, plan):
    out = whole(name)[1].splitlines()
    for function in FUNCTIONS:
        assert out.count(f"called: {function}") == calls.get(function, 0)
    assert plan in out


def test_without_a_method_it_is_the_ne_script_without_ne(whole, tmp_path):
    """All columns of results.csv, and the parameters, Adam's state and the buffer's draws."""
    ours = whole("none")[0]
    theirs = tmp_path / "theirs"
    without_ne = ["--initial-density", "1", "--review-floor", "1", "--grow-interval", "100"]
    arguments = [*TINY.split(), *without_ne, "--run-dir", str(theirs)]
    code, _, err = finish(launch(arguments))
    assert code == 0, err
    assert len(rows(ours)) == 5
    assert rows(ours) == rows(theirs)
    one = load(ours)["parts"]
    two = load(theirs)["parts"]
    tensors = 0
    for key, value in one["agent"].items():
        if torch.is_tensor(value):
            tensors += 1
            assert torch.equal(value, two["agent"][key])
    assert tensors == 36
    for name in ("actor_optimizer", "critic_optimizer"):
        for number, state in one[name]["state"].items():
            for key, value in state.items():
                assert torch.equal(value, two[name]["state"][number][key])
    for name in ("noise_rng", "env_rng"):
        assert one[name] == two[name]


def test_before_an_injection_the_run_is_td3(whole):
    """The rows before it are the same bytes; at its step the return still is, then it is not."""
    none = whole("none")[0].joinpath("results.csv").read_text().splitlines()
    injection = whole("injection")[0].joinpath("results.csv").read_text().splitlines()
    assert none[:3] == injection[:3]  # header, 300, 600
    returns_and_losses = 6  # columns, the step is the first
    at_injection = injection[3].split(",")  # 900
    assert none[3].split(",")[:returns_and_losses] == at_injection[:returns_and_losses]
    assert none[3] != injection[3]
    assert none[4].split(",")[1] != injection[4].split(",")[1]  # 1200


def test_an_injection_is_in_the_middle_if_no_step_is_given(tmp_path):
    flags = "--method injection --total-timesteps 410 --learning-starts 390"
    code, out, err = run(tmp_path / "run", flags, count_calls("inject"))
    assert code == 0, err
    assert "method: injection, at step 205" in out
    assert load(tmp_path / "run")["args"]["injection_step"] == 205


@pytest.mark.slow
def test_a_compiled_injection_resumes_exactly(tmp_path):
    compiled = tmp_path / "compiled"
    killed = tmp_path / "killed"
    eager = tmp_path / "eager"
    flags = FLAGS["injection"]
    code, out, err = run(compiled, f"{flags} --compile", count_calls("fast_updates"))
    assert code == 0, err
    assert out.count("called: fast_updates") == 2
    code, _, _ = run(killed, f"{flags} --compile", kill_at(930))
    assert code == -signal.SIGKILL
    resume(killed)
    assert_equal_runs(compiled, killed)
    code, _, err = run(eager, flags)
    assert code == 0, err
    for one, two in zip(rows(compiled), rows(eager), strict=True):
        # the same but for the order of additions
        expected = pytest.approx(float(two["eval/return_mean"]), rel=0.01)
        assert float(one["eval/return_mean"]) == expected


# --- what is refused ----------------------------------------------------------
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--reset-interval 0 --method reset", "at least 1, got 0"),
        ("--redo-interval 0 --method redo", "at least 1, got 0"),
        ("--regrama-interval 0 --method regrama", "in [1, 1,000,000,000], got 0"),
        ("--redo-tau -1 --method redo", "in [0, 1,000], got -1"),
        ("--regrama-tau -1 --method regrama", "in [0, 1], got -1"),
        ("--recency-horizon 0 --method recency", "in [1, 1,000,000,000], got 0"),
        ("--injection-step 0 --method injection", "in [1, 1,000,000,000], got 0"),
        ("--injection-step 3000 --method injection", "must be at most 1300, got 3000"),
        ("--redo-tau 0.2", "needs --method redo, got --method none"),
        ("--regrama-tau 0.2 --method redo", "needs --method regrama, got --method redo"),
        ("--reset-interval 5000 --method redo", "needs --method reset, got --method redo"),
        ("--injection-step 5 --method reset", "needs --method injection, got --method reset"),
        ("--recency-horizon 9 --method injection", "needs --method recency"),
        ("--batch-size 500 --buffer-size 400", "--batch-size must be at most 400, got 500"),
    ],
)
def test_values_out_of_range_are_refused_before_anything_is_written(
    tmp_path, monkeypatch, capsys, flags, words
):
    folder = tmp_path / "run"
    arguments = [*TINY.split(), "--run-dir", str(folder)]
    assert_refused(monkeypatch, capsys, arguments, words, flags, td3)
    assert not folder.exists()


def test_an_unknown_method_is_refused(monkeypatch, capsys):
    code, err = in_process(monkeypatch, capsys, "--method dropout", td3)
    assert code == 2
    assert "Traceback" not in err


def test_a_checkpoint_of_the_ne_script_is_refused(tmp_path, monkeypatch, capsys):
    content = {"script": "ne_td3_continuous", "args": {}, "step": 1, "results_bytes": 0}
    content["results_crc"] = 0
    content |= {"name": "run", "finished": False, "parts": {}}
    torch.save(content, tmp_path / "checkpoint.pt")
    code, err = in_process(monkeypatch, capsys, ["--resume", str(tmp_path)], td3)
    assert code == 1
    assert_one_line(err, "is a checkpoint of ne_td3_continuous, this is td3_continuous")


def test_another_method_cannot_be_given_to_a_run_that_is_resumed(whole, monkeypatch, capsys):
    arguments = ["--resume", str(whole("redo")[0]), "--method", "none"]
    code, err = in_process(monkeypatch, capsys, arguments, td3)
    assert code == 2
    assert_one_line(err, "--method must be redo or left out with --resume, got none")


@pytest.mark.parametrize("name", ["td3_continuous", "td3_continual", "drq_dmc"])
def test_runs_as_a_file_too(name, tmp_path):
    command = [sys.executable, ROOT / "baselines" / f"{name}.py", "--gamma", "3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert_one_line(done.stderr, "--gamma must be in [0, 1], got 3.0")
