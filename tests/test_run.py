"""The script as its users run it: end to end, interrupted and resumed, and given bad input."""

import errno
import io
import json
import os
import pty
import random
import re
import resource
import runpy
import shlex
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ne_td3_continuous as ne
from helpers import (
    KILL_IN_SAVING,
    REFUSED_NE,
    REFUSED_TD3,
    SCRIPT,
    SMALL,
    assert_equal,
    assert_equal_runs,
    assert_one_line,
    assert_refused,
    assert_rows_have_all_episodes,
    bad_numbers,
    finish,
    in_process,
    kill_at,
    launch,
    load,
    rows,
    run_here,
    signal_at,
    words_of,
)

# Episodes of 20 steps. Updates from 101 on, rounds every 40 steps, rows every 90 (mostly
# inside an episode), checkpoints every 100.
RUN = (
    "--env-id fake_task:Plain-v0 --total-timesteps 600 --learning-starts 100 "
    "--actor-hidden 16 12 --critic-hidden 16 12 --batch-size 16 --learning-rate 3e-3 "
    "--grow-interval 40 --review-interval 10 --eval-frequency 90 --eval-episodes 2 "
    "--checkpoint-frequency 100 --buffer-size 400 --no-cuda "
)
EVALUATED = [90, 180, 270, 360, 450, 540, 600]
# (signal, exit code)
SIGNALS = [
    (signal.SIGTERM, 0),
    (signal.SIGINT, 130),
    (signal.SIGHUP, 0),
    (signal.SIGUSR1, 0),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a run that was never interrupted, in a process of its own."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    code, out, err = finish(launch(f"{RUN} --run-dir {folder}"))
    assert code == 0, err
    (folder / "stdout").write_text(out)
    return folder


@pytest.fixture
def at_addition(monkeypatch):
    """Does something here while the run stores its n-th transition, counted from 1."""
    add = ne.ReplayBuffer.add

    def install(number: int, event) -> None:
        additions = 0

        def noted(*args):
            nonlocal additions
            additions += 1
            if additions == number:
                event()
            add(*args)

        monkeypatch.setattr(ne.ReplayBuffer, "add", noted)

    yield install
    monkeypatch.setattr(ne.ReplayBuffer, "add", add)


# --- end to end ---------------------------------------------------------------
def test_a_run_leaves_rows_events_arguments_and_a_checkpoint(whole):
    results = rows(whole)
    assert [int(row["step"]) for row in results] == EVALUATED
    for row in results:
        assert 0 < float(row["eval/return_mean"]) < 20
        assert 0 < float(row["charts/episodic_return"]) < 20
    for name in ("actor", "critic"):
        for row in results:
            assert float(row[f"ne/{name}/active_ratio"]) >= float(
                row[f"ne/{name}/active_ratio_0.1"]
            )
            planned = int(row[f"ne/{name}/planned"])
            grown = int(row[f"ne/{name}/grown"])
            pruned = int(row[f"ne/{name}/pruned"])
            assert 0 <= pruned <= 0.4 * grown
            assert grown <= planned
        density = [float(row[f"ne/{name}/density"]) for row in results]
        assert 0.2 < density[0] < 0.35
        assert 0.6 < density[-1] <= 1
    assert float(results[0]["losses/qf_loss"]) != float(results[0]["losses/qf_loss"])  # NaN
    assert float(results[-1]["losses/qf_loss"]) > 0
    assert 0.65 <= float(results[-1]["ne/review_epsilon"]) < 1
    assert float(results[-1]["ne/review_share"]) > 0

    assert_rows_have_all_episodes(whole)
    events = EventAccumulator(str(whole), size_guidance={"images": 0})
    events.Reload()
    scalars = {"charts/episodic_return", "charts/episodic_length", "eval/return_mean"}
    scalars |= {"losses/qf_loss", "ne/critic/density", "ne/actor/pruned", "ne/actor/planned"}
    assert scalars | {"ne/review_epsilon"} <= set(events.Tags()["scalars"])
    assert len(events.Images("masks/critic/1")) == 13  # the start; 120, 160, ..., 560
    assert [e.step for e in events.Scalars("eval/return_mean")] == EVALUATED

    assert json.loads((whole / "args.json").read_text())["batch_size"] == 16
    content = load(whole)
    assert (content["step"], content["finished"]) == (600, True)
    assert content["parts"]["progress"]["updates"] == 500
    assert "buffer" not in content["parts"]


def test_it_says_what_will_happen_and_what_came_out(whole):
    out = (whole / "stdout").read_text()
    assert re.search(r"topology: 25% -> 9\d% in 12 rounds", out)
    assert re.search(r"step 600: return \d+\.\d \+- \d+\.\d", out)
    assert re.search(r"critic: density \d+\.\d%, active neurons \d+\.\d%", out)


def test_a_finished_run_is_left_alone(whole, capsys):
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    assert run_here(f"--resume {whole}") == 0
    assert "is finished" in capsys.readouterr().out
    assert before == {path.name: path.read_bytes() for path in whole.iterdir()}


# --- interrupted and resumed --------------------------------------------------
@pytest.mark.parametrize(("setup", "saved"), [(kill_at(387), 300), (KILL_IN_SAVING, 100)])
def test_a_killed_run_resumes_exactly(whole, tmp_path, setup, saved):
    folder = tmp_path / "run"
    code, _, _ = finish(launch(f"{RUN} --run-dir {folder}", setup))
    assert code == -signal.SIGKILL
    assert (folder / "checkpoint.tmp").exists() == (setup is KILL_IN_SAVING)
    assert load(folder)["step"] == saved
    assert len(rows(folder)) > saved // 90  # rows that the resumed run redoes
    time.sleep(1.1)  # TensorBoard orders its files by the second in their names
    assert run_here(f"--resume {folder}") == 0
    assert_equal_runs(whole, folder)
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [e.step for e in events.Scalars("eval/return_mean")] == EVALUATED


@pytest.mark.slow
@pytest.mark.parametrize("addition", [101, 119, 120, 121, 300, 320, 401, 599])
def test_killed_at_any_step_it_resumes_exactly(whole, tmp_path, addition):
    folder = tmp_path / "run"
    code, _, _ = finish(launch(f"{RUN} --run-dir {folder}", kill_at(addition)))
    assert code == -signal.SIGKILL
    assert run_here(f"--resume {folder}") == 0
    assert_equal_runs(whole, folder)


@pytest.mark.slow
def test_a_killed_run_on_pendulum_resumes_exactly(tmp_path):
    undisturbed = tmp_path / "whole"
    killed = tmp_path / "killed"
    assert run_here(f"{SMALL} --run-dir {undisturbed}") == 0
    code, _, _ = finish(launch(f"{SMALL} --run-dir {killed}", kill_at(1730)))
    assert code == -signal.SIGKILL
    assert run_here(f"--resume {killed}") == 0
    assert_equal_runs(undisturbed, killed)


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_signal_ends_the_episode_saves_and_resumes_exactly(
    whole, tmp_path, at_addition, capfd, number, code
):
    """An evaluation falls due at 270 while the run stops: it is done by the resumed run."""
    folder = tmp_path / "run"
    at_addition(262, lambda: os.kill(os.getpid(), number))
    assert run_here(f"{RUN} --run-dir {folder}") == code
    assert load(folder)["step"] == 280
    assert [int(row["step"]) for row in rows(folder)] == [90, 180]
    printed = capfd.readouterr()
    assert "finishing the episode" in printed.err
    assert f"stopped at step 280; continue with: python {SCRIPT} --resume {folder}" in printed.out
    assert run_here(f"--resume {folder}") == 0
    assert_equal_runs(whole, folder)


@pytest.mark.parametrize("ending", ["stopped", "finished", "failed"])
def test_a_run_gives_the_signals_back(ending, tmp_path, at_addition):
    events = {
        "stopped": lambda: os.kill(os.getpid(), signal.SIGTERM),
        "finished": lambda: None,
        "failed": lambda: (tmp_path / "checkpoint.tmp").symlink_to("/dev/full"),
    }
    handlers = [signal.getsignal(number) for number, _ in SIGNALS]
    at_addition(5, events[ending])
    flags = RUN + "--total-timesteps 110 --checkpoint-frequency 20"
    sys.argv = [str(SCRIPT), *words_of(f"{flags} --run-dir {tmp_path}")]
    try:
        ne.main()
    except SystemExit as stop:
        assert stop.code == {"stopped": 0, "failed": 1}[ending]
    assert handlers == [signal.getsignal(number) for number, _ in SIGNALS]


def test_stopped_again_and_again_with_evaluations_at_every_step(tmp_path, at_addition):
    """Many are postponed at once; a run killed before its next checkpoint does them again."""
    flags = RUN + "--total-timesteps 200 --eval-frequency 3 --eval-episodes 1"
    undisturbed = tmp_path / "whole"
    folder = tmp_path / "run"
    assert run_here(f"{flags} --run-dir {undisturbed}") == 0
    at_addition(102, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run_here(f"{flags} --run-dir {folder}") == 0
    assert load(folder)["step"] == 120
    assert len(load(folder)["parts"]["progress"]["postponed"]) == 7  # 102, 105, ..., 120

    def interrupt():
        raise KeyboardInterrupt

    for event in (interrupt, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        at_addition(7, event)
        run_here(f"--resume {folder}")
    assert load(folder)["step"] == 140
    assert run_here(f"--resume {folder}") == 0
    assert_equal_runs(undisturbed, folder)


def test_a_second_signal_stops_at_once(tmp_path):
    folder = tmp_path / "run"
    setup = signal_at(262, "SIGTERM", "SIGINT")
    code, out, err = finish(launch(f"{RUN} --run-dir {folder}", setup))
    assert code == 128 + signal.SIGINT
    assert err.count("finishing the episode") == 1
    assert "stopped" not in out
    assert load(folder)["step"] == 200


def test_a_closed_terminal(tmp_path):
    """The kernel sends SIGHUP, and what is printed from then on fails."""
    folder = tmp_path / "run"
    terminal, theirs = pty.openpty()
    flags = RUN.replace("Plain", "Slow")
    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}

    def log_in():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup make test
        os.login_tty(theirs)

    process = launch(f"{flags} --run-dir {folder}", preexec_fn=log_in, **streams)
    os.close(theirs)
    printed = b""
    while b"return" not in printed:  # the first row
        printed += os.read(terminal, 1_000)
    os.close(terminal)
    assert process.wait(timeout=120) == 0
    content = load(folder)
    assert not content["finished"]
    assert content["step"] >= 100
    assert content["step"] % 20 == 0
    assert run_here(["--resume", str(folder)]) == 0


def test_a_terminal_closes_while_a_row_is_printed(whole, tmp_path, monkeypatch, capsys):
    def write(text, **_):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(ne.tqdm, "write", staticmethod(write))
    error = errno.EIO
    folder = tmp_path / "run"
    assert run_here(f"{RUN} --run-dir {folder}") == 0
    assert_equal_runs(whole, folder)
    error = errno.ENOSPC  # of a log file on a full disk
    assert run_here(f"{RUN} --run-dir {tmp_path / 'other'}") == 1
    assert_one_line(capsys.readouterr().err, "cannot write: ", "No space left")


def test_a_signal_in_the_last_episode_ends_the_run(whole, tmp_path, at_addition):
    folder = tmp_path / "run"
    at_addition(590, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run_here(f"{RUN} --run-dir {folder}") == 0
    assert_equal_runs(whole, folder)


def test_a_stopping_run_whose_episode_does_not_end_is_bounded(tmp_path, at_addition):
    folder = tmp_path / "run"
    flags = RUN + "--env-id fake_task:Never-v0 --max-episode-steps 50"
    at_addition(101, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run_here(f"{flags} --run-dir {folder}") == 0
    assert load(folder)["step"] == 150


def test_redo_and_reset_come_when_due_and_resume_exactly(tmp_path, monkeypatch):
    calls = []

    def count(name: str) -> None:
        function = getattr(ne, name)

        def counted(*args):
            calls.append(name)
            return function(*args)

        monkeypatch.setattr(ne, name, counted)

    count("redo")
    count("reset")
    flags = RUN + "--redo-interval 30 --reset-interval 300"
    undisturbed = tmp_path / "whole"
    assert run_here(f"{flags} --run-dir {undisturbed}") == 0
    assert calls.count("redo") == 500 // 30
    assert calls.count("reset") == 1  # at 300, not at the last step
    killed = tmp_path / "killed"
    code, _, _ = finish(launch(f"{flags} --run-dir {killed}", kill_at(387)))
    assert code == -signal.SIGKILL
    assert run_here(f"--resume {killed}") == 0
    assert_equal_runs(undisturbed, killed)


@pytest.mark.slow
def test_a_compiled_run_resumes_exactly(tmp_path):
    undisturbed = tmp_path / "whole"
    killed = tmp_path / "killed"
    code, _, err = finish(launch(f"{RUN} --compile --run-dir {undisturbed}"))
    assert code == 0, err
    code, _, _ = finish(launch(f"{RUN} --compile --run-dir {killed}", kill_at(387)))
    assert code == -signal.SIGKILL
    code, _, err = finish(launch(f"--resume {killed}"))
    assert code == 0, err
    assert_equal_runs(undisturbed, killed)


# --- the script as a module ---------------------------------------------------
class Notebook(io.TextIOBase):
    """A stdout as in notebooks, without `reconfigure`."""

    def write(self, text: str) -> int:
        return len(text)


def global_state() -> tuple:
    handlers = [signal.getsignal(number) for number in range(1, signal.NSIG)]
    return handlers, threading.excepthook, sys.excepthook, sys.stdout


def test_importing_the_script_changes_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Notebook())
    before = global_state()
    runpy.run_path(str(SCRIPT), run_name="imported")
    assert global_state() == before


def test_main_runs_in_a_thread(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Notebook())
    sys.argv = [str(SCRIPT), *words_of(f"{RUN} --run-dir {tmp_path / 'run'}")]
    before = global_state()
    thread = threading.Thread(target=ne.main)
    thread.start()
    thread.join(timeout=120)
    assert not thread.is_alive()
    assert global_state() == before
    assert_equal_runs(whole, tmp_path / "run")


# --- folders ------------------------------------------------------------------
def interrupt() -> None:
    raise KeyboardInterrupt


def test_a_start_that_failed_leaves_its_folder_usable(whole, tmp_path, at_addition, capsys):
    folder = tmp_path / "run"
    at_addition(5, interrupt)
    assert run_here(f"{RUN} --run-dir {folder}") == 130
    assert (folder / "args.json").exists()
    code = run_here(f"--resume {folder}")
    assert code == 1
    assert_one_line(capsys.readouterr().err, "nothing to resume", str(folder))
    assert run_here(f"{RUN} --run-dir {folder}") == 0
    assert_equal_runs(whole, folder)


def test_folders_that_cannot_be_used(whole, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    flags = f"{RUN} --run-dir {tmp_path / 'file' / 'run'}"
    code, err = in_process(monkeypatch, capsys, flags)
    assert code == 2
    assert_one_line(err, "--run-dir must be a folder that can be written")
    code, err = in_process(monkeypatch, capsys, f"{RUN} --run-dir {whole}")
    assert code == 2
    assert_one_line(err, "--run-dir must be a new folder", f"--resume {whole}")
    (tmp_path / "rows").mkdir()
    shutil.copy(whole / "results.csv", tmp_path / "rows")
    code, err = in_process(monkeypatch, capsys, f"{RUN} --run-dir {tmp_path / 'rows'}")
    assert code == 2
    assert_one_line(err, "--run-dir must be a new folder")


def test_runs_that_start_in_the_same_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    began = time.perf_counter()
    monkeypatch.setattr(time, "time", lambda: 1e9 + (time.perf_counter() - began) / 1_000)
    for _ in range(3):
        assert run_here(RUN + "--total-timesteps 40") == 0
    folders = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert len(folders) == 3
    assert all(name.endswith(("1000000000", "_2", "_3")) for name in folders)
    for folder in folders:
        assert len(rows(tmp_path / "runs" / folder)) == 1


def test_a_folder_with_spaces_is_quoted_in_the_printed_command(
    whole, tmp_path, at_addition, capsys
):
    folder = tmp_path / "a run; of mine"
    at_addition(262, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run_here([*words_of(RUN), "--run-dir", str(folder)]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if "continue with" in line]
    command = shlex.split(line.split("continue with: ")[1])
    assert command == ["python", str(SCRIPT), "--resume", str(folder)]
    assert run_here(command[2:]) == 0
    assert_equal_runs(whole, folder)


# --- disks and numbers --------------------------------------------------------
def test_a_full_disk_keeps_the_checkpoint_before(whole, tmp_path, at_addition, capsys):
    """/dev/full in place of the temporary file."""
    folder = tmp_path / "run"
    at_addition(250, lambda: (folder / "checkpoint.tmp").symlink_to("/dev/full"))
    assert run_here(f"{RUN} --run-dir {folder}") == 1
    kept = f"--resume {folder} continues from step 200"
    err = capsys.readouterr().err
    assert_one_line(err, "cannot write a checkpoint", "No space left", "step 300", kept)
    assert not (folder / "checkpoint.tmp").is_symlink()
    assert run_here(f"--resume {folder}") == 0
    assert_equal_runs(whole, folder)


def test_a_file_that_may_not_grow_keeps_the_checkpoint_before(whole, tmp_path):
    folder = tmp_path / "run"
    # a finished run's checkpoint has no replay buffer; less than 5 kB for its
    # generator, the rest for rows of 32 bytes
    limit = (whole / "checkpoint.pt").stat().st_size + 10_000

    def no_larger_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    flags = f"{RUN} --checkpoint-frequency 20 --run-dir {folder}"
    code, _, err = finish(launch(flags, preexec_fn=no_larger_files))
    assert code == 1
    assert_one_line(err, "cannot write", "File too large", str(folder))
    assert not (folder / "checkpoint.tmp").exists()
    assert run_here(f"--resume {folder}") == 0
    assert_equal_runs(whole, folder)


def test_a_row_that_cannot_be_written(whole, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    fsync = os.fsync

    def full(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("results.csv"):
            if len(rows(folder)) == 4:
                raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert run_here(f"{RUN} --run-dir {folder}") == 1
    assert_one_line(capsys.readouterr().err, "cannot write", "No space left", "--resume")
    assert run_here(f"--resume {folder}") == 0
    assert_equal_runs(whole, folder)


def test_a_nan_in_the_networks_stops_the_run_and_keeps_the_good_checkpoint(
    tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "run"
    update_critic = ne.Agent.update_critic
    calls = []

    def spoilt(agent, batch):
        calls.append(None)
        if len(calls) == 130:
            agent.critic_1.layers[0].bias.data[0] = float("nan")
        return update_critic(agent, batch)

    monkeypatch.setattr(ne.Agent, "update_critic", spoilt)
    assert run_here(f"{RUN} --run-dir {folder}") == 1
    err = capsys.readouterr().err
    assert_one_line(err, "NaN", f"--resume {folder} continues from step 200")
    step = int(re.search(r"at step (\d+)", err).group(1))
    assert 230 <= step <= 270  # the next evaluation at the latest
    for key, value in load(folder)["parts"]["agent"].items():
        if key.endswith(("weight", "bias")):
            assert value.isfinite().all()


def test_an_agent_larger_than_memory(tmp_path, monkeypatch, capsys):
    flags = f"{RUN} --run-dir {tmp_path / 'run'} --buffer-size 1000000000 --env-id Humanoid-v5"
    code, err = in_process(monkeypatch, capsys, flags)
    assert code == 1
    assert_one_line(err, "fit in memory")
    assert not (tmp_path / "run").exists()


# --- refused ------------------------------------------------------------------
REFUSED = [
    ("--env-id HalfCheeta-v5", "HalfCheetah"),
    ("--env-id CartPole-v1", "--env-id must have flat Boxes"),
    ("--env-id Blackjack-v1", "--env-id must have flat Boxes"),
    ("--initial-density 1.5", ", 1], got 1.5"),
    ("--prune-ratio -0.1", "in [0, 0.999]"),
    ("--total-timesteps -5", "in [1, "),
    ("--exploration-noise inf", "got inf"),
    ("--max-episode-steps 0", "in [1, "),
]


@pytest.mark.parametrize(("flags", "words"), REFUSED + REFUSED_NE + REFUSED_TD3)
def test_values_out_of_range_are_refused_before_anything_is_written(
    tmp_path, monkeypatch, capsys, flags, words
):
    assert_refused(monkeypatch, capsys, f"--run-dir {tmp_path / 'run'}", words, flags)
    assert not (tmp_path / "run").exists()


def test_no_flag_of_numbers_takes_a_bad_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tried = bad_numbers(ne.Args)
    assert len(tried) > 100
    for flags in tried:
        assert_refused(monkeypatch, capsys, "", flags.split()[0], flags)
    assert not list(tmp_path.iterdir())


WRONG = ["--growth sideways", "--sparse-init none", "--review-rule both"]
WRONG += ["--no-such-flag 1", "--seed one", "--batch-size 3.5", "--actor-hidden"]


@pytest.mark.parametrize("flags", WRONG)
def test_what_is_no_flag_or_no_choice_is_refused(monkeypatch, capsys, flags):
    code, err = in_process(monkeypatch, capsys, flags)
    assert code == 2
    assert "Traceback" not in err


def test_a_closed_stdout_and_stderr(whole, tmp_path):
    """Nothing is written to a file that got the number of the one that was closed."""

    def close() -> None:
        os.close(1)
        os.close(2)

    folder = tmp_path / "run"
    setup = signal_at(262, "SIGTERM")
    process = launch(f"{RUN} --run-dir {folder}", setup, preexec_fn=close, stdout=None, stderr=None)
    assert process.wait(timeout=120) == 0
    assert run_here(f"--resume {folder}") == 0
    assert_equal_runs(whole, folder)
    process = launch("--help", preexec_fn=close, stdout=None, stderr=None)
    assert process.wait(timeout=120) == 0


def test_a_folder_whose_name_cannot_be_printed(whole, tmp_path):
    folder = tmp_path / "läufe"
    environment = {"PYTHONIOENCODING": "ascii"}
    code, out, err = finish(launch(f"{RUN} --run-dir {folder}", env=environment))
    assert code == 0, err
    assert "l\\xe4ufe" in out
    assert_equal_runs(whole, folder)
    code, _, err = finish(launch("--help", env=environment))  # has a paragraph sign
    assert code == 0, err


def test_a_folder_whose_name_is_no_text(tmp_path, monkeypatch, capsys):
    flags = ["--run-dir", os.fsdecode(os.fsencode(tmp_path) + b"/l\xe4ufe")]
    code, err = in_process(monkeypatch, capsys, words_of(RUN) + flags)
    assert code == 2
    assert_one_line(err, "--run-dir must be a folder that can be written", "surrogates")


def test_nobody_reads_what_is_printed(tmp_path):
    """As with `| head`: the exit code is that of a process killed by SIGPIPE."""
    read, write = os.pipe()
    os.close(read)
    code, _, err = finish(launch(f"{RUN} --run-dir {tmp_path / 'run'}", stdout=write))
    os.close(write)
    assert (code, err) == (141, "")


@pytest.mark.parametrize("error", [MemoryError(), MemoryError("no\nroom")])
def test_memory_that_is_not_there(error, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        ne.as_script(main)
    assert stop.value.code == 1
    assert_one_line(capsys.readouterr().err, "must fit in memory")


def test_a_refusal_in_a_process_of_its_own():
    code, out, err = finish(launch("--prune-ratio 1"))
    assert (code, out) == (2, "")
    assert err == "error: --prune-ratio must be in [0, 0.999], got 1.0\n"


def test_compile_without_a_compiler(tmp_path):
    environment = {"CXX": str(tmp_path / "g++"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    flags = f"{RUN} --compile --run-dir {tmp_path / 'run'}"
    code, _, err = finish(launch(flags, env=environment))
    assert code == 1
    assert_one_line(err, "--compile needs torch 2.13 and a C++ compiler", "g++")
    assert run_here(f"{RUN} --run-dir {tmp_path / 'run'}") == 0  # the folder can be used


def test_compile_with_an_older_torch(monkeypatch, capsys):
    monkeypatch.delattr(torch.compiler, "skip_all_guards_unsafe")
    with pytest.raises(SystemExit) as stop:
        ne.compiled(torch.nn.Identity().forward, torch.ones(1))
    assert stop.value.code == 1
    assert_one_line(capsys.readouterr().err, "--compile needs torch 2.13", "skip_all_guards_unsafe")


# --- wandb --------------------------------------------------------------------
def test_wandb_that_is_not_installed(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    flags = f"{RUN} --track --run-dir {tmp_path / 'run'}"
    code, err = in_process(monkeypatch, capsys, flags)
    assert code == 2
    assert_one_line(err, "--track needs the package wandb")


def test_wandb_without_a_package_of_its_own(tmp_path, monkeypatch, capsys):
    (tmp_path / "wandb.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    flags = f"{RUN} --track --run-dir {tmp_path / 'run'}"
    code, err = in_process(monkeypatch, capsys, flags)
    assert code == 2
    assert_one_line(err, "--track needs the package wandb", "no_such_package")


class FakeWandb:
    """In place of the package: notes what `init` was given, or fails."""

    def __init__(self, error: Exception | None = None):
        self.error = error
        self.given = []

    def init(self, **options):
        if self.error:
            raise self.error
        self.given.append(options)
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "global_step")

    def log(self, values: dict) -> None:
        assert "global_step" in values

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


def test_wandb_without_a_key(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(ValueError("no API key\nlog in")))
    flags = f"{RUN} --track --run-dir {tmp_path / 'run'}"
    code, err = in_process(monkeypatch, capsys, flags)
    assert code == 2
    assert_one_line(err, "--track: no API key log in", "WANDB_MODE=offline")


def test_a_folder_named_wandb_in_the_way(tmp_path, monkeypatch, capsys):
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    flags = f"{RUN} --track --run-dir {tmp_path / 'run'}"
    code, err = in_process(monkeypatch, capsys, flags)
    assert code == 2
    assert_one_line(err, "--track needs the package wandb")


def test_a_resumed_run_continues_its_run_of_wandb(tmp_path, monkeypatch, at_addition):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    folder = tmp_path / "run"
    at_addition(105, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run_here(f"{RUN} --track --run-dir {folder}") == 0
    at_addition(5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run_here(f"--resume {folder}") == 0
    assert len(wandb.given) == 2
    first, second = wandb.given
    assert first["id"] == second["id"]
    assert first["resume"] == "allow"
    assert first["config"]["batch_size"] == second["config"]["batch_size"] == 16


# --- --resume and what may be wrong with it -----------------------------------
RESUME_CONTRADICTED = [
    ("--env-id HalfCheetah-v5", "--env-id must be fake_task:Plain-v0 or left out"),
    ("--critic-hidden 64 64", "--critic-hidden must be (16, 12) or left out"),
    ("--total-timesteps 9000", "--total-timesteps must be 600"),
    ("--seed 2", "--seed must be 1 or left out"),
    ("--no-prune", "--prune must be True or left out"),
    ("--run-dir elsewhere", "--run-dir must be"),
]


@pytest.mark.parametrize(("flags", "words"), RESUME_CONTRADICTED)
def test_resume_refuses_flags_that_contradict_the_run(whole, monkeypatch, capsys, flags, words):
    assert_refused(monkeypatch, capsys, f"--resume {whole}", words, flags)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A run that was stopped at step 280, with an evaluation postponed. Not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "stopped"
    setup = signal_at(262, "SIGTERM")
    code, _, err = finish(launch(f"{RUN} --run-dir {folder}", setup))
    assert code == 0, err
    return folder


@pytest.fixture
def interrupted(stopped, tmp_path) -> Path:
    """A copy of the stopped run, to be spoilt."""
    folder = tmp_path / "interrupted"
    shutil.copytree(stopped, folder)
    return folder


def assert_not_resumed(folder: Path, capsys, *words: str) -> None:
    """Refused in one line, and results.csv and the checkpoint are as they were."""
    paths = [folder / "results.csv", folder / "checkpoint.pt"]
    before = [path.read_bytes() for path in paths if path.exists()]
    capsys.readouterr()
    assert run_here(["--resume", str(folder)]) == 1
    assert_one_line(capsys.readouterr().err, *words)
    assert [path.read_bytes() for path in paths if path.exists()] == before


def test_the_run_to_be_spoilt_resumes_exactly(whole, interrupted):
    assert run_here(f"--resume {interrupted} --no-cudagraphs") == 0  # the one flag that may differ
    assert_equal_runs(whole, interrupted)


def test_two_resumes_at_once(interrupted, capsys):
    holder = ne.lock(interrupted)
    assert_not_resumed(interrupted, capsys, "in use by", f"process {os.getpid()}")
    holder.close()


def test_a_lock_of_a_process_that_is_gone_does_not_count(whole, interrupted):
    (interrupted / "lock").write_text("process 1 on elsewhere\n")
    assert run_here(f"--resume {interrupted}") == 0
    assert_equal_runs(whole, interrupted)


def test_single_bit_flips_are_refused_or_change_nothing(interrupted, stopped, capsys):
    path = interrupted / "checkpoint.pt"
    good = path.read_bytes()
    original = ne.load_checkpoint(stopped, ne.Args)
    rng = random.Random(0)
    places = [rng.randrange(8 * len(good)) for _ in range(150)]
    places += range(0, 400, 23)  # the zip archive's first header
    places += range(8 * len(good) - 1_600, 8 * len(good), 37)  # and its directory
    refused = 0
    for place in places:
        spoilt = bytearray(good)
        spoilt[place // 8] ^= 1 << place % 8
        path.write_bytes(spoilt)
        try:
            content = ne.load_checkpoint(interrupted, ne.Args)
        except SystemExit as stop:
            assert stop.code == 1
            assert_one_line(capsys.readouterr().err, "checkpoint.pt")
            refused += 1
        else:
            assert_equal(content, original)
    assert refused > 100


def test_truncated_checkpoints_are_refused(interrupted, capsys):
    path = interrupted / "checkpoint.pt"
    good = path.read_bytes()
    lengths = [0, 1, 100, len(good) // 2, len(good) * 2 // 3, len(good) - 100, len(good) - 1]
    for length in lengths:
        path.write_bytes(good[:length])
        with pytest.raises(SystemExit):
            ne.load_checkpoint(interrupted, ne.Args)
        words = "is damaged or not a checkpoint of ne_td3_continuous"
        assert_one_line(capsys.readouterr().err, words)
    path.write_bytes(good[: len(good) // 2])
    assert_not_resumed(interrupted, capsys, "is damaged")


@pytest.mark.parametrize(
    "content",
    [{"model": torch.zeros(3)}, [1, 2], {"args": Path("code that must not run")}],
)
def test_foreign_files_are_refused(interrupted, capsys, content):
    torch.save(content, interrupted / "checkpoint.pt")
    assert_not_resumed(interrupted, capsys, "checkpoint.pt is damaged or not a checkpoint")


def test_files_that_are_no_archives_are_refused(interrupted, capsys):
    (interrupted / "checkpoint.pt").write_text("hello")
    assert_not_resumed(interrupted, capsys, "checkpoint.pt is damaged or not a checkpoint")


def rewrite(folder: Path, change, args_json: bool = True) -> None:
    """Saves the checkpoint after `change(content)`, and an args.json that agrees with it."""
    content = load(folder)
    change(content)
    torch.save(content, folder / "checkpoint.pt")
    if args_json:
        (folder / "args.json").write_text(json.dumps(content["args"], indent=2))


CHANGES = {
    "another script": (lambda c: c.update(script="ne_drq_dmc"), "of ne_drq_dmc"),
    "unknown argument": (lambda c: c["args"].update(scale=2), "other flags"),
    "missing argument": (lambda c: c["args"].pop("gamma"), "other flags"),
    "argument out of range": (lambda c: c["args"].update(gamma=7.0), "--gamma"),
    "another environment": (lambda c: c["args"].update(env_id="Pendulum-v1"), "does not fit"),
    "other widths": (lambda c: c["args"].update(critic_hidden=(32, 16)), "does not fit"),
    "buffer size in arguments": (lambda c: c["args"].update(buffer_size=300), "the buffer"),
    "missing part": (lambda c: c["parts"].pop("noise_rng"), "parts"),
    "unknown part": (lambda c: c["parts"].update(more={}), "parts"),
    "no parts": (lambda c: c.pop("parts"), "parts"),
    "unknown key": (lambda c: c.update(more=1), "must have"),
    "progress without epsilon": (lambda c: c["parts"]["progress"].pop("epsilon"), "progress"),
    "optimizer without state": (lambda c: c["parts"]["actor_optimizer"].pop("state"), "optimizer"),
    "weights missing": (lambda c: c["parts"]["agent"].popitem(), "agent"),
    "random state": (lambda c: c["parts"].update(noise_rng="{}"), "noise_rng"),
    "buffer of another shape": (
        lambda c: c["parts"]["buffer"].update(filled=torch.zeros(5, 3)),
        "buffer",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_checkpoints_that_do_not_fit_are_refused(interrupted, capsys, name):
    change, words = CHANGES[name]
    rewrite(interrupted, change)
    paths = [interrupted / "results.csv", interrupted / "checkpoint.pt"]
    before = [path.read_bytes() for path in paths]
    assert run_here(f"--resume {interrupted}") in (1, 2)
    assert_one_line(capsys.readouterr().err, words)
    assert [path.read_bytes() for path in paths] == before


def test_missing_checkpoints(tmp_path, capsys):
    assert_not_resumed(tmp_path, capsys, "nothing to resume", str(tmp_path))
    assert_not_resumed(tmp_path / "no folder", capsys, "nothing to resume")


def test_what_is_no_folder_of_a_run(interrupted, monkeypatch, capsys):
    code = run_here(f"--resume {interrupted / 'checkpoint.pt'}")
    assert code == 1
    assert_one_line(capsys.readouterr().err, "--resume must be a run's folder", "Not a directory")

    def closed(path):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(ne.zipfile, "ZipFile", closed)
        assert_not_resumed(interrupted, capsys, "--resume must be", "Permission denied")


def test_a_folder_that_can_only_be_read_is_not_resumed(interrupted, capsys):
    (interrupted / "lock").unlink()
    (interrupted / "lock").mkdir()
    assert run_here(f"--resume {interrupted}") == 2
    assert_one_line(capsys.readouterr().err, "--resume must be a folder that can be written")


def test_resumed_in_its_own_folder(whole, interrupted, monkeypatch):
    """An empty name is the folder one is in."""
    monkeypatch.chdir(interrupted)
    assert run_here(["--resume", ""]) == 0
    assert_equal_runs(whole, interrupted)


SPOILT = {
    "empty": b"",
    "half": b'{"exp_name": "ne_td3_cont',
    "list": b"[]",
    "not UTF-8": b"\xff\xfe\x00",
    "number": b"3",
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_args_json_is_refused(interrupted, capsys, name):
    (interrupted / "args.json").write_bytes(SPOILT[name])
    assert_not_resumed(interrupted, capsys, "args.json")


def test_an_args_json_of_another_run_is_refused(interrupted, capsys):
    arguments = json.loads((interrupted / "args.json").read_text())
    (interrupted / "args.json").write_text(json.dumps(arguments | {"seed": 9}, indent=2))
    assert_not_resumed(interrupted, capsys, "args.json")
    (interrupted / "args.json").unlink()
    assert_not_resumed(interrupted, capsys, "args.json")


def test_fewer_rows_than_the_checkpoint_counts_on_are_refused(interrupted, capsys):
    path = interrupted / "results.csv"
    os.truncate(path, path.stat().st_size - 1)
    assert_not_resumed(interrupted, capsys, "results.csv has fewer rows")
    path.unlink()
    assert_not_resumed(interrupted, capsys, "results.csv")
    assert not path.exists()


@pytest.mark.parametrize("place", [0, 40, -3])
def test_rows_with_a_flipped_bit_are_refused(interrupted, capsys, place):
    path = interrupted / "results.csv"
    content = bytearray(path.read_bytes()[: load(interrupted)["results_bytes"]])
    content[place] ^= 4
    path.write_bytes(content)
    assert_not_resumed(interrupted, capsys, "results.csv is damaged")
    path.write_bytes(bytes(len(content)))  # as after a power cut
    assert_not_resumed(interrupted, capsys, "results.csv is damaged")


def test_rows_after_the_checkpoint_are_cut_off(whole, interrupted):
    with open(interrupted / "results.csv", "a") as file:
        file.write("280,half of a r")
    assert run_here(f"--resume {interrupted}") == 0
    assert_equal_runs(whole, interrupted)
