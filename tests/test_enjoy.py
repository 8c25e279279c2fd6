"""benchmark/enjoy.py: what it plays is the trained policy, for every script; videos; bad input."""

import ctypes.util
import importlib
import os
import sys

import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
import pytest
import torch

import enjoy
import fake_task
import ne_drq_dmc
from helpers import ROOT, assert_one_line, call, rows, run_here

TASK = "InvertedPendulum-v5"  # 4 observations, 1 action, 25 pictures a second, MuJoCo
RUN = (
    f"--env-id {TASK} --total-timesteps 300 --learning-starts 200 --batch-size 32 "
    "--eval-frequency 150 --eval-episodes 2 --grow-interval 20 --no-cuda "
)
PLAIN = "fake_task:Plain-v0"  # 2 observations, 2 actions
HIDDEN = {"actor_hidden": (16, 8), "critic_hidden": (16, 8)}
PIXELS = {"frame_size": 24, "channels": 4, "hidden_dim": 32, "env_id": "walker_walk"}
# script: sizes of the agent, arguments
SCRIPTS = {
    "ne_td3_continuous": ((2, 2), HIDDEN | {"env_id": PLAIN}),
    "ne_td3_continual": ((3, 2), HIDDEN | {"tasks": (PLAIN, "Pendulum-v1")}),
    "ne_drq_dmc": ((2,), PIXELS),
    "baselines.td3_continuous": ((2, 2), HIDDEN | {"env_id": PLAIN}),
    "baselines.td3_continual": ((3, 2), HIDDEN | {"tasks": (PLAIN, "Pendulum-v1")}),
    "baselines.drq_dmc": ((2,), PIXELS),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of NE-TD3 with networks of the default widths."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert run_here(f"{RUN} --run-dir {folder}") == 0
    return folder


@pytest.fixture(autouse=True)
def without_pictures_before_and_after(monkeypatch):
    monkeypatch.setattr(gym, "make", gym.make)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(ne_drq_dmc, "load_task", fake_task.load_task)


def save(folder, script: str, sizes=None, **changes):
    """A checkpoint as `save` of the scripts writes it, of an agent that has learned nothing."""
    default_sizes, options = SCRIPTS[script]
    module = importlib.import_module(script)
    args = module.Args(**options | changes)
    torch.manual_seed(3)
    agent = module.Agent(args, *(sizes or default_sizes), 1, torch.device("cpu"))
    if changes.get("method") == "injection":
        module.inject(agent)
        with torch.no_grad():
            for layer in agent.actor.layers:
                layer.weight.mul_(1.5)
    content = {"script": module.Args.exp_name, "args": vars(args), "step": 1_234}
    content |= {"finished": False, "results": "", "parts": {"agent": agent.state_dict()}}
    torch.save(content, folder / "checkpoint.pt")
    return agent


# --- what is played -----------------------------------------------------------
def test_returns_are_those_of_the_last_evaluation(run, tmp_path, capsys):
    """Of a run, its checkpoint, and the small policy that is made of it."""
    small = tmp_path / "new" / "small.pt"
    code, out, err = call(capsys, enjoy, run, "--export", small)
    assert code == 0, err
    assert out.startswith(f"{small}: {small.stat().st_size / 1000:,.0f} kB; ne_td3_continuous")
    row = rows(run)[-1]
    mean = float(row["eval/return_mean"])
    spread = f"{mean:,.1f} +- {float(row['eval/return_std']):,.1f}"
    for path in (run, run / "checkpoint.pt", small):
        code, out, err = call(capsys, enjoy, path, "--seed", 1, "--episodes", 2)
        assert code == 0, err
        first, *episodes, last = out.splitlines()
        assert first == f"ne_td3_continuous, seed 1, step 300; last evaluation: {TASK} {spread}"
        assert last == f"{TASK}, mean of 2: return {spread}"
        returns = []
        for n, line in enumerate(episodes, 1):
            before, _, value = line.rpartition(" ")
            assert before == f"{TASK}, episode {n}: return"
            returns.append(float(value))
        assert len(returns) == 2 and np.mean(returns) == pytest.approx(mean, abs=0.1)


@pytest.mark.parametrize("script", [*SCRIPTS, "injection"])
def test_plays_the_policy_of_every_script(script, tmp_path, capsys):
    changes = {}
    if script == "injection":
        script, changes = "baselines.td3_continuous", {"method": "injection"}
    agent = save(tmp_path, script, **changes)
    code, _, err = call(capsys, enjoy, tmp_path, "--export", tmp_path / "small.pt")
    assert code == 0, err
    played = []
    for path in (tmp_path, tmp_path / "small.pt"):
        player, envs, evaluate = enjoy.rebuild(enjoy.read(path), seed=0)
        start = next(iter(envs.values())).reset(seed=5)
        if script.endswith("drq_dmc"):
            expected = ne_drq_dmc.Policy(agent.encoder, agent.actor).act(start)
            assert np.array_equal(player.act(start), expected)
        else:
            assert np.array_equal(player.act(start[0]), agent.actor.act(start[0]))
        code, out, err = call(capsys, enjoy, path, "--episodes", 2)
        assert code == 0, err
        played.append(out)
    assert played[0] == played[1]
    for task, env in envs.items():
        first, second = evaluate(player, env, 2, seed=0)
        assert first != second
        assert f"{task}, episode 1: return {first:,.1f}\n" in out
        assert f"{task}, episode 2: return {second:,.1f}\n" in out
        assert f"{task}, mean of 2: return {(first + second) / 2:,.1f} " in out


def test_a_task_that_draws_from_numpy_is_repeated(tmp_path, capsys):
    save(tmp_path, "ne_td3_continuous", env_id="fake_task:GlobalRandom-v0")
    played = [call(capsys, enjoy, tmp_path, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert played[0] == played[1] != played[2]


def test_the_policies_of_this_repository_fit():
    for path in (ROOT / "policies").glob("*.pt"):
        policy = enjoy.read(path)
        enjoy.rebuild(policy, seed=0)
        assert f"last evaluation: {path.stem} " in enjoy.described(policy)


# --- videos -------------------------------------------------------------------
def frames_of(path) -> tuple[float, list[np.ndarray]]:
    """Frames per second, and the frames, (H, W, 3) each."""
    with imageio.get_reader(path) as video:
        return video.get_meta_data()["fps"], [frame.astype(int) for frame in video]


@pytest.mark.skipif(
    "MUJOCO_GL" not in os.environ and ctypes.util.find_library("EGL") is None,
    reason="no libEGL here",
)
def test_video_of_a_state_task(run, tmp_path, capsys):
    path = tmp_path / "videos" / "a.mp4"
    _, plain, _ = call(capsys, enjoy, run, "--episodes", 2)
    code, out, err = call(capsys, enjoy, run, "--episodes", 2, "--video", path)
    assert code == 0, err
    lines = out.splitlines(keepends=True)
    assert lines.pop(2).startswith(f"{path}: ")
    assert "".join(lines) == plain
    length = float(lines[1].split()[-1])  # a reward of 1 a step, but for the last
    fps, frames = frames_of(path)
    assert fps == 25 and len(frames) - length in (1, 2)
    assert frames[0].shape == (480, 480, 3) and frames[0].std() > 10


def test_video_of_pixels_is_what_the_agent_sees(tmp_path, capsys):
    save(tmp_path, "ne_drq_dmc")
    code, _, err = call(capsys, enjoy, tmp_path, "--video", tmp_path / "a.mp4", "--episodes", 1)
    assert code == 0, err
    fps, frames = frames_of(tmp_path / "a.mp4")
    assert fps == 25 and len(frames) == 11  # the first, and 20 steps of 0.02 s, two an action
    _, envs, _ = enjoy.rebuild(enjoy.read(tmp_path), seed=0)
    first = envs["walker_walk"].reset(seed=100)[-3:].transpose(1, 2, 0).astype(int)
    assert frames[0].shape == (96, 96, 3)
    assert np.abs(frames[0][2::4, 2::4] - first).mean() < 12  # compressed


# --- bad input ----------------------------------------------------------------
def refused(result: tuple, *words: str) -> None:
    code, _, err = result
    assert code == 2, err
    assert_one_line(err, *words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--video a.gif", "--video must end in .mp4, got a.gif"),
        ("--export checkpoint.pt", "--export must not be a checkpoint.pt"),
    ],
)
def test_refuses_flags(flags, words, run, capsys):
    refused(call(capsys, enjoy, run, *flags.split()), words)


def test_refuses_what_is_no_policy(run, tmp_path, capsys):
    refused(call(capsys, enjoy, tmp_path), "checkpoint.pt is missing", "No such file")
    checkpoint = (run / "checkpoint.pt").read_bytes()
    bad = tmp_path / "bad.pt"
    for content in (b"text", checkpoint[: len(checkpoint) // 2]):
        bad.write_bytes(content)
        refused(call(capsys, enjoy, bad), "bad.pt is missing, damaged")
    content = torch.load(run / "checkpoint.pt", weights_only=True)
    for foreign in ([1, 2], content | {"script": "sac"}):
        torch.save(foreign, bad)
        refused(call(capsys, enjoy, bad), "bad.pt is missing, damaged, or not of this version")


def test_refuses_weights_that_do_not_fit(tmp_path, capsys):
    save(tmp_path, "ne_td3_continuous", env_id="Pendulum-v1")
    refused(call(capsys, enjoy, tmp_path), "does not fit its task", "size mismatch")


def test_says_what_a_video_lacks(run, tmp_path, capsys, monkeypatch):
    video = ("--video", tmp_path / "a.mp4")
    monkeypatch.setenv("MUJOCO_GL", "none")
    refused(call(capsys, enjoy, run, *video), "--video: cannot film", "none", "libegl1 libgl1")
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    refused(call(capsys, enjoy, run, *video), "pip install imageio imageio-ffmpeg")
