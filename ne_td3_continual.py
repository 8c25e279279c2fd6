"""Neuroplastic Expansion (NE) on TD3, continual learning of a sequence of tasks (§5.2), in one file.

Paper: Neuroplastic Expansion in Deep Reinforcement Learning, arXiv 2410.07994; §, Eq. and Table below refer to it.
Run:   python ne_td3_continual.py --seed 1    (--help lists all flags)
With one task it is ne_td3_continuous.py, bit for bit. Definitions and deviations: docs/ne_td3_continual.md
"""

import copy
import csv
import gc
import json
import math
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import utils_topology as topology
from utils_topology import CudaGraph, MaskedMLP, topology_round


@dataclass
class Args:
    # --- run ---
    exp_name: str = "ne_td3_continual"  # name of this experiment, part of the run's name
    tasks: tuple[str, ...] = ("HalfCheetah-v5", "Humanoid-v5", "Ant-v5", "Hopper-v5")  # Gymnasium ids, in order (§5.2)
    cycles: int = 3  # how often the sequence of tasks is run through (§5.2)
    steps_per_task: int | None = None  # environment steps of a task in a cycle; default: 250,000 (ours)
    episodes_per_task: int | None = None  # episodes of a task in a cycle, instead of --steps-per-task (§5.2)
    clear_buffer: bool = False  # empty the replay buffer when the task changes
    seed: int = 1  # seed of everything random, >= 0
    cuda: bool = True  # use the GPU if there is one
    cudagraphs: bool = True  # on CUDA: capture the two updates once and replay them; off: eager
    compile: bool = False  # compile losses and gradients: faster on a CPU after half a minute, needs a C++ compiler
    torch_threads: int = 1  # CPU threads of torch; networks this small run best with one and several runs side by side
    torch_deterministic: bool = True  # on CUDA: deterministic kernels where there are any
    run_dir: str | None = None  # where all files go; default runs/{tasks}__{exp_name}__{seed}__{unix_time}
    track: bool = False  # also log to Weights & Biases (needs `pip install wandb`)
    wandb_project_name: str = "neuroplastic-expansion"  # project on Weights & Biases
    wandb_entity: str | None = None  # team on Weights & Biases
    capture_video: bool = False  # record the first episode of each evaluation (needs moviepy and OpenGL)
    eval_frequency: int = 10_000  # environment steps between two evaluations, each of them on every task
    eval_episodes: int = 10  # per task and evaluation: deterministic policy, own environment and seed (TD3)
    checkpoint_frequency: int = 50_000  # environment steps; written at the first episode end after each
    resume: str | None = None  # RUN_DIR of an interrupted run: continue it exactly, with its own arguments
    evaluate: str | None = None  # path of a checkpoint: evaluate its policy for --eval-episodes and exit
    # --- TD3 (Fujimoto et al. 2018; values of the reference code) ---
    learning_rate: float = 3e-4  # Adam's step size, actor and critics
    batch_size: int = 256  # transitions per update
    buffer_size: int = 1_000_000  # transitions kept
    gamma: float = 0.99  # discount factor per step
    tau: float = 0.005  # Polyak step of the target networks, per actor update
    learning_starts: int = 25_000  # environment steps with uniform random actions before the first update
    exploration_noise: float = 0.1  # standard deviation of the exploration noise; unit: half the action range
    policy_noise: float = 0.2  # standard deviation of the target policy's smoothing noise; unit: half the action range
    noise_clip: float = 0.5  # bound of the smoothing noise; unit: half the action range
    policy_frequency: int = 2  # critic updates per update of actor and targets
    actor_hidden: tuple[int, ...] = (256, 128)  # widths of the actor's hidden layers (Table 1)
    critic_hidden: tuple[int, ...] = (256, 128)  # widths of the hidden layers of each critic (Table 1)
    scale: int = 1  # scale-up study (§B.1): 1 = the widths above; s > 1 = width 256 throughout and s - 1 more layers
    layer_norm: bool = False  # Linear -> LayerNorm -> ReLU on every hidden layer (Lyle et al. 2024)
    # --- Neuroplastic Expansion ---
    ne_actor: bool = True  # NE on the actor; off: dense from the start (Figure 7b)
    ne_critic: bool = True  # NE on both critics; off: dense from the start (Figure 7b)
    initial_density: float = 0.25  # D, share of connections active at the start (ours); 1 = dense, nothing to grow
    sparse_init: Literal["erdos-renyi", "uniform"] = "erdos-renyi"  # how D is spread over the layers (§4.2)
    growth: Literal["gradient", "random", "none"] = "gradient"  # largest |gradient| (§4.2), any (§4.1), static
    grow_interval: int = 10_000  # Delta T, environment steps between two rounds (authors' README)
    grow_rate: float | None = None  # alpha of the cosine (§4.2); default: solved for --final-density (ours)
    final_density: float = 0.95  # density to reach at the end of growth when alpha is solved (ours)
    growth_end: int | None = None  # T_end, environment step after which nothing grows; default: the last step (§B.2)
    prune: bool = True  # prune and reset dormant neurons after growing (§4.2)
    prune_ratio: float = 0.4  # omega, at most this share of what a round grows is pruned (authors' code)
    weight_clip: float = 2.0  # kappa: reset neurons stay within kappa / sqrt(fan-in); 0 = off (§B.2; value ours)
    review_fraction: float = 0.25  # oldest share of the buffer that is reviewed (§4.2)
    review_interval: int = 1_000  # c, updates between two counts of dormant neurons (ours)
    review_decay: float = 0.005  # weight of the newest reduction in the review threshold epsilon (ours)
    review_floor: float = 0.65  # least epsilon, so at most 1 - floor of the batches are reviews (ours); 1 = no review
    review_tau: float = 0.1  # a neuron counts as dormant for the review when its score (Eq. 1) is at most this (ours)

    redo_interval: int = 0  # NE + ReDo (§C): updates between two resets of dormant neurons (Sokar et al. 2023); 0 = off
    redo_tau: float = 0.1  # NE + ReDo: a neuron is dormant when its score (Eq. 1) is at most this
    reset_interval: int = 0  # NE + Reset (§C): environment steps between two (Nikishin et al. 2022); 0 = off

    @property
    def total_timesteps(self) -> int:  # with --episodes-per-task as if every episode lasted until its time limit
        limits = [gym.spec(task.split(":")[-1]).max_episode_steps or 1_000 for task in self.tasks]
        return self.cycles * sum(self.steps_per_task or self.episodes_per_task * limit for limit in limits)


def die(message: str, code: int = 2) -> NoReturn:
    """One clear line and a non-zero exit: 2 for a mistake on the command line, 1 for what went wrong later."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


RANGES = [  # of each flag; None, where it is a default, is not checked
    ("at least 0", lambda x: x >= 0, "seed exploration_noise policy_noise noise_clip weight_clip review_tau"),
    ("at least 0", lambda x: x >= 0, "redo_interval redo_tau reset_interval"),
    ("at least 1", lambda x: x >= 1, "cycles steps_per_task episodes_per_task torch_threads eval_frequency"),
    ("at least 1", lambda x: x >= 1, "eval_episodes batch_size checkpoint_frequency learning_starts buffer_size"),
    ("at least 1", lambda x: x >= 1, "policy_frequency grow_interval growth_end review_interval"),
    ("in [0, 1]", lambda x: 0 <= x <= 1, "gamma tau grow_rate review_decay review_floor"),
    ("in (0, 1]", lambda x: 0 < x <= 1, "learning_rate initial_density review_fraction"),
    ("in [0, 1), so that every round grows on net", lambda x: 0 <= x < 1, "prune_ratio"),
    ("widths of at least 1", lambda x: min(x, default=0) >= 1, "actor_hidden critic_hidden"),
    ("1, 2, 3 or 4", lambda x: x in (1, 2, 3, 4), "scale"),
    ("one task or more, each once", lambda x: 0 < len(x) == len(set(x)), "tasks"),
]


def make_tasks(env_ids: tuple[str, ...], videos: Path | None = None, episodes: int = 1) -> tuple[list, np.ndarray]:
    """Environments padded to the largest: observations (obs,) with zeros; of an action (act,) a task reads the first.

    `videos` gets every `episodes`-th episode of each task.
    Returns: environments with actions in [-1, 1], rescaled to their own bounds, and masks (tasks, act), 1 where read.
    Raises: SystemExit(2) where one cannot be made, or has not flat Box observations and bounded flat Box actions.
    """
    envs = []
    for env_id in env_ids:
        try:
            env = gym.make(env_id, render_mode="rgb_array" if videos else None)
            if videos:
                env.reset()
                env.render()
                env = gym.wrappers.RecordVideo(env, f"{videos}/{env_id}", lambda episode: episode % episodes == 0)
        except Exception as e:  # each environment and each renderer has errors of its own
            renders = os.environ.get("MUJOCO_GL") != "disable" and not isinstance(e, gym.error.UnregisteredEnv)
            flag = "--capture-video needs moviepy and OpenGL (Debian: libegl1, libgl1)" if renders else "--tasks"
            die(f"{flag}: cannot make {env_id}: {' '.join(str(e).split())}")
        envs.append(env)
        obs, act = env.observation_space, env.action_space
        flat = all(isinstance(space, gym.spaces.Box) and len(space.shape) == 1 for space in (obs, act))
        if not flat or obs.dtype.kind != "f" or not np.isfinite(act.high - act.low).all():
            die(f"--tasks needs flat Box observations of floats, flat Box actions with finite bounds, got {obs}, {act}")
    sizes = [(env.observation_space.shape[0], env.action_space.shape[0]) for env in envs]
    n_obs, n_act = np.max(sizes, axis=0)
    obs, act = (gym.spaces.Box(-np.inf, np.inf, (n,), np.float32) for n in (n_obs, n_act))
    for i, (own_obs, own_act) in enumerate(sizes):
        env = gym.wrappers.RescaleAction(envs[i], np.float32(-1), np.float32(1))
        env = gym.wrappers.TransformAction(env, itemgetter(slice(own_act)), act)
        envs[i] = gym.wrappers.TransformObservation(env, partial(np.pad, pad_width=(0, n_obs - own_obs)), obs)
    return envs, np.array([np.arange(n_act) < own_act for _, own_act in sizes], dtype=np.float32)


class Batch(NamedTuple):
    """Views of preallocated tensors. `noise` is standard normal, for the smoothing of the target policy."""

    obs: torch.Tensor  # (B, obs)
    obs_actions: torch.Tensor  # (B, obs + act), observation and action in [-1, 1], the critics' input
    next_obs: torch.Tensor  # (B, obs)
    rewards: torch.Tensor  # (B,)
    terminated: torch.Tensor  # (B,), 1.0 where the episode ended, but not by its time limit
    mask: torch.Tensor  # (B, act), 1.0 for the actions that the transition's task has
    noise: torch.Tensor  # (B, act)


class ReplayBuffer:
    """A ring of transitions on the device, one row each: obs | action | next obs | reward | terminated | mask."""

    def __init__(self, capacity: int, n_obs: int, n_act: int, batch_size: int, seed: int, device: torch.device):
        columns = [n_obs, n_act, n_obs, 1, 1, n_act]
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
        memory = torch.cuda.mem_get_info(device)[0] / 2**30 if device.type == "cuda" else memory
        if (size := capacity * sum(columns) * 4 / 2**30) > memory:
            die(f"--buffer-size must fit in memory ({memory:.1f} GiB), got {capacity} ({size:.1f} GiB)")
        self.data = torch.empty(capacity, sum(columns), device=device)
        self.capacity, self.position, self.size = capacity, 0, 0
        self.rng = torch.Generator(device).manual_seed(seed)
        self.row = np.empty(sum(columns), dtype=np.float32)
        self.rows = torch.empty(batch_size, sum(columns), device=device)  # every batch is written here
        obs, _, next_obs, rewards, terminated, mask = self.rows.split(columns, dim=1)
        noise = torch.empty(batch_size, n_act, device=device)
        self.batch = Batch(obs, self.rows[:, : n_obs + n_act], next_obs, rewards[:, 0], terminated[:, 0], mask, noise)

    def add(self, obs: np.ndarray, action: np.ndarray, next_obs: np.ndarray, reward: float, terminated: bool, mask):
        np.concatenate((obs, action, next_obs, (reward, terminated), mask), out=self.row, casting="same_kind")
        self.data[self.position].copy_(torch.from_numpy(self.row), non_blocking=True)
        self.position = (self.position + 1) % self.capacity
        self.size = min(self.size + 1, self.capacity)

    def sample(self, oldest: float = 1.0, rng: torch.Generator | None = None) -> Batch:
        """A uniform batch from the oldest share of the buffer, written into the same tensors at every call."""
        rng = rng or self.rng
        first = self.position if self.size == self.capacity else 0  # the oldest row, also when the ring has wrapped
        count = max(1, int(oldest * self.size))
        index = (first + torch.randint(count, (len(self.rows),), generator=rng, device=rng.device)) % self.capacity
        torch.index_select(self.data, 0, index.to(self.data.device), out=self.rows)
        self.batch.noise.copy_(torch.randn(self.batch.noise.shape, generator=rng, device=rng.device))
        return self.batch

    def state_dict(self) -> dict:
        """The filled part only; on the CPU a view with a storage of its own length, so that saving copies nothing."""
        filled = torch.from_numpy(self.data[: self.size].cpu().numpy())
        return {"filled": filled, "position": self.position, "rng": self.rng.get_state()}

    def load_state_dict(self, state: dict) -> None:
        self.size, self.position = len(state["filled"]), state["position"]
        self.data[: self.size] = state["filled"]
        self.rng.set_state(state["rng"])


class Actor(MaskedMLP):
    """Deterministic tanh policy: (B, obs) -> (B, act) in [-1, 1]."""

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return torch.tanh(super().forward(obs))

    @torch.inference_mode()
    def act(self, obs: np.ndarray) -> np.ndarray:  # (obs,) -> (act,)
        return self(torch.as_tensor(obs, dtype=torch.float32).to(self.layers[0].weight.device)[None])[0].cpu().numpy()


class Critic(MaskedMLP):
    """One action-value function: (B, obs + act) -> (B,)."""

    def forward(self, obs_actions: torch.Tensor) -> torch.Tensor:
        return super().forward(obs_actions)[:, 0]


class Agent(nn.Module):
    """Actor, twin critics, their targets and optimisers. Both updates are pure functions of a batch, all in place."""

    def __init__(self, args: Args, n_obs: int, n_act: int, ne_seed: int, device: torch.device):
        super().__init__()
        self.ne_rng = torch.Generator().manual_seed(ne_seed)  # all that NE draws, so that it shifts nothing else
        self.args, deeper = args, (256,) * (args.scale + 1) if args.scale > 1 else None  # §B.1
        self.actor = Actor([n_obs, *(deeper or args.actor_hidden), n_act], args.layer_norm)
        sizes = [n_obs + n_act, *(deeper or args.critic_hidden), 1]
        self.critic = nn.ModuleList(Critic(sizes, args.layer_norm) for _ in range(2))
        for mlp in [self.actor] * args.ne_actor + [*self.critic] * args.ne_critic:
            topology.sparsify(mlp.layers, args.initial_density, args.sparse_init, self.ne_rng)  # §4.2
        self.target_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.to(device)
        self.mlps = {"actor": [self.actor], "critic": [*self.critic]}
        self.layers = {name: [layer for mlp in mlps for layer in mlp.layers] for name, mlps in self.mlps.items()}
        self.target_layers = [layer for mlp in (self.target_actor, *self.target_critic) for layer in mlp.layers]
        self.params = {name: [p for mlp in mlps for p in mlp.parameters()] for name, mlps in self.mlps.items()}
        self.online = [p.detach() for p in (*self.actor.parameters(), *self.critic.parameters())]
        self.targets = [*self.target_actor.parameters(), *self.target_critic.parameters()]
        self.optimizers = {name: topology.adam(p, args.learning_rate) for name, p in self.params.items()}
        self.online_layers = self.layers["actor"] + self.layers["critic"]
        topology.apply_masks(self.online_layers, self.target_layers)

    def critic_loss(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Eq. 3 with TD3's target smoothing and clipped double Q. Returns loss and mean Q."""
        args = self.args
        with torch.no_grad():
            noise = (batch.noise * args.policy_noise).clamp(-args.noise_clip, args.noise_clip)  # (B, act)
            next_actions = (self.target_actor(batch.next_obs) + noise).clamp(-1, 1) * batch.mask  # (B, act)
            next_obs_actions = torch.cat((batch.next_obs, next_actions), dim=1)  # (B, obs + act)
            next_q = torch.minimum(*[critic(next_obs_actions) for critic in self.target_critic])  # (B,)
            target_q = batch.rewards + args.gamma * (1 - batch.terminated) * next_q  # (B,)
        q1, q2 = (critic(batch.obs_actions) for critic in self.critic)  # (B,), (B,)
        return F.mse_loss(q1, target_q) + F.mse_loss(q2, target_q), q1.mean()

    def actor_loss(self, batch: Batch) -> torch.Tensor:
        """Eq. 4, deterministic policy gradient: minus the mean Q1 of the policy's own actions."""
        return -self.critic[0](torch.cat((batch.obs, self.actor(batch.obs) * batch.mask), dim=1)).mean()

    def critic_gradients(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
        loss, mean_q = self.critic_loss(batch)
        return loss.detach(), mean_q.detach(), torch.autograd.grad(loss, self.params["critic"])

    def actor_gradients(self, batch: Batch) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        loss = self.actor_loss(batch)
        return loss.detach(), torch.autograd.grad(loss, self.params["actor"])

    def update_critic(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        loss, mean_q, gradients = self.critic_gradients(batch)
        topology.masked_step(self.optimizers["critic"], self.layers["critic"], gradients)
        return loss, mean_q

    def update_actor(self, batch: Batch) -> torch.Tensor:
        """One step of the policy, then Polyak averaging of all targets."""
        loss, gradients = self.actor_gradients(batch)
        topology.masked_step(self.optimizers["actor"], self.layers["actor"], gradients)
        torch._foreach_lerp_(self.targets, self.online, self.args.tau)
        return loss

    @torch.no_grad()
    def hidden(self, batch: Batch) -> dict[str, list[list[torch.Tensor]]]:
        """Activations [(B, n), ...] of the hidden layers, for each MLP of each network."""
        inputs = {"actor": batch.obs, "critic": batch.obs_actions}
        return {name: [mlp.activations(inputs[name]) for mlp in mlps] for name, mlps in self.mlps.items()}


def compile_gradients(agent: Agent, batch: Batch) -> None:
    """One compiled graph for loss and backward pass of each network. Raises: SystemExit(1) if it cannot be compiled."""
    print("compiling losses and gradients: half a minute, less when it was done before")
    torch._dynamo.config.trace_autograd_ops = True
    compiled = partial(torch.compile, fullgraph=True, options={"cpp_wrapper": not batch.obs.is_cuda})
    agent.critic_gradients, agent.actor_gradients = map(compiled, (agent.critic_gradients, agent.actor_gradients))
    try:
        agent.critic_gradients(batch), agent.actor_gradients(batch)  # changes nothing but that they are compiled
    except Exception as e:  # of the compilers, which are many
        die(f"--compile needs a C++ compiler (Debian: g++, python3-dev): {str(e).splitlines()[0]}", code=1)
    torch.compiler.set_stance(skip_guard_eval_unsafe=True)  # neither shapes nor tensors change from now on


def review_threshold(epsilon: float, before: int | None, now: int, args: Args) -> float:
    """§4.2, next threshold from the critics' dormant neurons before and now. A batch is a review if u > epsilon."""
    if before is None:  # the first count
        return epsilon
    r = max(0, before - now) / max(before, 1)  # in [0, 1]: large while growth wakes neurons up, then near 0
    return max(args.review_floor, (1 - args.review_decay) * epsilon + args.review_decay * r)


def evaluate(actor: Actor, env: gym.Env, episodes: int, seed: int) -> list[float]:
    """Undiscounted returns of the deterministic policy; the same seeds, hence the same starts, at every call."""
    returns = []
    for episode in range(episodes):
        obs, _ = env.reset(seed=100 + seed + episode)  # not the seed of training
        done, total = False, 0.0
        while not done:
            obs, reward, terminated, truncated, _ = env.step(actor.act(obs))
            done, total = terminated or truncated, total + float(reward)
        returns.append(total)
    return returns


def continual_metrics(rows: list[dict]) -> dict[str, dict[str, float]]:
    """{metric: {task: value, ..., "mean": value}} from the rows of results.csv; defined in docs/ne_td3_continual.md."""
    ends = {(row["cycle"], row["task_trained"]): row["step"] for row in rows}  # the last step of each stretch
    returns = {(row["step"], row["task_evaluated"]): float(row["eval/return_mean"]) for row in rows}
    tasks, steps = list(dict.fromkeys(row["task_evaluated"] for row in rows)), [rows[0]["step"], *ends.values()]
    r = np.array([[returns[step, task] for task in tasks] for step in steps])  # (1 + stretches, tasks)
    performance = dict(zip(tasks, r[-1], strict=True))  # Lopez-Paz and Ranzato (2017)
    forgetting = dict(zip(tasks[:-1], r[1:-1].max(0, initial=-np.inf) - r[-1], strict=False))  # Chaudhry et al. (2018)
    transfer = dict(zip(tasks[1:], (r.diagonal() - r[0])[1:], strict=True))  # Lopez-Paz and Ranzato (2017)
    metrics = {"average performance": performance, "forgetting": forgetting, "forward transfer": transfer}
    return {name: line | {"mean": np.mean([*line.values()] or [math.nan])} for name, line in metrics.items()}


def save_checkpoint(path: Path, content: dict) -> None:
    """Atomic: temporary file, fsync, rename. Raises: SystemExit(1) if it cannot be written; the old one stays."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:
        temporary.unlink(missing_ok=True)
        kept = f"the one before is good: --resume {path.parent}" if path.exists() else "there is none before it"
        die(f"cannot write checkpoint {path}: {e.__context__ or e}; {kept}", code=1)


def load_checkpoint(path: Path) -> dict:
    """Raises: SystemExit(1) for a missing, damaged or foreign file."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if content["format"] == "ne_td3_continual 1":
            return content
    except FileNotFoundError:
        die(f"there is no checkpoint {path}", code=1)
    except Exception:  # torch raises many kinds for a damaged or foreign file
        pass
    die(f"{path} is damaged or not a checkpoint of {Path(__file__).name}", code=1)


def parse_args() -> tuple[Args, dict | None]:
    """The arguments and, with --resume or --evaluate, the checkpoint. Raises: SystemExit(2) for what cannot be."""
    args, checkpoint = tyro.cli(Args), None
    if args.evaluate is not None:
        checkpoint = load_checkpoint(Path(args.evaluate))
        asked = ("evaluate", "eval_episodes", "seed", "cuda")
        args = Args(**checkpoint["run"]["args"] | {name: getattr(args, name) for name in asked})
    elif args.resume is not None:
        checkpoint = load_checkpoint(Path(args.resume) / "checkpoint.pt")
        stored = Args(**checkpoint["run"]["args"])
        args = tyro.cli(Args, default=stored)  # so whatever differs now was given on the command line
        may_change = ("resume", "cudagraphs", "track", "wandb_project_name", "wandb_entity", "capture_video")
        for name, value in vars(stored).items():
            if name not in may_change and getattr(args, name) != value:
                die(f"--{name.replace('_', '-')} must be {value} or left out with --resume, got {getattr(args, name)}")
    for allowed, holds, names in RANGES:
        for name in names.split():
            if (value := getattr(args, name)) is not None and not holds(value):
                die(f"--{name.replace('_', '-')} must be {allowed}, got {value}")
    if args.batch_size > args.buffer_size:
        die(f"--batch-size must be at most --buffer-size ({args.buffer_size}), got {args.batch_size}")
    if args.grow_rate is None and args.initial_density < 1 and not args.initial_density <= args.final_density < 1:
        die(f"--final-density must be in [--initial-density ({args.initial_density}), 1), got {args.final_density}")
    if args.scale > 1 and not (args.actor_hidden == args.critic_hidden == (256, 128)):
        die(f"--scale must be 1 with --actor-hidden or --critic-hidden, got {args.scale}: it sets every width to 256")
    if args.steps_per_task and args.episodes_per_task:
        die(f"--steps-per-task must be left out with --episodes-per-task, got {args.steps_per_task}")
    args.steps_per_task = args.steps_per_task or (None if args.episodes_per_task else 250_000)
    return args, checkpoint


def open_run(args: Args, checkpoint: dict | None) -> tuple[Path, SummaryWriter]:
    """The run's folder and its TensorBoard writer: new ones, or those of --resume cut back to the checkpoint."""
    name = f"{'+'.join(args.tasks)}__{args.exp_name}__{args.seed}__{int(time.time())}"
    folder = Path(args.resume or args.run_dir or Path("runs") / name)
    try:
        if checkpoint is None:
            folder.mkdir(parents=True, exist_ok=True)
            if (folder / "args.json").exists():
                die(f"--run-dir must be a new folder, {folder} holds a run: continue it with --resume {folder}")
            (folder / "args.json").write_text(json.dumps(vars(args), indent=2) + "\n")
            (folder / "results.csv").touch()
        elif json.loads((folder / "args.json").read_text()) != json.loads(json.dumps(checkpoint["run"]["args"])):
            die(f"{folder / 'checkpoint.pt'} belongs to another run than {folder / 'args.json'}", code=1)
        else:
            os.truncate(folder / "results.csv", checkpoint["run"]["results_bytes"])
        threading.excepthook = lambda failure: None  # TensorBoard's thread: the same error is raised here as well
        if args.track:
            import wandb

            wandb.init(project=args.wandb_project_name, entity=args.wandb_entity, name=name, sync_tensorboard=True)
        return folder, SummaryWriter(str(folder), purge_step=checkpoint and checkpoint["run"]["step"] + 1)
    except ImportError:
        die("--track needs the package wandb: pip install wandb")
    except OSError as e:
        die(f"--run-dir must be a folder that can be written, got {folder}: {e}")


def main() -> None:
    # --- setup ---
    args, checkpoint = parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # a log file shows each row at once
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic kernels need
        torch.cuda.set_stream(torch.cuda.Stream())  # a graph cannot be captured on the default stream
        torch.use_deterministic_algorithms(args.torch_deterministic, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    os.environ.setdefault("MUJOCO_GL", "egl" if args.capture_video else "disable")  # training needs no OpenGL
    torch.set_num_threads(args.torch_threads)
    torch.set_flush_denormal(True)  # denormal numbers make long runs slow
    seeds = [int(s) for s in np.random.SeedSequence(args.seed).generate_state(4)]
    torch.manual_seed(seeds[0])  # initial weights
    noise_rng = np.random.default_rng(seeds[1])  # exploration
    envs, masks = make_tasks(args.tasks)
    (n_obs,), (n_act,) = envs[0].observation_space.shape, envs[0].action_space.shape
    agent = Agent(args, n_obs, n_act, seeds[3], device)
    buffer = ReplayBuffer(args.buffer_size, n_obs, n_act, args.batch_size, seeds[2], device)
    run = {"args": vars(args), "device": device.type, "step": 0, "updates": 0, "saved": 0, "results_bytes": 0}
    run |= {"returns": [], "epsilon": 1.0, "dormant": None, "reviewed": 0, "stretch": 0, "episodes": 0}
    run["losses"] = math.nan, math.nan
    run["counts"] = {f"ne/{name}/{change}": 0 for name in agent.layers for change in ("grown", "pruned")}
    obs, *_ = [env.reset(seed=args.seed)[0] for env in envs]
    if checkpoint is not None:
        try:
            agent.load_state_dict(checkpoint["agent"])
            topology.apply_masks(agent.online_layers, agent.target_layers)
        except RuntimeError:
            die(f"the checkpoint does not fit {args.tasks} with {n_obs} observations and {n_act} actions", code=1)
        run = checkpoint["run"]
    if args.evaluate:
        for env_id, env in zip(args.tasks, envs, strict=True):
            returns = evaluate(agent.actor, env, args.eval_episodes, args.seed)
            print(f"{env_id}, step {run['step']}: return {np.mean(returns):.1f}, std {np.std(returns):.1f}")
        return
    if run["stretch"] == args.cycles * len(args.tasks):
        return print(f"{args.resume} is finished, there is nothing to resume")
    numpy_rngs = noise_rng, *(env.unwrapped.np_random for env in envs)
    if checkpoint is not None:
        if run["device"] != device.type:
            die(f"--resume must continue on {run['device']}, where the run was started, got {device.type}")
        buffer.load_state_dict(checkpoint["buffer"])
        agent.ne_rng.set_state(checkpoint["ne_rng"])
        for name, adam in agent.optimizers.items():
            adam.load_state_dict(checkpoint["optimizers"][name])
        for rng, state in zip(numpy_rngs, checkpoint["numpy_rngs"], strict=True):
            rng.bit_generator.state = json.loads(state)
        obs, _ = envs[run["stretch"] % len(envs)].reset()
    if args.compile:
        compile_gradients(agent, buffer.batch)
    run_dir, writer = open_run(args, checkpoint)
    videos = run_dir / f"videos/from_step_{run['step']}" if args.capture_video else None
    eval_envs, _ = make_tasks(args.tasks, videos, args.eval_episodes)
    graphed = CudaGraph if device.type == "cuda" and args.cudagraphs else lambda update: update
    update_critic, update_actor = graphed(agent.update_critic), graphed(agent.update_actor)
    rounds, alpha, plan = topology.growth_schedule(args)
    densities = topology.planned_densities(args, rounds, alpha, args.cycles * args.tasks)
    print(f"{' '.join(args.tasks)}, seed {args.seed}, {device}: {run_dir}\n{plan}{densities}")
    print(f"replay buffer: {buffer.data.nbytes / 2**30:.2f} GiB when it is full")
    bar = tqdm(total=args.total_timesteps, initial=run["step"], unit=" steps", disable=None)
    stops, hint = [], b"\nfinishing the episode in hand, then saving (once more: stop at once)\n"
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda n, _: os._exit(128 + n) if stops else stops.append(n) or os.write(2, hint))

    def log(values: dict) -> None:
        for key, value in values.items():
            writer.add_scalar(key, float(value), run["step"])

    def stop_unless_finite(values) -> None:
        if not np.isfinite(values).all():
            kept = f"the checkpoint of step {run['saved']} is kept" if run["saved"] else "there is no checkpoint yet"
            die(f"loss is NaN or infinite at step {run['step']}; {kept} in {run_dir}", code=1)

    def save(finished: bool = False) -> None:
        stop_unless_finite(float(qf_loss) if run["updates"] else 0.0)
        run["saved"], run["losses"] = run["step"], (float(qf_loss), float(qf_values))
        writer.flush()
        content = {"format": "ne_td3_continual 1", "run": run, "agent": agent.state_dict()}
        content |= {"ne_rng": agent.ne_rng.get_state(), "buffer": None if finished else buffer.state_dict()}
        content["optimizers"] = {name: adam.state_dict() for name, adam in agent.optimizers.items()}
        content["numpy_rngs"] = [json.dumps(r.bit_generator.state, default=np.ndarray.tolist) for r in numpy_rngs]
        save_checkpoint(run_dir / "checkpoint.pt", content)

    def evaluate_tasks() -> str:
        """One row of results.csv for each task; returns the densities, to be shown."""
        row = {"charts/episodic_return": np.mean(run["returns"] or [math.nan])}
        row |= {"losses/qf_loss": float(qf_loss), "losses/qf_values": float(qf_values)}
        for name, hidden in agent.hidden(buffer.sample(rng=torch.Generator().manual_seed(run["step"]))).items():
            row |= topology.metrics(f"ne/{name}", agent.layers[name], sum(hidden, []))
        if not buffer.size:  # before the first step there are no activations
            row |= {key: math.nan for key in row if key.startswith("ne/") and not key.endswith("/density")}
        row |= run["counts"] | {"ne/review_epsilon": run["epsilon"]}
        row["ne/review_share"] = run["reviewed"] / max(run["updates"], 1)
        trained, rows = {"step": run["step"], "cycle": cycle + 1, "task/id": task, "task_trained": args.tasks[task]}, []
        log({key: value for key, value in (row | trained).items() if key.startswith(("ne/", "task/"))})
        for name, env in zip(args.tasks, eval_envs, strict=True):
            returns = evaluate(agent.actor, env, args.eval_episodes, args.seed)
            scores = {"eval/return_mean": np.mean(returns), "eval/return_std": np.std(returns)}
            rows.append([*(columns := trained | {"task_evaluated": name} | scores | row).values()])
            log({f"eval/{name}/return_mean": np.mean(returns)})
            bar.write(f"step {run['step']:,}: {name} return {np.mean(returns):.0f} +- {np.std(returns):.0f}")
        with open(run_dir / "results.csv", "a", newline="") as file:
            csv.writer(file).writerows(rows if file.tell() else [columns, *rows])
            run["returns"], run["results_bytes"] = [], file.tell()
        return f"density {row['ne/actor/density']:.0%} actor, {row['ne/critic/density']:.0%} critics"

    # --- the loop ---
    gc.freeze()  # what exists by now stays: garbage collection need not look at it again
    (qf_loss, qf_values), actor_loss = run["losses"], math.nan
    episodic_return, episodic_length, start, first_step = 0.0, 0, time.time(), run["step"]
    cycle, task = divmod(run["stretch"], len(envs))
    status = "" if run["step"] else evaluate_tasks()  # the untrained policy
    while cycle < args.cycles:
        step = run["step"] = run["step"] + 1
        # act
        if step <= args.learning_starts:
            action = noise_rng.uniform(-1, 1, n_act)
        else:
            action = agent.actor.act(obs) + noise_rng.normal(0, args.exploration_noise, n_act)
            stop_unless_finite(action)
        action = action.clip(-1, 1).astype(np.float32) * masks[task]
        # update; queued before the environment steps, so that on CUDA both run at the same time
        if step > args.learning_starts and buffer.size >= min(args.batch_size, args.learning_starts):
            run["updates"] += 1
            # §4.2, experience review
            review = torch.rand((), generator=agent.ne_rng).item() > run["epsilon"]
            run["reviewed"] += review
            batch = buffer.sample(args.review_fraction if review else 1.0)
            # critic, then actor and targets
            qf_loss, qf_values = update_critic(batch)
            if run["updates"] % args.policy_frequency == 0:
                actor_loss = update_actor(batch)
            if run["updates"] % args.review_interval == 0:
                dormant = topology.count_dormant(sum(agent.hidden(batch)["critic"], []), args.review_tau)
                run["epsilon"] = review_threshold(run["epsilon"], run["dormant"], dormant, args)
                run["dormant"] = dormant
            if args.redo_interval and run["updates"] % args.redo_interval == 0:
                topology.redo(agent.mlps, agent.hidden(batch), args.redo_tau, agent.optimizers, agent.ne_rng)
        # step and store
        next_obs, reward, terminated, truncated, _ = envs[task].step(action)
        buffer.add(obs, action, next_obs, reward, terminated, masks[task])
        obs = next_obs
        episodic_return, episodic_length = episodic_return + float(reward), episodic_length + 1
        run["episodes"] += int(terminated or truncated)  # of this task in this cycle
        task_done = run["episodes"] == args.episodes_per_task or step % (args.steps_per_task or math.inf) == 0
        # topology
        if step in rounds:
            for key, count in topology_round(agent, buffer.sample(rng=agent.ne_rng), step, alpha).items():
                run["counts"][key] += count
            for name, layer in ((f"{n}/{i}", layer) for n in agent.layers for i, layer in enumerate(agent.layers[n])):
                writer.add_image(f"masks/{name}", layer.mask[None].float(), step)
        if args.reset_interval and step % args.reset_interval == 0 and step < args.total_timesteps:
            topology.reset(agent.mlps, agent.targets, agent.optimizers, agent.ne_rng)
        # log
        if step % 1_000 == 0 and run["updates"]:
            losses = {"losses/qf_loss": qf_loss, "losses/qf_values": qf_values, "losses/actor_loss": actor_loss}
            log({"charts/SPS": (step - first_step) / (time.time() - start)} | losses)
        # evaluate
        if step % args.eval_frequency == 0 or task_done:
            status = evaluate_tasks()
        # episode end: log, next task, checkpoint, reset
        bar.update()
        if terminated or truncated or task_done:
            log({"charts/episodic_return": episodic_return, "charts/episodic_length": episodic_length})
            run["returns"].append(episodic_return)
            bar.set_postfix_str(f"return {episodic_return:.0f}, {status}", refresh=False)
            if task_done:
                run |= {"stretch": run["stretch"] + 1, "episodes": 0, "returns": []}
                cycle, task = divmod(run["stretch"], len(envs))
                if args.clear_buffer:
                    buffer.position = buffer.size = 0
            if stops or step // args.checkpoint_frequency > run["saved"] // args.checkpoint_frequency:
                save()
            if stops:
                print(f"stopped at step {step}; continue with: python {sys.argv[0]} --resume {run_dir}")
                raise SystemExit(0 if stops[0] == signal.SIGTERM else 130)
            episodic_return, episodic_length = 0.0, 0
            obs, _ = envs[task].reset()

    save(finished=True)
    for part in (bar, writer, *envs, *eval_envs):
        part.close()
    speed = (step - first_step) / (time.time() - start)
    print(f"{status} at {speed:.0f} steps per second")
    with open(run_dir / "results.csv", newline="") as file:
        table = continual_metrics(list(csv.DictReader(file)))
    print(" " * 20 + "".join(f"{task:>16s}" for task in table["average performance"]))
    for name, line in table.items():
        print(f"{name:20s}" + "".join(f"{line.get(task, math.nan):16.1f}" for task in table["average performance"]))


if __name__ == "__main__":
    try:
        main()
    except (KeyboardInterrupt, BrokenPipeError):
        raise SystemExit(130) from None
    except OSError as e:  # a full disk, a folder that went away
        die(f"cannot write: {e}; make room and continue the last checkpoint with --resume", code=1)
