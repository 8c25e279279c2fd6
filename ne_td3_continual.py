"""Neuroplastic Expansion (NE) on TD3, a sequence of tasks (§5.2), in one file.

Paper: Neuroplastic Expansion in Deep Reinforcement Learning, arXiv 2410.07994.
       §, Eq. and Table refer to it; docs/ne_td3_continual.md has definitions and deviations.
Run:   python ne_td3_continual.py --seed 1    (--help lists all flags)
       three million steps, up to ten hours on one CPU core
With one task it is ne_td3_continuous.py, bit for bit, and with --initial-density 1
--review-floor 1 it is TD3.

Part one is the algorithm, to be read beside the paper. Part two, from `die` to the end,
surrounds a run, knows nothing of the algorithm, and is the same text in every script.
"""

import copy
import csv
import errno
import fcntl
import functools
import gc
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import zipfile
import zlib
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass
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
class RunArgs:
    """What is run, and what it writes."""

    exp_name: str = "ne_td3_continual"
    """name of this experiment, part of the run's name"""
    tasks: tuple[str, ...] = ("HalfCheetah-v5", "Humanoid-v5", "Ant-v5", "Hopper-v5")
    """Gymnasium ids, or module:id, of tasks with flat Boxes of floats, in order (§5.2)"""
    cycles: int = 3
    """how often the sequence of tasks is run through (§5.2)"""
    steps_per_task: int | None = None
    """environment steps of a task in a cycle; default: 250,000 (ours)"""
    episodes_per_task: int | None = None
    """episodes of a task in a cycle, in place of --steps-per-task (§5.2)"""
    clear_buffer: bool = False
    """empty the replay buffer when the task changes"""
    seed: int = 1
    """seed of everything random"""
    cuda: bool = True
    """use the GPU if there is one"""
    cudagraphs: bool = True
    """on CUDA: capture the two updates once and replay them"""
    compile: bool = False
    """compile losses and gradients; needs a C++ compiler and half a minute"""
    torch_threads: int = 1
    """CPU threads of torch; networks this small run best with one"""
    run_dir: str | None = None
    """where all files go; default: runs/{tasks}__{exp_name}__{seed}__{unix_time}"""
    eval_frequency: int = 10_000
    """environment steps between two evaluations, each on every task"""
    eval_episodes: int = 10
    """episodes per task and evaluation, deterministic policy (TD3 reference code)"""
    max_episode_steps: int = 10_000
    """longer episodes are cut off; far above the limits of all known tasks"""
    checkpoint_frequency: int = 50_000
    """environment steps between checkpoints, each at the next episode end"""
    resume: str | None = None
    """folder of an interrupted run: continue it exactly, with its own arguments"""
    track: bool = False
    """log to Weights and Biases as well"""
    wandb_project_name: str = "neuroplastic-expansion"
    """project of --track"""
    wandb_entity: str | None = None
    """team of --track"""

    @property
    def task_lengths(self) -> list[int]:
        """Environment steps of each task in a cycle.

        With --episodes-per-task, if no episode ends before its time limit.
        """
        if self.episodes_per_task is None:
            return [self.steps_per_task] * len(self.tasks)
        lengths = []
        for task in self.tasks:
            spec = gym.spec(task.split(":")[-1])  # without the module
            limit = spec.max_episode_steps or self.max_episode_steps
            longest = min(limit, self.max_episode_steps)
            lengths.append(self.episodes_per_task * longest)
        return lengths

    @property
    def total_timesteps(self) -> int:
        """Length of the run in environment steps; with --episodes-per-task at most."""
        return self.cycles * sum(self.task_lengths)


@dataclass
class TD3Args:
    """Fujimoto et al. 2018; values of the reference code, widths of the paper."""

    learning_rate: float = 3e-4
    """Adam's step size, actor and critics"""
    batch_size: int = 256
    """transitions per update"""
    buffer_size: int = 1_000_000
    """transitions kept"""
    gamma: float = 0.99
    """discount factor per step"""
    tau: float = 0.005
    """Polyak step of the target networks, per actor update"""
    learning_starts: int = 25_000
    """environment steps with uniform random actions before the first update"""
    exploration_noise: float = 0.1
    """standard deviation of the exploration noise; unit: half the action range"""
    policy_noise: float = 0.2
    """standard deviation of the target policy's smoothing; unit: half the action range"""
    noise_clip: float = 0.5
    """bound of the smoothing noise; unit: half the action range"""
    policy_frequency: int = 2
    """critic updates per update of actor and targets"""
    actor_hidden: tuple[int, ...] = (256, 128)
    """widths of the actor's hidden layers (Table 1)"""
    critic_hidden: tuple[int, ...] = (256, 128)
    """widths of the hidden layers of each critic (Table 1)"""


@dataclass
class NEArgs:
    """Neuroplastic Expansion, and what it is combined with (§C)."""

    ne_actor: bool = True
    """NE on the actor; off: dense from the start (Figure 7b)"""
    ne_critic: bool = True
    """NE on both critics; off: dense from the start (Figure 7b)"""
    initial_density: float = 0.25
    """D, share of connections active at the start (ours); 1: dense, nothing to grow"""
    sparse_init: Literal["erdos-renyi", "uniform"] = "erdos-renyi"
    """how D is spread over the layers (§4.2)"""
    growth: Literal["gradient", "random", "none"] = "gradient"
    """largest |gradient| (§4.2), any (§4.1), static"""
    grow_interval: int | None = None
    """Delta T, environment steps between rounds (ours); default: run / 100"""
    grow_rate: float | None = None
    """alpha of the cosine (§4.2); default: solved for --final-density (ours)"""
    final_density: float = 0.95
    """density to reach at the end of growth when alpha is solved (ours)"""
    growth_end: int | None = None
    """T_end, environment step after which nothing grows (§B.2); default: the last"""
    prune: bool = True
    """prune and reset dormant neurons after growing (§4.2)"""
    prune_ratio: float = 0.4
    """omega, share of all that has grown that may be pruned (authors' code)"""
    weight_clip: float = 2.0
    """kappa: reset neurons stay within kappa / sqrt(n_in) (§B.2; value ours); 0: off"""
    review_fraction: float = 0.25
    """oldest share of the buffer that is reviewed (§4.2)"""
    review_rule: Literal["slope", "level"] = "slope"
    """review more as the dormant count stops falling, or the higher it is (ours)"""
    review_interval: int | None = None
    """c, updates between counts of dormant neurons (ours); default: all / 1,000"""
    review_decay: float | None = None
    """weight of the newest count in epsilon (ours); default: floor reached at half the run"""
    review_floor: float = 0.65
    """slope's least epsilon: at most 1 - floor of the batches are reviews (ours); 1: none"""
    review_tau: float = 0.1
    """for the review, a neuron is dormant at a score (Eq. 1) of at most this (ours)"""
    layer_norm: bool = False
    """NE + LayerNorm (Lyle et al. 2024): Linear, LayerNorm, ReLU in every hidden layer"""
    redo_interval: int = 0
    """NE + ReDo (Sokar et al. 2023): updates between two; 0: off"""
    redo_tau: float = 0.1
    """NE + ReDo: a neuron is dormant at a score (Eq. 1) of at most this"""
    reset_interval: int = 0
    """NE + Reset (Nikishin et al. 2022): environment steps between two; 0: off"""


@dataclass
class Args(NEArgs, TD3Args, RunArgs):
    """All flags."""


def set_length(args) -> None:
    """Fills in, in place, how long a task lasts. Raises: SystemExit(2)."""
    if len(set(args.tasks)) < len(args.tasks):
        die(f"--tasks must be one task or more, each once, got {' '.join(args.tasks)}")
    for task in args.tasks:
        if task.split(":")[-1] not in gym.registry:
            die(f"--tasks must name versions, as in Ant-v5, got {task}")
    if args.episodes_per_task is None:
        args.steps_per_task = args.steps_per_task or 250_000
    elif args.steps_per_task is not None:
        got = args.steps_per_task
        die(f"--steps-per-task must be left out with --episodes-per-task, got {got}")
    if args.total_timesteps > 10**9:
        total = f"{args.total_timesteps:,}"
        die(f"--cycles must make a run of at most 1,000,000,000 steps, got {total}")


@dataclass
class Progress:
    """What a run has done so far."""

    stretches: int = 0  # of one task each, that have ended
    episodes: int = 0  # of this task in this cycle
    updates: int = 0
    reviewed: int = 0  # updates whose batch was a review
    epsilon: float = 1.0  # a batch is a review with probability 1 - epsilon
    dormant: int | None = None  # the critics' dormant neurons when last counted
    # connections of each MLP of a network, so far
    planned: dict[str, list[int]] = field(default_factory=dict)
    grown: dict[str, list[int]] = field(default_factory=dict)
    pruned: dict[str, list[int]] = field(default_factory=dict)
    # returns of the episodes since the last evaluation
    returns: list[float] = field(default_factory=list)
    # of the last uniform batch
    losses: dict[str, torch.Tensor] = field(default_factory=dict)
    # evaluations that are due, in order: (row, weights of the actor)
    postponed: list[tuple[dict, dict]] = field(default_factory=list)

    @classmethod
    def of(cls, agent):
        """At the start: nothing is planned, grown or pruned in any MLP."""
        progress = cls()
        for name, network in agent.networks.items():
            progress.planned[name] = [0] * len(network.mlps)
            progress.grown[name] = [0] * len(network.mlps)
            progress.pruned[name] = [0] * len(network.mlps)
        return progress


# --- replay buffer ------------------------------------------------------------
class Batch(NamedTuple):
    """B transitions. All but `noise` are views of `rows`; `noise` is standard normal."""

    rows: torch.Tensor  # (B, obs + act + obs + 2 + act)
    obs: torch.Tensor  # (B, obs)
    obs_actions: torch.Tensor  # (B, obs + act), action in [-1, 1]; the critics' input
    next_obs: torch.Tensor  # (B, obs)
    rewards: torch.Tensor  # (B,)
    terminated: torch.Tensor  # (B,), 1.0 at an end that is not the time limit's
    action_mask: torch.Tensor  # (B, act), 1.0 for the actions that the row's task has
    noise: torch.Tensor  # (B, act), for the smoothing of the target policy


class ReplayBuffer:
    """A ring of rows on the device: obs | action | next obs | reward | terminated | mask.

    The mask is that of the actions of the row's task.
    """

    def __init__(self, capacity: int, n_obs: int, n_act: int, seed: int, device: torch.device):
        self.n_obs = n_obs
        self.n_act = n_act
        self.data = torch.empty(capacity, 2 * n_obs + 2 * n_act + 2, device=device)
        self.row = np.empty(self.data.shape[1], dtype=np.float32)
        self.position = 0  # of the next row
        self.size = 0
        self.rng = torch.Generator(device).manual_seed(seed)

    def add(self, obs, action, next_obs, reward: float, terminated: bool, action_mask) -> None:
        end = (reward, terminated)
        row = (obs, action, next_obs, end, action_mask)
        np.concatenate(row, out=self.row, casting="same_kind")
        self.data[self.position].copy_(torch.from_numpy(self.row), non_blocking=True)
        self.position = (self.position + 1) % len(self.data)
        self.size = min(self.size + 1, len(self.data))

    def clear(self) -> None:
        self.position = 0
        self.size = 0

    def new_batch(self, size: int) -> Batch:
        """Memory for `sample` to fill: a CUDA graph reads the same tensors every time."""
        rows = torch.empty(size, self.data.shape[1], device=self.data.device)
        columns = [self.n_obs, self.n_act, self.n_obs, 1, 1, self.n_act]
        obs, _, next_obs, rewards, terminated, action_mask = rows.split(columns, dim=1)
        obs_actions = rows[:, : self.n_obs + self.n_act]
        noise = torch.empty(size, self.n_act, device=rows.device)
        ends = terminated[:, 0]
        return Batch(rows, obs, obs_actions, next_obs, rewards[:, 0], ends, action_mask, noise)

    def sample(self, batch: Batch, oldest: float = 1.0, rng=None) -> None:
        """Fills `batch` uniformly from the oldest share of the buffer."""
        rng = rng or self.rng  # a torch.Generator
        first = self.position if self.size == len(self.data) else 0  # the oldest row
        count = max(1, int(oldest * self.size))
        age = torch.randint(count, (len(batch.rows),), generator=rng, device=rng.device)
        index = (first + age) % len(self.data)  # (B,), age 0 is the oldest
        torch.index_select(self.data, 0, index.to(self.data.device), out=batch.rows)
        noise = torch.randn(batch.noise.shape, generator=rng, device=rng.device)
        batch.noise.copy_(noise)

    def state_dict(self) -> dict:
        # through NumPy, because torch would save the whole storage of a slice
        filled = torch.from_numpy(self.data[: self.size].cpu().numpy())
        state = {"capacity": len(self.data), "filled": filled, "position": self.position}
        state["rng"] = self.rng.get_state()
        return state

    def load_state_dict(self, state: dict) -> None:
        """Raises: ValueError for a buffer of another size."""
        if state["capacity"] != len(self.data):
            raise ValueError(f"it must hold {len(self.data):,} rows, got {state['capacity']:,}")
        self.size = len(state["filled"])
        self.position = state["position"]
        self.data[: self.size] = state["filled"]
        self.rng.set_state(state["rng"])


# --- networks with masks ------------------------------------------------------
class MaskedLinear(nn.Linear):
    """A linear layer whose weight (out, in) is 0 wherever its mask (out, in) is 0.

    It has no forward of its own: the weight itself is kept masked, and autograd gives the
    dense gradient, which growth looks at and `Network.step` masks. With weight * mask in
    the forward pass, the gradient of a masked weight would be 0.
    """

    def __init__(self, n_in: int, n_out: int):
        super().__init__(n_in, n_out)
        self.initial_density = 1.0
        self.register_buffer("mask", torch.ones(n_out, n_in))
        self.register_buffer("bound", torch.full((n_out, n_in), math.inf))  # of |weight|
        self.clipped = False  # whether any bound is finite

    def draw(self, neurons: int, rng: torch.Generator):
        """Weights (neurons, in) and biases (neurons,), as nn.Linear draws them."""
        uniform = torch.rand(neurons, self.in_features + 1, generator=rng)
        values = (2 * uniform - 1) / math.sqrt(self.in_features)
        values = values.to(self.weight.device)
        return values[:, :-1], values[:, -1]

    def get_extra_state(self) -> bool:
        return self.clipped

    def set_extra_state(self, clipped: bool) -> None:
        self.clipped = clipped


class MLP(nn.Module):
    """Hidden layers (masked linear, LayerNorm if asked for, ReLU), then a masked linear."""

    def __init__(self, sizes: list[int], layer_norm: bool):
        super().__init__()
        self.layers = nn.ModuleList()
        for n_in, n_out in itertools.pairwise(sizes):
            self.layers.append(MaskedLinear(n_in, n_out))
        norm = nn.LayerNorm if layer_norm else nn.Identity
        self.norms = nn.ModuleList()
        for n in sizes[1:-1]:
            self.norms.append(norm(n))

    def activations(self, x: torch.Tensor) -> list[torch.Tensor]:
        """(B, sizes[0]) -> [(B, n), ...] of the hidden layers."""
        hidden = []
        for layer, norm in zip(self.layers, self.norms, strict=False):  # not the last
            x = F.relu(norm(layer(x)), inplace=True)
            hidden.append(x)
        return hidden

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.activations(x)
        return self.layers[-1](hidden[-1])  # (B, sizes[-1])


class Actor(MLP):
    """Deterministic tanh policy: (B, obs) -> (B, act) in [-1, 1]."""

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return torch.tanh(super().forward(obs))

    @torch.no_grad()
    def hidden(self, batch: Batch) -> list[torch.Tensor]:
        return self.activations(batch.obs)

    @torch.inference_mode()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """(obs,) -> (act,)."""
        device = self.layers[0].weight.device
        row = torch.as_tensor(obs, dtype=torch.float32).to(device)
        actions = self(row[None])  # (1, act)
        return actions[0].cpu().numpy()


class Critic(MLP):
    """One action-value function: (B, obs + act) -> (B,)."""

    def forward(self, obs_actions: torch.Tensor) -> torch.Tensor:
        return super().forward(obs_actions)[:, 0]

    @torch.no_grad()
    def hidden(self, batch: Batch) -> list[torch.Tensor]:
        return self.activations(batch.obs_actions)


# --- agent: TD3 on masked networks --------------------------------------------
class Network:
    """What one optimiser trains, the actor or both critics, and their targets."""

    def __init__(self, mlps: list[MLP], targets: list[MLP], learning_rate: float):
        self.mlps = mlps
        self.layers = []
        self.params = []
        for mlp in mlps:
            self.layers += mlp.layers
            self.params += mlp.parameters()
        self.target_layers = []
        self.target_params = []
        for target in targets:
            self.target_layers += target.layers
            self.target_params += target.parameters()
        place_of = {p: n for n, p in enumerate(self.params)}
        self.weight_places = [place_of[layer.weight] for layer in self.layers]  # in `params`
        self.masks = [layer.mask for layer in self.layers]
        self.optimizer = topology.Adam(self.params, learning_rate)
        for layer in self.layers:
            # a CUDA graph is captured before the first reset
            layer.clipped = layer.mask.is_cuda

    @torch.no_grad()
    def step(self, gradients: tuple[torch.Tensor, ...]) -> None:
        """One step of Adam on the active connections; `gradients` of `params` are dense."""
        of_weights = [gradients[n] for n in self.weight_places]
        torch._foreach_mul_(of_weights, self.masks)
        self.optimizer.apply(gradients)
        # §B.2, weight clipping of neurons that were reset (Elsayed et al. 2024)
        for layer in self.layers:
            if layer.clipped:
                layer.weight.clamp_(-layer.bound, layer.bound)

    @torch.no_grad()
    def update_targets(self, tau: float) -> None:
        """Polyak averaging: target <- (1 - tau) * target + tau * online."""
        torch._foreach_lerp_(self.target_params, self.params, tau)

    def density(self) -> float:
        """Share of active connections."""
        return topology.network_density(self.layers)

    def hidden(self, batch: Batch) -> list[torch.Tensor]:
        """Activations [(B, n), ...] of the hidden layers of all MLPs."""
        hidden = []
        for mlp in self.mlps:
            hidden += mlp.hidden(batch)
        return hidden


class Agent(nn.Module):
    """Actor, twin critics and their targets; both updates are functions of a batch."""

    def __init__(self, args: Args, n_obs: int, n_act: int, ne_seed: int, device):
        super().__init__()
        self.args = args
        # all that NE draws: it must not shift exploration noise and batches
        self.ne_rng = torch.Generator().manual_seed(ne_seed)
        actor_sizes = [n_obs, *args.actor_hidden, n_act]
        critic_sizes = [n_obs + n_act, *args.critic_hidden, 1]
        self.actor = Actor(actor_sizes, args.layer_norm)
        self.critic_1 = Critic(critic_sizes, args.layer_norm)
        self.critic_2 = Critic(critic_sizes, args.layer_norm)
        # §4.2, sparse start
        sparse = []
        if args.ne_actor:
            sparse += [self.actor]
        if args.ne_critic:
            sparse += [self.critic_1, self.critic_2]
        for mlp in sparse:
            density = args.initial_density
            topology.sparsify(mlp.layers, density, args.sparse_init, self.ne_rng)
        self.target_actor = copy.deepcopy(self.actor)
        self.target_critic_1 = copy.deepcopy(self.critic_1)
        self.target_critic_2 = copy.deepcopy(self.critic_2)
        self.to(device)
        critics = [self.critic_1, self.critic_2]
        target_critics = [self.target_critic_1, self.target_critic_2]
        self.networks = {
            "actor": Network([self.actor], [self.target_actor], args.learning_rate),
            "critic": Network(critics, target_critics, args.learning_rate),
        }

    def critic_gradients(self, batch: Batch):
        """Eq. 3 with TD3's target smoothing and clipped double Q.

        Returns: loss, mean Q, and the dense gradients of the critics' parameters.
        """
        args = self.args
        with torch.no_grad():
            noise = args.policy_noise * batch.noise  # (B, act)
            noise = noise.clamp(-args.noise_clip, args.noise_clip)
            next_actions = self.target_actor(batch.next_obs) + noise
            next_actions = next_actions.clamp(-1, 1) * batch.action_mask  # (B, act)
            next_obs_actions = torch.cat((batch.next_obs, next_actions), dim=1)
            next_q_1 = self.target_critic_1(next_obs_actions)  # (B,)
            next_q_2 = self.target_critic_2(next_obs_actions)  # (B,)
            next_q = torch.minimum(next_q_1, next_q_2)
            going_on = 1 - batch.terminated
            target_q = batch.rewards + args.gamma * going_on * next_q  # (B,)
        q_1 = self.critic_1(batch.obs_actions)  # (B,)
        q_2 = self.critic_2(batch.obs_actions)  # (B,)
        loss = F.mse_loss(q_1, target_q) + F.mse_loss(q_2, target_q)  # ()
        gradients = torch.autograd.grad(loss, self.networks["critic"].params)
        return loss.detach(), q_1.mean().detach(), gradients

    def actor_gradients(self, batch: Batch):
        """Eq. 4, deterministic policy gradient: minus the mean Q1 of its own actions.

        Returns: loss and the dense gradients of the actor's parameters.
        """
        actions = self.actor(batch.obs) * batch.action_mask  # (B, act)
        obs_actions = torch.cat((batch.obs, actions), dim=1)  # (B, obs + act)
        loss = -self.critic_1(obs_actions).mean()  # ()
        gradients = torch.autograd.grad(loss, self.networks["actor"].params)
        return loss.detach(), gradients

    def update_critic(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns loss and mean Q before the step."""
        loss, mean_q, gradients = self.critic_gradients(batch)
        self.networks["critic"].step(gradients)
        return loss, mean_q

    def update_actor(self, batch: Batch) -> torch.Tensor:
        """One step of the policy, then of all targets. Returns the loss before."""
        loss, gradients = self.actor_gradients(batch)
        self.networks["actor"].step(gradients)
        for network in self.networks.values():
            network.update_targets(self.args.tau)
        return loss


# --- neuroplastic expansion ---------------------------------------------------
def scale_to_run(args: Args) -> None:
    """Fills in, in place, the flags that follow from the length of the run (all ours)."""
    if args.growth_end is None:
        args.growth_end = args.total_timesteps
    if args.grow_interval is None:
        args.grow_interval = max(1, args.total_timesteps // 100)
    if args.grow_rate is None:
        args.grow_rate = solve_grow_rate(args)
    updates = max(1, args.total_timesteps - args.learning_starts)
    if args.review_interval is None:
        args.review_interval = max(1, updates // 1_000)
    if args.review_decay is None:
        # with no reduction, (1 - decay)^counts meets the floor at half the run
        until_half = args.total_timesteps // 2 - args.learning_starts
        counts = max(1, until_half // args.review_interval - 1)  # the first has no reduction
        floor = max(0.01, args.review_floor)  # 0 would never be met
        args.review_decay = 1 - floor ** (1 / counts)


def growth_rounds(args: Args) -> range:
    """Environment steps of the rounds: from the first update until the cosine is 0."""
    first = (args.learning_starts // args.grow_interval + 1) * args.grow_interval
    return range(first, args.growth_end, args.grow_interval)


def annealed(args: Args, step: int) -> float:
    """1 + cos(pi t / T_end), the annealing of growth (§4.2): from 2 to 0."""
    return 1 + math.cos(math.pi * step / args.growth_end)


def solve_grow_rate(args: Args) -> float:
    """alpha that takes a network from --initial-density to about --final-density.

    A round leaves 1 - alpha / 2 * (1 + cos(pi t / T_end)) of the inactive connections
    inactive, all rounds leave the product, and with ln(1 - x) = -x that is

        exp(-alpha / 2 * sum(1 + cos(pi t / T_end))) = (1 - final) / (1 - initial density)
    """
    inactive = 1 - args.initial_density
    total = sum(annealed(args, step) for step in growth_rounds(args))
    grows = args.growth != "none" and (args.ne_actor or args.ne_critic)
    if not grows or total == 0 or inactive == 0:
        return 0.0
    if not args.initial_density <= args.final_density < 1:
        low = f"--initial-density ({args.initial_density})"
        die(f"--final-density must be below 1 and at least {low}, got {args.final_density}")
    return min(1.0, 2 / total * math.log(inactive / (1 - args.final_density)))


def growth_fraction(args: Args, step: int) -> float:
    """Share of a layer's candidates that is born at `step`, cosine-annealed (§4.2)."""
    if args.growth == "none":
        return 0.0
    return args.grow_rate / 2 * annealed(args, step)


def planned_density(args: Args, until: int) -> float:
    """Of a network with NE after the rounds up to step `until`, if nothing is pruned."""
    inactive = 1 - args.initial_density
    for step in growth_rounds(args):
        if step <= until:
            inactive *= 1 - growth_fraction(args, step)
    return 1 - inactive


def growth_plan(args: Args) -> str:
    """One line that says what densities to expect."""
    if args.initial_density == 1 or not (args.ne_actor or args.ne_critic):
        return "topology: dense, nothing to grow"
    rounds = [step for step in growth_rounds(args) if step <= args.total_timesteps]
    if args.growth == "none" or not rounds:
        return f"topology: stays at {args.initial_density:.0%}"
    end = planned_density(args, args.total_timesteps)
    densities = f"{args.initial_density:.0%} -> {end:.0%}"
    plan = f"topology: {densities} in {len(rounds)} rounds, less what is pruned"
    if args.episodes_per_task is not None:
        plan += f", if no episode ends early ({args.total_timesteps:,} steps)"
    return f"{plan}\ndensity at the start: {densities_at_the_start(args)}"


def densities_at_the_start(args: Args) -> str:
    """Planned density at the start of each task of the first cycles, in order."""
    densities = []
    step = 0
    for stretch in range(min(12, args.cycles * len(args.tasks))):
        task = stretch % len(args.tasks)
        densities.append(f"{args.tasks[task]} {planned_density(args, step):.0%}")
        step += args.task_lengths[task]
    return ", ".join(densities)


def topology_round(args: Args, agent: Agent, batch: Batch, progress: Progress, step: int) -> None:
    """§4.2, Eq. 2: grows, then prunes and resets; targets take over the masks."""
    fraction = growth_fraction(args, step)
    gradients = {  # dense; no step is taken with them
        "actor": agent.actor_gradients(batch)[-1],
        "critic": agent.critic_gradients(batch)[-1],
    }
    for name, network in agent.networks.items():
        optimizer = network.optimizer
        gradient_of = dict(zip(network.params, gradients[name], strict=True))
        grown = progress.grown[name]
        pruned = progress.pruned[name]
        for i, mlp in enumerate(network.mlps):
            hidden = mlp.hidden(batch)
            # elastic neuron generation
            scores = [gradient_of[layer.weight] for layer in mlp.layers]
            if args.growth == "random":  # §4.1
                scores = topology.random_scores(mlp.layers, agent.ne_rng)
            progress.planned[name][i] += topology.planned_births(mlp.layers, fraction)
            grown[i] += topology.grow(mlp.layers, scores, fraction, optimizer)
            # dormant neuron pruning and reset
            if args.prune:
                budget = int(args.prune_ratio * grown[i]) - pruned[i]
                clip = args.weight_clip
                rng = agent.ne_rng
                pruned[i] += topology.prune(mlp.layers, hidden, budget, clip, optimizer, rng)
        topology.copy_masks(network.layers, network.target_layers)


def review_threshold(args: Args, progress: Progress, dormant: int, neurons: int) -> float:
    """§4.2, experience review: the next epsilon; a batch is a review with 1 - epsilon.

    "slope": epsilon is large while growth still wakes neurons up, then falls to its
    floor. "level": 1 - epsilon is the dormant share of the critics' hidden neurons.
    """
    if args.review_floor == 1:
        return 1.0
    if args.review_rule == "level":
        return 1 - dormant / neurons
    if progress.dormant is None:  # the first count
        return progress.epsilon
    reduction = max(0, progress.dormant - dormant) / max(progress.dormant, 1)  # in [0, 1]
    epsilon = (1 - args.review_decay) * progress.epsilon + args.review_decay * reduction
    return max(args.review_floor, epsilon)


def redo(args: Args, agent: Agent, batch: Batch) -> None:
    """NE + ReDo (§C)."""
    for network in agent.networks.values():
        for mlp in network.mlps:
            hidden = mlp.hidden(batch)
            optimizer = network.optimizer
            topology.redo(mlp.layers, hidden, args.redo_tau, optimizer, agent.ne_rng)


@torch.no_grad()
def reset(agent: Agent) -> None:
    """NE + Reset (§C): networks, targets and Adam's state start anew; the masks stay."""
    for network in agent.networks.values():
        topology.reset(network.layers, agent.ne_rng)
        for mlp in network.mlps:
            for norm in mlp.norms:
                if isinstance(norm, nn.LayerNorm):
                    norm.reset_parameters()
        network.update_targets(tau=1.0)
        for state in network.optimizer.state.values():
            for value in state.values():
                value.zero_()


# --- environment and evaluation -----------------------------------------------
class CheckedEnv(gym.Wrapper):
    """An environment of which nothing is trusted. Raises: EnvironmentFault.

    Observations are copied, because an environment may change its own array in place.
    """

    def __init__(self, env: gym.Env, env_id: str):
        super().__init__(env)
        self.env_id = env_id

    def reset(self, **kwargs):
        try:
            obs, info = self.env.reset(**kwargs)
            rng = self.np_random
        except (Exception, SystemExit) as e:  # each environment has errors of its own
            raise self.fault(f"{type(e).__name__} in reset: {e}") from e
        if not isinstance(rng, np.random.Generator | np.random.RandomState):  # cannot be saved
            raise self.fault(f"np_random must be NumPy's, got {type(rng).__name__}")
        return self.checked(obs), info

    def step(self, action: np.ndarray):
        # rescaling may pass a bound by the last bit
        action = action.clip(self.action_space.low, self.action_space.high)
        try:
            obs, reward, terminated, truncated, info = self.env.step(action)
            reward = np.asarray(reward, dtype=np.float64).item()
            terminated = bool(terminated)
            truncated = bool(truncated)
        except (Exception, SystemExit) as e:
            raise self.fault(f"{type(e).__name__} in step: {e}") from e
        if not abs(reward) < 3e38:  # NaN, or infinite as float32
            raise self.fault(f"the reward is {reward}")
        return self.checked(obs), reward, terminated, truncated, info

    def checked(self, obs) -> np.ndarray:
        """A finite float32 copy (obs,)."""
        try:
            with np.errstate(over="ignore"):  # is infinite then
                obs = np.asarray(obs).astype(np.float32, casting="same_kind")
        except Exception as e:
            raise self.fault(f"the observation is not made of floats: {e}") from e
        if obs.shape != self.observation_space.shape:
            expected = self.observation_space.shape
            raise self.fault(f"the observation has shape {obs.shape}, not {expected}")
        if not np.isfinite(obs).all():
            raise self.fault("the observation is NaN or infinite")
        return obs

    def fault(self, reason: str) -> Exception:
        one_line = " ".join(reason.split())
        return EnvironmentFault(f"{self.env_id}: {one_line}")


def mujoco_warning(text: str) -> None:
    """All that MuJoCo warns of, but for an attribute in Gymnasium's HalfCheetah."""
    if "settotalmass" not in text:
        print(f"mujoco: {text}", file=sys.stderr)


def make_env(env_id: str, max_episode_steps: int) -> gym.Env:
    """A task with flat float32 observations and actions (act,) in [-1, 1].

    Raises: SystemExit(2) for another kind of task.
    """
    try:
        import mujoco

        mujoco.set_mju_user_warning(mujoco_warning)
        env = gym.make(env_id)
        obs = env.observation_space
        act = env.action_space
    except (Exception, SystemExit) as e:  # each environment has errors of its own
        reason = " ".join(str(e).split())
        die(f"--tasks: cannot make {env_id}: {reason}")
    for space in (obs, act):
        flat = isinstance(space, gym.spaces.Box) and len(space.shape) == 1
        if not flat or space.shape[0] == 0 or space.dtype.kind != "f":
            die(f"--tasks must have flat Boxes of floats, got {obs} and {act}")
    with np.errstate(over="ignore"):  # is infinite then
        width = act.high - act.low
    if not (np.isfinite(width).all() and (width > 0).all()):
        die(f"--tasks must have actions between finite bounds, low < high, got {act}")
    env = CheckedEnv(gym.wrappers.TimeLimit(env, max_episode_steps), env_id)
    return gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))


class PaddedEnv(gym.Wrapper):
    """A task as large as the largest of the sequence.

    Its observations (obs,) end in zeros; of an action (act,) it reads the first entries.
    """

    def __init__(self, env: gym.Env, n_obs: int, n_act: int):
        super().__init__(env)
        self.n_obs = n_obs
        self.n_act = n_act
        self.own_act = env.action_space.shape[0]
        self.action_mask = np.zeros(n_act, dtype=np.float32)
        self.action_mask[: self.own_act] = 1.0

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        return self.padded(obs), info

    def step(self, action: np.ndarray):
        obs, reward, terminated, truncated, info = self.env.step(action[: self.own_act])
        return self.padded(obs), reward, terminated, truncated, info

    def padded(self, obs: np.ndarray) -> np.ndarray:
        padded = np.zeros(self.n_obs, dtype=np.float32)
        padded[: len(obs)] = obs
        return padded


def make_envs(args) -> list[PaddedEnv]:
    """All tasks, padded. Raises: SystemExit(2) for another kind of task."""
    envs = [make_env(task, args.max_episode_steps) for task in args.tasks]
    n_obs = max(env.observation_space.shape[0] for env in envs)
    n_act = max(env.action_space.shape[0] for env in envs)
    return [PaddedEnv(env, n_obs, n_act) for env in envs]


def evaluate(actor: Actor, env: gym.Env, episodes: int, seed: int) -> list[float]:
    """Returns of the deterministic policy, from the same starts at every call."""
    returns = []
    for episode in range(episodes):
        obs, _ = env.reset(seed=100 + seed + episode)  # not the seed of training
        total = 0.0
        done = False
        while not done:
            obs, reward, terminated, truncated, _ = env.step(actor.act(obs))
            total += reward
            done = terminated or truncated
        returns.append(total)
    return returns


def evaluate_postponed(run, progress, actor: Actor, envs: list[PaddedEnv], args, last=False):
    """Evaluates on every task what is due, in order, and writes its rows.

    A run that is asked to stop leaves the rest to the resumed one, but not at its last step.
    """
    actor = copy.deepcopy(actor)
    while progress.postponed:
        row, weights = progress.postponed[0]
        actor.load_state_dict(weights)
        rows = []
        for task, env in zip(args.tasks, envs, strict=True):
            if run.stop_signal is not None and not last:
                return
            returns = evaluate(actor, env, args.eval_episodes, args.seed)
            row["task_evaluated"] = task
            row["eval/return_mean"] = float(np.mean(returns))
            row["eval/return_std"] = float(np.std(returns))
            rows.append(row.copy())
        write_evaluation(run, rows)
        progress.postponed.pop(0)


def write_evaluation(run, rows: list[dict]) -> None:
    """Writes the rows of one step, one for each task."""
    step = rows[0]["step"]
    for row in rows:
        task = row["task_evaluated"]
        mean = row["eval/return_mean"]
        run.write_row(row)
        run.log(step, f"eval/{task}/return_mean", mean)
        run.say(f"step {step:,}: {task} return {mean:,.1f} +- {row['eval/return_std']:,.1f}")
    for key, value in rows[0].items():
        if key.startswith(("task/", "charts/", "losses/", "ne/")):
            run.log(step, key, value)


def new_row(args, progress: Progress, step: int) -> dict:
    """The columns of results.csv that every method has, its returns still empty."""
    cycle, task = divmod(progress.stretches, len(args.tasks))
    row = {"step": step, "cycle": cycle + 1, "task/id": task}
    row["task_trained"] = args.tasks[task]
    row["task_evaluated"] = ""
    row["eval/return_mean"] = math.nan
    row["eval/return_std"] = math.nan
    row["charts/episodic_return"] = float(np.mean(progress.returns or math.nan))
    for key in ("qf_loss", "qf_values"):
        row[f"losses/{key}"] = float(progress.losses.get(key, math.nan))
    return row


def measure(args: Args, agent: Agent, batch: Batch, progress: Progress, step: int) -> dict:
    """A row of results.csv, its returns still empty."""
    row = new_row(args, progress, step)
    for name, network in agent.networks.items():
        activity = topology.activity(network.hidden(batch))
        if step == 0:  # there are no transitions to take activations from
            activity = dict.fromkeys(activity, math.nan)
        values = {"density": network.density()} | activity
        values["planned"] = sum(progress.planned[name])
        values["grown"] = sum(progress.grown[name])
        values["pruned"] = sum(progress.pruned[name])
        for key, value in values.items():
            row[f"ne/{name}/{key}"] = value
    row["ne/review_epsilon"] = progress.epsilon
    row["ne/review_share"] = progress.reviewed / max(1, progress.updates)
    return row


def continual_metrics(rows: list[dict]) -> dict[str, dict[str, float]]:
    """{metric: {task: value, ..., "mean": mean}} from the rows of results.csv.

    Average performance and forward transfer: Lopez-Paz and Ranzato (2017); forgetting:
    Chaudhry et al. (2018). docs/ne_td3_continual.md defines them for returns.
    """
    tasks = list(dict.fromkeys(row["task_evaluated"] for row in rows))
    ends = {}  # the last step of each stretch
    returns = {}
    for row in rows:
        stretch = (row["cycle"], row["task_trained"])
        ends[stretch] = row["step"]
        returns[row["step"], row["task_evaluated"]] = float(row["eval/return_mean"])
    steps = [rows[0]["step"], *ends.values()]  # the first is of the untrained policy
    matrix = np.empty((len(steps), len(tasks)))
    for n, step in enumerate(steps):
        for i, task in enumerate(tasks):
            matrix[n, i] = returns[step, task]

    performance = dict(zip(tasks, matrix[-1], strict=True))
    forgetting = {}
    for i, task in enumerate(tasks[:-1]):
        best = matrix[1:-1, i].max()  # at the end of an earlier stretch
        forgetting[task] = best - matrix[-1, i]
    transfer = {}
    for i, task in enumerate(tasks[1:], start=1):
        transfer[task] = matrix[i, i] - matrix[0, i]  # just before it is trained
    metrics = {
        "average performance": performance,
        "forgetting": forgetting,
        "forward transfer": transfer,
    }
    for values in metrics.values():
        numbers = list(values.values())
        values["mean"] = np.mean(numbers or math.nan)
    return metrics


def print_metrics(folder: Path) -> None:
    """The table at the end of a run."""
    with open(folder / "results.csv", newline="") as file:
        metrics = continual_metrics(list(csv.DictReader(file)))
    columns = list(metrics["average performance"])
    widths = [max(14, len(column) + 2) for column in columns]
    cells = [f"{column:>{width}}" for column, width in zip(columns, widths, strict=True)]
    print(" " * 20 + "".join(cells))
    for name, values in metrics.items():
        cells = []
        for column, width in zip(columns, widths, strict=True):
            value = values.get(column, math.nan)
            cells.append(f"{value:>{width},.1f}")
        print(f"{name:20}" + "".join(cells))


def log_masks(run, agent: Agent, step: int) -> None:
    """Pictures (1, out, in) for TensorBoard and benchmark/plot.py topology."""
    for name, network in agent.networks.items():
        for i, layer in enumerate(network.layers):
            run.writer.add_image(f"masks/{name}/{i}", layer.mask[None], step)


def fast_updates(args: Args, agent: Agent, batch: Batch):
    """The agent's two updates, compiled and captured if asked for."""
    if args.compile:
        print("compiling losses and gradients, which takes half a minute or more")
        of_critic = compiled(agent.critic_gradients, batch)
        of_actor = compiled(agent.actor_gradients, batch)
        agent.critic_gradients, agent.actor_gradients = of_critic, of_actor
    if batch.rows.is_cuda and args.cudagraphs:
        return CudaGraph(agent.update_critic), CudaGraph(agent.update_actor)
    return agent.update_critic, agent.update_actor


def main() -> None:
    # --- setup ---
    args, checkpoint = parse_args(Args)
    envs = make_envs(args)
    eval_envs = make_envs(args)
    set_length(args)
    scale_to_run(args)
    if args.batch_size > args.buffer_size:
        die(f"--batch-size must be at most {args.buffer_size}, got {args.batch_size}")
    device = set_up_torch(args)
    seeds = np.random.SeedSequence(args.seed).generate_state(4).tolist()
    weight_seed, noise_seed, batch_seed, ne_seed = seeds
    torch.manual_seed(weight_seed)
    noise_rng = np.random.default_rng(noise_seed)
    n_obs = envs[0].n_obs
    n_act = envs[0].n_act
    agent = Agent(args, n_obs, n_act, ne_seed, device)
    buffer = ReplayBuffer(args.buffer_size, n_obs, n_act, batch_seed, device)
    batch = buffer.new_batch(args.batch_size)
    ne_batch = buffer.new_batch(args.batch_size)  # of rounds and metrics
    review_batch = buffer.new_batch(1_024)
    progress = Progress.of(agent)
    starts = [env.reset(seed=args.seed) for env in envs]
    obs, _ = starts[0]

    # all that a resumed run needs
    parts = {"agent": agent, "buffer": buffer, "progress": progress}
    parts["ne_rng"] = agent.ne_rng
    parts["noise_rng"] = noise_rng
    for task, env in zip(args.tasks, envs, strict=True):
        parts[f"{task} rng"] = env
    for name, network in agent.networks.items():
        parts[f"{name}_optimizer"] = network.optimizer
    if checkpoint is not None:
        restore(parts, checkpoint)
        obs, _ = envs[progress.stretches % len(envs)].reset()
    total_steps = args.total_timesteps
    if args.episodes_per_task is not None:
        total_steps = None  # not known in advance
    run = Run(args, "+".join(args.tasks), total_steps, checkpoint)
    print(f"{' '.join(args.tasks)}, seed {args.seed}, {device}: {run.folder}\n{growth_plan(args)}")
    if checkpoint is None:
        log_masks(run, agent, step=0)
        row = measure(args, agent, ne_batch, progress, step=0)  # the untrained policy
        weights = copy.deepcopy(agent.actor.state_dict())
        progress.postponed.append((row, weights))
    evaluate_postponed(run, progress, agent.actor, eval_envs, args)
    update_critic, update_actor = fast_updates(args, agent, batch)

    # --- the loop ---
    rounds = growth_rounds(args)
    resets = range(0)
    if args.reset_interval > 0:  # none at the last step
        resets = range(args.reset_interval, args.total_timesteps, args.reset_interval)
    episodic_return = 0.0
    episodic_length = 0
    started = time.time()
    first = run.saved + 1
    for step in itertools.count(first):
        task = progress.stretches % len(envs)
        env = envs[task]

        # act
        if step <= args.learning_starts:
            action = noise_rng.uniform(-1, 1, n_act)
        else:
            noise = noise_rng.normal(0, args.exploration_noise, n_act)
            action = agent.actor.act(obs) + noise
            run.require_finite(step, action)
        action = action.clip(-1, 1).astype(np.float32) * env.action_mask

        # update; before the environment steps, so that on CUDA both run at the same time
        # and, after the buffer was cleared, not until it holds a batch again
        enough = buffer.size >= min(args.batch_size, args.learning_starts)
        if step > args.learning_starts and enough:
            progress.updates += 1
            # §4.2, experience review
            u = torch.rand((), generator=agent.ne_rng).item()
            review = u > progress.epsilon
            if review:
                progress.reviewed += 1
                buffer.sample(batch, oldest=args.review_fraction)
            else:
                buffer.sample(batch)
            # critic, then actor and targets
            losses = {}
            losses["qf_loss"], losses["qf_values"] = update_critic(batch)
            if progress.updates % args.policy_frequency == 0:
                losses["actor_loss"] = update_actor(batch)
            if not review:  # old batches would bend the curves
                for key, value in losses.items():
                    progress.losses[key] = value.clone()
            if progress.updates % args.review_interval == 0:
                buffer.sample(review_batch, rng=agent.ne_rng)
                hidden = agent.networks["critic"].hidden(review_batch)
                dormant = len(topology.dormant_neurons(hidden, args.review_tau))
                neurons = 2 * sum(args.critic_hidden)
                progress.epsilon = review_threshold(args, progress, dormant, neurons)
                progress.dormant = dormant
            if args.redo_interval > 0 and progress.updates % args.redo_interval == 0:
                buffer.sample(ne_batch, rng=agent.ne_rng)
                redo(args, agent, ne_batch)

        # step and store
        try:
            next_obs, reward, terminated, truncated, _ = env.step(action)
        except EnvironmentFault as fault:
            run.fail(step, str(fault))
        buffer.add(obs, action, next_obs, reward, terminated, env.action_mask)
        obs = next_obs
        episodic_return += reward
        episodic_length += 1
        ended = terminated or truncated
        if ended:
            run.log(step, "charts/episodic_return", episodic_return)
            run.log(step, "charts/episodic_length", episodic_length)
            progress.returns.append(episodic_return)
            progress.episodes += 1
        switch = progress.episodes == args.episodes_per_task
        if args.episodes_per_task is None:
            switch = step % args.steps_per_task == 0
        last = switch and progress.stretches + 1 == args.cycles * len(envs)

        # topology; a cleared buffer that holds no batch yet has no round
        if step in rounds and enough:
            buffer.sample(ne_batch, rng=agent.ne_rng)
            topology_round(args, agent, ne_batch, progress, step)
            log_masks(run, agent, step)
        if step in resets and not last:
            reset(agent)

        # evaluate and log
        run.bar.update()
        if step % 1_000 == 0:
            run.log(step, "charts/SPS", (step - first + 1) / (time.time() - started))
            for key, value in progress.losses.items():
                run.log(step, f"losses/{key}", value)
        if step % args.eval_frequency == 0 or switch:
            run.require_finite(step, *agent.parameters())
            buffer.sample(ne_batch, rng=torch.Generator().manual_seed(step))
            row = measure(args, agent, ne_batch, progress, step)
            progress.returns = []
            weights = copy.deepcopy(agent.actor.state_dict())
            progress.postponed.append((row, weights))
            evaluate_postponed(run, progress, agent.actor, eval_envs, args, last)

        # episode end, or the task's, which may cut an episode
        if last:
            break
        if switch:
            progress.stretches += 1
            progress.episodes = 0
            if args.clear_buffer:
                buffer.clear()
        if ended or switch:
            # no environment can be saved inside an episode
            stopping = run.stop_signal is not None
            due = step - run.saved >= args.checkpoint_frequency
            if due or stopping:
                run.require_finite(step, *agent.parameters())
                run.save(step, parts)
                if stopping:
                    run.leave(step)
            episodic_return = 0.0
            episodic_length = 0
            obs, _ = envs[progress.stretches % len(envs)].reset()

    run.require_finite(step, *agent.parameters())
    del parts["buffer"]  # a finished run needs it no more
    run.save(step, parts, finished=True)
    run.close()
    print(f"finished: {run.folder}, {(step - first + 1) / (time.time() - started):.0f} steps/s")
    for name in agent.networks:
        density = row[f"ne/{name}/density"]
        active = row[f"ne/{name}/active_ratio"]
        print(f"{name}: density {density:.1%}, active neurons {active:.1%}")
    print_metrics(run.folder)


# ==============================================================================
# Part two, around a run: nothing of the algorithm, the same text in every script
# ==============================================================================
class EnvironmentFault(Exception):
    """What an environment must not do, in one line."""


def die(message: str, code: int = 2) -> NoReturn:
    """One clear line; exits with 2 for a mistake on the command line, 1 for later."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


def limits(name: str, number: float) -> tuple[float, float]:
    """Least and largest value of a flag. Integers are in [1, 10^9], others in [0, 1], but:"""
    if name == "seed":
        return 0, 2**31 - 1
    if name in ("actor_hidden", "critic_hidden", "hidden_dim", "channels", "torch_threads"):
        return 1, 65_536
    if name in ("redo_interval", "reset_interval"):  # 0: off
        return 0, 10**9
    if name.endswith("_noise") or name in ("noise_clip", "weight_clip", "redo_tau", "review_tau"):
        return 0, 1_000
    if name in ("learning_rate", "initial_density", "review_fraction"):
        return 1e-9, 1
    if name == "prune_ratio":  # below 1, so that more is born than pruned
        return 0, 0.999
    return (1, 10**9) if isinstance(number, int) else (0, 1)


def check_limits(args) -> None:
    for name, value in vars(args).items():
        flag = "--" + name.replace("_", "-")
        values = value if isinstance(value, tuple) else (value,)
        if not values:
            die(f"{flag} must have a value or more, got none")
        for number in values:
            if type(number) in (int, float):
                low, high = limits(name, number)
                if not low <= number <= high:  # NaN is in no interval
                    die(f"{flag} must be in [{low:,}, {high:,}], got {number}")


def command_line(Args: type, default):
    """The arguments as given, else as in `default`. --help has a group per base class."""
    groups = {}
    for base in reversed(Args.__bases__):
        values = {field.name: getattr(default, field.name) for field in fields(base)}
        groups[base.__name__.removesuffix("Args")] = base(**values)
    kinds = [(title, type(group)) for title, group in groups.items()]
    Groups = make_dataclass("Groups", kinds)
    description = sys.modules[Args.__module__].__doc__.splitlines()[0]
    flat = (tyro.conf.OmitArgPrefixes,)
    if "--help" in sys.argv or "-h" in sys.argv:
        os.environ["COLUMNS"] = str(min(99, shutil.get_terminal_size().columns))
    parsed = tyro.cli(Groups, default=Groups(**groups), description=description, config=flat)
    args = {}
    for group in vars(parsed).values():
        args |= vars(group)
    return Args(**args)


def parse_args(Args: type) -> tuple:
    """The arguments and, with --resume, the checkpoint. Raises: SystemExit."""
    args = command_line(Args, Args())
    checkpoint = None
    if args.resume is not None:
        checkpoint = load_checkpoint(Path(args.resume), Args)
        stored = Args(**checkpoint["args"])
        args = command_line(Args, stored)  # what differs was given
        for name, value in vars(stored).items():
            given = getattr(args, name)
            if given != value and name not in ("resume", "cudagraphs", "track"):
                flag = "--" + name.replace("_", "-")
                die(f"{flag} must be {value} or left out with --resume, got {given}")
        if checkpoint["finished"]:
            print(f"{args.resume} is finished, there is nothing to resume")
            raise SystemExit(0)
    check_limits(args)
    return args, checkpoint


def set_up_torch(args) -> torch.device:
    torch.set_num_threads(args.torch_threads)
    torch.set_flush_denormal(True)  # denormal numbers make long runs slow
    gc.freeze()  # garbage collection need not look at what is imported
    if not (args.cuda and torch.cuda.is_available()):
        return torch.device("cpu")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # to be deterministic
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.cuda.set_stream(torch.cuda.Stream())  # the default stream cannot be captured
    return torch.device("cuda")


# --- checkpoints --------------------------------------------------------------
def load_checkpoint(folder: Path, Args: type) -> dict:
    """Raises: SystemExit(1) for what is missing, damaged, or not of this run."""
    path = folder / "checkpoint.pt"
    script = Args.exp_name
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at checksums
            damaged = archive.testzip()
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        made_by = checkpoint["script"]
        known_flags = set(checkpoint["args"]) == set(vars(Args()))
        args = json.dumps(checkpoint["args"], indent=2)
        size = checkpoint["results_bytes"]
        checksum = checkpoint["results_crc"]
        keys = {"script", "args", "step", "name", "finished", "parts"}
        keys |= {"results_bytes", "results_crc"}
        complete = set(checkpoint) == keys
    except FileNotFoundError:
        die(f"nothing to resume: there is no {path}", code=1)
    except (NotADirectoryError, PermissionError) as e:
        die(f"--resume must be a run's folder that can be read: {e}", code=1)
    except Exception:  # zipfile and torch raise many kinds for a damaged or foreign file
        die(f"{path} is damaged or not a checkpoint of {script}", code=1)
    if not complete:
        die(f"{path} must have {', '.join(sorted(keys))}, got {', '.join(checkpoint)}", code=1)
    if damaged:
        die(f"{path} is damaged: the checksum of {damaged} is wrong", code=1)
    if made_by != script:
        die(f"{path} is a checkpoint of {made_by}, this is {script}", code=1)
    if not known_flags:
        die(f"{path} is of another version of {script}, with other flags", code=1)
    try:
        same_args = (folder / "args.json").read_bytes() == args.encode()
        rows = (folder / "results.csv").read_bytes()
    except OSError as e:
        die(f"{path} needs what is beside it: {e}", code=1)
    if not same_args:
        die(f"{folder / 'args.json'} is damaged or of another run than {path}", code=1)
    if len(rows) < size:
        die(f"{folder / 'results.csv'} has fewer rows than {path} counts on", code=1)
    if zlib.crc32(rows[:size]) != checksum:
        die(f"{folder / 'results.csv'} is damaged: its checksum is wrong", code=1)
    return checkpoint


def restore(parts: dict, checkpoint: dict) -> None:
    """Raises: SystemExit(1) for a checkpoint that does not fit."""
    states = checkpoint["parts"]
    if set(states) != set(parts):
        die(f"the checkpoint must have the parts {', '.join(parts)}, got {', '.join(states)}", 1)
    for name, part in parts.items():
        try:
            set_state(part, states[name])
        except (AttributeError, KeyError, IndexError, RuntimeError, TypeError, ValueError) as e:
            reason = " ".join(str(e).split())
            die(f"the checkpoint does not fit the {name} of this run: {reason}", code=1)


def state_of(part):
    """What `set_state` needs, made of tensors, numbers, strings, lists and dictionaries."""
    if hasattr(part, "np_random"):  # an environment, whose resets may make it anew
        part = part.np_random
    if isinstance(part, torch.Generator):
        return part.get_state()
    if isinstance(part, np.random.Generator):
        return json.dumps(part.bit_generator.state, default=np.ndarray.tolist)
    if isinstance(part, np.random.RandomState):
        return json.dumps(part.get_state(), default=np.ndarray.tolist)
    if is_dataclass(part):
        return vars(part)
    return part.state_dict()


def set_state(part, state) -> None:
    if hasattr(part, "np_random"):
        part = part.np_random
    if isinstance(part, torch.Generator):
        part.set_state(state)
    elif isinstance(part, np.random.Generator):
        part.bit_generator.state = json.loads(state)
    elif isinstance(part, np.random.RandomState):
        part.set_state(json.loads(state))
    elif is_dataclass(part):
        if set(state) != set(vars(part)):
            raise KeyError(f"it must have {', '.join(vars(part))}, got {', '.join(state)}")
        vars(part).update(state)
    else:
        part.load_state_dict(state)


# --- a run's folder, its log and its end --------------------------------------
class Run:
    """A run's folder: args.json, results.csv, TensorBoard's events, checkpoint.pt."""

    def __init__(self, args, task: str, total_steps: int | None, checkpoint: dict | None):
        new = {"args": vars(args), "step": 0, "results_bytes": 0}
        new["name"] = f"{task}__{args.exp_name}__{args.seed}__{int(time.time())}"
        start = checkpoint or new
        self.script = type(args).exp_name
        self.args = start["args"]
        self.saved = start["step"]  # of the last checkpoint
        self.results_bytes = start["results_bytes"]
        self.name = start["name"]
        self.stop_signal = None
        self.previous_handlers = {}
        try:
            if args.resume is None:
                self.folder = self.new_folder(args.run_dir)
            else:
                self.folder = Path(args.resume)
            self.lock = lock(self.folder)
            if checkpoint is None:
                self.require_unused()
                (self.folder / "args.json").write_text(json.dumps(self.args, indent=2))
            with open(self.folder / "results.csv", "a") as file:
                file.truncate(self.results_bytes)  # cut back to the checkpoint
            self.tracker = None
            if args.track:
                self.tracker = start_wandb(args, self.name, self.folder)
            self.writer = SummaryWriter(str(self.folder), purge_step=self.saved + 1)
        except (OSError, UnicodeError) as e:
            flag = "--run-dir" if args.resume is None else "--resume"
            die(f"{flag} must be a folder that can be written: {e}")
        self.bar = tqdm(total=total_steps, initial=self.saved, disable=None)
        self.install_handlers()

    def new_folder(self, run_dir: str | None) -> Path:
        if run_dir is not None:
            Path(run_dir).mkdir(parents=True, exist_ok=True)
            return Path(run_dir)
        for number in itertools.count(1):  # runs may start in the same second
            suffix = f"_{number}" if number > 1 else ""
            folder = Path("runs") / (self.name.replace("/", "_") + suffix)
            try:
                folder.mkdir(parents=True)
                self.name = folder.name
                return folder
            except FileExistsError:
                continue

    def require_unused(self) -> None:
        """A folder in which a run has failed to start may be used again."""
        rows = self.folder / "results.csv"
        if (self.folder / "checkpoint.pt").exists():
            hint = shlex.join(["--resume", str(self.folder)])
            die(f"--run-dir must be a new folder, this one holds a run: continue it with {hint}")
        if rows.exists() and rows.stat().st_size > 0:
            die(f"--run-dir must be a new folder, {self.folder} holds the results of a run")

    def install_handlers(self) -> None:
        """Ctrl-C, kill, a closed terminal, Slurm's warning. Only the main thread may."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            ignored = signal.getsignal(number) == signal.SIG_IGN
            if not (number == signal.SIGHUP and ignored):  # nohup
                self.previous_handlers[number] = signal.signal(number, self.request_stop)

    def request_stop(self, number: int, frame) -> None:
        """The first signal waits for the episode's end, without evaluations; a second does not."""
        if self.stop_signal is not None:
            os._exit(128 + number)
        self.stop_signal = number
        for stream in (1, 2):
            try:
                os.write(stream, b"")
                closed = number == signal.SIGHUP and os.isatty(stream)
            except OSError:
                closed = True
            if closed:  # the terminal; nobody reads what would be printed
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        os.write(2, b"\nfinishing the episode, then saving (once more: stop at once)\n")

    def say(self, text: str) -> None:
        """A line above the bar. A closed terminal gets none; its signal is on the way."""
        try:
            self.bar.write(text)
        except OSError as e:
            if e.errno != errno.EIO:
                raise

    def log(self, step: int, key: str, value: float) -> None:
        self.writer.add_scalar(key, float(value), step)
        if self.tracker is not None:
            self.tracker.log({key: float(value), "global_step": step})

    def write_row(self, row: dict) -> None:
        """To results.csv, on the disk before any checkpoint that counts on it."""
        with open(self.folder / "results.csv", "a", newline="") as file:
            table = csv.DictWriter(file, row.keys())
            if file.tell() == 0:
                table.writeheader()
            table.writerow(row)
            file.flush()
            os.fsync(file.fileno())
            self.results_bytes = file.tell()

    def fail(self, step: int, reason: str) -> NoReturn:
        kept = "there is no checkpoint yet"
        if self.saved > 0:
            hint = shlex.join(["--resume", str(self.folder)])
            kept = f"{hint} continues from step {self.saved:,}"
        self.bar.close()
        self.give_back(exit_code=1)
        die(f"{reason}, at step {step:,}; {kept}", code=1)

    def require_finite(self, step: int, *values) -> None:
        for value in values:
            library = torch if torch.is_tensor(value) else np
            if not library.isfinite(value).all():
                self.fail(step, "a loss or a weight is NaN or infinite")

    def save(self, step: int, parts: dict, finished: bool = False) -> None:
        """Atomic: temporary file, fsync, rename."""
        content = {"script": self.script, "args": self.args, "step": step}
        content["results_bytes"] = self.results_bytes
        content["name"] = self.name
        content["finished"] = finished
        content["parts"] = {name: state_of(part) for name, part in parts.items()}
        temporary = self.folder / "checkpoint.tmp"
        try:
            content["results_crc"] = zlib.crc32((self.folder / "results.csv").read_bytes())
            self.writer.flush()
            with open(temporary, "wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.folder / "checkpoint.pt")
        except (OSError, RuntimeError) as e:  # a full disk
            temporary.unlink(missing_ok=True)
            reason = e
            if isinstance(e, RuntimeError):  # torch hides the reason
                reason = e.__context__ or e
            self.fail(step, f"cannot write a checkpoint: {reason}")
        self.saved = step

    def leave(self, step: int) -> NoReturn:
        """After a signal and `save`."""
        self.close()
        module = sys.modules["__main__"].__spec__  # of python -m
        program = ["-m", module.name] if module else [sys.argv[0]]
        command = shlex.join(["python", *program, "--resume", str(self.folder)])
        print(f"stopped at step {step}; continue with: {command}")
        raise SystemExit(130 if self.stop_signal == signal.SIGINT else 0)

    def close(self) -> None:
        self.bar.close()
        self.writer.close()
        self.give_back()

    def give_back(self, exit_code: int = 0) -> None:
        """W&B's run, the lock and the signals, for what else runs in this process."""
        if self.tracker is not None:
            self.tracker.finish(exit_code=exit_code)
        self.lock.close()
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)


def lock(folder: Path):
    """A lock that ends with the process. Raises: SystemExit(1) if another has it."""
    file = open(folder / "lock", "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        die(f"{folder} is in use by {file.read().strip()}", code=1)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()
    return file


def start_wandb(args, name: str, folder: Path):
    """A resumed run continues its W&B run. Raises: SystemExit(2) if that cannot be."""
    try:
        import wandb

        tracker = wandb.init(
            project=args.wandb_project_name,
            entity=args.wandb_entity,
            id=re.sub(r"\W", "-", name),
            name=name,
            resume="allow",
            config=vars(args),
            dir=str(folder),
        )
        tracker.define_metric("*", step_metric="global_step")
        return tracker
    except (ImportError, AttributeError) as e:  # a folder named wandb is a module without init
        wanted = "the package wandb (pip install wandb), and nothing else of that name"
        die(f"--track needs {wanted}: {e}")
    except Exception as e:  # no key, no network, no such team
        reason = " ".join(str(e).split())
        die(f"--track: {reason} (WANDB_MODE=offline needs no account)")


# --- speed --------------------------------------------------------------------
class CudaGraph:
    """An update: three plain calls to warm up, then captured once and replayed."""

    def __init__(self, update):
        self.update = update
        self.calls = 0

    def __call__(self, batch):  # the same tensors at every call
        self.calls += 1
        if self.calls <= 3:
            return self.update(batch)
        if self.calls == 4:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
                self.losses = self.update(batch)
        self.graph.replay()
        return self.losses


def compiled(method, *inputs):
    """A method, as one graph for such inputs. Raises: SystemExit(1) without a compiler."""
    try:
        torch._dynamo.config.trace_autograd_ops = True
        options = {"cpp_wrapper": not torch.cuda.is_available()}
        # nothing is checked at a call: shapes stay as they are
        options["guard_filter_fn"] = torch.compiler.skip_all_guards_unsafe
        graph = torch.compile(method, fullgraph=True, options=options)
        graph = graph.aot_compile((inputs, {}))
        graph(method.__self__, *inputs)
    except Exception as e:  # of the compilers, which are many
        reason = str(e).partition("\n")[0]
        die(f"--compile needs torch 2.13 and a C++ compiler (g++, python3-dev): {reason}", 1)
    return functools.partial(graph, method.__self__)


def as_script(main) -> None:
    """Runs `main`; one line and a non-zero exit for what can go wrong around it."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed by whoever started this
            setattr(sys, name, open(os.devnull, "w"))
    if hasattr(sys.stdout, "reconfigure"):
        # a log file shows each row at once; a name may have what cannot be printed
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    threading.excepthook = lambda failure: None  # TensorBoard's thread; `main` sees it too
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # of `| head`; as if it had been killed by SIGPIPE
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes it once more
        raise SystemExit(141) from None
    except EnvironmentFault as e:
        die(f"{e}; --resume continues the last checkpoint, if there is one", 1)
    except OSError as e:  # a full disk, a folder that went away
        die(f"cannot write: {e}; make room and continue the last checkpoint with --resume", 1)
    except (MemoryError, RuntimeError) as e:
        reason = str(e).partition("\n")[0]
        memory = isinstance(e, (MemoryError, torch.OutOfMemoryError))
        if not memory and "allocate memory" not in reason:
            raise
        die(f"the replay buffer and the networks must fit in memory: {reason}", 1)


if __name__ == "__main__":
    as_script(main)
