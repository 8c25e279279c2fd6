"""Neuroplastic Expansion (NE) on TD3, continuous control from states, in one file.

Paper: Neuroplastic Expansion in Deep Reinforcement Learning, arXiv 2410.07994; §, Eq. and Table below refer to it.
Run:   python ne_td3_continuous.py --env-id HalfCheetah-v5 --seed 1    (--help lists all flags)
       2.5 hours per million steps on one CPU core; a return of 5,500 to 6,000 after 200,000 steps of a run that long
With --initial-density 1 --review-floor 1 it is TD3, bit for bit. Deviations from the paper, numbered: docs/ne_td3.md
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
from collections import Counter
from dataclasses import dataclass
from functools import partial
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


@dataclass
class Args:
    # --- run ---
    exp_name: str = "ne_td3_continuous"  # name of this experiment, part of the run's name
    env_id: str = "HalfCheetah-v5"  # Gymnasium id of a task with flat Box observations and bounded Box actions
    seed: int = 1  # seed of everything random, >= 0
    total_timesteps: int = 1_000_000  # length of the run in environment steps
    cuda: bool = True  # use the GPU if there is one
    cudagraphs: bool = True  # on CUDA: capture the two updates once and replay them; off: eager
    compile: bool = False  # compile losses and gradients: faster on a CPU after half a minute, needs a C++ compiler
    torch_threads: int = 1  # CPU threads of torch; networks this small run best with one and several runs side by side
    torch_deterministic: bool = True  # on CUDA: deterministic kernels where there are any
    run_dir: str | None = None  # where all files go; default runs/{env_id}__{exp_name}__{seed}__{unix_time}
    track: bool = False  # also log to Weights & Biases (needs `pip install wandb`)
    wandb_project_name: str = "neuroplastic-expansion"  # project on Weights & Biases
    wandb_entity: str | None = None  # team on Weights & Biases
    capture_video: bool = False  # record the first episode of each evaluation (needs moviepy and OpenGL)
    eval_frequency: int = 5_000  # environment steps between two rows of results.csv (TD3 reference code)
    eval_episodes: int = 10  # per evaluation: deterministic policy, own environment and seed (TD3 reference code)
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


def die(message: str, code: int = 2) -> NoReturn:
    """One clear line and a non-zero exit: 2 for a mistake on the command line, 1 for what went wrong later."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


RANGES = [  # of each flag; None, where it is a default, is not checked
    ("at least 0", lambda x: x >= 0, "seed exploration_noise policy_noise noise_clip weight_clip review_tau"),
    ("at least 0", lambda x: x >= 0, "redo_interval redo_tau reset_interval"),
    ("at least 1", lambda x: x >= 1, "total_timesteps torch_threads eval_frequency eval_episodes batch_size"),
    ("at least 1", lambda x: x >= 1, "checkpoint_frequency learning_starts buffer_size policy_frequency"),
    ("at least 1", lambda x: x >= 1, "grow_interval growth_end review_interval"),
    ("in [0, 1]", lambda x: 0 <= x <= 1, "gamma tau grow_rate review_decay review_floor"),
    ("in (0, 1]", lambda x: 0 < x <= 1, "learning_rate initial_density review_fraction"),
    ("in [0, 1), so that every round grows on net", lambda x: 0 <= x < 1, "prune_ratio"),
    ("widths of at least 1", lambda x: min(x, default=0) >= 1, "actor_hidden critic_hidden"),
    ("1, 2, 3 or 4", lambda x: x in (1, 2, 3, 4), "scale"),
]


def make_env(env_id: str, videos: Path | None = None, episodes: int = 1) -> gym.Env:
    """One environment with actions in [-1, 1], rescaled to its own bounds; `videos` gets every `episodes`-th episode.

    Raises: SystemExit(2) where it cannot be made, or has not flat Box observations and bounded flat Box actions.
    """
    try:
        env = gym.make(env_id, render_mode="rgb_array" if videos else None)
        if videos:
            env.reset()
            env.render()
            env = gym.wrappers.RecordVideo(env, str(videos), episode_trigger=lambda episode: episode % episodes == 0)
    except Exception as e:  # each environment and each renderer has errors of its own
        renders = os.environ.get("MUJOCO_GL") != "disable" and not isinstance(e, gym.error.UnregisteredEnv)
        flag = "--capture-video needs moviepy and OpenGL (Debian: libegl1, libgl1)" if renders else "--env-id"
        die(f"{flag}: cannot make {env_id}: {' '.join(str(e).split())}")
    obs, act = env.observation_space, env.action_space
    flat = all(isinstance(space, gym.spaces.Box) and len(space.shape) == 1 for space in (obs, act))
    if not flat or obs.dtype.kind != "f" or not np.isfinite(act.high - act.low).all():
        die(f"--env-id needs flat Box observations of floats, flat Box actions with finite bounds; got {obs} and {act}")
    return gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))


class Batch(NamedTuple):
    """Views of preallocated tensors. `noise` is standard normal, for the smoothing of the target policy."""

    obs: torch.Tensor  # (B, obs)
    obs_actions: torch.Tensor  # (B, obs + act), observation and action in [-1, 1], the critics' input
    next_obs: torch.Tensor  # (B, obs)
    rewards: torch.Tensor  # (B,)
    terminated: torch.Tensor  # (B,), 1.0 where the episode ended, but not by its time limit
    noise: torch.Tensor  # (B, act)


class ReplayBuffer:
    """A ring of transitions on the device, one float32 row each: obs | action | next obs | reward | terminated."""

    def __init__(self, capacity: int, n_obs: int, n_act: int, batch_size: int, seed: int, device: torch.device):
        columns = [n_obs, n_act, n_obs, 1, 1]
        try:
            self.data = torch.empty(capacity, sum(columns), device=device)
        except RuntimeError:
            die(f"--buffer-size must fit in memory, got {capacity} ({capacity * sum(columns) * 4 / 2**30:.1f} GiB)")
        self.capacity, self.position, self.size = capacity, 0, 0
        self.rng = torch.Generator(device).manual_seed(seed)
        self.row = np.empty(sum(columns), dtype=np.float32)
        self.rows = torch.empty(batch_size, sum(columns), device=device)  # every batch is written here
        obs, _, next_obs, rewards, terminated = self.rows.split(columns, dim=1)
        noise = torch.empty(batch_size, n_act, device=device)
        self.batch = Batch(obs, self.rows[:, : n_obs + n_act], next_obs, rewards[:, 0], terminated[:, 0], noise)

    def add(self, obs: np.ndarray, action: np.ndarray, next_obs: np.ndarray, reward: float, terminated: bool) -> None:
        np.concatenate((obs, action, next_obs, (reward, terminated)), out=self.row, casting="same_kind")
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


class MaskedLinear(nn.Linear):
    """A linear layer whose weight (out, in) is exactly 0 wherever the boolean mask (out, in) is False.

    `forward` ignores the mask, so autograd gives the dense gradient, which growth looks at; the optimiser's step then
    multiplies it by `keep`. `bound` (out, in) limits |weight|: infinite, except for neurons that were reset.
    """

    def __init__(self, n_in: int, n_out: int):
        super().__init__(n_in, n_out)
        self.initial_density, self.clipped = 1.0, False
        self.register_buffer("mask", torch.ones(n_out, n_in, dtype=torch.bool))
        self.register_buffer("keep", torch.ones(n_out, n_in))  # the mask as floats: 8 times faster to multiply by
        self.register_buffer("bound", torch.full((n_out, n_in), math.inf))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, in) -> (B, out); compiled, bias and ReLU share a loop
        return x @ self.weight.t() + self.bias if torch.compiler.is_compiling() else super().forward(x)


class MLP(nn.Module):
    """Hidden layers (masked linear, LayerNorm if asked for, ReLU) and a masked linear output."""

    def __init__(self, sizes: list[int], layer_norm: bool):
        super().__init__()
        self.layers = nn.ModuleList(MaskedLinear(n_in, n_out) for n_in, n_out in zip(sizes, sizes[1:], strict=False))
        self.norms = nn.ModuleList(nn.LayerNorm(n) if layer_norm else nn.Identity() for n in sizes[1:-1])

    def activations(self, x: torch.Tensor) -> list[torch.Tensor]:
        """(B, sizes[0]) -> [(B, n), ...] of the hidden layers."""
        hidden = []
        for layer, norm in zip(self.layers, self.norms, strict=False):
            x = F.relu(norm(layer(x)), inplace=True)
            hidden.append(x)
        return hidden

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[-1](self.activations(x)[-1])  # (B, sizes[-1])


class Actor(MLP):
    """Deterministic tanh policy: (B, obs) -> (B, act) in [-1, 1]."""

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return torch.tanh(super().forward(obs))

    @torch.inference_mode()
    def act(self, obs: np.ndarray) -> np.ndarray:  # (obs,) -> (act,)
        return self(torch.as_tensor(obs, dtype=torch.float32).to(self.layers[0].weight.device)[None])[0].cpu().numpy()


class Critic(MLP):
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
            next_actions = (self.target_actor(batch.next_obs) + noise).clamp(-1, 1)  # (B, act)
            next_obs_actions = torch.cat((batch.next_obs, next_actions), dim=1)  # (B, obs + act)
            next_q = torch.minimum(*[critic(next_obs_actions) for critic in self.target_critic])  # (B,)
            target_q = batch.rewards + args.gamma * (1 - batch.terminated) * next_q  # (B,)
        q1, q2 = (critic(batch.obs_actions) for critic in self.critic)  # (B,), (B,)
        return F.mse_loss(q1, target_q) + F.mse_loss(q2, target_q), q1.mean()

    def actor_loss(self, batch: Batch) -> torch.Tensor:
        """Eq. 4, deterministic policy gradient: minus the mean Q1 of the policy's own actions."""
        return -self.critic[0](torch.cat((batch.obs, self.actor(batch.obs)), dim=1)).mean()

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


class CudaGraph:
    """Captures an update once and replays it. `batch` must be the same tensors at every call."""

    def __init__(self, update):
        self.update, self.calls, self.graph = update, 0, torch.cuda.CUDAGraph()

    def __call__(self, batch: Batch):
        self.calls += 1
        if self.calls <= 3:  # plain updates: the warm-up that a capture needs
            return self.update(batch)
        if self.calls == 4:
            with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):  # records without running
                self.losses = self.update(batch)
        self.graph.replay()
        return self.losses


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


def topology_round(agent: Agent, batch: Batch, step: int, alpha: float) -> dict[str, int]:
    """§4.2, Eq. 2: grows, then prunes and resets every NE network in place. Returns {"ne/{network}/grown": n, ...}."""
    args, counts, hidden = agent.args, Counter(), agent.hidden(batch)
    fraction = topology.growth_fraction(alpha, step, args.growth_end or args.total_timesteps)
    losses = {"actor": agent.actor_loss(batch), "critic": agent.critic_loss(batch)[0]}  # no step is taken with them
    for name, optimizer in agent.optimizers.items():
        for mlp, activations in zip(agent.mlps[name], hidden[name], strict=True):
            # Elastic neuron generation
            scores = torch.autograd.grad(losses[name], [layer.weight for layer in mlp.layers], retain_graph=True)
            if args.growth == "random":
                scores = [torch.rand(g.shape, generator=agent.ne_rng).to(g.device) for g in scores]
            grown = topology.grow(mlp.layers, scores, fraction, optimizer)
            # Dormant neuron pruning
            budget = int(args.prune_ratio * grown) if args.prune else 0
            pruned = topology.prune(mlp.layers, activations, budget, optimizer, args.weight_clip, agent.ne_rng)
            counts.update({f"ne/{name}/grown": grown, f"ne/{name}/pruned": pruned})
    topology.apply_masks(agent.online_layers, agent.target_layers)
    return counts


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
        if content["format"] == "ne_td3_continuous 1":
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
    return args, checkpoint


def open_run(args: Args, checkpoint: dict | None) -> tuple[Path, SummaryWriter]:
    """The run's folder and its TensorBoard writer: new ones, or those of --resume cut back to the checkpoint."""
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"
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
    env = make_env(args.env_id)
    n_obs, n_act = env.observation_space.shape[0], env.action_space.shape[0]
    agent = Agent(args, n_obs, n_act, seeds[3], device)
    buffer = ReplayBuffer(args.buffer_size, n_obs, n_act, args.batch_size, seeds[2], device)
    run = {"args": vars(args), "device": device.type, "step": 0, "updates": 0, "saved": 0, "results_bytes": 0}
    run |= {"returns": [], "epsilon": 1.0, "dormant": None, "reviewed": 0}
    run["counts"] = {f"ne/{name}/{change}": 0 for name in agent.layers for change in ("grown", "pruned")}
    obs, _ = env.reset(seed=args.seed)
    if checkpoint is not None:
        try:
            agent.load_state_dict(checkpoint["agent"])
            topology.apply_masks(agent.online_layers, agent.target_layers)
        except RuntimeError:
            die(f"the checkpoint does not fit {args.env_id} with {n_obs} observations and {n_act} actions", code=1)
        run = checkpoint["run"]
    if args.evaluate:
        returns = evaluate(agent.actor, env, args.eval_episodes, args.seed)
        return print(f"{args.env_id}, step {run['step']}: return {np.mean(returns):.1f}, std {np.std(returns):.1f}")
    if run["step"] == args.total_timesteps:
        return print(f"{args.resume} is finished, there is nothing to resume")
    numpy_rngs = noise_rng, env.unwrapped.np_random
    if checkpoint is not None:
        if run["device"] != device.type:
            die(f"--resume must continue on {run['device']}, where the run was started, got {device.type}")
        buffer.load_state_dict(checkpoint["buffer"])
        agent.ne_rng.set_state(checkpoint["ne_rng"])
        for name, adam in agent.optimizers.items():
            adam.load_state_dict(checkpoint["optimizers"][name])
        for rng, state in zip(numpy_rngs, checkpoint["numpy_rngs"], strict=True):
            rng.bit_generator.state = json.loads(state)
        obs, _ = env.reset()
    if args.compile:
        compile_gradients(agent, buffer.batch)
    run_dir, writer = open_run(args, checkpoint)
    videos = run_dir / f"videos/from_step_{run['step']}" if args.capture_video else None
    eval_env = make_env(args.env_id, videos, args.eval_episodes)
    graphed = CudaGraph if device.type == "cuda" and args.cudagraphs else lambda update: update
    update_critic, update_actor = graphed(agent.update_critic), graphed(agent.update_actor)
    rounds, alpha, plan = topology.growth_schedule(args)
    print(f"{args.env_id}, seed {args.seed}, {device}: {run_dir}\n{plan}")
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
        run["saved"] = run["step"]
        writer.flush()
        content = {"format": "ne_td3_continuous 1", "run": run, "agent": agent.state_dict()}
        content |= {"ne_rng": agent.ne_rng.get_state(), "buffer": None if finished else buffer.state_dict()}
        content["optimizers"] = {name: adam.state_dict() for name, adam in agent.optimizers.items()}
        content["numpy_rngs"] = [json.dumps(r.bit_generator.state, default=np.ndarray.tolist) for r in numpy_rngs]
        save_checkpoint(run_dir / "checkpoint.pt", content)

    # --- the loop ---
    gc.freeze()  # what exists by now stays: garbage collection need not look at it again
    qf_loss = qf_values = actor_loss = math.nan
    episodic_return, episodic_length, status, start, first_step = 0.0, 0, "", time.time(), run["step"]
    for step in range(run["step"] + 1, args.total_timesteps + 1):
        run["step"] = step
        # act
        if step <= args.learning_starts:
            action = noise_rng.uniform(-1, 1, n_act)
        else:
            action = agent.actor.act(obs) + noise_rng.normal(0, args.exploration_noise, n_act)
            stop_unless_finite(action)
        action = action.clip(-1, 1).astype(np.float32)
        # update; queued before the environment steps, so that on CUDA both run at the same time
        if step > args.learning_starts:
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
        next_obs, reward, terminated, truncated, _ = env.step(action)
        buffer.add(obs, action, next_obs, reward, terminated)
        obs = next_obs
        episodic_return, episodic_length = episodic_return + float(reward), episodic_length + 1
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
        if step % args.eval_frequency == 0 or step == args.total_timesteps:
            returns = evaluate(agent.actor, eval_env, args.eval_episodes, args.seed)
            row = {"step": step, "eval/return_mean": np.mean(returns), "eval/return_std": np.std(returns)}
            row["charts/episodic_return"] = np.mean(run["returns"] or [math.nan])
            row |= {"losses/qf_loss": float(qf_loss), "losses/qf_values": float(qf_values)}
            for name, hidden in agent.hidden(buffer.sample(rng=torch.Generator().manual_seed(step))).items():
                row |= topology.metrics(f"ne/{name}", agent.layers[name], sum(hidden, []))
            row |= run["counts"] | {"ne/review_epsilon": run["epsilon"]}
            row["ne/review_share"] = run["reviewed"] / max(run["updates"], 1)
            log({key: value for key, value in row.items() if key.startswith(("eval/", "ne/"))})
            status = f"density {row['ne/actor/density']:.0%} actor, {row['ne/critic/density']:.0%} critics"
            bar.write(f"step {step:,}: return {np.mean(returns):.0f} +- {np.std(returns):.0f}, {status}")
            with open(run_dir / "results.csv", "a", newline="") as file:
                csv.writer(file).writerows([row.values()] if file.tell() else [row.keys(), row.values()])
                run["returns"], run["results_bytes"] = [], file.tell()
        # episode end: log, checkpoint, reset
        bar.update()
        if terminated or truncated:
            log({"charts/episodic_return": episodic_return, "charts/episodic_length": episodic_length})
            run["returns"].append(episodic_return)
            bar.set_postfix_str(f"return {episodic_return:.0f}, {status}", refresh=False)
            if stops or step // args.checkpoint_frequency > run["saved"] // args.checkpoint_frequency:
                save()
            if stops:
                print(f"stopped at step {step}; continue with: python {sys.argv[0]} --resume {run_dir}")
                raise SystemExit(0 if stops[0] == signal.SIGTERM else 130)
            episodic_return, episodic_length = 0.0, 0
            obs, _ = env.reset()

    save(finished=True)
    for part in (bar, writer, env, eval_env):
        part.close()
    speed = (step - first_step) / (time.time() - start)
    print(f"return {row['eval/return_mean']:.1f} +- {row['eval/return_std']:.1f} at {speed:.0f} steps per second")
    for name in agent.optimizers:
        print(f"{name:6s} density {row[f'ne/{name}/density']:.1%}, active ratio {row[f'ne/{name}/active_ratio']:.1%}")


if __name__ == "__main__":
    try:
        main()
    except (KeyboardInterrupt, BrokenPipeError):
        raise SystemExit(130) from None
    except OSError as e:  # a full disk, a folder that went away
        die(f"cannot write: {e}; make room and continue the last checkpoint with --resume", code=1)
