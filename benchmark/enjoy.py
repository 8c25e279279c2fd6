"""Watch a trained agent: plays a run of any script, its checkpoint, or a small policy.

Run:   python benchmark/enjoy.py policies/HalfCheetah-v5.pt        the return of each episode
       python benchmark/enjoy.py runs/a --video a.mp4              and what it looks like
       python benchmark/enjoy.py runs/a --export policies/NAME.pt  writes a small policy

Episodes are those of an evaluation: no noise, the same starts for the same --seed. With the
run's own --seed and --eval-episodes, a run on a CPU gives the last row of its results.csv,
if its episodes depend on the seed alone. Those of a task that normalises by what it has
seen, or draws from random or np.random, do not: they repeat themselves, but not that row.
"""

import csv
import importlib
import math
import os
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import gymnasium as gym
import numpy as np
import torch
import tyro
from tyro.conf import Positional

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from ne_td3_continuous import die  # noqa: E402

SCRIPTS = ("td3_continuous", "td3_continual", "drq_dmc")  # baselines; NE's begin with ne_
make = gym.make
OPENGL = "MuJoCo needs OpenGL, on Debian: apt-get install libegl1 libgl1"


@dataclass
class Options:
    """All flags."""

    run: Positional[Path]  # folder of a run, a checkpoint.pt, or a small policy
    episodes: int = 5  # of each task
    seed: int = 0  # decides where the episodes start
    video: Path | None = None  # .mp4 of the first episode; of several tasks NAME_TASK.mp4
    export: Path | None = None  # play nothing: write a small policy to this file


# --- reading and writing ------------------------------------------------------
def read(path: Path) -> dict:
    """A checkpoint or a small policy, which is a checkpoint of what acts only.

    Raises: SystemExit(2) for what is missing, damaged, or neither of both.
    """
    if path.is_dir():
        path = path / "checkpoint.pt"
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at checksums
            if archive.testzip() is not None:
                raise ValueError("a checksum is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        policy = {key: content[key] for key in ("script", "args", "step", "results")}
        policy["parts"] = {"agent": acting_weights(content["parts"]["agent"])}
        if policy["script"].removeprefix("ne_") not in SCRIPTS:
            raise ValueError(f"of {policy['script']}")
    except Exception as e:  # zipfile and torch raise many kinds
        reason = str(e).partition("\n")[0]
        die(f"{path} is missing, damaged, or not of this version of the scripts: {reason}")
    return policy


def acting_weights(agent: dict) -> dict:
    """What acts of an agent's state: the actor and, from pixels, the encoder before it.

    A weight is 0 where its mask is, so masks, bounds and counts need not be known to act.
    """
    weights = {}
    for name, value in agent.items():
        acts = name.startswith(("actor.", "encoder."))
        of_topology = name.endswith((".mask", ".bound")) or isinstance(value, dict)
        if acts and not of_topology:
            weights[name] = value
    return weights


def described(policy: dict) -> str:
    """One line: script, seed, step and the returns of the last evaluation."""
    args = policy["args"]
    returns = {}
    for row in csv.DictReader(policy["results"].splitlines()):
        task = row.get("task_evaluated") or args["env_id"]
        mean = float(row["eval/return_mean"])
        std = float(row["eval/return_std"])
        # later rows replace earlier ones
        returns[task] = f"{task} {mean:,.1f} +- {std:,.1f}"
    line = f"{policy['script']}, seed {args['seed']}, step {policy['step']:,}"
    return f"{line}; last evaluation: {', '.join(returns.values()) or 'none'}"


def export(policy: dict, path: Path) -> None:
    if path.name == "checkpoint.pt":
        die(f"--export must not be a checkpoint.pt, which a run continues from, got {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(policy, path)
    print(f"{path}: {path.stat().st_size / 1000:,.0f} kB; {described(policy)}")


# --- playing ------------------------------------------------------------------
def rebuild(policy: dict, seed: int) -> tuple:
    """As the script makes them: what acts, the environments {task: env}, `evaluate`."""
    name = policy["script"]
    ne = importlib.import_module(f"ne_{name.removeprefix('ne_')}")  # makes environments
    module = ne
    if not name.startswith("ne_"):
        module = importlib.import_module(f"baselines.{name}")
    args = module.Args()
    for name in vars(args).keys() & policy["args"].keys():
        setattr(args, name, policy["args"][name])
    args.seed = seed
    args.cuda = False
    device = ne.set_up(args)
    if hasattr(ne, "PixelEnv"):
        env = ne.PixelEnv(args)
        envs = {args.env_id: env}
        agent = module.Agent(args, env.n_act, 0, device)
        player = ne.Policy(agent.encoder, agent.actor)
    else:
        if hasattr(args, "tasks"):
            envs = dict(zip(args.tasks, ne.make_envs(args.tasks), strict=True))
        else:
            envs = {args.env_id: ne.make_env(args.env_id)}
        env = next(iter(envs.values()))  # all have the same sizes
        n_obs = env.observation_space.shape[0]
        n_act = env.action_space.shape[0]
        agent = module.Agent(args, n_obs, n_act, 0, device)
        player = agent.actor
    weights = policy["parts"]["agent"]
    try:
        agent.load_state_dict(weights, strict=False)
    except RuntimeError as e:  # names every weight of another shape
        die(f"the policy does not fit its task: {' '.join(str(e).split())}")
    missing = acting_weights(agent.state_dict()).keys() - weights.keys()
    if missing:
        die(f"the policy lacks {', '.join(sorted(missing))}")
    return player, envs, ne.evaluate


def play(policy: dict, options: Options) -> None:
    """Prints each episode's return and their mean; films each task's first episode."""
    player, envs, evaluate = rebuild(policy, options.seed)
    print(described(policy))
    for task, env in envs.items():
        returns = []
        for n in range(options.episodes):
            stage = env
            if options.video is not None and n == 0:
                path = video_path(options.video, task, len(envs))
                stage = Camera(env, path)
            returns += evaluate(player, stage, 1, options.seed + n)
            print(f"{task}, episode {n + 1}: return {returns[-1]:,.1f}")
            if stage is not env:
                stage.writer.close()
                print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
        mean = f"{np.mean(returns):,.1f} +- {np.std(returns):,.1f}"
        print(f"{task}, mean of {len(returns)}: return {mean}")


# --- pictures -----------------------------------------------------------------
def import_video():
    """What writes videos. Raises: SystemExit(2) where it is missing."""
    try:
        import imageio.v2
        import imageio_ffmpeg  # noqa: F401  an ffmpeg of its own
    except ImportError:
        die("--video needs two packages: pip install imageio imageio-ffmpeg")
    return imageio.v2


def video_path(path: Path, task: str, tasks: int) -> Path:
    """NAME_TASK.mp4 where there are several."""
    if tasks == 1:
        return path
    name = task.rpartition(":")[2].replace("/", "_")
    return path.with_stem(f"{path.stem}_{name}")


def make_drawn(*args, **kwargs) -> gym.Env:
    """gym.make, for pictures."""
    try:
        return make(*args, render_mode="rgb_array", **kwargs)
    except TypeError as e:  # of a constructor without render_mode
        cannot_film(e)


def cannot_film(error: Exception) -> NoReturn:
    # a broken viewer fails once more when deleted
    sys.unraisablehook = lambda failure: None
    die(f"--video: cannot film this task: {' '.join(str(error).split())} ({OPENGL})")


class Camera:
    """An environment that films itself."""

    def __init__(self, env, path: Path):
        self.env = env
        self.pixels = not isinstance(env, gym.Env)
        if self.pixels:
            speed = 1 / (env.task.control_timestep() * env.args.action_repeat)
        else:
            speed = env.metadata.get("render_fps", 30)
        self.every = math.ceil(speed / 30)  # steps per picture
        self.steps = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        video = import_video()
        self.writer = video.get_writer(path, fps=speed / self.every, macro_block_size=2)

    def __getattr__(self, name: str):
        return getattr(self.env, name)

    def reset(self, **kwargs):
        start = self.env.reset(**kwargs)
        self.film()
        return start

    def step(self, action: np.ndarray):
        moment = self.env.step(action)
        self.film()
        return moment

    def film(self) -> None:
        self.steps += 1
        if self.steps % self.every != 1 % self.every:
            return
        try:
            picture = self.env.render()  # (H, W, 3)
            if self.pixels:  # (3, H, W), what the agent sees
                picture = picture.transpose(1, 2, 0).repeat(4, axis=0).repeat(4, axis=1)
            self.writer.append_data(picture)
        except Exception as e:  # each environment and each renderer has errors of its own
            cannot_film(e)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    if options.episodes < 1:
        die(f"--episodes must be at least 1, got {options.episodes}")
    if not 0 <= options.seed < 2**31:
        die(f"--seed must be in [0, {2**31 - 1:,}], got {options.seed}")
    policy = read(options.run)
    if options.export is not None:
        export(policy, options.export)
        return
    if options.video is not None:
        if options.video.suffix != ".mp4":
            die(f"--video must end in .mp4, got {options.video}")
        import_video()
        os.environ.setdefault("MUJOCO_GL", "egl")
        gym.make = make_drawn  # in place of the one that the scripts call
    play(policy, options)


if __name__ == "__main__":
    main()
