"""Watch a trained agent: plays a run of any script, its checkpoint, or a small policy.

Run:   python benchmark/enjoy.py policies/HalfCheetah-v5.pt          the return of each episode
       python benchmark/enjoy.py runs/a --video a.mp4                and what it looks like
       python benchmark/enjoy.py runs/a --export policies/NAME.pt    writes a small policy

Episodes are those of an evaluation: no noise, the same starts for the same --seed. With the
run's own --seed and --eval-episodes, a run on a CPU gives the last row of its results.csv.
A small policy has what acts and nothing else: the actor, before it the encoder for pixels.
"""

import csv
import importlib
import inspect
import io
import math
import os
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, NoReturn

import gymnasium as gym
import numpy as np
import torch
import tyro
from PIL import Image
from tyro.conf import Positional

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from ne_td3_continuous import die  # noqa: E402

# what a checkpoint calls its script: the module of its agent, the one of its environments
SCRIPTS = {
    "ne_td3_continuous": ("ne_td3_continuous", "ne_td3_continuous"),
    "ne_td3_continual": ("ne_td3_continual", "ne_td3_continual"),
    "ne_drq_dmc": ("ne_drq_dmc", "ne_drq_dmc"),
    "td3_continuous": ("baselines.td3_continuous", "ne_td3_continuous"),
    "td3_continual": ("baselines.td3_continual", "ne_td3_continual"),
    "drq_dmc": ("baselines.drq_dmc", "ne_drq_dmc"),
}
PIXELS = ("ne_drq_dmc", "drq_dmc")
FRAMES_PER_SECOND = 30  # at most
OPENGL = (
    "MuJoCo needs OpenGL, on Debian: apt-get install libegl1 libgl1, "
    "or libosmesa6 and MUJOCO_GL=osmesa"
)


@dataclass
class Options:
    """All flags."""

    run: Positional[Path]
    """folder of a run, a checkpoint.pt, or a small policy"""
    episodes: int = 5
    """episodes of each task"""
    seed: int = 0
    """decides where the episodes start"""
    video: Path | None = None
    """.mp4 or .gif of each task's first episode; of several tasks NAME_TASK.mp4 each"""
    seconds: float = 60
    """longest video"""
    export: Path | None = None
    """play nothing: write what acts, and the returns of its last evaluation, to this file"""


class Policy(NamedTuple):
    """What a small policy's file holds, as a dictionary."""

    script: str
    args: dict
    step: int  # of training
    returns: dict[str, list[float]]  # {task: [mean, standard deviation]}, last evaluation
    weights: dict[str, torch.Tensor]  # of the agent's parts that act


# --- reading and writing ------------------------------------------------------
def read(path: Path) -> dict:
    """A file that torch wrote. Raises: SystemExit(2) for what is missing or damaged."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at checksums
            damaged = archive.testzip()
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        die(f"there is no {path}")
    except (NotADirectoryError, PermissionError) as e:
        die(f"cannot read {path}: {e.strerror}")
    except Exception:  # zipfile and torch raise many kinds for a damaged or foreign file
        die(f"{path} is damaged, or neither a checkpoint nor a policy")
    if damaged:
        die(f"{path} is damaged: the checksum of {damaged} is wrong")
    return content


def load_policy(path: Path) -> Policy:
    """From a run's folder, a checkpoint or a small policy. Raises: SystemExit(2)."""
    if path.is_dir():
        path = path / "checkpoint.pt"
    content = read(path)
    try:
        if not isinstance(content, dict):  # a tensor warns before it fails
            raise TypeError
        if content["script"] not in SCRIPTS:
            die(f"{path} is of {content['script']}, which is none of {', '.join(SCRIPTS)}")
        if "parts" not in content:
            policy = Policy(**content)
            described(policy)  # all of it must be there
            if not all(isinstance(value, torch.Tensor | bool) for value in policy.weights.values()):
                raise TypeError("weights must be tensors")
            return policy
        weights = acting_weights(content["parts"]["agent"])
        returns = last_returns(path.parent / "results.csv", content)
        return Policy(content["script"], content["args"], content["step"], returns, weights)
    except OSError as e:
        die(f"cannot read {path.parent / 'results.csv'}: {e.strerror}")
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        die(f"{path} is neither a checkpoint of these scripts nor a policy of them")


def acting_weights(agent: dict) -> dict:
    """What acts of an agent's state: of the actor and the encoder, all but masks and bounds.

    A weight is 0 where its mask is, so the masks need not be known to act.
    """
    weights = {}
    for name, value in agent.items():
        part, _, rest = name.partition(".")
        acts = part in ("actor", "encoder")
        if acts and rest.rpartition(".")[2] not in ("mask", "bound"):
            weights[name] = value
    return weights


def last_returns(path: Path, checkpoint: dict) -> dict[str, list[float]]:
    """{task: [mean, std]} of the last evaluation before the checkpoint; {} if there is none."""
    if not path.exists():
        return {}
    rows = path.read_bytes()[: checkpoint["results_bytes"]].decode()
    returns = {}
    for row in csv.DictReader(io.StringIO(rows)):  # later rows replace earlier ones
        task = row.get("task_evaluated") or checkpoint["args"]["env_id"]
        returns[task] = [float(row["eval/return_mean"]), float(row["eval/return_std"])]
    return returns


def export(policy: Policy, path: Path) -> None:
    """Writes a small policy. Raises: SystemExit(2) where it cannot."""
    content = policy._asdict()
    weights = {}
    for name, value in policy.weights.items():
        # a copy has a storage of its own, and torch saves whole storages
        weights[name] = value.clone() if torch.is_tensor(value) else value
    content["weights"] = weights
    make_folder(path, "--export")
    if path.name == "checkpoint.pt":
        die(f"--export must not be a checkpoint.pt, which a run continues from, got {path}")
    try:
        torch.save(content, path)
    except (OSError, RuntimeError) as e:  # torch hides the reason
        die(f"--export: cannot write {path}: {e.__context__ or e}")
    print(f"{path}: {path.stat().st_size / 1000:,.0f} kB; {described(policy)}")


def make_folder(path: Path, flag: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        die(f"{flag} must be in a folder that can be written, got {path}: {e}")


def described(policy: Policy) -> str:
    """One line: script, seed, step and the returns of the last evaluation."""
    line = f"{policy.script}, seed {policy.args['seed']}, step {policy.step:,}"
    returns = []
    for task, (mean, std) in policy.returns.items():
        returns.append(f"{task} {mean:,.1f} +- {std:,.1f}")
    if returns:
        line += f"; last evaluation: {', '.join(returns)}"
    return line


# --- playing ------------------------------------------------------------------
class Stage(NamedTuple):
    """A policy in its environments."""

    script: ModuleType  # of whose environments
    player: torch.nn.Module  # what the script's `evaluate` takes: the actor, or the pixel agent
    envs: dict  # {task: environment}


def rebuild(policy: Policy, path: Path) -> Stage:
    """Agent and environments as the script makes them."""
    of_agent, of_environments = SCRIPTS[policy.script]
    module = importlib.import_module(of_agent)
    script = importlib.import_module(of_environments)
    args = module.Args()
    for name, default in vars(args).items():
        value = policy.args.get(name, default)  # a flag that is newer than the file
        if default is not None and type(value) is not type(default):
            die(f"{path}: {name} must be a {type(default).__name__}, got {value!r}")
        setattr(args, name, value)
    script.check_limits(args)
    if policy.script in PIXELS:
        env = script.PixelEnv(args)
        envs = {args.env_id: env}
        sizes = [env.n_act]
    elif "tasks" in policy.args:
        envs = dict(zip(args.tasks, script.make_envs(args), strict=True))
        largest = envs[args.tasks[0]]  # all are padded
        sizes = [largest.n_obs, largest.n_act]
    else:
        env = script.make_env(args.env_id, args.max_episode_steps)
        envs = {args.env_id: env}
        sizes = [env.observation_space.shape[0], env.action_space.shape[0]]
    takes = inspect.signature(module.Agent).parameters
    seeds = {name: 0 for name in ("ne_seed", "method_seed") if name in takes}  # none is drawn from
    agent = module.Agent(args, *sizes, **seeds, device=torch.device("cpu"))
    put_weights(agent, policy.weights, path)
    player = agent if policy.script in PIXELS else agent.actor
    return Stage(script, player, envs)


def put_weights(agent, weights: dict, path: Path) -> None:
    """Raises: SystemExit(2) where they are not those of such an agent."""
    needed = acting_weights(agent.state_dict())
    if set(needed) != set(weights):
        die(f"{path} has the weights {', '.join(weights)}, not {', '.join(needed)}")
    try:
        agent.load_state_dict(weights, strict=False)
    except RuntimeError as e:  # names every weight of another shape
        reason = " ".join(str(e).split())
        die(f"{path} does not fit its task: {reason}")


def play(policy: Policy, options: Options) -> None:
    """Prints the return of each episode and their mean; films each task's first episode."""
    filmed = options.video is not None
    if filmed and policy.script not in PIXELS:
        for task in policy.args.get("tasks") or [policy.args["env_id"]]:
            ask_for_pictures(task)
    stage = rebuild(policy, options.run)
    print(described(policy))
    for task, env in stage.envs.items():
        returns = []
        if filmed:
            path = video_path(options.video, task, len(stage.envs))
            camera = Camera(env, path, options.seconds)
            returns += play_episode(stage, camera, task, options.seed, 1)
            camera.close()
        for episode in range(len(returns), options.episodes):
            returns += play_episode(stage, env, task, options.seed, episode + 1)
        mean = f"{np.mean(returns):,.1f} +- {np.std(returns):,.1f}"
        print(f"{task}, mean of {len(returns)}: return {mean}")


def play_episode(stage: Stage, env, task: str, seed: int, number: int) -> list[float]:
    """Its return, in a list. Raises: SystemExit(1) for what no environment must do."""
    start = seed + number - 1  # so that all are the episodes of one evaluation
    try:
        returns = stage.script.evaluate(stage.player, env, 1, start)
    except stage.script.EnvironmentFault as fault:
        die(str(fault), code=1)
    print(f"{task}, episode {number}: return {returns[0]:,.1f}")
    return returns


# --- pictures -----------------------------------------------------------------
def ask_for_pictures(task: str) -> None:
    """Whatever makes this Gymnasium task from now on makes it with pictures.

    Raises: SystemExit(2) where none can be drawn.
    """
    module, _, name = task.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
        gym.spec(name).kwargs["render_mode"] = "rgb_array"
        env = gym.make(name)
        env.reset()
        env.render()
        env.close()
    except Exception as e:  # each environment and each renderer has errors of its own
        sys.unraisablehook = lambda failure: None  # a broken viewer fails once more when deleted
        reason = " ".join(str(e).split())
        die(f"--video: cannot draw {task}: {reason} ({OPENGL})")


def video_path(path: Path, task: str, tasks: int) -> Path:
    """NAME_TASK.mp4 where there are several."""
    if tasks == 1:
        return path
    name = task.rpartition(":")[2].replace("/", "_")
    return path.with_stem(f"{path.stem}_{name}")


def import_video():
    """The library that writes videos. Raises: SystemExit(2) where it is missing."""
    try:
        import imageio.v2
        import imageio_ffmpeg  # noqa: F401  an ffmpeg of its own
    except ImportError:
        die("--video needs two packages: pip install imageio imageio-ffmpeg")
    return imageio.v2


class Camera:
    """An environment that films itself."""

    def __init__(self, env, path: Path, seconds: float):
        self.env = env
        self.path = path
        self.pixels = not isinstance(env, gym.Env)
        if self.pixels:
            speed = 1 / (env.task.control_timestep() * env.args.action_repeat)
        else:
            speed = env.metadata.get("render_fps", FRAMES_PER_SECOND)
        self.every = math.ceil(speed / FRAMES_PER_SECOND)  # steps per picture
        self.left = math.ceil(seconds * speed)  # steps still to be filmed
        self.steps = 0
        try:
            self.writer = self.new_writer(speed / self.every)
        except OSError as e:
            self.cannot_write(e)

    def cannot_write(self, error: Exception) -> NoReturn:
        sys.unraisablehook = lambda failure: None  # a broken writer fails once more when deleted
        die(f"--video: cannot write {self.path}: {' '.join(str(error).split())}")

    def new_writer(self, frames_per_second: float):
        library = import_video()
        if self.path.suffix == ".gif":
            milliseconds = 1000 / frames_per_second
            return library.get_writer(self.path, duration=milliseconds, loop=0)
        return library.get_writer(self.path, fps=frames_per_second, macro_block_size=2)

    def __getattr__(self, name: str):
        return getattr(self.env, name)

    def reset(self, **kwargs):
        start = self.env.reset(**kwargs)
        self.film(start)
        return start

    def step(self, action: np.ndarray):
        moment = self.env.step(action)
        self.film(moment[0])
        return moment

    def film(self, obs) -> None:
        if self.left > 0 and self.steps % self.every == 0:
            picture = self.enlarged(obs) if self.pixels else self.rendered()
            try:
                self.writer.append_data(picture)
            except (OSError, RuntimeError) as e:  # a full disk, an ffmpeg that does not run
                self.cannot_write(e)
        self.steps += 1
        self.left -= 1

    def rendered(self) -> np.ndarray:
        """What Gymnasium draws (H, W, 3); half as large in a GIF, which compresses badly."""
        picture = self.env.render()
        height, width, _ = picture.shape
        picture = picture[: height // 2 * 2, : width // 2 * 2]  # H.264 takes even sides
        if self.path.suffix == ".gif":
            picture = np.asarray(Image.fromarray(picture).reduce(2))
        return picture

    def enlarged(self, obs) -> np.ndarray:
        """The newest frame that the agent sees, (C, H, W) -> about (336, 336, 3)."""
        frame = obs[-3:].transpose(1, 2, 0)
        times = 2 * max(1, 168 // len(frame))
        return frame.repeat(times, axis=0).repeat(times, axis=1)

    def close(self) -> None:
        try:
            self.writer.close()  # a GIF is written here
            if self.path.suffix == ".mp4":  # ffmpeg does not say that it could not finish
                import_video().get_reader(self.path).close()
        except (OSError, RuntimeError) as e:
            self.cannot_write(e)
        print(f"{self.path}: {self.path.stat().st_size / 1e6:.1f} MB")


def check(options: Options) -> None:
    if options.episodes < 1:
        die(f"--episodes must be at least 1, got {options.episodes}")
    if not 0 <= options.seed < 2**31:
        die(f"--seed must be in [0, {2**31 - 1:,}], got {options.seed}")
    if not options.seconds > 0:
        die(f"--seconds must be above 0, got {options.seconds}")
    if options.video is not None:
        if options.video.suffix not in (".mp4", ".gif"):
            die(f"--video must end in .mp4 or .gif, got {options.video}")
        import_video()
        make_folder(options.video, "--video")


def main() -> None:
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)  # a closed pipe is seen at once
    options = tyro.cli(Options, description=__doc__.rpartition("\n\n")[0])
    check(options)
    policy = load_policy(options.run)
    if options.export is not None:
        export(policy, options.export)
        return
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # as in training, so that returns are the same
    if options.video is not None:
        os.environ.setdefault("MUJOCO_GL", "egl")  # before MuJoCo is imported
    play(policy, options)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # of `| head`; as if it had been killed by SIGPIPE
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes it once more
        raise SystemExit(141) from None
