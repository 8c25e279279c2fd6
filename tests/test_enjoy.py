"""benchmark/enjoy.py: what it plays is the trained policy, for every script; videos; bad input."""

import ctypes.util
import inspect
import os
import resource
import subprocess
import sys
from types import SimpleNamespace

import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
import pytest
import torch

import baselines.drq_dmc
import baselines.td3_continual
import baselines.td3_continuous
import enjoy
import fake_task
import ne_drq_dmc
import ne_td3_continual
import ne_td3_continuous
from helpers import PIXELS, ROOT, assert_one_line, rows

TASK = "InvertedPendulum-v5"  # 4 observations, 1 action, 25 pictures a second, MuJoCo
RUN = (
    f"--env-id {TASK} --total-timesteps 300 --learning-starts 200 --batch-size 32 "
    "--eval-frequency 150 --eval-episodes 2 --grow-interval 20 --no-cuda "
)
PLAIN = "fake_task:Plain-v0"  # 2 observations, 2 actions
PENDULUM = "Pendulum-v1"  # 3 observations, 1 action
SEQUENCE = {"tasks": (PLAIN, PENDULUM), "actor_hidden": (16, 8), "critic_hidden": (16, 8)}
ALONE = {"env_id": PLAIN, "actor_hidden": (16, 8), "critic_hidden": (16, 8)}
# script: its module, sizes of the agent, arguments
SCRIPTS = {
    "ne_td3_continuous": (ne_td3_continuous, (2, 2), ALONE),
    "ne_td3_continual": (ne_td3_continual, (3, 2), SEQUENCE),
    "ne_drq_dmc": (ne_drq_dmc, (2,), PIXELS),
    "td3_continuous": (baselines.td3_continuous, (2, 2), ALONE),
    "td3_continual": (baselines.td3_continual, (3, 2), SEQUENCE),
    "drq_dmc": (baselines.drq_dmc, (2,), PIXELS),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of NE-TD3 with networks of the default widths."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    argv = sys.argv
    sys.argv = ["ne_td3_continuous.py", *RUN.split(), "--run-dir", str(folder)]
    ne_td3_continuous.main()
    sys.argv = argv
    return folder


@pytest.fixture(autouse=True)
def without_pictures_before_and_after():
    threads = torch.get_num_threads()
    gym.spec(TASK).kwargs.pop("render_mode", None)
    yield
    gym.spec(TASK).kwargs.pop("render_mode", None)
    torch.set_num_threads(threads)


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs enjoy.py here: (exit code, stdout, stderr)."""

    def run_command(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["enjoy.py", *map(str, arguments)])
        code = 0
        try:
            enjoy.main()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run_command


def new_agent(script: str, **changes):
    """An agent that has learned nothing, and the arguments."""
    module, sizes, options = SCRIPTS[script]
    args = module.Args(**options | changes)
    torch.manual_seed(3)
    takes = inspect.signature(module.Agent).parameters
    seeds = {name: 1 for name in ("ne_seed", "method_seed") if name in takes}
    return module.Agent(args, *sizes, **seeds, device=torch.device("cpu")), args


def save(folder, script: str, agent, args) -> None:
    """A checkpoint as `Run.save` writes it, with the parts that count here."""
    content = {"script": script, "args": vars(args), "step": 1_234, "results_bytes": 0}
    content |= {"name": "run", "finished": False}
    content["parts"] = {"agent": agent.state_dict(), "progress": {"updates": 3}}
    torch.save(content, folder / "checkpoint.pt")


# --- what is played -----------------------------------------------------------
def test_returns_are_those_of_the_last_evaluation(run, command):
    row = rows(run)[-1]
    policy = enjoy.load_policy(run)
    stage = enjoy.rebuild(policy, run)
    torch.set_flush_denormal(True)
    returns = stage.script.evaluate(stage.player, stage.envs[TASK], 2, seed=1)
    assert np.mean(returns) == float(row["eval/return_mean"])
    assert np.std(returns) == float(row["eval/return_std"])
    code, out, _ = command(run, "--seed", 1, "--episodes", 2)
    assert code == 0
    spread = f"{np.mean(returns):,.1f} +- {np.std(returns):,.1f}"
    assert out.splitlines() == [
        f"ne_td3_continuous, seed 1, step 300; last evaluation: {TASK} {spread}",
        f"{TASK}, episode 1: return {returns[0]:,.1f}",
        f"{TASK}, episode 2: return {returns[1]:,.1f}",
        f"{TASK}, mean of 2: return {spread}",
    ]
    assert "render_mode" not in gym.spec(TASK).kwargs


@pytest.mark.parametrize("script", SCRIPTS)
def test_plays_the_policy_of_every_script(script, tmp_path, command, monkeypatch):
    monkeypatch.setattr(ne_drq_dmc, "load_task", fake_task.load_task)
    agent, args = new_agent(script)
    save(tmp_path, script, agent, args)
    small = tmp_path / "new" / "small.pt"
    assert command(tmp_path, "--export", small)[0] == 0
    acting = agent.act if script in enjoy.PIXELS else agent.actor.act
    for path in (tmp_path, tmp_path / "checkpoint.pt", small):
        stage = enjoy.rebuild(enjoy.load_policy(path), path)
        env = next(iter(stage.envs.values()))
        obs = env.reset(seed=5)
        obs = obs if script in enjoy.PIXELS else obs[0]
        assert np.array_equal(stage.player.act(obs), acting(obs))
    played = [command(path, "--episodes", 2)[1] for path in (tmp_path, small)]
    assert played[0] == played[1]
    tasks = getattr(args, "tasks", None) or [args.env_id]
    assert played[0].count("episode 2: return") == len(tasks)
    for task in tasks:
        assert f"{task}, mean of 2: return" in played[0]


def test_plays_what_a_plasticity_injection_has_made(tmp_path):
    agent, args = new_agent("td3_continuous", method="injection")
    baselines.td3_continuous.inject(agent)
    with torch.no_grad():
        for layer in agent.actor.layers:
            layer.weight.mul_(1.5)
    save(tmp_path, "td3_continuous", agent, args)
    stage = enjoy.rebuild(enjoy.load_policy(tmp_path), tmp_path)
    obs = np.array([0.3, -0.4], dtype=np.float32)
    assert np.array_equal(stage.player.act(obs), agent.actor.act(obs))


def test_small_policy_has_what_acts_and_its_returns(run, tmp_path, command):
    small = tmp_path / "small.pt"
    code, out, _ = command(run, "--export", small)
    assert code == 0
    row = rows(run)[-1]
    returns = [float(row["eval/return_mean"]), float(row["eval/return_std"])]
    content = torch.load(small, weights_only=True)
    assert content["returns"] == {TASK: returns}
    assert (content["script"], content["step"]) == ("ne_td3_continuous", 300)
    assert content["args"]["env_id"] == TASK
    weights = content["weights"]
    assert {name.split(".")[0] for name in weights} == {"actor"}
    numbers = sum(value.numel() for value in weights.values() if torch.is_tensor(value))
    assert numbers == 5 * 256 + 257 * 128 + 129
    assert small.stat().st_size < 4 * numbers + 10_000
    assert out.startswith(f"{small}: {small.stat().st_size / 1000:,.0f} kB; ne_td3_continuous")
    played = [command(path, "--episodes", 1)[1] for path in (run, small)]
    assert played[0] == played[1]


def test_needs_no_dm_control_and_no_opengl(run, tmp_path):
    """As its users start it, in another folder, where importing dm_control fails."""
    (tmp_path / "dm_control.py").write_text("raise ImportError('no dm_control here')")
    script = ROOT / "benchmark" / "enjoy.py"
    command = [sys.executable, str(script), str(run), "--episodes", "1"]
    env = os.environ | {"PYTHONPATH": str(tmp_path), "MUJOCO_GL": "disable"}
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{TASK}, mean of 1: return" in done.stdout


# --- videos -------------------------------------------------------------------
NEEDS_OPENGL = pytest.mark.skipif(
    "MUJOCO_GL" not in os.environ and ctypes.util.find_library("EGL") is None,
    reason="no libEGL here",
)


def frames_of(path) -> list[np.ndarray]:
    """(H, W, 3) each."""
    with imageio.get_reader(path) as video:
        return [frame[..., :3].astype(int) for frame in video]


@NEEDS_OPENGL
def test_videos_of_a_state_task(run, tmp_path, command, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", os.environ.get("MUJOCO_GL", "egl"))
    seen = {}
    for name in ("a.mp4", "a.gif"):
        path = tmp_path / "videos" / name
        code, out, err = command(run, "--video", path, "--seconds", 0.1, "--episodes", 2)
        assert code == 0, err
        assert f"{path}: " in out
        assert out.count("episode 2") == 1
        seen[name] = frames_of(path)
    assert [len(frames) for frames in seen.values()] == [3, 3]
    assert seen["a.mp4"][0].shape == (480, 480, 3)
    assert seen["a.gif"][0].shape[:2] == (240, 240)
    for frames in seen.values():
        assert frames[0].std() > 10


def test_video_of_pixels_is_what_the_agent_sees(tmp_path, command, monkeypatch):
    monkeypatch.setattr(ne_drq_dmc, "load_task", fake_task.load_task)
    agent, args = new_agent("ne_drq_dmc")
    save(tmp_path, "ne_drq_dmc", agent, args)
    path = tmp_path / "a.gif"
    code, out, err = command(tmp_path, "--video", path, "--episodes", 1)
    assert code == 0, err
    frames = frames_of(path)
    assert len(frames) == 11  # the first, and 20 steps, each action twice
    stage = enjoy.rebuild(enjoy.load_policy(tmp_path), tmp_path)
    obs = stage.envs[args.env_id].reset(seed=100)
    first = obs[-3:].transpose(1, 2, 0).astype(int)
    times = len(frames[0]) // len(first)
    assert frames[0].shape == (24 * times, 24 * times, 3) and times == 14
    assert np.abs(frames[0][::times, ::times] - first).mean() < 8  # a palette of 256 colours


@NEEDS_OPENGL
def test_each_task_of_a_sequence_has_a_video(tmp_path, command, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", os.environ.get("MUJOCO_GL", "egl"))
    slower = "test_enjoy:SlowPictures-v0"
    monkeypatch.setitem(SCRIPTS, "ne_td3_continual", (ne_td3_continual, (4, 1), SEQUENCE))
    agent, args = new_agent("ne_td3_continual", tasks=(TASK, slower))
    save(tmp_path, "ne_td3_continual", agent, args)
    video = tmp_path / "a.mp4"
    code, out, err = command(tmp_path, "--video", video, "--seconds", 0.08, "--episodes", 1)
    assert code == 0, err
    assert sorted(path.name for path in tmp_path.glob("*.mp4")) == [
        f"a_{TASK}.mp4",
        "a_SlowPictures-v0.mp4",
    ]
    path = tmp_path / "a_SlowPictures-v0.mp4"
    with imageio.get_reader(path) as reader:
        assert reader.get_meta_data()["fps"] == 25  # every fourth step
    assert [frame.shape for frame in frames_of(path)] == [(30, 20, 3)] * 2


class SlowPictures(fake_task.Plain):
    """One action, 100 steps a second, pictures with odd sides."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 100}
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, render_mode=None):
        super().__init__()
        self.render_mode = render_mode

    def render(self):
        return np.full((31, 21, 3), 10 * self.steps, dtype=np.uint8)


gym.register("SlowPictures-v0", SlowPictures)


# --- bad input ----------------------------------------------------------------
def refused(result: tuple, *words: str, code: int = 2) -> None:
    returned, _, err = result
    assert returned == code, err
    assert_one_line(err, *words)


def test_refuses_what_is_no_policy(run, tmp_path, command, recwarn):
    refused(command(tmp_path), "there is no", "checkpoint.pt")
    refused(command(tmp_path / "missing.pt"), "there is no", "missing.pt")
    text = tmp_path / "text.pt"
    text.write_text("not a zip archive")
    refused(command(text), "text.pt is damaged, or neither a checkpoint nor a policy")
    for number, content in enumerate(
        ({"format": "old 1"}, [1, 2], {"script": "sac"}, torch.zeros(2))
    ):
        foreign = tmp_path / f"foreign{number}.pt"
        torch.save(content, foreign)
        refused(command(foreign), f"foreign{number}.pt is ")
    assert not recwarn.list  # would be a second line
    checkpoint = (run / "checkpoint.pt").read_bytes()
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(checkpoint[: len(checkpoint) // 2])
    refused(command(damaged), "damaged.pt is damaged")
    middle = len(checkpoint) // 2
    flipped = bytes([checkpoint[middle] ^ 255])
    damaged.write_bytes(checkpoint[:middle] + flipped + checkpoint[middle + 1 :])
    refused(command(damaged), "damaged.pt is damaged")


def test_refuses_weights_that_do_not_fit(run, tmp_path, command):
    small = tmp_path / "small.pt"
    command(run, "--export", small)
    content = torch.load(small, weights_only=True)
    content["args"]["env_id"] = PLAIN
    torch.save(content, small)
    refused(command(small), "does not fit its task", "size mismatch")
    del content["weights"]["actor.layers.0.bias"]
    torch.save(content, small)
    refused(command(small), "has the weights", "actor.layers.0.bias")


def test_refuses_what_has_other_types(run, tmp_path, command):
    small = tmp_path / "small.pt"
    command(run, "--export", small)
    good = torch.load(small, weights_only=True)
    for part, value in (
        ("args", 3),
        ("step", "last"),
        ("returns", [1.0]),
        ("returns", {PLAIN: [1.0]}),
        ("weights", None),
        ("weights", good["weights"] | {"actor.layers.0.bias": "none"}),
    ):
        torch.save(good | {part: value}, small)
        refused(command(small), "is neither a checkpoint of these scripts nor a policy of them")
    for name, value, word in (
        ("actor_hidden", 256, "actor_hidden must be a tuple, got 256"),
        ("env_id", None, "env_id must be a str, got None"),
        ("actor_hidden", (-1, 8), "--actor-hidden must be in [1, 65,536], got -1"),
    ):
        torch.save(good | {"args": good["args"] | {name: value}}, small)
        refused(command(small), word)


def test_refuses_flags(run, tmp_path, command):
    refused(command(run, "--video", "a.avi"), "--video must end in .mp4 or .gif, got a.avi")
    refused(command(run, "--episodes", 0), "--episodes must be at least 1, got 0")
    refused(command(run, "--seed", -1), "--seed must be in [0, ")
    refused(command(run, "--seconds", "nan"), "--seconds must be above 0, got nan")
    (tmp_path / "file").write_text("")
    below = tmp_path / "file" / "a.gif"
    refused(command(run, "--video", below), "--video must be in a folder", str(below))
    refused(command(run, "--export", below), "--export must be in a folder", str(below))
    refused(command(run, "--export", tmp_path), "--export: cannot write", str(tmp_path))


def test_a_video_that_cannot_be_written(tmp_path, command, monkeypatch):
    monkeypatch.setattr(ne_drq_dmc, "load_task", fake_task.load_task)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # to be as before
    save(tmp_path, "ne_drq_dmc", *new_agent("ne_drq_dmc"))
    (tmp_path / "folder.gif").mkdir()
    (tmp_path / "full.gif").symlink_to("/dev/full")
    for name in ("folder.gif", "full.gif"):
        path = tmp_path / name
        result = command(tmp_path, "--video", path, "--episodes", 1)
        refused(result, f"--video: cannot write {path}")


@pytest.mark.parametrize("at", ["get_writer", "append_data", "close"])
def test_a_writer_that_fails_at_any_moment(at, tmp_path, command, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ne_drq_dmc, "load_task", fake_task.load_task)
    hook = sys.unraisablehook
    monkeypatch.setattr(sys, "unraisablehook", hook)  # to be as before
    save(tmp_path, "ne_drq_dmc", *new_agent("ne_drq_dmc"))
    library = SimpleNamespace(append_data=lambda picture: None, close=lambda: None)
    library.get_writer = lambda *_, **__: library
    setattr(library, at, fail)
    monkeypatch.setattr(enjoy, "import_video", lambda: library)
    result = command(tmp_path, "--video", tmp_path / "a.gif", "--episodes", 1)
    refused(result, "--video: cannot write", "a.gif: [Errno 28] No space left on device")
    assert sys.unraisablehook is not hook  # the writer's second failure is not printed


def test_a_disk_that_fills_up_before_the_end_of_a_video(tmp_path, command, monkeypatch):
    """ffmpeg ends as if all were well."""
    monkeypatch.setattr(ne_drq_dmc, "load_task", fake_task.load_task)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # to be as before
    save(tmp_path, "ne_drq_dmc", *new_agent("ne_drq_dmc"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, limits[1]))  # bytes of a file
    try:
        result = command(tmp_path, "--video", tmp_path / "a.mp4", "--episodes", 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    refused(result, "--video: cannot write", "a.mp4")


def test_says_which_library_is_missing(run, command, monkeypatch, tmp_path):
    monkeypatch.setenv("MUJOCO_GL", "none")
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # to be as before
    words = ("--video: cannot draw", "none", "libegl1 libgl1", "libosmesa6")
    refused(command(run, "--video", tmp_path / "a.gif"), *words)
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    refused(command(run, "--video", "a.mp4"), "pip install imageio imageio-ffmpeg")


def test_fault_of_an_environment_is_one_line(tmp_path, command):
    agent, args = new_agent("ne_td3_continuous", env_id="fake_task:NaNObs-v0")
    save(tmp_path, "ne_td3_continuous", agent, args)
    refused(command(tmp_path, "--episodes", 8), "NaNObs-v0", "the observation is NaN", code=1)


def test_says_why_a_file_cannot_be_read(run, command, monkeypatch):
    within = run / "checkpoint.pt" / "checkpoint.pt"
    refused(command(within), f"cannot read {within}", "Not a directory")

    def closed(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(enjoy.zipfile, "ZipFile", closed)
    refused(command(run), "cannot read", "Permission denied")


def test_the_checkpoint_of_a_run_is_not_replaced(run, command):
    """A run could not be resumed from a small policy."""
    before = (run / "checkpoint.pt").read_bytes()
    refused(command(run, "--export", run / "checkpoint.pt"), "--export must not be")
    assert (run / "checkpoint.pt").read_bytes() == before


def test_nobody_reads_what_is_printed(run):
    """As with `| head`: the exit code is that of a process killed by SIGPIPE."""
    read, write = os.pipe()
    os.close(read)
    program = [sys.executable, enjoy.__file__, str(run), "--episodes", "1"]
    done = subprocess.run(program, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
