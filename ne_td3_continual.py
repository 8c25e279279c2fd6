"""Neuroplastic Expansion (NE) on TD3, a sequence of tasks (§5.2), in one file.

Paper: Neuroplastic Expansion in Deep Reinforcement Learning, arXiv 2410.07994.
       §, Eq. and Table refer to it; docs/ne_td3_continual.md has definitions and deviations.
Run:   python ne_td3_continual.py --seed 1    (--help lists all flags)
       three million steps, up to ten hours on one CPU core
With one task it is ne_td3_continuous.py, bit for bit.

Part one is the algorithm, to be read beside the paper. Part two, from `die` to the end,
surrounds a run and is the same text in every script.
"""

import copy
import csv
import errno
import gc
import itertools
import json
import math
import os
import random
import signal
import sys
import threading
import time
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import filelock
import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import utils_topology as topology


# --- flags; the comments are what --help says ---------------------------------
@dataclass
class RunArgs:
    """What is run, and what it writes."""

    exp_name: str = "ne_td3_continual"  # part of the run's name
    tasks: tuple[str, ...] = ("HalfCheetah-v5", "Humanoid-v5", "Ant-v5", "Hopper-v5")
    """Gymnasium ids, or module:id; Boxes of floats (§5.2)"""
    cycles: int = 3  # times through all tasks (§5.2)
    steps_per_task: int = 250_000  # environment steps of a task in a cycle (ours)
    episodes_per_task: int | None = None  # in place of --steps-per-task (§5.2)
    clear_buffer: bool = False  # empty the replay buffer when the task changes
    seed: int = 1  # of everything random
    cuda: bool = True  # use the GPU if there is one
    cudagraphs: bool = True  # on CUDA: capture the two updates once and replay them
    compile: bool = False  # losses and gradients: half a minute, and a C++ compiler
    torch_threads: int = 1  # of the CPU; more do not help networks this small
    run_dir: str | None = None  # default: runs/{tasks}__{exp_name}__{seed}__{time}
    eval_frequency: int = 10_000  # steps between two evaluations, each on every task
    eval_episodes: int = 10  # per task and evaluation, deterministic policy (TD3's code)
    checkpoint_frequency: int = 50_000  # steps between two, each at an episode's end
    resume: str | None = None  # folder of an interrupted run: continue it exactly
    track: bool = False  # log to W&B as well, which reads WANDB_PROJECT, WANDB_ENTITY

    @property
    def task_lengths(self) -> list[int]:
        """Environment steps of each task in a cycle, of episodes at most."""
        if self.episodes_per_task is None:
            return [self.steps_per_task] * len(self.tasks)
        limits = []
        for task in self.tasks:
            spec = gym.spec(task.split(":")[-1])  # without the module
            limits.append(spec.max_episode_steps or 10_000)
        return [self.episodes_per_task * limit for limit in limits]

    @property
    def total_timesteps(self) -> int:
        """Length of the run in environment steps, of episodes at most."""
        return self.cycles * sum(self.task_lengths)


@dataclass
class TD3Args:
    """Fujimoto et al. 2018; values of the reference code, widths of the paper."""

    learning_rate: float = 3e-4  # of Adam
    batch_size: int = 256  # per update
    buffer_size: int = 1_000_000  # transitions
    gamma: float = 0.99  # discount per step
    tau: float = 0.005  # Polyak step of targets
    learning_starts: int = 25_000  # uniform random actions before the first update
    exploration_noise: float = 0.1  # standard deviation; unit: half the action range
    policy_noise: float = 0.2  # of the target policy's smoothing; same unit
    noise_clip: float = 0.5  # bounds policy_noise
    policy_frequency: int = 2  # critic updates per update of actor and targets
    replay_ratio: int = 1  # updates per environment step
    actor_hidden: tuple[int, ...] = (256, 128)  # widths of hidden layers (Table 1)
    critic_hidden: tuple[int, ...] = (256, 128)  # of each critic (Table 1)


@dataclass
class NEArgs:
    """Neuroplastic Expansion, and what it is combined with (§C)."""

    ne_actor: bool = True  # or dense (Figure 7b)
    ne_critic: bool = True  # or dense (Figure 7b)
    initial_density: float = 0.25  # D, share of connections at the start (ours)
    sparse_init: Literal["erdos-renyi", "uniform"] = "erdos-renyi"  # D over layers (§4.2)
    growth: Literal["gradient", "random", "none"] = "gradient"  # §4.2, §4.1, static
    grow_interval: int | None = None  # Delta T in steps (ours); default: run / 100
    grow_rate: float | None = None  # alpha (§4.2); default: solved for --final-density
    final_density: float = 0.95  # at the end of growth when alpha is solved (ours)
    growth_end: int | None = None  # T_end, last step of growth (§B.2); default: the run's
    prune: bool = True  # dormant neurons (§4.2)
    prune_ratio: float = 0.4  # omega, share of the grown that may go (authors' code)
    weight_clip: float = 2.0  # kappa / sqrt(n_in) bounds reset neurons (§B.2); 0: off
    review_fraction: float = 0.25  # oldest share of the buffer that is reviewed (§4.2)
    review_rule: Literal["slope", "level", "fau"] = "slope"  # see review_threshold (ours)
    review_interval: int | None = None  # c, updates between counts; default: all / 1,000
    review_decay: float | None = None  # of epsilon; default: floor met at half the run
    review_floor: float = 0.65  # slope's least epsilon (ours); 1: no reviews
    review_tau: float = 0.1  # for the review, dormant is a score (Eq. 1) up to this (ours)
    layer_norm: bool = False  # NE + LayerNorm (Lyle et al. 2024), in every hidden layer
    redo_interval: int | None = None  # NE + ReDo (Sokar et al. 2023): updates between two
    redo_tau: float = 0.1  # NE + ReDo: dormant is a score (Eq. 1) up to this
    reset_interval: int | None = None  # NE + Reset (Nikishin et al. 2022): steps


@dataclass
class Args(NEArgs, TD3Args, RunArgs):
    """Neuroplastic Expansion (arXiv 2410.07994) on TD3."""


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

    def copy_(self, other: "Batch") -> None:  # into the batch that a CUDA graph reads
        self.rows.copy_(other.rows)
        self.noise.copy_(other.noise)


class ReplayBuffer:
    """A ring of rows on the device: obs | action | next obs | reward | terminated | mask.

    The mask is that of the actions of the row's task.
    """

    def __init__(self, capacity: int, n_obs: int, n_act: int, seed: int, device: torch.device):
        self.n_obs = n_obs
        self.n_act = n_act
        # filled, so that too little memory shows at once
        self.data = torch.full((capacity, 2 * n_obs + 2 * n_act + 2), 0.0, device=device)
        self.position = 0  # of the next row
        self.size = 0
        self.rng = torch.Generator(device).manual_seed(seed)

    def add(self, obs, action, next_obs, reward: float, terminated: bool, action_mask) -> None:
        end = (reward, terminated)
        row = np.concatenate((obs, action, next_obs, end, action_mask), dtype=np.float32)
        self.data[self.position].copy_(torch.from_numpy(row), non_blocking=True)
        self.position = (self.position + 1) % len(self.data)
        self.size = min(self.size + 1, len(self.data))

    def clear(self) -> None:
        self.position = 0
        self.size = 0

    def sample(self, size: int, oldest=1.0, rng: torch.Generator | None = None) -> Batch:
        """Uniformly from the oldest share of the buffer."""
        rng = rng or self.rng
        first = self.position if self.size == len(self.data) else 0  # the oldest row
        count = max(1, int(oldest * self.size))
        age = torch.randint(count, (size,), generator=rng, device=rng.device)
        return self.batch((first + age) % len(self.data), rng)  # age 0 is the oldest

    def batch(self, index: torch.Tensor, rng: torch.Generator) -> Batch:
        """The rows (B,) of an index, with noise."""
        rows = self.data.index_select(0, index.to(self.data.device))
        columns = (self.n_obs, self.n_act, self.n_obs, 2, self.n_act)
        obs, actions, next_obs, ends, action_mask = rows.split(columns, dim=1)
        noise = torch.randn(actions.shape, generator=rng, device=rng.device)
        return Batch(
            rows=rows,
            obs=obs,
            obs_actions=rows[:, : self.n_obs + self.n_act],
            next_obs=next_obs,
            rewards=ends[:, 0],
            terminated=ends[:, 1],
            action_mask=action_mask,
            noise=noise.to(rows.device),
        )

    def state_dict(self) -> dict:
        # through NumPy, because torch would save the whole storage of a slice
        filled = torch.from_numpy(self.data[: self.size].cpu().numpy())
        return {"filled": filled, "position": self.position, "rng": self.rng.get_state()}

    def load_state_dict(self, state: dict) -> None:
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
        self.initial_density = 1.0  # the fan-in of a reset neuron
        self.register_buffer("mask", torch.ones(n_out, n_in))
        self.register_buffer("bound", torch.full((n_out, n_in), math.inf))  # of |weight|

    def draw(self, neurons: int, rng: torch.Generator):
        """Weights (neurons, in) and biases (neurons,), as nn.Linear draws them."""
        uniform = torch.rand(neurons, self.in_features + 1, generator=rng)
        values = (2 * uniform - 1) / math.sqrt(self.in_features)
        values = values.to(self.weight.device)
        return values[:, :-1], values[:, -1]


class MLP(nn.Module):
    """Hidden layers (masked linear, LayerNorm if asked for, ReLU), then a masked linear."""

    def __init__(self, sizes: list[int], layer_norm: bool):
        super().__init__()
        self.layers = nn.ModuleList()
        for n_in, n_out in itertools.pairwise(sizes):
            self.layers.append(MaskedLinear(n_in, n_out))
        norm = nn.LayerNorm if layer_norm else nn.Identity
        self.norms = nn.ModuleList(norm(n) for n in sizes[1:-1])
        # connections so far: born if all inactive ones were candidates, born, pruned
        self.counts = {"planned": 0, "grown": 0, "pruned": 0}

    def get_extra_state(self) -> dict:  # of state_dict
        return dict(self.counts)

    def set_extra_state(self, counts: dict) -> None:
        self.counts = dict(counts)

    def activations(self, x: torch.Tensor) -> list[torch.Tensor]:
        """(B, sizes[0]) -> [(B, n), ...] of the hidden layers."""
        hidden = []
        for layer, norm in zip(self.layers, self.norms, strict=False):  # not the output's
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
        row = torch.as_tensor(obs, dtype=torch.float32, device=device)
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
        self.layers = [layer for mlp in mlps for layer in mlp.layers]
        self.params = [p for mlp in mlps for p in mlp.parameters()]
        self.target_layers = [layer for target in targets for layer in target.layers]
        self.target_params = [p for target in targets for p in target.parameters()]
        self.optimizer = topology.Adam(self.params, learning_rate)

    @torch.no_grad()
    def step(self, gradients: tuple[torch.Tensor, ...]) -> None:
        """One step of Adam on the active connections; `gradients` of `params` are dense."""
        gradient_of = dict(zip(self.params, gradients, strict=True))
        for layer in self.layers:
            gradient_of[layer.weight].mul_(layer.mask)
        self.optimizer.apply(gradients)
        # §B.2, weight clipping of neurons that were reset (Elsayed et al. 2024)
        for layer in self.layers:
            # written to since it was made; a CUDA graph is captured before that
            if layer.bound._version > 0 or layer.bound.is_cuda:
                layer.weight.clamp_(-layer.bound, layer.bound)

    @torch.no_grad()
    def update_targets(self, tau: float) -> None:
        """Polyak averaging: target <- (1 - tau) * target + tau * online."""
        torch._foreach_lerp_(self.target_params, self.params, tau)

    def hidden(self, batch: Batch) -> list[torch.Tensor]:
        """Activations [(B, n), ...] of the hidden layers of all MLPs."""
        return [h for mlp in self.mlps for h in mlp.hidden(batch)]

    def density(self) -> float:
        """Share of active connections."""
        return topology.network_density(self.layers)


class Agent(nn.Module):
    """Actor, twin critics and their targets; both updates are functions of a batch."""

    def __init__(self, args: Args, n_obs: int, n_act: int, ne_seed: int, device):
        super().__init__()
        self.args = args
        # of all that NE draws: it must not shift exploration noise and batches
        self.rng = torch.Generator().manual_seed(ne_seed)
        actor_sizes = [n_obs, *args.actor_hidden, n_act]
        critic_sizes = [n_obs + n_act, *args.critic_hidden, 1]
        self.actor = Actor(actor_sizes, args.layer_norm)
        self.critic_1 = Critic(critic_sizes, args.layer_norm)
        self.critic_2 = Critic(critic_sizes, args.layer_norm)
        critics = [self.critic_1, self.critic_2]
        # §4.2, sparse start
        sparse = []
        if args.ne_actor:
            sparse += [self.actor]
        if args.ne_critic:
            sparse += critics
        for mlp in sparse:
            topology.sparsify(mlp.layers, args.initial_density, args.sparse_init, self.rng)
        self.target_actor = copy.deepcopy(self.actor)
        self.target_critic_1 = copy.deepcopy(self.critic_1)
        self.target_critic_2 = copy.deepcopy(self.critic_2)
        self.to(device)
        target_critics = [self.target_critic_1, self.target_critic_2]
        self.networks = {
            "actor": Network([self.actor], [self.target_actor], args.learning_rate),
            "critic": Network(critics, target_critics, args.learning_rate),
        }
        self.optimizers = [network.optimizer for network in self.networks.values()]

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
            discounts = args.gamma * (1 - batch.terminated)  # (B,)
            target_q = batch.rewards + discounts * next_q  # (B,)
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
        obs_actions = torch.cat((batch.obs, actions), dim=1)
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
    if args.growth == "none" or not (args.ne_actor or args.ne_critic):
        args.grow_rate = 0.0
    if args.grow_rate is None:
        args.grow_rate = solve_grow_rate(args)
    updates = args.replay_ratio * max(1, args.total_timesteps - args.learning_starts)
    if args.review_interval is None:
        args.review_interval = max(1, updates // 1_000)
    if args.review_decay is None:
        # with no reduction, (1 - decay)^counts meets the floor at half the run
        until_half = args.replay_ratio * (args.total_timesteps // 2 - args.learning_starts)
        counts = max(1, until_half // args.review_interval - 1)  # the first has no reduction
        floor = max(0.01, args.review_floor)  # 0 would never be met
        args.review_decay = 1 - floor ** (1 / counts)


def growth_rounds(args: Args) -> range:
    """Environment steps of the rounds: from the first update until the cosine is 0."""
    first = (args.learning_starts // args.grow_interval + 1) * args.grow_interval
    return range(first, args.growth_end, args.grow_interval)


def growth_fraction(args: Args, step: int, alpha: float) -> float:
    """Share of a layer's candidates that is born at `step`, cosine-annealed (§4.2)."""
    return alpha / 2 * (1 + math.cos(math.pi * step / args.growth_end))


def solve_grow_rate(args: Args) -> float:
    """alpha that takes a network from --initial-density to about --final-density.

    All rounds leave the product of 1 - growth_fraction of the inactive connections inactive.
    With ln(1 - x) = -x, (1 - final) / (1 - initial density) = exp(-sum of the fractions).
    """
    inactive = 1 - args.initial_density
    total = sum(growth_fraction(args, step, alpha=1.0) for step in growth_rounds(args))
    if total == 0 or inactive == 0:
        return 0.0
    if not args.initial_density <= args.final_density < 1:
        low = f"--initial-density ({args.initial_density})"
        die(f"--final-density must be below 1 and at least {low}, got {args.final_density}")
    return min(1.0, 1 / total * math.log(inactive / (1 - args.final_density)))


def growth_plan(args: Args) -> str:
    """One line that says what density to expect."""
    density = args.initial_density if args.ne_actor or args.ne_critic else 1.0
    inactive = 1 - density
    rounds = [step for step in growth_rounds(args) if step <= args.total_timesteps]
    for step in rounds:
        inactive *= 1 - growth_fraction(args, step, args.grow_rate)
    end = f"{1 - inactive:.0%} in {len(rounds)} rounds"
    return f"topology: {density:.0%} -> {end}, less what is pruned"


def topology_round(agent: Agent, batch: Batch, step: int) -> None:
    """§4.2, Eq. 2: grows, then prunes and resets; targets take over the masks."""
    args = agent.args
    fraction = growth_fraction(args, step, args.grow_rate)
    # dense; no step is taken with them
    _, of_actor = agent.actor_gradients(batch)
    _, _, of_critic = agent.critic_gradients(batch)
    gradients = {"actor": of_actor, "critic": of_critic}
    rng = agent.rng
    for name, network in agent.networks.items():
        gradient_of = dict(zip(network.params, gradients[name], strict=True))
        for mlp in network.mlps:
            layers, counts, adam = mlp.layers, mlp.counts, network.optimizer
            hidden = mlp.hidden(batch)
            # elastic neuron generation
            scores = [gradient_of[layer.weight] for layer in layers]
            if args.growth == "random":  # §4.1
                scores = topology.random_scores(layers, rng)
            counts["planned"] += topology.planned_births(layers, fraction)
            counts["grown"] += topology.grow(layers, scores, fraction, adam)
            # dormant neuron pruning and reset
            if args.prune:
                budget = int(args.prune_ratio * counts["grown"]) - counts["pruned"]
                clip = args.weight_clip
                pruned = topology.prune(layers, hidden, budget, clip, adam, rng, mlp.norms)
                counts["pruned"] += pruned
        topology.copy_masks(network.layers, network.target_layers)


@dataclass
class Progress:
    """What a run has done so far, beside its networks."""

    updates: int = 0
    reviewed: int = 0  # updates whose batch was a review
    epsilon: float = 1.0  # a batch is a review with probability 1 - epsilon
    dormant: int | None = None  # the critics' dormant neurons when last counted
    losses: dict[str, torch.Tensor] = field(default_factory=dict)  # of a uniform batch
    returns: list[float] = field(default_factory=list)  # since the last evaluation
    stretches: int = 0  # of one task each, that have ended
    episodes: int = 0  # of this task in this cycle


def review_threshold(args: Args, progress: Progress, dormant: int, fau: float) -> float:
    """§4.2, experience review: the next epsilon; a batch is a review with 1 - epsilon.

    "slope": epsilon is large while growth still wakes neurons up, then falls to its
    floor. "level": 1 - epsilon is the dormant share of the critics' hidden neurons.
    "fau": half of the batches while few of the critics' activations are positive.
    """
    if args.review_floor == 1:
        return 1.0
    if args.review_rule == "level":
        return 1 - dormant / (2 * sum(args.critic_hidden))
    if args.review_rule == "fau":  # numbers of the authors' code
        return 1 / (1 + 0.9 * math.exp(0.4 - fau)) if fau < 0.4 else 1.0
    if progress.dormant is None:  # first count
        return progress.epsilon
    reduction = max(0, progress.dormant - dormant) / max(progress.dormant, 1)  # in [0, 1]
    epsilon = (1 - args.review_decay) * progress.epsilon + args.review_decay * reduction
    return max(args.review_floor, epsilon)


def redo(agent: Agent, batch: Batch) -> None:
    """NE + ReDo (§C)."""
    tau = agent.args.redo_tau
    for network in agent.networks.values():
        for mlp in network.mlps:
            hidden = mlp.hidden(batch)
            topology.redo(mlp.layers, hidden, tau, network.optimizer, agent.rng, mlp.norms)


@torch.no_grad()
def reset(agent: Agent) -> None:
    """NE + Reset (§C): networks, targets and Adam's state start anew; the masks stay."""
    for network in agent.networks.values():
        topology.reset(network.layers, agent.rng)
        for mlp in network.mlps:
            for norm in mlp.norms:
                if isinstance(norm, nn.LayerNorm):
                    norm.reset_parameters()
        network.update_targets(tau=1.0)
        for state in network.optimizer.state.values():
            for value in state.values():
                value.zero_()


# --- environment and evaluation -----------------------------------------------
def make_env(env_id: str) -> gym.Env:
    """A task with flat observations (obs,) and actions (act,) in [-1, 1].

    Raises: SystemExit(2) for a task that there is not, or whose spaces do not fit.
    """
    try:
        import mujoco  # after triton, see utils_topology

        mujoco.set_mju_user_warning(warn)
        env = gym.make(env_id)
        spaces = f"{env.observation_space} and {env.action_space}"
        env = gym.wrappers.FlattenObservation(env)  # which copies them, too
    except (gym.error.Error, ImportError, NotImplementedError) as e:
        die(f"cannot make {env_id}: {type(e).__name__}: {e}")
    for space in (env.observation_space, env.action_space):
        flat = isinstance(space, gym.spaces.Box) and len(space.shape) == 1
        if not flat or space.shape[0] == 0 or space.dtype.kind != "f":
            die(f"{env_id} must have Boxes of floats, actions in one dimension, got {spaces}")
    act = env.action_space
    if not (act.is_bounded() and (act.low < act.high).all()):
        die(f"{env_id} must have actions between finite bounds, low < high, got {spaces}")
    if env.spec.max_episode_steps is None:
        env = gym.wrappers.TimeLimit(env, 10_000)
    # rescaling may pass a bound by the last bit
    env = gym.wrappers.TransformAction(env, lambda action: action.clip(act.low, act.high), act)
    env = gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
    return gym.wrappers.RecordEpisodeStatistics(env)


class PaddedEnv(gym.Wrapper):
    """A task as large as the largest of the sequence.

    Its observations (obs,) end in zeros; of an action (act,) it reads the first entries.
    """

    def __init__(self, env: gym.Env, n_obs: int, n_act: int):
        super().__init__(env)
        self.missing = np.zeros(n_obs - env.observation_space.shape[0], dtype=np.float32)
        self.own_act = env.action_space.shape[0]
        self.action_mask = np.zeros(n_act, dtype=np.float32)
        self.action_mask[: self.own_act] = 1.0
        self.observation_space = gym.spaces.Box(-math.inf, math.inf, (n_obs,))
        self.action_space = gym.spaces.Box(-1, 1, (n_act,))

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        return np.concatenate((obs, self.missing)), info

    def step(self, action: np.ndarray):
        obs, *rest = self.env.step(action[: self.own_act])
        return np.concatenate((obs, self.missing)), *rest


def make_envs(tasks: tuple[str, ...]) -> list[PaddedEnv]:
    """All tasks, padded. Raises: SystemExit(2) as make_env does."""
    if not tasks or len(set(tasks)) < len(tasks):
        die(f"--tasks must be one task or more, each once, got {' '.join(tasks)}")
    envs = [make_env(task) for task in tasks]
    n_obs = max(env.observation_space.shape[0] for env in envs)
    n_act = max(env.action_space.shape[0] for env in envs)
    return [PaddedEnv(env, n_obs, n_act) for env in envs]


def evaluate(actor: Actor, env: gym.Env, episodes: int, seed: int) -> list[float]:
    """Returns of the deterministic policy, from the same starts at every call."""
    returns = []
    for episode in range(episodes):
        obs, _ = env.reset(seed=100 + seed + episode)  # not the seed of training
        done = False
        while not done:
            obs, _, terminated, truncated, info = env.step(actor.act(obs))
            done = terminated or truncated
        returns.append(float(info["episode"]["r"]))
    return returns


# --- training -----------------------------------------------------------------
def evaluate_tasks(agent, buffer, progress, envs, step: int, folder: Path, log) -> None:
    """Adds a row for each task to results.csv; they differ in the evaluation only."""
    args = agent.args
    cycle, task = divmod(progress.stretches, len(args.tasks))
    trained = {"step": step, "cycle": cycle + 1, "task/id": task}
    trained["task_trained"] = args.tasks[task]
    batch = buffer.sample(args.batch_size, rng=torch.Generator().manual_seed(step))
    measured = measure(agent, batch, progress, step)
    progress.returns = []
    for name, env in zip(args.tasks, envs, strict=True):
        returns = evaluate(agent.actor, env, args.eval_episodes, args.seed)
        mean = float(np.mean(returns))
        std = float(np.std(returns))
        evaluated = {"task_evaluated": name, "eval/return_mean": mean, "eval/return_std": std}
        write_row(folder, trained | evaluated | measured)
        log.scalar(f"eval/{name}/return_mean", mean, step)
        tqdm.write(f"step {step:,}: {name} return {mean:,.1f} +- {std:,.1f}")
    log.scalar("task/id", task, step)
    log.row(measured, step)


def measure(agent: Agent, batch: Batch, progress: Progress, step: int) -> dict[str, float]:
    """What the rows of one step of results.csv share."""
    row = {"charts/episodic_return": float(np.mean(progress.returns or math.nan))}
    for key in ("qf_loss", "qf_values"):
        row[f"losses/{key}"] = float(progress.losses.get(key, math.nan))
    for name, network in agent.networks.items():
        activity = topology.activity(network.hidden(batch))
        if step == 0:  # there are no transitions to take activations from
            activity = dict.fromkeys(activity, math.nan)
        values = {"density": network.density()} | activity
        for key in ("planned", "grown", "pruned"):
            values[key] = sum(mlp.counts[key] for mlp in network.mlps)
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
    returns = {}  # of each task at the end of each stretch
    for row in rows:
        pair = (row["cycle"], row["task_trained"], row["task_evaluated"])
        returns[pair] = float(row["eval/return_mean"])
    matrix = np.reshape(list(returns.values()), (-1, len(tasks)))  # (stretches, tasks)
    untrained = [float(row["eval/return_mean"]) for row in rows[: len(tasks)]]
    metrics = {"average performance": {}, "forgetting": {}, "forward transfer": {}}
    for i, task in enumerate(tasks):
        metrics["average performance"][task] = matrix[-1, i]
        if i < len(tasks) - 1:
            best = matrix[:-1, i].max()  # at the end of an earlier stretch
            metrics["forgetting"][task] = best - matrix[-1, i]
        if i > 0:
            before = matrix[i - 1, i]  # at the end of the stretch before its first
            metrics["forward transfer"][task] = before - untrained[i]
    for values in metrics.values():
        values["mean"] = np.mean(list(values.values()) or math.nan)
    return metrics


def print_metrics(folder: Path) -> None:
    """The table at the end of a run."""
    with open(folder / "results.csv", newline="") as file:
        metrics = continual_metrics(list(csv.DictReader(file)))
    columns = list(metrics["average performance"])
    width = max(14, 2 + max(map(len, columns)))
    print(" " * 20 + "".join(f"{column:>{width}}" for column in columns))
    for name, values in metrics.items():
        cells = [f"{values.get(column, math.nan):>{width},.1f}" for column in columns]
        print(f"{name:20}" + "".join(cells))


def log_masks(log, agent: Agent, step: int) -> None:
    """Pictures (1, out, in) for TensorBoard and benchmark/plot.py topology."""
    for name, network in agent.networks.items():
        for i, layer in enumerate(network.layers):
            log.writer.add_image(f"masks/{name}/{i}", layer.mask[None], step)


def fast_updates(args: Args, agent: Agent, buffer: ReplayBuffer):
    """The agent's two updates, compiled and captured if asked for."""
    if args.compile:
        print("compiling losses and gradients, which takes half a minute or more")
        example = buffer.sample(args.batch_size, rng=torch.Generator().manual_seed(0))
        of_critic = compiled(agent.critic_gradients, example)
        of_actor = compiled(agent.actor_gradients, example)
        agent.critic_gradients, agent.actor_gradients = of_critic, of_actor
    if buffer.data.is_cuda and args.cudagraphs:
        return CudaGraph(agent.update_critic), CudaGraph(agent.update_actor)
    return agent.update_critic, agent.update_actor


def main() -> None:
    # --- setup ---
    args, checkpoint = parse_args(Args)
    device = set_up(args)
    seeds = np.random.SeedSequence(args.seed).generate_state(4).tolist()
    weight_seed, noise_seed, batch_seed, ne_seed = seeds
    torch.manual_seed(weight_seed)
    noise_rng = np.random.default_rng(noise_seed)
    envs = make_envs(args.tasks)
    eval_envs = make_envs(args.tasks)
    scale_to_run(args)  # whose tasks are registered now
    n_obs = envs[0].observation_space.shape[0]
    n_act = envs[0].action_space.shape[0]
    agent = Agent(args, n_obs, n_act, ne_seed, device)
    buffer = ReplayBuffer(args.buffer_size, n_obs, n_act, batch_seed, device)
    progress = Progress()
    parts = (agent, buffer, progress, noise_rng, envs)  # all that a resumed run needs
    start = 0
    starts = [env.reset(seed=args.seed) for env in envs]
    obs, _ = starts[0]
    if checkpoint is not None:
        start = checkpoint["step"]
        restore(parts, checkpoint.pop("parts"))
        obs, _ = envs[progress.stretches % len(envs)].reset()
    folder, lock = open_folder(args, checkpoint, "+".join(args.tasks))
    log = Log(args, folder, start)
    stop = Stop()
    print(f"{' '.join(args.tasks)}, seed {args.seed}, {device}: {folder}\n{growth_plan(args)}")
    update_critic, update_actor = fast_updates(args, agent, buffer)
    rounds = growth_rounds(args)
    if start == 0:
        log_masks(log, agent, step=0)
        evaluate_tasks(agent, buffer, progress, eval_envs, 0, folder, log)

    # --- the loop ---
    saved = start
    started = time.time()
    last = args.total_timesteps
    for step in tqdm(range(start + 1, last + 1), initial=start, total=last, disable=None):
        env = envs[progress.stretches % len(envs)]

        # act
        if step <= args.learning_starts:
            action = noise_rng.uniform(-1, 1, n_act)
        else:
            noise = noise_rng.normal(0, args.exploration_noise, n_act)
            action = agent.actor.act(obs) + noise
        action = action.clip(-1, 1).astype(np.float32) * env.action_mask

        # update; before the environment steps, so that on CUDA both run at the same time
        # and, after the buffer was cleared, not until it holds a batch again
        enough = buffer.size >= min(args.batch_size, args.learning_starts)
        updates = args.replay_ratio if step > args.learning_starts and enough else 0
        for _ in range(updates):
            progress.updates += 1
            # §4.2, experience review
            u = torch.rand((), generator=agent.rng).item()
            review = u > progress.epsilon
            progress.reviewed += review
            oldest = args.review_fraction if review else 1.0
            batch = buffer.sample(args.batch_size, oldest)
            # critic, then actor and targets
            losses = {}
            losses["qf_loss"], losses["qf_values"] = update_critic(batch)
            if progress.updates % args.policy_frequency == 0:
                losses["actor_loss"] = update_actor(batch)
            if not review:  # old batches would bend the curves
                progress.losses |= {key: value.clone() for key, value in losses.items()}
            if progress.updates % args.review_interval == 0:
                batch = buffer.sample(1_024, rng=agent.rng)
                hidden = agent.networks["critic"].hidden(batch)
                dormant = len(topology.dormant_neurons(hidden, args.review_tau))
                fau = topology.activity(hidden)["fau"]
                progress.epsilon = review_threshold(args, progress, dormant, fau)
                progress.dormant = dormant
            if args.redo_interval and progress.updates % args.redo_interval == 0:
                redo(agent, buffer.sample(args.batch_size, rng=agent.rng))

        # step and store
        require_finite(step, observation=obs, action=action)
        next_obs, reward, terminated, truncated, info = env.step(action)
        require_finite(step, observation=next_obs, reward=reward)
        buffer.add(obs, action, next_obs, reward, terminated, env.action_mask)
        obs = next_obs
        ended = terminated or truncated
        if ended:
            episodic_return = float(info["episode"]["r"])
            progress.returns.append(episodic_return)
            log.scalar("charts/episodic_return", episodic_return, step)
            log.scalar("charts/episodic_length", info["episode"]["l"], step)
            progress.episodes += 1
        if args.episodes_per_task is None:
            switch = step % args.steps_per_task == 0
        else:
            switch = progress.episodes == args.episodes_per_task
        if switch and progress.stretches + 1 == args.cycles * len(envs):
            last = step  # of episodes, there may be fewer steps

        # topology; none while a cleared buffer holds no batch
        if step in rounds and enough:
            batch = buffer.sample(args.batch_size, rng=agent.rng)
            topology_round(agent, batch, step)
            log_masks(log, agent, step)
        if args.reset_interval and step % args.reset_interval == 0 and step < last:
            reset(agent)

        # evaluate and log
        if step % 1_000 == 0:
            log.scalar("charts/SPS", (step - start) / (time.time() - started), step)
            for key, value in progress.losses.items():
                log.scalar(f"losses/{key}", value, step)
        if step % args.eval_frequency == 0 or switch:
            evaluate_tasks(agent, buffer, progress, eval_envs, step, folder, log)

        # episode end, or the task's, which may cut an episode
        if step == last:
            break
        if switch:
            progress.stretches += 1
            progress.episodes = 0
            if args.clear_buffer:
                buffer.clear()
        # no environment can be saved inside an episode
        if ended or switch:
            if stop.signal or step - saved >= args.checkpoint_frequency:
                save(folder, args, checkpoint, step, parts)
                saved = step
            if stop.signal:
                log.close()
                stop.leave(step, folder)
            obs, _ = envs[progress.stretches % len(envs)].reset()

    save(folder, args, checkpoint, step, parts, finished=True)
    log.close()
    print(f"finished: {folder}, {(step - start) / (time.time() - started):.0f} steps/s")
    print_metrics(folder)


# ==============================================================================
# Part two, around a run: nothing of the algorithm, the same text in every script
# ==============================================================================
def die(message: str, code: int = 2) -> NoReturn:
    """One clear line; exits with 2 for a mistake on the command line, 1 for later."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


# --- arguments ----------------------------------------------------------------
# integers are in [1, 10^9], other numbers in [0, 1], but:
LIMITS = {
    "seed": (0, 2**31 - 1),
    "learning_rate": (1e-9, 1),
    "initial_density": (1e-9, 1),
    "review_fraction": (1e-9, 1),
    "prune_ratio": (0, 0.999),  # below 1, so that more is born than pruned
    "frame_size": (15, 10**9),  # for the encoder's four convolutions
}
NOISES = ("exploration_noise", "policy_noise", "noise_clip")
LIMITS |= dict.fromkeys((*NOISES, "weight_clip", "redo_tau", "review_tau"), (0, 1_000))


def check_limits(args) -> None:
    for name, value in vars(args).items():
        flag = "--" + name.replace("_", "-")
        numbers = value if isinstance(value, tuple) else (value,)
        for number in numbers:
            if type(number) in (int, float):
                usual = (1, 10**9) if isinstance(number, int) else (0, 1)
                low, high = LIMITS.get(name, usual)
                if not low <= number <= high:  # NaN is in no interval
                    die(f"{flag} must be in [{low:,}, {high:,}], got {number}")
    if args.batch_size > args.buffer_size:
        die(f"--batch-size must be at most {args.buffer_size}, got {args.batch_size}")


def parse_args(Args: type) -> tuple:
    """The arguments and, with --resume, the checkpoint, whose arguments they are."""
    for word in sys.argv[1:]:
        flag, _, value = word.partition("=")
        if value.lower() in ("true", "false"):
            die(f"{flag} takes no value: give {flag} or --no-{flag[2:]}")
    args = tyro.cli(Args)
    checkpoint = None
    if args.resume is not None:
        checkpoint = load_checkpoint(Path(args.resume), Args)
        stored = Args(**checkpoint["args"])
        args = tyro.cli(Args, default=stored)  # what differs was given
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


def set_up(args) -> torch.device:
    random.seed(args.seed)  # some environments draw from it, or from NumPy's
    np.random.seed(args.seed)
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


# --- a run's folder: args.json, results.csv, TensorBoard's events, checkpoint.pt
def open_folder(args, checkpoint: dict | None, task: str) -> tuple[Path, filelock.FileLock]:
    """The folder, locked. Of a resumed run, rows since the checkpoint are cut off."""
    name = f"{task}__{args.exp_name}__{args.seed}__{time.time_ns()}"
    new = "runs/" + name.replace("/", "_").replace(":", "_")
    folder = Path(args.resume or args.run_dir or new)
    results = folder / "results.csv"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(folder)
        if checkpoint is not None:
            results.write_bytes(checkpoint["results"].encode())
        elif results.exists() or (folder / "checkpoint.pt").exists():
            die(f"--run-dir must be a new folder; --resume {folder} continues the run in it")
        else:
            (folder / "args.json").write_text(json.dumps(vars(args), indent=2))
    except OSError as e:
        die(f"the run's folder must be one that can be written: {e}")
    return folder, lock


def lock_folder(folder: Path) -> filelock.FileLock:
    """Until this process ends no other may work in it."""
    lock = filelock.FileLock(folder / "lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        die(f"{folder} is in use by another process", code=1)
    except OSError as e:  # some network file systems have no locks
        warn(f"no other process may use {folder}, it cannot be locked: {e}")
    return lock


def write_row(folder: Path, row: dict) -> None:
    with open(folder / "results.csv", "a", newline="") as file:
        table = csv.DictWriter(file, row)
        if file.tell() == 0:
            table.writeheader()
        table.writerow(row)


class Log:
    """TensorBoard's events and, with --track, W&B."""

    def __init__(self, args, folder: Path, start: int):
        self.writer = SummaryWriter(str(folder), purge_step=start + 1)
        self.tracker = None
        if args.track:
            import wandb

            file = folder / "wandb_id"  # by which a resumed run continues it
            if not file.exists():
                file.write_text(os.urandom(8).hex())
            run = {"id": file.read_text(), "name": str(folder), "config": vars(args)}
            self.tracker = wandb.init(**run, dir=str(folder), resume="allow")
            self.tracker.define_metric("*", step_metric="global_step")

    def scalar(self, key: str, value: float, step: int) -> None:
        self.writer.add_scalar(key, value, step)
        if self.tracker is not None:
            self.tracker.log({key: float(value), "global_step": step})

    def row(self, row: dict, step: int) -> None:
        """Episodes and losses are logged as they come."""
        for key, value in row.items():
            if key.startswith(("eval/", "ne/")):
                self.scalar(key, value, step)

    def close(self) -> None:
        self.writer.close()
        if self.tracker is not None:
            self.tracker.finish()


def warn(text: str) -> None:
    if "settotalmass" not in text:  # MuJoCo, of Gymnasium's HalfCheetah
        print(f"warning: {text}", file=sys.stderr)


def require_finite(step: int, **values) -> None:
    for name, value in values.items():
        if not (np.abs(value) < 3e38).all():  # NaN is not; float32 ends there
            hint = "--resume continues from the last checkpoint, if there is one"
            die(f"the {name} is NaN or infinite at step {step:,}; {hint}", code=1)


class Stop:
    """Ctrl-C, kill, a closed terminal, Slurm's warning end a run at the episode's end."""

    def __init__(self):
        self.signal = None
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
            number = getattr(signal, name, signal.SIGTERM)  # Windows lacks two
            nohup = name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN
            if not nohup:
                signal.signal(number, self.request)

    def request(self, number: int, frame) -> None:
        self.signal = number
        signal.signal(number, signal.SIG_DFL)
        try:
            os.write(2, b"\nfinishing the episode, then saving (once more: stop at once)\n")
        except OSError:  # the terminal is closed
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)

    def leave(self, step: int, folder: Path) -> NoReturn:
        print(f"stopped at step {step}: python {sys.argv[0]} --resume {folder}")
        raise SystemExit(130 if self.signal == signal.SIGINT else 0)


# --- checkpoints --------------------------------------------------------------
def save(folder: Path, args, resumed, step: int, parts: tuple, finished=False) -> None:
    """Atomic: a run that is killed in here keeps the checkpoint before.

    Args:
        resumed: the checkpoint that this process continues, or None; it has the arguments
            of the run's first start.
    """
    agent, buffer, progress, noise_rng, envs = parts
    for parameter in agent.parameters():
        require_finite(step, weight=parameter.detach().cpu().numpy())
    states = {
        "agent": agent.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in agent.optimizers],
        "progress": vars(progress),
        "agent_rng": agent.rng.get_state(),
        "noise_rng": state_of(noise_rng),
        "env_rngs": [state_of(env.np_random) for env in envs],
        "numpy_rng": state_of(np.random),
        "python_rng": random.getstate(),
    }
    if not finished:  # else it is needed no more
        states["buffer"] = buffer.state_dict()
    results = folder / "results.csv"
    content = {"script": type(args).exp_name, "step": step, "finished": finished}
    content["args"] = resumed["args"] if resumed else vars(args)
    content["parts"] = states
    content["results"] = results.read_bytes().decode() if results.exists() else ""
    with open(folder / "checkpoint.tmp", "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(folder / "checkpoint.tmp", folder / "checkpoint.pt")


def restore(parts: tuple, states: dict) -> None:
    """Raises: SystemExit(1) for a checkpoint that does not fit, e.g. one begun on a GPU."""
    agent, buffer, progress, noise_rng, envs = parts
    try:
        buffer.load_state_dict(states.pop("buffer"))
        states = copy.deepcopy(states)  # so that the old file can go
        agent.load_state_dict(states["agent"])
        for optimizer, state in zip(agent.optimizers, states["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        vars(progress).update(states["progress"])
        agent.rng.set_state(states["agent_rng"])
        set_state(noise_rng, states["noise_rng"])
        for env, state in zip(envs, states["env_rngs"], strict=True):
            set_state(env.np_random, state)
        set_state(np.random, states["numpy_rng"])
        random.setstate(states["python_rng"])
    except (KeyError, RuntimeError, TypeError, ValueError) as e:
        reason = " ".join(str(e).split())
        die(f"the checkpoint does not fit this run: {reason}", code=1)


def state_of(rng) -> str:
    """Of a NumPy generator; of old ones (np.random is one) get_state has all."""
    old = hasattr(rng, "get_state")
    state = rng.get_state(legacy=False) if old else rng.bit_generator.state
    return json.dumps(state, default=np.ndarray.tolist)


def set_state(rng, state: str) -> None:
    if hasattr(rng, "set_state"):
        rng.set_state(json.loads(state))
    else:
        rng.bit_generator.state = json.loads(state)


def load_checkpoint(folder: Path, Args: type) -> dict:
    """Raises: SystemExit(1) for what is missing, damaged or of another script."""
    path = folder / "checkpoint.pt"
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at checksums
            if archive.testzip() is not None:
                raise ValueError("a checksum is wrong")
        mmap = os.name == "posix"  # elsewhere no file that is open can be replaced
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        if checkpoint["script"] != Args.exp_name:
            raise ValueError(f"it is of {checkpoint['script']}")
        if set(checkpoint["args"]) != set(vars(Args())):
            raise ValueError("it is of another version, with other flags")
    except Exception as e:  # zipfile and torch raise many kinds
        reason = str(e).partition("\n")[0]
        die(f"{path} is missing, damaged or not this script's: {reason}", code=1)
    return checkpoint


# --- speed --------------------------------------------------------------------
def compiled(method, *inputs):
    """A method, as one graph for inputs of these shapes. Raises: SystemExit(1)."""
    try:
        torch._dynamo.config.trace_autograd_ops = True
        options = {"cpp_wrapper": not torch.cuda.is_available()}
        # nothing is checked at a call: shapes stay as they are
        options["guard_filter_fn"] = torch.compiler.skip_all_guards_unsafe
        graph = torch.compile(method, fullgraph=True, options=options)
        graph = graph.aot_compile((inputs, {}))
    except Exception as e:  # of the compilers, which are many
        reason = str(e).partition("\n")[0]
        die(f"--compile needs torch 2.13 and a C++ compiler (g++, python3-dev): {reason}", 1)
    return lambda *inputs: graph(method.__self__, *inputs)


class CudaGraph:
    """An update: three plain calls to warm up, then captured once and replayed."""

    def __init__(self, update):
        self.update = update
        self.calls = 0

    def __call__(self, batch):
        self.calls += 1
        if self.calls <= 3:
            return self.update(batch)
        if self.calls == 4:
            self.batch = batch  # whose memory the graph reads
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
                self.losses = self.update(batch)
        self.batch.copy_(batch)
        self.graph.replay()
        return self.losses


def as_script(main) -> None:
    """Runs `main`; one line for a full disk and for too little memory."""
    threading.excepthook = lambda failure: None  # TensorBoard's thread; `main` sees it too
    sys.stdout.reconfigure(line_buffering=True)  # a log file shows each row at once
    try:
        main()
    except (OSError, RuntimeError) as e:
        for failure in (e, e.__context__):  # torch hides the first behind a second
            if getattr(failure, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                hint = "make room, then --resume continues from the last checkpoint"
                die(f"cannot write: {failure}; {hint}", code=1)
        reason = str(e).partition("\n")[0]
        if isinstance(e, torch.OutOfMemoryError) or "allocate memory" in reason:
            die(f"the replay buffer and the networks must fit in memory: {reason}", code=1)
        raise


if __name__ == "__main__":
    as_script(main)
