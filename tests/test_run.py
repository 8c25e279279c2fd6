"""The script as its users run it: end to end, interrupted and resumed, and given bad input."""

import collections
import errno
import json
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ne_td3_continuous as ne
from helpers import (
    REFUSED_NE,
    REFUSED_TD3,
    SCRIPT,
    SIGNALS,
    assert_equal,
    assert_equal_runs,
    assert_limits,
    assert_one_line,
    assert_rows_have_all_episodes,
    count_calls,
    finish,
    launch,
    load,
    refused,
    rows,
    run_here,
)

# Episodes of 20 steps. Updates from 101 on, rounds every 40 steps, rows every 90 (mostly
# inside an episode), checkpoints every 100.
RUN = (
    "--env-id fake_task:Plain-v0 --total-timesteps 600 --learning-starts 100 "
    "--actor-hidden 16 12 --critic-hidden 16 12 --batch-size 16 --learning-rate 3e-3 "
    "--grow-interval 40 --review-interval 10 --eval-frequency 90 --eval-episodes 2 "
    "--checkpoint-frequency 100 --buffer-size 400 --no-cuda "
)
SHORT = RUN + "--total-timesteps 60 "
EVALUATED = [90, 180, 270, 360, 450, 540, 600]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a run that was never interrupted, in a process of its own."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    code, out, err = finish(launch(f"{RUN} --run-dir {folder}"))
    assert (code, err) == (0, "")
    (folder / "stdout").write_text(out)
    return folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A run that was stopped at step 280. Not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "stopped"
    assert run_here(f"{RUN} --run-dir {folder}", due={262: "SIGTERM"}) == 0
    return folder


@pytest.fixture
def interrupted(stopped, tmp_path) -> Path:
    """A copy of the stopped run, to be spoilt."""
    return Path(shutil.copytree(stopped, tmp_path / "interrupted"))


# --- end to end ---------------------------------------------------------------
def test_a_run_leaves_rows_events_arguments_and_a_checkpoint(whole):
    results = rows(whole)
    assert [int(row["step"]) for row in results] == EVALUATED
    for row in results:
        assert 0 < float(row["eval/return_mean"]) < 20
        assert 0 < float(row["charts/episodic_return"]) < 20
        for name in ("ne/actor/", "ne/critic/"):
            numbers = {key: float(row[name + key]) for key in ("planned", "grown", "pruned")}
            assert 0 <= numbers["pruned"] <= 0.4 * numbers["grown"]
            assert numbers["grown"] <= numbers["planned"]
            assert float(row[name + "active_ratio"]) >= float(row[name + "active_ratio_0.1"])
    for name in ("actor", "critic"):
        density = [float(row[f"ne/{name}/density"]) for row in results]
        assert 0.2 < density[0] < 0.35
        assert 0.6 < density[-1] <= 1
    assert results[0]["losses/qf_loss"] == "nan"
    assert float(results[-1]["losses/qf_loss"]) > 0
    assert 0.65 <= float(results[-1]["ne/review_epsilon"]) < 1
    assert float(results[-1]["ne/review_share"]) > 0

    assert_rows_have_all_episodes(whole)
    events = EventAccumulator(str(whole), size_guidance={"images": 0})
    events.Reload()
    scalars = {"charts/episodic_length", "ne/actor/planned", "ne/review_epsilon"}
    assert scalars <= set(events.Tags()["scalars"])
    assert len(events.Images("masks/critic/1")) == 13  # the start; 120, 160, ..., 560
    assert [e.step for e in events.Scalars("eval/return_mean")] == EVALUATED

    assert json.loads((whole / "args.json").read_text())["batch_size"] == 16
    content = load(whole)
    assert (content["step"], content["finished"]) == (600, True)
    assert content["parts"]["progress"]["updates"] == 500
    assert "buffer" not in content["parts"]
    out = (whole / "stdout").read_text()
    assert re.search(r"topology: 25% -> 9\d% in 12 rounds", out)
    assert re.search(r"step 600: return \d+\.\d\n", out)


def test_a_finished_run_is_left_alone(whole, capsys):
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    assert run_here(f"--resume {whole}") == 0
    assert "is finished" in capsys.readouterr().out
    assert before == {path.name: path.read_bytes() for path in whole.iterdir()}


# --- interrupted and resumed --------------------------------------------------
@pytest.mark.parametrize(("setup", "saved"), [("387:SIGKILL", 300), ("kill_in_saving", 100)])
def test_a_killed_run_resumes_exactly(whole, tmp_path, setup, saved):
    folder = tmp_path / "run"
    code, _, _ = finish(launch(f"{RUN} --run-dir {folder}", setup))
    assert code == -signal.SIGKILL
    assert (folder / "checkpoint.tmp").exists() == (setup == "kill_in_saving")
    assert load(folder)["step"] == saved
    assert len(rows(folder)) > saved // 90  # rows that the resumed run redoes
    with open(folder / "results.csv", "a") as file:
        file.write("280,half of a r")
    time.sleep(1.1)  # TensorBoard orders its files by the second in their names
    assert run_here(f"--resume {folder}") == 0
    assert_equal_runs(whole, folder)
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [e.step for e in events.Scalars("eval/return_mean")] == EVALUATED


# 50 is before the first row, 300 the last step of an episode, where a checkpoint is due too
@pytest.mark.parametrize(
    ("name", "addition", "saved", "code"),
    [("SIGTERM", 50, 60, 0), ("SIGINT", 262, 280, 130), ("SIGHUP", 300, 300, 0)]
    + [("SIGUSR1", 101, 120, 0)],
)
def test_a_signal_ends_the_episode_saves_and_resumes_exactly(
    whole, tmp_path, capfd, name, addition, saved, code
):
    folder = tmp_path / "run"
    assert run_here(f"{RUN} --run-dir {folder}", due={addition: name}) == code
    assert load(folder)["step"] == saved
    assert len(rows(folder)) == saved // 90
    printed = capfd.readouterr()
    assert "finishing the episode" in printed.err
    assert f"stopped at step {saved}: python {SCRIPT} --resume {folder}" in printed.out
    assert run_here(f"--resume {folder}") == 0
    assert_equal_runs(whole, folder)


@pytest.mark.parametrize(
    ("second", "code", "step"), [("SIGUSR1", -signal.SIGUSR1, 200), ("SIGTERM", 0, 280)]
)
def test_the_same_signal_once_more_stops_at_once(tmp_path, second, code, step):
    """Slurm's SIGTERM after its SIGUSR1 does not."""
    folder = tmp_path / "run"
    process = launch(f"{RUN} --run-dir {folder}", f"262:SIGUSR1 263:{second}")
    got, out, _ = finish(process)
    assert got == code
    assert ("stopped" in out) == (code == 0)
    assert load(folder)["step"] == step


def test_a_closed_terminal(tmp_path):
    """The kernel sends SIGHUP, and what is printed from then on fails."""
    folder = tmp_path / "run"
    terminal, theirs = pty.openpty()
    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}

    def log_in():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup make test
        os.login_tty(theirs)

    flags = f"{RUN.replace('Plain', 'Slow')} --total-timesteps 200 --eval-frequency 30"
    process = launch(f"{flags} --run-dir {folder}", preexec_fn=log_in, **streams)
    os.close(theirs)
    printed = b""
    while b"return" not in printed:  # the first row
        printed += os.read(terminal, 1_000)
    os.close(terminal)
    assert process.wait(timeout=120) == 0
    content = load(folder)
    assert not content["finished"]
    assert content["step"] in range(40, 200, 20)
    assert run_here(f"--resume {folder}") == 0


def test_what_nohup_ignores_is_ignored():
    handlers = {name: signal.getsignal(signal.Signals[name]) for name in SIGNALS}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = ne.Stop()
    os.kill(os.getpid(), signal.SIGHUP)
    assert stop.signal is None
    for name, handler in handlers.items():
        signal.signal(signal.Signals[name], handler)


def test_redo_and_reset_come_when_due_and_resume_exactly(tmp_path, monkeypatch):
    calls = count_calls(monkeypatch, ne, "redo", "reset")
    flags = f"{RUN} --redo-interval 30 --reset-interval 300 --layer-norm --replay-ratio 2"
    flags += " --growth random --review-rule level --sparse-init uniform"
    undisturbed = tmp_path / "whole"
    assert run_here(f"{flags} --run-dir {undisturbed}") == 0
    assert calls == {"redo": 1_000 // 30, "reset": 1}  # at 300, not at the last step
    killed = tmp_path / "killed"
    assert run_here(f"{flags} --run-dir {killed}", due={387: "SIGKILL"}) == -9
    assert run_here(f"--resume {killed}") == 0
    assert_equal_runs(undisturbed, killed)


@pytest.mark.slow
def test_a_compiled_run_resumes_exactly(tmp_path):
    undisturbed = tmp_path / "whole"
    killed = tmp_path / "killed"
    code, _, err = finish(launch(f"{RUN} --compile --run-dir {undisturbed}"))
    assert code == 0, err
    code, _, _ = finish(launch(f"{RUN} --compile --run-dir {killed}", "387:SIGKILL"))
    assert code == -signal.SIGKILL
    code, _, err = finish(launch(f"--resume {killed}"))
    assert code == 0, err
    assert_equal_runs(undisturbed, killed)


# --- folders ------------------------------------------------------------------
def test_a_start_that_failed_leaves_its_folder_usable(tmp_path, capsys):
    folder = tmp_path / "run"
    assert run_here(f"{SHORT} --run-dir {folder}", due={5: "SIGKILL"}) == -9
    refused(capsys, f"--resume {folder}", str(folder / "checkpoint.pt"), "missing", code=1)
    assert run_here(f"{SHORT} --run-dir {folder}") == 0


def test_folders_that_cannot_be_used_are_refused(whole, tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "rows").mkdir()
    shutil.copy(whole / "results.csv", tmp_path / "rows")
    for folder, words in (
        (tmp_path / "file" / "run", "must be one that can be written"),
        (whole, f"--resume {whole} continues the run in it"),
        (tmp_path / "rows", "--run-dir must be a new folder"),
    ):
        refused(capsys, f"{RUN} --run-dir {folder}", words)


def test_runs_of_the_same_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert run_here(SHORT) == 0
    folders = sorted((tmp_path / "runs").iterdir())
    for folder in folders:
        assert folder.name.startswith("fake_task_Plain-v0__ne_td3_continuous__1__1")
    assert [len(rows(folder)) for folder in folders] == [1, 1]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to(tmp_path / "scratch that was purged")
    refused(capsys, SHORT, "must be one that can be written")


def test_a_second_process_in_a_folder_is_refused(interrupted, capsys):
    lock = filelock.FileLock(interrupted / "lock")
    with lock:
        assert_not_resumed(interrupted, capsys, "in use by another process")
    assert run_here(f"--resume {interrupted}", due={5: "SIGTERM"}) == 0


def test_where_there_are_no_locks_a_run_starts_all_the_same(tmp_path, monkeypatch, capsys):
    """Some network file systems have none."""

    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    assert run_here(f"{SHORT} --run-dir {tmp_path / 'run'}") == 0
    assert "No locks available" in capsys.readouterr().err


# --- disks, memory and numbers ------------------------------------------------
@pytest.mark.parametrize(
    ("function", "name"), [("save", "checkpoint.tmp"), ("write_row", "results.csv")]
)
def test_a_full_disk_loses_nothing_that_was_saved(
    whole, tmp_path, monkeypatch, capsys, function, name
):
    """At the third checkpoint, of step 300, or the third row."""
    folder = tmp_path / "run"
    write = getattr(ne, function)
    calls = []

    def write_on_full_disk(*args, **kwargs):
        calls.append(None)
        if len(calls) == 3:
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to("/dev/full")
        write(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ne, function, write_on_full_disk)
        words = ("cannot write", "No space left", "make room, then --resume")
        refused(capsys, f"{RUN} --run-dir {folder}", *words, code=1)
    assert load(folder)["step"] == 200
    (folder / name).unlink()
    assert run_here(f"--resume {folder}") == 0
    assert_equal_runs(whole, folder)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 kB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can make a file system")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_that_is_full_for_tensorboard_is_one_line(small_disk, capsys):
    flags = f"{RUN} --total-timesteps 4000 --checkpoint-frequency 4000 --grow-interval 5"
    code, err = run_here(f"{flags} --run-dir {small_disk / 'run'}"), capsys.readouterr().err
    assert (code, err.count("\n")) == (1, 1)
    assert_one_line(err, "cannot write", "No space left")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_stops_the_run_unsaved(tmp_path, monkeypatch, capsys, bad):
    update_critic = ne.Agent.update_critic
    updates = []

    def spoilt(agent, batch):
        updates.append(batch)
        if len(updates) == 100:  # at step 200, where a checkpoint is due
            agent.critic_1.layers[0].bias.data[0] = bad
        return update_critic(agent, batch)

    monkeypatch.setattr(ne.Agent, "update_critic", spoilt)
    words = "the weight is NaN or infinite at step 200; --resume"
    refused(capsys, f"{RUN} --run-dir {tmp_path / 'run'}", words, code=1)
    content = load(tmp_path / "run")
    assert content["step"] == 100
    for key, value in content["parts"]["agent"].items():
        assert not key.endswith(("weight", "bias")) or value.isfinite().all()


def test_an_action_that_is_nan_stops_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ne.Actor, "act", lambda actor, obs: np.full(2, np.nan))
    flags = f"{RUN} --eval-frequency 600 --run-dir {tmp_path / 'run'}"
    refused(capsys, flags, "the action is NaN or infinite at step 101; --resume", code=1)


def test_an_agent_larger_than_memory(tmp_path, capsys):
    flags = f"{RUN} --run-dir {tmp_path / 'run'} --buffer-size 1000000000 --env-id Humanoid-v5"
    refused(capsys, flags, "must fit in memory", code=1)
    assert not (tmp_path / "run").exists()


# --- refused ------------------------------------------------------------------
@pytest.mark.parametrize(("flags", "words"), REFUSED_NE + REFUSED_TD3)
def test_values_out_of_range_are_refused_before_anything_is_written(tmp_path, capsys, flags, words):
    refused(capsys, f"--run-dir {tmp_path / 'run'} {flags}", words)
    assert not (tmp_path / "run").exists()


def test_no_flag_of_numbers_takes_a_bad_one(capsys):
    assert_limits(capsys, ne)


@pytest.mark.parametrize("flags", ["--growth sideways", "--no-such-flag 1", "--seed one"])
def test_what_is_no_flag_or_no_value_of_its_type_is_refused(capsys, flags):
    assert run_here(flags) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_compile_without_a_compiler(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (str(tmp_path / "g++"),))
    flags = f"{SHORT} --compile --run-dir {tmp_path / 'run'}"
    refused(capsys, flags, "--compile needs torch 2.13 and a C++ compiler", "g++", code=1)
    assert run_here(f"{SHORT} --run-dir {tmp_path / 'run'}") == 0  # the folder can be used


# --- wandb --------------------------------------------------------------------
class FakeWandb:
    """In place of the package: notes what it was given."""

    def __init__(self):
        self.given = []
        self.logged = collections.Counter()

    def init(self, **options):
        self.given.append(options)
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "global_step")

    def log(self, values: dict) -> None:
        step = values.pop("global_step")
        [(key, value)] = values.items()
        assert type(value) is float
        self.logged[key, step] += 1

    def finish(self) -> None:
        pass


def test_wandb_gets_each_value_once_and_a_resumed_run_continues_its_run(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    folder = tmp_path / "run"
    flags = f"{RUN} --track --total-timesteps 200"
    assert run_here(f"{flags} --run-dir {folder}", due={105: "SIGTERM"}) == 0
    assert run_here(f"--resume {folder}") == 0
    first, second = wandb.given
    assert first["id"] == second["id"]
    assert first["resume"] == "allow"
    assert first["config"]["batch_size"] == second["config"]["batch_size"] == 16
    assert set(wandb.logged.values()) == {1}
    for key in rows(folder)[0]:
        if key.startswith(("eval/", "ne/")):
            assert [step for name, step in wandb.logged if name == key] == [90, 180, 200]
    for key in ("charts/episodic_return", "charts/episodic_length"):
        ends = [step for name, step in wandb.logged if name == key]
        assert ends == list(range(20, 201, 20))


def test_losses_and_speed_are_logged_every_thousand_steps(tmp_path):
    folder = tmp_path / "run"
    assert run_here(f"{RUN} --total-timesteps 1100 --run-dir {folder}") == 0
    events = EventAccumulator(str(folder))
    events.Reload()
    for key in ("losses/qf_loss", "losses/qf_values", "losses/actor_loss", "charts/SPS"):
        assert [event.step for event in events.Scalars(key)] == [1000]


# --- --resume and what may be wrong with it -----------------------------------
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--env-id HalfCheetah-v5", "--env-id must be fake_task:Plain-v0 or left out"),
        ("--no-prune", "--prune must be True or left out"),
    ],
)
@pytest.mark.parametrize("folder", ["whole", "stopped"])
def test_resume_refuses_flags_that_contradict_the_run(folder, request, capsys, flags, words):
    refused(capsys, f"--resume {request.getfixturevalue(folder)} {flags}", words)


def assert_not_resumed(folder: Path, capsys, *words: str) -> None:
    """Refused in one line, and results.csv and the checkpoint are as they were."""
    paths = [folder / "results.csv", folder / "checkpoint.pt"]
    before = [path.read_bytes() for path in paths if path.exists()]
    refused(capsys, ["--resume", folder], *words, code=1)
    assert [path.read_bytes() for path in paths if path.exists()] == before


def test_what_may_differ_at_resume_is_not_stored(whole, interrupted):
    """Nor does it matter what became of results.csv."""
    (interrupted / "results.csv").unlink()
    assert run_here(f"--resume {interrupted} --no-cudagraphs") == 0
    assert load(interrupted)["args"]["cudagraphs"]
    assert_equal_runs(whole, interrupted)


def test_single_bit_flips_are_refused_or_change_nothing(interrupted, stopped, capsys):
    path = interrupted / "checkpoint.pt"
    good = path.read_bytes()
    original = ne.load_checkpoint(stopped, ne.Args)
    rng = random.Random(0)
    places = [rng.randrange(8 * len(good)) for _ in range(100)]
    places += range(0, 400, 23)  # the zip archive's first header
    places += range(8 * len(good) - 1_600, 8 * len(good), 37)  # and its directory
    flipped = 0
    for place in places:
        spoilt = bytearray(good)
        spoilt[place // 8] ^= 1 << place % 8
        path.unlink(missing_ok=True)  # what was loaded before may be mapped
        path.write_bytes(spoilt)
        try:
            content = ne.load_checkpoint(interrupted, ne.Args)
        except SystemExit as stop:
            assert stop.code == 1
            assert_one_line(capsys.readouterr().err, "checkpoint.pt")
            flipped += 1
        else:
            assert_equal(content, original)
    assert flipped > 80


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("executed",)


FILES = {
    "empty": b"",
    "foreign": {"model": torch.zeros(3)},
    "hostile": Hostile(),
}


@pytest.mark.parametrize("name", ["all but a byte", *FILES])
def test_what_is_no_whole_checkpoint_is_refused(interrupted, monkeypatch, capsys, name):
    path = interrupted / "checkpoint.pt"
    good = path.read_bytes()
    content = FILES.get(name, good[:-1])
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    monkeypatch.chdir(interrupted)
    assert_not_resumed(interrupted, capsys, "checkpoint.pt is missing, damaged or not")
    assert not Path("executed").exists()


# (change, what the message says, exit code)
CHANGES = {
    "script": (lambda c: c.update(script="ne_drq_dmc"), "it is of ne_drq_dmc", 1),
    "more flags": (lambda c: c["args"].update(scale=2), "other flags", 1),
    "flag out of range": (lambda c: c["args"].update(gamma=7.0), "--gamma", 2),
    "another task": (lambda c: c["args"].update(env_id="Pendulum-v1"), "does not fit", 1),
    "a part is missing": (lambda c: c["parts"].pop("noise_rng"), "does not fit", 1),
    "no weight": (lambda c: c["parts"]["agent"].popitem(), "does not fit", 1),
    "a random state": (lambda c: c["parts"].update(noise_rng="{}"), "does not fit", 1),
}


@pytest.mark.parametrize("name", CHANGES)
def test_checkpoints_that_do_not_fit_are_refused(interrupted, capsys, name):
    change, words, code = CHANGES[name]
    content = load(interrupted)
    change(content)
    torch.save(content, interrupted / "checkpoint.pt")
    before = (interrupted / "checkpoint.pt").read_bytes()
    refused(capsys, f"--resume {interrupted}", words, code=code)
    assert (interrupted / "checkpoint.pt").read_bytes() == before
