"""The script as its users run it: end to end, interrupted and resumed, and given bad input."""

import json
import os
import re
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
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
    assert_equal_runs,
    assert_one_line,
    assert_refused,
    finish,
    in_process,
    kill_at,
    launch,
    rows,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a run that was never interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    code, out, err = finish(launch(f"{SMALL} --run-dir {folder}"))
    assert code == 0, err
    (folder / "stdout").write_text(out)
    return folder


# --- end to end -------------------------------------------------------------------------------------------------------
def test_a_run_leaves_rows_events_arguments_and_a_checkpoint(whole):
    results = rows(whole)
    assert [int(row["step"]) for row in results] == [500, 1000, 1500, 2000, 2500]
    for row in results:
        assert -2000 < float(row["eval/return_mean"]) < 0  # Pendulum's range
        for name in ("actor", "critic"):
            assert 0 < float(row[f"ne/{name}/density"]) <= 1
            assert float(row[f"ne/{name}/active_ratio"]) >= float(row[f"ne/{name}/active_ratio_0.1"])
    for name in ("actor", "critic"):
        density = [float(row[f"ne/{name}/density"]) for row in results]
        assert density == sorted(density) and 0.25 < density[0] < 0.8 < density[-1]
        assert int(results[-1][f"ne/{name}/grown"]) > 0
    assert 0.65 <= float(results[-1]["ne/review_epsilon"]) < 1 and float(results[-1]["ne/review_share"]) > 0

    events = EventAccumulator(str(whole), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()
    assert {"charts/episodic_return", "charts/SPS", "losses/qf_loss", "losses/actor_loss"} <= set(tags["scalars"])
    assert {"eval/return_mean", "ne/critic/density", "ne/actor/pruned", "ne/review_epsilon"} <= set(tags["scalars"])
    assert len(events.Images("masks/critic/1")) == 11  # rounds at 400, 600, ..., 2400
    assert [e.step for e in events.Scalars("eval/return_mean")] == [500, 1000, 1500, 2000, 2500]

    assert json.loads((whole / "args.json").read_text())["batch_size"] == 32
    content = torch.load(whole / "checkpoint.pt", weights_only=True)
    assert content["run"]["step"] == 2500 and content["run"]["updates"] == 2200


def test_it_says_what_will_happen_and_what_came_out(whole):
    out = (whole / "stdout").read_text()
    assert "topology: actor and critics 25% -> 9" in out and "in 11 rounds" in out
    assert re.search(r"return -\d+\.\d \+- \d+\.\d at \d+ steps per second", out)
    assert re.search(r"critic density 9\d\.\d%, active ratio \d+\.\d%", out)


def test_a_checkpoint_can_be_evaluated(whole, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--evaluate", str(whole / "checkpoint.pt"), "--eval-episodes", "2"])
    ne.main()
    expected = f"Pendulum-v1, step 2500: return {float(rows(whole)[-1]['eval/return_mean']):.1f}"
    assert expected in capsys.readouterr().out  # the same episodes as the last evaluation of the run


def test_a_finished_run_is_left_alone(whole, monkeypatch, capsys):
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--resume", str(whole)])
    ne.main()
    assert "is finished" in capsys.readouterr().out
    assert before == {path.name: path.read_bytes() for path in whole.iterdir()}


# --- interrupted and resumed ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("setup", "saved"), [(kill_at(1730), 1200), (KILL_IN_SAVING, 600)])
def test_a_killed_run_resumes_exactly(whole, tmp_path, setup, saved):
    folder = tmp_path / "run"
    code, _, _ = finish(launch(f"{SMALL} --run-dir {folder}", setup))
    assert code == -signal.SIGKILL
    assert (folder / "checkpoint.tmp").exists() == (setup is KILL_IN_SAVING)
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["run"]["step"] == saved
    assert len(rows(folder)) > saved // 500  # rows that the resumed run redoes
    code, _, err = finish(launch(f"--resume {folder}"))
    assert code == 0, err
    assert_equal_runs(whole, folder)
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [e.step for e in events.Scalars("eval/return_mean")] == [500, 1000, 1500, 2000, 2500]


COUNT_RESETS = """
import utils_topology
for name in ("redo", "reset"):
    def counted(*args, name=name, original=getattr(utils_topology, name)):
        print("called:", name)
        return original(*args)
    setattr(utils_topology, name, counted)
"""


def test_redo_and_reset_come_when_due_and_resume_exactly(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = f"{SMALL} --redo-interval 50 --reset-interval 1250"
    code, out, err = finish(launch(f"{flags} --run-dir {whole}", COUNT_RESETS))
    assert code == 0, err
    assert out.count("called: redo\n") == 2200 // 50
    assert out.count("called: reset\n") == 1  # at 1250, not at the last step
    code, _, _ = finish(launch(f"{flags} --run-dir {killed}", kill_at(1730)))
    assert code == -signal.SIGKILL
    code, _, err = finish(launch(f"--resume {killed}"))
    assert code == 0, err
    assert_equal_runs(whole, killed)


@pytest.mark.slow
def test_a_compiled_run_resumes_exactly(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, out, err = finish(launch(f"{SMALL} --compile --run-dir {whole}"))
    assert code == 0 and "compiling" in out, err
    code, _, _ = finish(launch(f"{SMALL} --compile --run-dir {killed}", kill_at(1730)))
    assert code == -signal.SIGKILL and rows(killed)
    code, _, err = finish(launch(f"--resume {killed}"))
    assert code == 0, err
    assert_equal_runs(whole, killed)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_the_episode_saves_and_resumes_exactly(whole, tmp_path, number, code):
    folder = tmp_path / "run"
    process = launch(f"{SMALL} --run-dir {folder}")
    deadline = time.time() + 120
    while time.time() < deadline and not rows(folder):
        time.sleep(0.05)
    process.send_signal(number)
    returned, out, err = finish(process)
    assert returned == code, err
    step = torch.load(folder / "checkpoint.pt", weights_only=True)["run"]["step"]
    assert step % 200 == 0 and 500 <= step < 2500
    assert "finishing the episode" in err and f"stopped at step {step}" in out and f"--resume {folder}" in out
    returned, _, err = finish(launch(f"--resume {folder}"))
    assert returned == 0, err
    assert_equal_runs(whole, folder)


def test_resumed_twice_before_the_first_row_and_with_another_logging_flag(tmp_path):
    """SIGTERM in the first episode of each process: the rows are those of a run that was never interrupted."""
    folder, other = tmp_path / "run", tmp_path / "whole"
    flags = "--env-id Pendulum-v1 --total-timesteps 1000 --eval-frequency 450 --eval-episodes 1 --no-cuda"
    stop_at_once = "ne.ReplayBuffer.add = (lambda add: lambda *a: (os.kill(os.getpid(), signal.SIGTERM) "
    stop_at_once += "if a[0].size % 200 == 50 else None, add(*a)))(ne.ReplayBuffer.add)"
    for arguments, step in ((f"{flags} --run-dir {folder}", 200), (f"--resume {folder} --no-cudagraphs", 400)):
        code, out, err = finish(launch(arguments, stop_at_once))
        assert code == 0 and f"stopped at step {step}" in out, err
    for arguments in (f"--resume {folder}", f"{flags} --run-dir {other}"):
        code, _, err = finish(launch(arguments))
        assert code == 0, err
    assert_equal_runs(other, folder)


def test_a_full_disk_keeps_the_checkpoint_before(whole, tmp_path):
    folder = tmp_path / "run"
    limit = None

    def no_larger_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    finish(launch(f"{SMALL} --run-dir {tmp_path / 'first'}", KILL_IN_SAVING))
    limit = (tmp_path / "first" / "checkpoint.pt").stat().st_size + 5_000  # the second checkpoint is larger
    code, _, err = finish(launch(f"{SMALL} --run-dir {folder}", preexec_fn=no_larger_files))
    assert code == 1
    assert_one_line(err, "cannot write checkpoint", str(folder), "--resume")
    assert not (folder / "checkpoint.tmp").exists()
    code, _, err = finish(launch(f"--resume {folder}"))
    assert code == 0, err
    assert_equal_runs(whole, folder)


def test_a_nan_stops_the_run_and_keeps_the_good_checkpoint(tmp_path, monkeypatch, capsys):
    folder, add = tmp_path / "run", ne.ReplayBuffer.add

    def add_nan(buffer, obs, action, next_obs, reward, terminated):
        add(buffer, obs, action, next_obs, float("nan") if buffer.size == 1000 else reward, terminated)

    monkeypatch.setattr(ne.ReplayBuffer, "add", add_nan)
    code, err = in_process(monkeypatch, capsys, f"{SMALL} --run-dir {folder}")
    assert code == 1
    assert_one_line(err, "NaN", "the checkpoint of step 600 is kept", str(folder))
    step = int(re.search(r"at step (\d+)", err).group(1))
    assert 1001 < step < 1200
    agent = torch.load(folder / "checkpoint.pt", weights_only=True)["agent"]
    assert all(torch.isfinite(value).all() for key, value in agent.items() if key.endswith("weight"))


# --- refused ----------------------------------------------------------------------------------------------------------
REFUSED = [
    ("--env-id HalfCheeta-v5", "HalfCheetah"),
    ("--env-id CartPole-v1", "flat Box actions"),
    ("--env-id Blackjack-v1", "flat Box observations"),
    ("--initial-density 1.5", "in (0, 1], got 1.5"),
    ("--initial-density nan", "in (0, 1], got nan"),
    ("--final-density 1", "in [--initial-density (0.25), 1), got 1.0"),
    ("--prune-ratio -0.1", "in [0, 1)"),
    ("--total-timesteps -5", "at least 1"),
    ("--scale 5", "1, 2, 3 or 4"),
    ("--scale 2 --critic-hidden 64 64", "--scale must be 1"),
]


@pytest.mark.parametrize(("flags", "words"), REFUSED + REFUSED_NE + REFUSED_TD3)
def test_values_out_of_range_are_refused_before_anything_is_written(tmp_path, monkeypatch, capsys, flags, words):
    assert_refused(monkeypatch, capsys, f"--run-dir {tmp_path / 'run'}", words, flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", ["--growth sideways", "--sparse-init none", "--no-such-flag 1", "--seed one"])
def test_what_is_no_flag_or_no_choice_is_refused(monkeypatch, capsys, flags):
    code, err = in_process(monkeypatch, capsys, flags)
    assert code == 2 and "Traceback" not in err


def test_a_refusal_in_a_process_of_its_own():
    code, out, err = finish(launch("--prune-ratio 1"))
    assert (code, out) == (2, "")
    assert err == "error: --prune-ratio must be in [0, 1), so that every round grows on net, got 1.0\n"


def test_compile_without_a_compiler(tmp_path):
    environment = {**os.environ, "CXX": str(tmp_path / "g++"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    code, _, err = finish(launch(f"{SMALL} --compile --run-dir {tmp_path / 'run'}", env=environment))
    assert code == 1
    assert_one_line(err, "--compile needs a C++ compiler", "g++")
    assert not (tmp_path / "run").exists()


def test_folders_that_cannot_be_used(whole, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    code, err = in_process(monkeypatch, capsys, f"{SMALL} --run-dir {tmp_path / 'file' / 'run'}")
    assert code == 2
    assert_one_line(err, "--run-dir must be a folder that can be written")
    code, err = in_process(monkeypatch, capsys, f"{SMALL} --run-dir {whole}")
    assert code == 2
    assert_one_line(err, "--run-dir must be a new folder", f"--resume {whole}")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--env-id HalfCheetah-v5", "--env-id must be Pendulum-v1 or left out"),
        ("--critic-hidden 64 64", "--critic-hidden must be (24, 16) or left out"),
        ("--total-timesteps 9000", "--total-timesteps must be 2500"),
        ("--seed 2", "--seed must be 1 or left out"),
        ("--no-prune", "--prune must be True or left out"),
    ],
)
def test_resume_refuses_flags_that_contradict_the_run(whole, monkeypatch, capsys, flags, words):
    assert_refused(monkeypatch, capsys, f"--resume {whole}", words, flags)


@pytest.fixture
def interrupted(whole, tmp_path, monkeypatch, capsys) -> Path:
    """A folder whose checkpoint looks as if the run were not finished."""
    folder = tmp_path / "interrupted"
    shutil.copytree(whole, folder)
    content = torch.load(folder / "checkpoint.pt", weights_only=True)
    content["run"]["step"] -= 1
    torch.save(content, folder / "checkpoint.pt")
    return folder


def break_truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def break_empty(path: Path) -> None:
    path.write_bytes(b"")


def break_foreign(path: Path) -> None:
    torch.save({"model": torch.zeros(3)}, path)


def break_not_torch(path: Path) -> None:
    path.write_text("hello")


def break_pickle(path: Path) -> None:
    torch.save({"format": Path("code that must not run")}, path)


@pytest.mark.parametrize("spoil", [break_truncated, break_empty, break_foreign, break_not_torch, break_pickle])
def test_spoilt_checkpoints_are_refused(interrupted, monkeypatch, capsys, spoil):
    spoil(interrupted / "checkpoint.pt")
    results = (interrupted / "results.csv").read_bytes()
    for flags in (f"--resume {interrupted}", f"--evaluate {interrupted / 'checkpoint.pt'}"):
        code, err = in_process(monkeypatch, capsys, flags)
        assert code == 1
        assert_one_line(err, "checkpoint.pt is damaged or not a checkpoint of ne_td3_continuous.py")
    assert (interrupted / "results.csv").read_bytes() == results


@pytest.mark.parametrize("change", [{"env_id": "MountainCarContinuous-v0"}, {"critic_hidden": (32, 16)}])
def test_a_checkpoint_that_does_not_fit_is_refused(interrupted, monkeypatch, capsys, change):
    content = torch.load(interrupted / "checkpoint.pt", weights_only=True)
    content["run"]["args"] |= change
    torch.save(content, interrupted / "checkpoint.pt")
    results = (interrupted / "results.csv").read_bytes()
    code, err = in_process(monkeypatch, capsys, f"--resume {interrupted}")
    assert code == 1
    assert_one_line(err, "the checkpoint does not fit")
    assert (interrupted / "results.csv").read_bytes() == results


def test_a_checkpoint_of_another_run_is_refused(interrupted, monkeypatch, capsys):
    arguments = json.loads((interrupted / "args.json").read_text())
    (interrupted / "args.json").write_text(json.dumps(arguments | {"seed": 9}))
    content = torch.load(interrupted / "checkpoint.pt", weights_only=True)
    content["buffer"] = ne.ReplayBuffer(10, 3, 1, 4, 0, torch.device("cpu")).state_dict()
    torch.save(content, interrupted / "checkpoint.pt")
    code, err = in_process(monkeypatch, capsys, f"--resume {interrupted}")
    assert code == 1
    assert_one_line(err, "belongs to another run")


def test_missing_checkpoints(tmp_path, monkeypatch, capsys):
    for flags in (f"--resume {tmp_path}", f"--evaluate {tmp_path / 'checkpoint.pt'}"):
        code, err = in_process(monkeypatch, capsys, flags)
        assert code == 1
        assert_one_line(err, "there is no checkpoint", str(tmp_path))


def test_wandb_that_is_not_installed(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    code, err = in_process(monkeypatch, capsys, f"{SMALL} --track --run-dir {tmp_path / 'run'}")
    assert code == 2
    assert_one_line(err, "--track needs the package wandb")


def test_videos_are_recorded(tmp_path):
    folder = tmp_path / "run"
    flags = "--env-id InvertedPendulum-v5 --total-timesteps 400 --learning-starts 100 --eval-frequency 200 --no-cuda"
    code, _, err = finish(launch(f"{flags} --eval-episodes 3 --capture-video --run-dir {folder}"))
    assert code == 0, err
    videos = sorted(path.name for path in (folder / "videos" / "from_step_0").glob("*.mp4"))
    assert videos == ["rl-video-episode-0.mp4", "rl-video-episode-3.mp4"]


def test_video_without_its_package(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "moviepy", None)
    code, err = in_process(monkeypatch, capsys, f"{SMALL} --capture-video --run-dir {tmp_path / 'run'}")
    assert code == 2
    assert_one_line(err, "--capture-video needs moviepy")


def test_the_default_start_does_not_depend_on_ne(monkeypatch):
    """NE's draws come from a generator of their own: the weights, before masking, and the batches are those of TD3."""
    networks = []
    for density in (0.25, 1.0):
        torch.manual_seed(3)
        networks.append(ne.Agent(ne.Args(initial_density=density), 17, 6, 0, torch.device("cpu")))
    for sparse, dense in zip(*(agent.layers["actor"] + agent.layers["critic"] for agent in networks), strict=True):
        assert torch.equal(sparse.weight, dense.weight * sparse.mask) and np.array_equal(
            sparse.bias.tolist(), dense.bias.tolist()
        )
