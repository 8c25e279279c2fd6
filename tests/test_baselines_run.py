"""The baseline script as its users run it: from anywhere, interrupted and resumed, and given bad input."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import td3_continuous as td3
from helpers import SMALL, assert_equal_runs, assert_one_line, assert_refused, finish, in_process, kill_at, launch, rows

SCRIPT = Path(td3.__file__)
TINY = SMALL.replace("--grow-interval 200 --review-interval 50 ", "")
for change in ("--total-timesteps 2500 1300", "--checkpoint-frequency 600 400", "--eval-frequency 500 300"):
    flag, old, new = change.split()
    assert f"{flag} {old}" in TINY
    TINY = TINY.replace(f"{flag} {old}", f"{flag} {new}")
# events before and after the checkpoint of step 800, from which the run that is killed at step 930 is resumed
FLAGS = {
    "none": "",
    "layer-norm": "--method layer-norm",
    "reset": "--method reset --reset-interval 325",  # at 325, 650, 975; 1300 is the last step
    "redo": "--method redo --redo-interval 350",  # after updates 350 and 700, that is steps 650 and 1000
    "injection": "--method injection --injection-step 900",
    "early injection": "--method injection --injection-step 800",  # saved at this very step
    "recency": "--method recency --recency-horizon 500",
}
COUNT = """
for name in ("redo", "reset", "inject"):
    def counted(*args, name=name, original=getattr(ne, name)):
        print("called:", name)
        return original(*args)
    setattr(ne, name, counted)
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs that were never interrupted, made when first asked for: name -> (folder, standard output)."""
    done = {}

    def run(name: str) -> tuple[Path, str]:
        if name not in done:
            folder = tmp_path_factory.mktemp("runs") / "whole"
            code, out, err = finish(launch(f"{TINY} {FLAGS[name]} --run-dir {folder}", COUNT, script=SCRIPT))
            assert code == 0, err
            done[name] = folder, out
        return done[name]

    return run


@pytest.mark.parametrize("name", ["reset", "redo", "injection", "early injection", "recency"])
def test_a_killed_run_resumes_exactly(whole, tmp_path, name):
    killed = tmp_path / "killed"
    code, _, _ = finish(launch(f"{TINY} {FLAGS[name]} --run-dir {killed}", kill_at(930), script=SCRIPT))
    assert code == -signal.SIGKILL
    assert torch.load(killed / "checkpoint.pt", weights_only=True)["run"]["step"] == 800
    code, _, err = finish(launch(f"--resume {killed}", script=SCRIPT))
    assert code == 0, err
    assert_equal_runs(whole(name)[0], killed)


@pytest.mark.parametrize(
    ("name", "calls", "plan"),
    [
        ("none", {}, "method: none"),
        ("reset", {"reset": 3}, "method: reset, 3 times"),
        ("redo", {"redo": 2}, "method: redo"),
        ("injection", {"inject": 1}, "method: injection, at step 900"),
        ("layer-norm", {}, "method: layer-norm"),
        ("recency", {}, "method: recency"),
    ],
)
def test_each_method_acts_when_it_is_due_and_no_other_does(whole, name, calls, plan):
    out = whole(name)[1].splitlines()
    for function in ("redo", "reset", "inject"):
        assert out.count(f"called: {function}") == calls.get(function, 0)
    assert plan in out


def test_without_a_method_it_is_the_ne_script_without_ne(whole, tmp_path):
    ours, theirs = whole("none")[0], tmp_path / "theirs"
    code, _, err = finish(launch(f"{TINY} --initial-density 1 --review-floor 1 --run-dir {theirs}"))
    assert code == 0, err
    for one, two in zip(rows(ours), rows(theirs), strict=True):
        assert one.items() <= two.items() and len(one) > 15
    one, two = (torch.load(folder / "checkpoint.pt", weights_only=True)["agent"] for folder in (ours, theirs))
    assert len(one) == 36 and all(torch.equal(one[key], two[key]) for key in one)


def test_before_an_injection_the_run_is_td3(whole):
    """The rows before the injection are the same bytes; at its step the return still is, afterwards it is not."""
    none, injection = (
        whole(name)[0].joinpath("results.csv").read_text().splitlines() for name in ("none", "injection")
    )
    assert none[:3] == injection[:3]  # header, 300, 600
    assert none[3].split(",")[:7] == injection[3].split(",")[:7] and none[3] != injection[3]  # 900
    assert none[4].split(",")[1] != injection[4].split(",")[1]  # 1200


@pytest.mark.slow
def test_a_compiled_injection_resumes_exactly(tmp_path):
    whole, killed, eager = tmp_path / "whole", tmp_path / "killed", tmp_path / "eager"
    flags = f"{TINY} {FLAGS['injection']} --compile"
    code, out, err = finish(launch(f"{flags} --run-dir {whole}", script=SCRIPT))
    assert code == 0 and out.count("compiling") == 2, err
    code, _, _ = finish(launch(f"{flags} --run-dir {killed}", kill_at(930), script=SCRIPT))
    assert code == -signal.SIGKILL
    code, _, err = finish(launch(f"--resume {killed}", script=SCRIPT))
    assert code == 0, err
    assert_equal_runs(whole, killed)
    code, _, err = finish(launch(f"{flags.replace('--compile', '')} --run-dir {eager}", script=SCRIPT))
    assert code == 0, err
    for one, two in zip(rows(whole), rows(eager), strict=True):  # the same but for the order of additions
        assert float(one["eval/return_mean"]) == pytest.approx(float(two["eval/return_mean"]), rel=0.01)


def test_one_file_runs_from_anywhere_without_the_rest_of_the_repository(tmp_path):
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(SCRIPT, alone)
    flags = "--env-id Pendulum-v1 --total-timesteps 400 --learning-starts 100 --eval-episodes 1 --no-cuda --method redo"
    command = [sys.executable, "-I", str(alone / SCRIPT.name), *flags.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("Pendulum-v1__td3_continuous__1__") and len(rows(folder)) == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--reset-interval 0 --method reset", "at least 1, got 0"),
        ("--redo-interval 0 --method redo", "at least 1, got 0"),
        ("--redo-tau -1 --method redo", "at least 0, got -1"),
        ("--recency-horizon 0 --method recency", "at least 1, got 0"),
        ("--injection-step 0 --method injection", "at least 1, got 0"),
        (
            "--injection-step 3000 --method injection --total-timesteps 2000",
            "at most --total-timesteps (2000), got 3000",
        ),
        ("--redo-tau 0.2", "needs --method redo, got --method none"),
        ("--reset-interval 5000 --method redo", "needs --method reset, got --method redo"),
        ("--injection-step 5000 --method reset", "needs --method injection, got --method reset"),
        ("--recency-horizon 9 --method injection", "needs --method recency"),
    ],
)
def test_values_out_of_range_are_refused_before_anything_is_written(tmp_path, monkeypatch, capsys, flags, words):
    assert_refused(monkeypatch, capsys, f"--run-dir {tmp_path / 'run'}", words, flags, td3)
    assert not (tmp_path / "run").exists()


def test_an_unknown_method_and_a_checkpoint_of_the_ne_script_are_refused(tmp_path, monkeypatch, capsys):
    code, err = in_process(monkeypatch, capsys, "--method dropout", td3)
    assert code == 2 and "Traceback" not in err
    torch.save({"format": "ne_td3_continuous 1"}, tmp_path / "checkpoint.pt")
    code, err = in_process(monkeypatch, capsys, f"--resume {tmp_path}", td3)
    assert code == 1
    assert_one_line(err, "checkpoint.pt is damaged or not a checkpoint of td3_continuous.py")
