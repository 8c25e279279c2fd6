"""Neuroplastic Expansion (NE) on DrQ-v2, continuous control from pixels, in one file.

Paper: Neuroplastic Expansion in Deep Reinforcement Learning, arXiv 2410.07994.
       §, Eq. and Table refer to it; docs/ne_drq_dmc.md numbers the deviations from it.
Run:   python ne_drq_dmc.py --env-id walker_walk    (--help lists all flags)
       on a GPU: an update of the default size takes four CPU seconds; the score published
       for DrQ-v2 on walker_walk is 767 after a million frames
With --initial-density 1 --review-floor 1 it is DrQ-v2, bit for bit (on a CPU).

A step is an environment frame, --action-repeat of them an agent step.
Part one is the algorithm, to be read beside the paper. Part two, from `die` to the end,
surrounds a run, knows nothing of the algorithm, and is the same text in every script.
"""

import contextlib
import copy
import csv
import difflib
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
from collections import deque
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import utils_topology as topology

PAD = 4  # pixels by which the augmentation shifts at most
TRUNK = 50  # outputs of a trunk


@dataclass
class RunArgs:
    """What is run, and what it writes. Steps are environment frames."""

    exp_name: str = "ne_drq_dmc"
    """name of this experiment, part of the run's name"""
    env_id: str = "walker_walk"
    """domain_task of the DeepMind Control Suite"""
    seed: int = 1
    """seed of everything random"""
    total_timesteps: int | None = None
    """length of the run in frames (DrQ-v2); default: 1.1M for walker_walk, else 3.1M"""
    cuda: bool = True
    """use the GPU if there is one"""
    cudagraphs: bool = True
    """on CUDA: capture the update once and replay it"""
    compile: bool = False
    """compile losses and gradients; needs a C++ compiler and a minute"""
    bf16: bool = False
    """losses in bfloat16 where autocast holds that to be safe"""
    torch_threads: int = 1
    """CPU threads of torch; a resumed run is exact with the same number only"""
    run_dir: str | None = None
    """where all files go; default: runs/{env_id}__{exp_name}__{seed}__{unix_time}"""
    eval_frequency: int = 10_000
    """frames between two rows of results.csv (DrQ-v2)"""
    eval_episodes: int = 10
    """episodes per evaluation, deterministic policy (DrQ-v2)"""
    max_episode_steps: int = 10_000
    """longer episodes are cut off, in frames; far above the limits of all known tasks"""
    checkpoint_frequency: int = 250_000
    """frames between checkpoints, each at the next episode end"""
    resume: str | None = None
    """folder of an interrupted run: continue it exactly, with its own arguments"""
    track: bool = False
    """log to Weights and Biases as well"""
    wandb_project_name: str = "neuroplastic-expansion"
    """project of --track"""
    wandb_entity: str | None = None
    """team of --track"""


@dataclass
class DrQArgs:
    """DrQ-v2 (Yarats et al. 2022); values of its reference code, Table 3."""

    action_repeat: int = 2
    """frames per agent step"""
    frame_size: int = 84
    """height and width of a frame in pixels"""
    frame_stack: int = 3
    """frames per observation"""
    channels: int = 32
    """of each of the four convolutions"""
    hidden_dim: int = 1024
    """width of the two hidden layers of policy and Q heads"""
    learning_rate: float = 1e-4
    """Adam's step size, encoder, critic and actor"""
    batch_size: int = 256
    """windows of n steps per update"""
    buffer_size: int = 1_000_000
    """single frames kept"""
    buffer_device: Literal["cpu", "cuda"] = "cpu"
    """where the frames are kept, if a GPU is used"""
    gamma: float = 0.99
    """discount factor per agent step"""
    n_step: int = 3
    """agent steps per window"""
    tau: float = 0.01
    """Polyak step of the target networks, per update"""
    learning_starts: int = 4_000
    """frames with uniform random actions before the first update"""
    update_frequency: int = 2
    """agent steps per update"""
    stddev: tuple[float, float] = (1.0, 0.1)
    """of all action noise, first and last; unit: half the action range"""
    stddev_duration: int | None = None
    """agent steps from first to last; default: 100k for walker_walk, else 500k"""
    noise_clip: float = 0.3
    """bound of the noise in the losses; unit: half the action range"""


@dataclass
class NEArgs:
    """Neuroplastic Expansion on the MLP heads, and what it is combined with (§C)."""

    ne_actor: bool = True
    """NE on the policy; off: dense from the start (Figure 7b)"""
    ne_critic: bool = True
    """NE on both Q heads; off: dense from the start (Figure 7b)"""
    sparse_trunk: bool = False
    """NE on the trunks' linear layers, too: one density budget with the heads (ours)"""
    initial_density: float = 0.25
    """D, share of connections active at the start (ours); 1: dense, nothing to grow"""
    sparse_init: Literal["erdos-renyi", "uniform"] = "erdos-renyi"
    """how D is spread over the layers (§4.2)"""
    growth: Literal["gradient", "random", "none"] = "gradient"
    """largest |gradient| (§4.2), any (§4.1), static"""
    grow_interval: int | None = None
    """Delta T, frames between rounds (ours); default: run / 100"""
    actor_grow_rate: float | None = None
    """alpha of the policy (§4.2); default: solved for --actor-final-density (ours)"""
    critic_grow_rate: float | None = None
    """alpha of the Q heads (§B.2: larger); default: solved likewise (ours)"""
    actor_final_density: float = 0.75
    """density of the policy at the end of growth when alpha is solved (ours)"""
    critic_final_density: float = 0.95
    """density of the Q heads at the end of growth when alpha is solved (ours)"""
    growth_end: int | None = None
    """T_end, frame after which nothing grows (§B.2); default: the last"""
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
    """c, updates between counts of dormant neurons (ours); default: all / 1,000, not below 10"""
    review_decay: float | None = None
    """weight of the newest count in epsilon (ours); default: floor reached at half the run"""
    review_floor: float = 0.65
    """slope's least epsilon: at most 1 - floor of the batches are reviews (ours); 1: none"""
    review_tau: float = 0.1
    """for the review, a neuron is dormant at a score (Eq. 1) of at most this (ours)"""
    layer_norm: bool = False
    """NE + LayerNorm (Lyle et al. 2024): Linear, LayerNorm, ReLU in all hidden layers"""
    redo_interval: int = 0
    """NE + ReDo (Sokar et al. 2023): updates between two; 0: off"""
    redo_tau: float = 0.1
    """NE + ReDo: a neuron is dormant at a score (Eq. 1) of at most this"""
    reset_interval: int = 0
    """NE + Reset of the heads (Nikishin et al. 2022): frames between two; 0: off"""


@dataclass
class Args(NEArgs, DrQArgs, RunArgs):
    """All flags."""


@dataclass
class Progress:
    """What a run has done so far."""

    updates: int = 0
    reviewed: int = 0  # updates whose batch was a review
    epsilon: float = 1.0  # a batch is a review with probability 1 - epsilon
    dormant: int | None = None  # the Q heads' dormant neurons when last counted
    # connections of each MLP of a network, so far
    planned: dict[str, list[int]] = field(default_factory=dict)
    grown: dict[str, list[int]] = field(default_factory=dict)
    pruned: dict[str, list[int]] = field(default_factory=dict)
    # returns of the episodes since the last evaluation
    returns: list[float] = field(default_factory=list)
    # of the last uniform batch
    losses: dict[str, torch.Tensor] = field(default_factory=dict)
    # evaluations that are due, if the run is stopping: (row, weights of the policy)
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
    """B windows of n agent steps, with all the randomness of the losses."""

    pixels: torch.Tensor  # (B, 2, C, H, W) uint8, C = 3 * stack; of obs, next_obs
    gathered: torch.Tensor  # the same where the ring is, `pixels` itself if that is here
    rows: torch.Tensor  # (B, act + 2); actions, rewards and discounts are views
    obs: torch.Tensor  # (B, C, H, W) uint8
    next_obs: torch.Tensor  # (B, C, H, W) uint8, n agent steps later
    actions: torch.Tensor  # (B, act) in [-1, 1]
    rewards: torch.Tensor  # (B,), sum of n steps, discounted
    discounts: torch.Tensor  # (B,), gamma ** n; 0 where the task terminated
    noise: torch.Tensor  # (B, 2, act) standard normal, for next and own actions
    shifts: torch.Tensor  # (B, 2, 2) in [0, 2 * PAD], down and right, of obs and next_obs


class ReplayBuffer:
    """A ring of single frames, each with the action, reward and discount that led to it.

    Frame i of the run is at i % capacity. A window is a frame and the n after it in its
    episode. `windows` is a ring of (frame, first of its episode, first of its stack), oldest
    first; a window is dropped when the first frame of its stack is overwritten.
    """

    def __init__(self, args: DrQArgs, n_act: int, seed: int, device: torch.device):
        self.capacity = args.buffer_size
        self.n_act = n_act
        self.n_step = args.n_step
        self.frame_stack = args.frame_stack
        self.gamma = args.gamma
        self.device = device
        where = args.buffer_device if device.type == "cuda" else "cpu"
        require_memory(args, n_act, where)
        frame = (3, args.frame_size, args.frame_size)
        self.frames = torch.empty(self.capacity, *frame, dtype=torch.uint8, device=where)
        self.steps = torch.empty(self.capacity, n_act + 2)  # action | reward | discount
        self.windows = torch.zeros(self.capacity, 3, dtype=torch.int64)
        self.count = 0  # frames so far
        self.start = 0  # first frame of the running episode
        self.oldest = 0  # windows oldest to newest - 1 are kept
        self.newest = 0
        self.rng = torch.Generator().manual_seed(seed)

    def start_episode(self, obs: np.ndarray) -> None:
        self.start = self.count
        self.add(obs, np.zeros(self.n_act, dtype=np.float32), reward=0.0, discount=1.0)

    def add(self, obs, action: np.ndarray, reward: float, discount: float) -> None:
        """Stores the newest frame of an observation (C, H, W) and what led to it."""
        place = self.count % self.capacity
        self.frames[place].copy_(torch.from_numpy(obs[-3:]))
        self.steps[place, :-2] = torch.from_numpy(action)
        self.steps[place, -2] = reward
        self.steps[place, -1] = discount
        self.count += 1
        # the window that ends with this frame
        window = self.count - 1 - self.n_step
        if window >= self.start:
            first = max(window - self.frame_stack + 1, self.start)
            new = torch.tensor([window, self.start, first])
            self.windows[self.newest % self.capacity] = new
            self.newest += 1
        # windows of which a frame is gone
        first_kept = self.count - self.capacity
        while self.oldest < self.newest:
            if self.windows[self.oldest % self.capacity, 2] >= first_kept:
                break
            self.oldest += 1

    def new_batch(self, size: int) -> Batch:
        """Memory for `sample` to fill: a CUDA graph reads the same tensors every time."""
        _, _, height, width = self.frames.shape
        shape = (size, 2, 3 * self.frame_stack, height, width)
        pixels = torch.empty(shape, dtype=torch.uint8, device=self.device)
        gathered = pixels
        if self.frames.device.type != self.device.type:  # fastest from pinned memory
            gathered = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        rows = torch.empty(size, self.n_act + 2, device=self.device)
        actions, rewards, discounts = rows.split([self.n_act, 1, 1], dim=1)
        noise = torch.empty(size, 2, self.n_act, device=self.device)
        shifts = torch.zeros(size, 2, 2, dtype=torch.int64, device=self.device)
        ends = (rewards[:, 0], discounts[:, 0])
        obs, next_obs = pixels.unbind(1)
        return Batch(pixels, gathered, rows, obs, next_obs, actions, *ends, noise, shifts)

    def sample(self, batch: Batch, oldest: float = 1.0, rng=None) -> None:
        """Fills `batch` uniformly from the oldest share of the windows."""
        rng = rng or self.rng  # a torch.Generator
        count = max(1, int(oldest * (self.newest - self.oldest)))
        age = torch.randint(count, (len(batch.rows),), generator=rng)
        index = (self.oldest + age) % self.capacity  # (B,), age 0 is the oldest
        frame, start, _ = self.windows[index].unbind(1)  # (B,), (B,)

        # two stacks each, in which the first frame of an episode is repeated
        newest = torch.stack((frame, frame + self.n_step), dim=1)  # (B, 2)
        back = torch.arange(1 - self.frame_stack, 1)  # (stack,)
        stacks = newest[:, :, None] + back  # (B, 2, stack)
        stacks = torch.maximum(stacks, start[:, None, None])
        places = (stacks % self.capacity).flatten().to(self.frames.device)
        single_frames = batch.gathered.view(-1, *self.frames.shape[1:])
        torch.index_select(self.frames, 0, places, out=single_frames)
        if batch.gathered is not batch.pixels:
            batch.pixels.copy_(batch.gathered)

        # action, n-step reward and discount
        following = frame[:, None] + torch.arange(1, self.n_step + 1)  # (B, n)
        steps = self.steps[following % self.capacity]  # (B, n, act + 2)
        actions, rewards, discounts = steps.split([self.n_act, 1, 1], dim=2)
        discounts = (self.gamma * discounts).cumprod(1)  # (B, n, 1)
        later = (discounts[:, :-1] * rewards[:, 1:]).sum(1)  # (B, 1)
        columns = (actions[:, 0], rewards[:, 0] + later, discounts[:, -1])
        batch.rows.copy_(torch.cat(columns, dim=1))

        batch.noise.copy_(torch.randn(batch.noise.shape, generator=rng))
        batch.shifts.copy_(torch.randint(2 * PAD + 1, batch.shifts.shape, generator=rng))

    def state_dict(self) -> dict:
        state = {"capacity": self.capacity, "device": self.device.type}
        # through NumPy, because torch would save the whole storage of a slice
        for name in ("frames", "steps", "windows"):
            filled = getattr(self, name)[: self.count]
            state[name] = torch.from_numpy(filled.cpu().numpy())
        for name in ("count", "start", "oldest", "newest"):
            state[name] = getattr(self, name)
        state["rng"] = self.rng.get_state()
        return state

    def load_state_dict(self, state: dict) -> None:
        """Raises: ValueError for a buffer of another size or of a run on another device."""
        if state["capacity"] != self.capacity:
            expected = f"it must hold {self.capacity:,} frames"
            raise ValueError(f"{expected}, got {state['capacity']:,}")
        if state["device"] != self.device.type:
            raise ValueError(f"the run was on {state['device']}, this is {self.device.type}")
        for name in ("count", "start", "oldest", "newest"):
            setattr(self, name, state[name])
        for name in ("frames", "steps", "windows"):
            getattr(self, name)[: self.count] = state[name]
        self.rng.set_state(state["rng"])


def require_memory(args: DrQArgs, n_act: int, where: str) -> None:
    """Prints what the frames will take. Raises: SystemExit(2) if that is not there."""
    if where == "cuda":
        free, _ = torch.cuda.mem_get_info()
    else:
        meminfo = Path("/proc/meminfo").read_text()
        free = 1024 * int(meminfo.split("MemAvailable:")[1].split()[0])
    per_frame = 3 * args.frame_size**2 + 4 * (n_act + 2) + 24  # bytes
    needed = args.buffer_size * per_frame
    memory = f"{needed / 2**30:.2f} GiB on {where}, where {free / 2**30:.2f} GiB are free"
    if needed > free:
        most = free // per_frame
        die(f"--buffer-size must be at most {most} to fit, got {args.buffer_size}: {memory}")
    print(f"replay buffer: {args.buffer_size:,} frames, {memory}")


# --- networks, MLP heads with masks -------------------------------------------
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
        """Weights (neurons, in) and biases (neurons,), as `orthogonal` draws them.

        Of all neurons, an orthogonal matrix; of one, a random direction of the length that
        a row of such a matrix has.
        """
        weights = torch.empty(neurons, self.in_features)
        if neurons == self.out_features:
            nn.init.orthogonal_(weights, generator=rng)
        else:
            length = math.sqrt(min(1.0, self.in_features / self.out_features))
            directions = torch.randn(weights.shape, generator=rng)
            weights = length * F.normalize(directions, dim=1)
        biases = torch.zeros(neurons)
        return weights.to(self.weight.device), biases.to(self.bias.device)

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


def random_shift(obs: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
    """Repeats the border PAD times, then crops (Yarats et al. 2022).

    (B, C, H, W), (B, 2) -> (B, C, H, W), channels last in memory.
    """
    places = torch.arange(obs.shape[-1], device=obs.device)  # frames are square
    shifted = places + shifts.T[:, :, None] - PAD  # (2, B, H)
    rows, columns = shifted.clamp(0, len(places) - 1)  # (B, H), (B, W)
    batch = torch.arange(len(obs), device=obs.device)[:, None, None]
    crops = obs[batch, :, rows[:, :, None], columns[:, None, :]]  # (B, H, W, C)
    return crops.permute(0, 3, 1, 2)


class Encoder(nn.Module):
    """Four 3x3 convolutions: (B, C, H, W) uint8 -> (B, features)."""

    def __init__(self, args: DrQArgs):
        super().__init__()
        self.convolutions = nn.ModuleList()
        n_in = 3 * args.frame_stack
        for stride in (2, 1, 1, 1):
            self.convolutions.append(nn.Conv2d(n_in, args.channels, 3, stride))
            n_in = args.channels
        size = args.frame_size
        blank = torch.zeros(1, 3 * args.frame_stack, size, size, dtype=torch.uint8)
        self.n_features = self(blank).shape[1]

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        x = obs / 255 - 0.5
        for convolution in self.convolutions:
            x = F.relu(convolution(x))
        return x.flatten(1)

    def augmented(self, obs: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) uint8, (B, 2) -> (B, features)."""
        return self(random_shift(obs, shifts))


def orthogonal(module: nn.Module) -> None:
    """Initialises a convolution or a linear layer as DrQ-v2 does."""
    if isinstance(module, nn.Conv2d):
        nn.init.orthogonal_(module.weight, gain=math.sqrt(2))
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.orthogonal_(module.weight)
        nn.init.zeros_(module.bias)


class Trunk(nn.Module):
    """Linear, LayerNorm, tanh: (B, features) -> (B, TRUNK). For NE, an MLP of one layer."""

    def __init__(self, n_features: int):
        super().__init__()
        self.layers = nn.ModuleList([MaskedLinear(n_features, TRUNK)])
        self.norm = nn.LayerNorm(TRUNK)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.norm(self.layers[0](features)))

    def activations(self, x: torch.Tensor) -> list[torch.Tensor]:
        return []  # it has no hidden layer


class Actor(nn.Module):
    """Deterministic tanh policy: (B, features) -> (B, act) in [-1, 1]."""

    def __init__(self, args: Args, n_features: int, n_act: int):
        super().__init__()
        sizes = [TRUNK, args.hidden_dim, args.hidden_dim, n_act]
        self.trunk = Trunk(n_features)
        self.heads = nn.ModuleList([MLP(sizes, args.layer_norm)])

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        (head,) = self.heads
        return torch.tanh(head(self.trunk(features)))


class Critic(nn.Module):
    """Two action-value functions on one trunk: (B, features), (B, act) -> (B,), (B,)."""

    def __init__(self, args: Args, n_features: int, n_act: int):
        super().__init__()
        sizes = [TRUNK + n_act, args.hidden_dim, args.hidden_dim, 1]
        self.trunk = Trunk(n_features)
        self.heads = nn.ModuleList()
        for _ in range(2):
            self.heads.append(MLP(sizes, args.layer_norm))

    def forward(self, features: torch.Tensor, actions: torch.Tensor):
        x = torch.cat((self.trunk(features), actions), dim=1)  # (B, TRUNK + act)
        q_1, q_2 = [head(x)[:, 0] for head in self.heads]
        return q_1, q_2


# --- agent: DrQ-v2 on masked heads --------------------------------------------
class Network:
    """What one optimiser trains, the actor or the critic, and where NE works in it.

    The actor has no target.
    """

    def __init__(self, module: Actor | Critic, target: Critic | None, args: Args):
        self.heads = list(module.heads)
        self.mlps = list(module.heads)  # of NE
        target_mlps = list(target.heads) if target else []
        if args.sparse_trunk:
            self.mlps.insert(0, module.trunk)
            if target:
                target_mlps.insert(0, target.trunk)
        self.layers = layers_of(self.mlps)
        self.target_layers = layers_of(target_mlps)
        self.params = list(module.parameters())
        self.target_params = list(target.parameters()) if target else []
        place_of = {p: n for n, p in enumerate(self.params)}
        self.weight_places = [place_of[layer.weight] for layer in self.layers]  # in `params`
        self.masks = [layer.mask for layer in self.layers]
        self.optimizer = topology.Adam(self.params, args.learning_rate)
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


def layers_of(mlps: list) -> list[MaskedLinear]:
    layers = []
    for mlp in mlps:
        layers += mlp.layers
    return layers


class Policy(nn.Module):
    """What acts: an encoder and an actor."""

    def __init__(self, encoder: Encoder, actor: nn.Module):
        super().__init__()
        self.encoder = encoder
        self.actor = actor

    @torch.inference_mode()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """(C, H, W) uint8 -> (act,)."""
        device = next(self.actor.parameters()).device
        pixels = torch.from_numpy(obs).to(device)
        actions = self.actor(self.encoder(pixels[None]))  # (1, act)
        return actions[0].cpu().numpy()


class Agent(Policy):
    """Encoder, actor, twin critics and their targets; the update is a function of a batch."""

    def __init__(self, args: Args, n_act: int, ne_seed: int, device):
        encoder = Encoder(args)
        super().__init__(encoder, Actor(args, encoder.n_features, n_act))
        self.args = args
        # all that NE draws: it must not shift exploration noise and batches
        self.ne_rng = torch.Generator().manual_seed(ne_seed)
        self.critic = Critic(args, self.encoder.n_features, n_act)
        self.apply(orthogonal)
        # §4.2, sparse start
        if args.ne_actor:
            self.sparsify(self.actor)
        if args.ne_critic:
            self.sparsify(self.critic)
        self.target_critic = copy.deepcopy(self.critic)
        # of the action noise
        self.register_buffer("stddev", torch.tensor(args.stddev[0]))
        self.to(device)
        self.encoder.to(memory_format=torch.channels_last)
        self.encoder_params = list(self.encoder.parameters())
        self.encoder_optimizer = topology.Adam(self.encoder_params, args.learning_rate)
        self.networks = {
            "actor": Network(self.actor, None, args),
            "critic": Network(self.critic, self.target_critic, args),
        }

    def sparsify(self, module: Actor | Critic) -> None:
        """Each head has a budget of its own, or shares it with trunk and other head."""
        density = self.args.initial_density
        sparse_init = self.args.sparse_init
        if self.args.sparse_trunk:
            layers = layers_of([module.trunk, *module.heads])
            topology.sparsify(layers, density, sparse_init, self.ne_rng)
        else:
            for head in module.heads:
                topology.sparsify(head.layers, density, sparse_init, self.ne_rng)

    def precision(self):
        """For losses: bfloat16 where autocast holds that to be safe, if asked for."""
        if not self.args.bf16:
            return contextlib.nullcontext()
        device = self.stddev.device.type
        return torch.autocast(device, torch.bfloat16, cache_enabled=False)

    def noisy_actions(self, features: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """(B, features), (B, act) -> (B, act) in [-1, 1].

        The gradient passes the bounds as if there were none.
        """
        clip = self.args.noise_clip
        actions = self.actor(features) + (self.stddev * noise).clamp(-clip, clip)
        return actions + (actions.clamp(-1, 1) - actions).detach()

    def critic_gradients(self, batch: Batch):
        """Eq. 3 over n steps with clipped double Q; it trains the encoder, too.

        Returns: loss, mean Q, the features (B, features) of the observations without a
            graph, and the dense gradients of the encoder's and of the critic's parameters.
        """
        with self.precision():
            features = self.encoder.augmented(batch.obs, batch.shifts[:, 0])  # (B, features)
            with torch.no_grad():
                next_features = self.encoder.augmented(batch.next_obs, batch.shifts[:, 1])
                next_actions = self.noisy_actions(next_features, batch.noise[:, 0])
                next_q_1, next_q_2 = self.target_critic(next_features, next_actions)
                next_q = torch.minimum(next_q_1, next_q_2)  # (B,)
                target_q = batch.rewards + batch.discounts * next_q  # (B,)
            q_1, q_2 = self.critic(features, batch.actions)  # (B,), (B,)
            loss = F.mse_loss(q_1, target_q) + F.mse_loss(q_2, target_q)  # ()
        params = self.encoder_params + self.networks["critic"].params
        gradients = torch.autograd.grad(loss, params)
        of_encoder = gradients[: len(self.encoder_params)]
        of_critic = gradients[len(self.encoder_params) :]
        return loss.detach(), q_1.mean().detach(), features.detach(), of_encoder, of_critic

    def actor_gradients(self, batch: Batch, features: torch.Tensor):
        """Eq. 4 with clipped double Q, on the features (B, features) of the critic's pass.

        Returns: loss and the dense gradients of the actor's parameters.
        """
        with self.precision():
            actions = self.noisy_actions(features, batch.noise[:, 1])  # (B, act)
            q_1, q_2 = self.critic(features, actions)  # (B,), (B,)
            loss = -torch.minimum(q_1, q_2).mean()  # ()
        gradients = torch.autograd.grad(loss, self.networks["actor"].params)
        return loss.detach(), gradients

    def step_encoder(self, gradients: tuple[torch.Tensor, ...]) -> None:
        in_layout = []  # of the parameters, channels last
        for p, gradient in zip(self.encoder_params, gradients, strict=True):
            in_layout.append(torch.empty_like(p).copy_(gradient))
        self.encoder_optimizer.apply(in_layout)

    def update(self, batch: Batch) -> dict[str, torch.Tensor]:
        """One step of critic and encoder, of the policy, and of the targets.

        Returns: the losses before.
        """
        qf_loss, mean_q, features, of_encoder, of_critic = self.critic_gradients(batch)
        self.networks["critic"].step(of_critic)
        self.step_encoder(of_encoder)
        actor_loss, of_actor = self.actor_gradients(batch, features)
        self.networks["actor"].step(of_actor)
        self.networks["critic"].update_targets(self.args.tau)
        return {"qf_loss": qf_loss, "qf_values": mean_q, "actor_loss": actor_loss}

    @torch.no_grad()
    def hidden(self, batch: Batch) -> dict[str, list[list[torch.Tensor]]]:
        """Activations [(B, n), ...] of the hidden layers of each MLP of each network."""
        features = self.encoder.augmented(batch.obs, batch.shifts[:, 0])
        of_critic = torch.cat((self.critic.trunk(features), batch.actions), dim=1)
        inputs = {"actor": self.actor.trunk(features), "critic": of_critic}
        hidden = {}
        for name, network in self.networks.items():
            hidden[name] = [mlp.activations(inputs[name]) for mlp in network.mlps]
        return hidden


# --- neuroplastic expansion ---------------------------------------------------
def scale_to_task(args: RunArgs) -> None:
    """Fills in, in place, the lengths that depend on the task (DrQ-v2)."""
    easy = args.env_id == "walker_walk"
    if args.total_timesteps is None:
        args.total_timesteps = 1_100_000 if easy else 3_100_000
    if args.stddev_duration is None:
        args.stddev_duration = 100_000 if easy else 500_000


def scale_to_run(args: Args) -> None:
    """Fills in, in place, the flags that follow from the length of the run (all ours)."""
    if args.growth_end is None:
        args.growth_end = args.total_timesteps
    if args.grow_interval is None:
        agent_steps = args.total_timesteps // args.action_repeat
        args.grow_interval = max(1, agent_steps // 100) * args.action_repeat
    if args.actor_grow_rate is None:
        args.actor_grow_rate = solve_grow_rate(args, "actor")
    if args.critic_grow_rate is None:
        args.critic_grow_rate = solve_grow_rate(args, "critic")
    per_update = args.action_repeat * args.update_frequency  # frames
    updates = max(1, (args.total_timesteps - args.learning_starts) // per_update)
    if args.review_interval is None:
        # a count costs about as much as two updates
        args.review_interval = max(10, updates // 1_000)
    if args.review_decay is None:
        # with no reduction, (1 - decay)^counts meets the floor at half the run
        until_half = (args.total_timesteps // 2 - args.learning_starts) // per_update
        counts = max(1, until_half // args.review_interval - 1)  # the first has no reduction
        floor = max(0.01, args.review_floor)  # 0 would never be met
        args.review_decay = 1 - floor ** (1 / counts)


def growth_rounds(args: Args) -> range:
    """Frames of the rounds: from the first update until the cosine is 0."""
    first = (args.learning_starts // args.grow_interval + 1) * args.grow_interval
    return range(first, args.growth_end, args.grow_interval)


def annealed(args: Args, step: int) -> float:
    """1 + cos(pi t / T_end), the annealing of growth (§4.2): from 2 to 0."""
    return 1 + math.cos(math.pi * step / args.growth_end)


def solve_grow_rate(args: Args, name: str) -> float:
    """alpha that takes a network from --initial-density to about its final density.

    A round leaves 1 - alpha / 2 * (1 + cos(pi t / T_end)) of the inactive connections
    inactive, all rounds leave the product, and with ln(1 - x) = -x that is

        exp(-alpha / 2 * sum(1 + cos(pi t / T_end))) = (1 - final) / (1 - initial density)
    """
    final_density = getattr(args, f"{name}_final_density")
    inactive = 1 - args.initial_density
    total = sum(annealed(args, step) for step in growth_rounds(args))
    grows = args.growth != "none" and getattr(args, f"ne_{name}")
    if not grows or total == 0 or inactive == 0:
        return 0.0
    if not args.initial_density <= final_density < 1:
        low = f"--initial-density ({args.initial_density})"
        got = f"got {final_density}"
        die(f"--{name}-final-density must be below 1 and at least {low}, {got}")
    return min(1.0, 2 / total * math.log(inactive / (1 - final_density)))


def growth_fraction(args: Args, grow_rate: float, step: int) -> float:
    """Share of a layer's candidates that is born at `step`, cosine-annealed (§4.2)."""
    if args.growth == "none":
        return 0.0
    return grow_rate / 2 * annealed(args, step)


def planned_density(args: Args, grow_rate: float, until: int) -> float:
    """Of a network with NE after the rounds up to step `until`, if nothing is pruned."""
    inactive = 1 - args.initial_density
    for step in growth_rounds(args):
        if step <= until:
            inactive *= 1 - growth_fraction(args, grow_rate, step)
    return 1 - inactive


def growth_plan(args: Args) -> str:
    """One line that says what densities to expect."""
    if args.initial_density == 1 or not (args.ne_actor or args.ne_critic):
        return "topology: dense, nothing to grow"
    rounds = [step for step in growth_rounds(args) if step <= args.total_timesteps]
    if args.growth == "none" or not rounds:
        return f"topology: stays at {args.initial_density:.0%}"
    grow_rates = {}
    if args.ne_actor:
        grow_rates["actor"] = args.actor_grow_rate
    if args.ne_critic:
        grow_rates["critic"] = args.critic_grow_rate
    plans = []
    for name, grow_rate in grow_rates.items():
        end = planned_density(args, grow_rate, args.total_timesteps)
        plans.append(f"{name} {args.initial_density:.0%} -> {end:.0%}")
    return f"topology: {', '.join(plans)} in {len(rounds)} rounds, less what is pruned"


def topology_round(args: Args, agent: Agent, batch: Batch, progress: Progress, step: int) -> None:
    """§4.2, Eq. 2: grows, then prunes and resets; the target takes over the masks."""
    # dense gradients; no step is taken with them
    _, _, features, _, of_critic = agent.critic_gradients(batch)
    _, of_actor = agent.actor_gradients(batch, features)
    gradients = {"actor": of_actor, "critic": of_critic}
    # §B.2, slower for the actor
    grow_rates = {"actor": args.actor_grow_rate, "critic": args.critic_grow_rate}
    hidden_of = agent.hidden(batch)
    for name, network in agent.networks.items():
        fraction = growth_fraction(args, grow_rates[name], step)
        optimizer = network.optimizer
        gradient_of = dict(zip(network.params, gradients[name], strict=True))
        grown = progress.grown[name]
        pruned = progress.pruned[name]
        for i, mlp in enumerate(network.mlps):
            hidden = hidden_of[name][i]
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
    critic = agent.networks["critic"]
    topology.copy_masks(critic.layers, critic.target_layers)


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


def review_hidden(agent: Agent, buffer: ReplayBuffer, batch: Batch) -> list[torch.Tensor]:
    """Activations [(1024 or more, n), ...] of the Q heads, a batch at a time."""
    chunks = []
    for _ in range(math.ceil(1_024 / len(batch.rows))):
        buffer.sample(batch, rng=agent.ne_rng)
        chunks.append(itertools.chain(*agent.hidden(batch)["critic"]))
    return [torch.cat(layer) for layer in zip(*chunks, strict=True)]


def redo(args: Args, agent: Agent, batch: Batch) -> None:
    """NE + ReDo (§C) on the heads."""
    hidden_of = agent.hidden(batch)
    for name, network in agent.networks.items():
        for mlp, hidden in zip(network.mlps, hidden_of[name], strict=True):
            optimizer = network.optimizer
            topology.redo(mlp.layers, hidden, args.redo_tau, optimizer, agent.ne_rng)


@torch.no_grad()
def reset(agent: Agent) -> None:
    """NE + Reset (§C): heads, their targets and Adam's state start anew; the masks stay."""
    for network in agent.networks.values():
        for head in network.heads:
            topology.reset(head.layers, agent.ne_rng)
            for norm in head.norms:
                if isinstance(norm, nn.LayerNorm):
                    norm.reset_parameters()
            for p in head.parameters():
                for value in network.optimizer.state[p].values():
                    value.zero_()
    agent.target_critic.heads.load_state_dict(agent.critic.heads.state_dict())


# --- environment and evaluation -----------------------------------------------
def load_task(env_id: str, rng: np.random.RandomState) -> tuple:
    """A dm_control task, and what renders it.

    Raises: SystemExit(2), with what to do, where either cannot be had.
    """
    backend = os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        from dm_control import suite
        from OpenGL.GL import GL_RENDERER, glGetString

        tasks = {}
        for domain, task in suite.ALL_TASKS:
            if domain != "lqr":  # actions without bounds
                tasks[f"{domain}_{task}"] = (domain, task)
        if env_id not in tasks:
            near = difflib.get_close_matches(env_id, tasks, n=5, cutoff=0.5) or tasks
            wanted = "--env-id must be a task of the DeepMind Control Suite"
            die(f"{wanted}, got {env_id}; there is {', '.join(near)}")
        task = suite.load(*tasks[env_id], task_kwargs={"random": rng})
        task.physics.render(8, 8)
        with task.physics.contexts.gl.make_current() as context:
            renderer = context.call(glGetString, GL_RENDERER).decode()
    except ModuleNotFoundError as e:
        die(f"pixels need more packages: pip install -r requirements-pixels.txt ({e})")
    except Exception as e:  # each backend has errors of its own
        packages = "libegl1 libgl1, or libosmesa6 with MUJOCO_GL=osmesa"
        if backend == "osmesa":
            packages = "libosmesa6"
        reason = " ".join(str(e).split())
        # a renderer that is half made fails once more when it is deleted
        sys.unraisablehook = lambda failure: None
        install = f"Debian: apt-get install {packages}"
        die(f"cannot render with MUJOCO_GL={backend} ({install}): {reason}")
    return task, f"{backend}, {renderer}"


class PixelEnv:
    """A task seen by a camera, of which nothing is trusted. Raises: EnvironmentFault.

    Observations are (C, H, W) uint8, C = 3 * stack, newest frame last; actions are (act,)
    in [-1, 1].
    """

    def __init__(self, args: Args):
        self.args = args
        self.rng = np.random.RandomState(args.seed)  # the task draws from it
        self.task, self.backend = load_task(args.env_id, self.rng)
        self.camera = 2 if args.env_id.startswith("quadruped") else 0  # as in DrQ-v2
        spec = self.task.action_spec()
        self.n_act = spec.shape[0]
        self.low = spec.minimum
        self.high = spec.maximum
        self.stack = deque(maxlen=args.frame_stack)
        self.length = 0  # frames of the running episode

    @contextlib.contextmanager
    def watched(self, where: str):
        """Each environment has errors of its own."""
        try:
            yield
        except Exception as e:
            raise self.fault(f"{type(e).__name__} in {where}: {e}") from e

    def render(self) -> np.ndarray:
        """(3, H, W), a copy, because the task may draw into the same memory again."""
        size = self.args.frame_size
        frame = self.task.physics.render(size, size, camera_id=self.camera)  # (H, W, 3)
        return frame.transpose(2, 0, 1).copy()

    def reset(self, seed: int | None = None) -> np.ndarray:
        if seed is not None:
            self.rng.seed(seed)
        with self.watched("reset"):
            self.task.reset()
            frame = self.render()
        self.length = 0
        self.stack.extend([frame] * self.args.frame_stack)
        return np.concatenate(self.stack)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, float, bool]:
        """Returns: observation, reward, discount (0 where the task terminated), done."""
        scaled = self.low + (action + 1) / 2 * (self.high - self.low)
        # rescaling may pass a bound by the last bit
        scaled = scaled.clip(self.low, self.high)
        total = 0.0
        discount = 1.0
        with self.watched("step"):
            for _ in range(self.args.action_repeat):
                moment = self.task.step(scaled)
                total += discount * np.asarray(moment.reward, dtype=np.float64).item()
                discount *= float(moment.discount)
                self.length += 1
                done = moment.last() or self.length >= self.args.max_episode_steps
                if done:
                    break
            self.stack.append(self.render())
        if not abs(total) < 3e38:  # NaN, or infinite as float32
            raise self.fault(f"the reward is {total}")
        return np.concatenate(self.stack), total, discount, done

    def fault(self, reason: str):
        one_line = " ".join(reason.split())
        return EnvironmentFault(f"{self.args.env_id}: {one_line}")


def evaluate(policy: Policy, env: PixelEnv, episodes: int, seed: int) -> list[float]:
    """Returns of the deterministic policy, from the same starts at every call."""
    returns = []
    for episode in range(episodes):
        obs = env.reset(seed=100 + seed + episode)  # not the seed of training
        total = 0.0
        done = False
        while not done:
            obs, reward, _, done = env.step(policy.act(obs))
            total += reward
        returns.append(total)
    return returns


def policy_weights(agent: Policy) -> dict[str, torch.Tensor]:
    """A copy of what `agent.act` needs."""
    policy = Policy(agent.encoder, agent.actor)
    return copy.deepcopy(policy.state_dict())


def evaluate_postponed(run, progress, agent: Policy, env: PixelEnv, args, last=False) -> None:
    """Evaluates what is due, in order, and writes its rows.

    A run that is asked to stop leaves the rest to the resumed one, but not at its last step.
    """
    policy = copy.deepcopy(Policy(agent.encoder, agent.actor))
    while progress.postponed:
        row, weights = progress.postponed[0]
        policy.load_state_dict(weights)
        returns = []
        for episode in range(args.eval_episodes):  # one takes long enough
            if run.stop_signal is not None and not last:
                return
            returns += evaluate(policy, env, 1, args.seed + episode)
        row["eval/return_mean"] = float(np.mean(returns))
        row["eval/return_std"] = float(np.std(returns))
        write_evaluation(run, row)
        progress.postponed.pop(0)


def write_evaluation(run, row: dict) -> None:
    """Writes the row of its step."""
    run.write_row(row)
    for key, value in row.items():
        run.log(row["step"], key, value)
    mean_and_std = f"{row['eval/return_mean']:,.1f} +- {row['eval/return_std']:,.1f}"
    run.say(f"step {row['step']:,}: return {mean_and_std}")


def measure(agent: Agent, batch: Batch, progress: Progress, step: int) -> dict[str, float]:
    """A row of results.csv, its returns still empty."""
    row = {"step": step, "eval/return_mean": math.nan, "eval/return_std": math.nan}
    row["charts/episodic_return"] = float(np.mean(progress.returns or math.nan))
    for key in ("qf_loss", "qf_values"):
        row[f"losses/{key}"] = float(progress.losses.get(key, math.nan))
    hidden_of = agent.hidden(batch)
    for name, network in agent.networks.items():
        hidden = list(itertools.chain(*hidden_of[name]))
        values = {"density": topology.network_density(network.layers)}
        values |= topology.activity(hidden)
        values["planned"] = sum(progress.planned[name])
        values["grown"] = sum(progress.grown[name])
        values["pruned"] = sum(progress.pruned[name])
        for key, value in values.items():
            row[f"ne/{name}/{key}"] = value
    row["ne/review_epsilon"] = progress.epsilon
    row["ne/review_share"] = progress.reviewed / max(1, progress.updates)
    return row


def fast_update(args: RunArgs, agent: Agent, batch: Batch):
    """The agent's update, compiled and captured if asked for."""
    if args.compile:
        print("compiling losses and gradients, which takes half a minute or more")
        features = agent.critic_gradients(batch)[2]
        of_critic = compiled(agent.critic_gradients, batch)
        of_actor = compiled(agent.actor_gradients, batch, features)
        agent.critic_gradients, agent.actor_gradients = of_critic, of_actor
    if batch.pixels.is_cuda and args.cudagraphs:
        return CudaGraph(agent.update)
    return agent.update


def check_sizes(args: DrQArgs) -> None:
    """Raises: SystemExit(2) for what does not fit: windows, batches, whole agent steps."""
    if not 15 <= args.frame_size <= 1_024:
        die(f"--frame-size must be in [15, 1024], for the encoder, got {args.frame_size}")
    window = args.n_step * args.action_repeat  # frames
    for name in ("learning_starts", "max_episode_steps"):
        value = getattr(args, name)
        if value < window:
            flag = "--" + name.replace("_", "-")
            die(f"{flag} must be at least {window}, a window of --n-step, got {value}")
    least = max(args.batch_size, 2 * (args.n_step + args.frame_stack))
    if args.buffer_size < least:
        wanted = f"at least {least} for such batches and windows"
        die(f"--buffer-size must be {wanted}, got {args.buffer_size}")
    require_whole_steps(args, "total_timesteps", "eval_frequency")


def require_whole_steps(args: DrQArgs, *names: str) -> None:
    """Raises: SystemExit(2) for intervals in frames that end inside an agent step."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value % args.action_repeat != 0:
            flag = "--" + name.replace("_", "-")
            die(f"{flag} must be a multiple of --action-repeat, got {value}")


def main() -> None:
    # --- setup ---
    args, checkpoint = parse_args(Args)
    scale_to_task(args)
    check_sizes(args)
    require_whole_steps(args, "grow_interval", "reset_interval")
    scale_to_run(args)
    device = set_up_torch(args)
    seeds = np.random.SeedSequence(args.seed).generate_state(4).tolist()
    weight_seed, noise_seed, batch_seed, ne_seed = seeds
    torch.manual_seed(weight_seed)
    noise_rng = np.random.default_rng(noise_seed)
    env = PixelEnv(args)
    eval_env = PixelEnv(args)
    agent = Agent(args, env.n_act, ne_seed, device)
    buffer = ReplayBuffer(args, env.n_act, batch_seed, device)
    batch = buffer.new_batch(args.batch_size)
    ne_batch = buffer.new_batch(args.batch_size)  # of rounds, reviews and metrics
    progress = Progress.of(agent)

    # all that a resumed run needs
    parts = {"agent": agent, "buffer": buffer, "progress": progress}
    parts["ne_rng"] = agent.ne_rng
    parts["noise_rng"] = noise_rng
    parts["env_rng"] = env.rng
    parts["encoder_optimizer"] = agent.encoder_optimizer
    for name, network in agent.networks.items():
        parts[f"{name}_optimizer"] = network.optimizer
    if checkpoint is not None:
        restore(parts, checkpoint)
    run = Run(args, args.env_id, args.total_timesteps, checkpoint)
    print(f"{args.env_id}, seed {args.seed}, {device}: {run.folder}\n{growth_plan(args)}")
    size = f"{args.frame_stack} frames of {args.frame_size}x{args.frame_size}"
    print(f"{env.n_act} actions, {size}, {env.backend}")
    evaluate_postponed(run, progress, agent, eval_env, args)
    update = fast_update(args, agent, batch)

    # --- the loop ---
    rounds = growth_rounds(args)
    resets = range(0)
    if args.reset_interval > 0:  # none at the last step
        resets = range(args.reset_interval, args.total_timesteps, args.reset_interval)
    episodic_return = 0.0
    episodic_length = 0
    started = time.time()
    start = run.saved
    obs = env.reset()
    buffer.start_episode(obs)
    first = start + args.action_repeat
    for step in range(first, args.total_timesteps + 1, args.action_repeat):
        # act
        agent_step = step // args.action_repeat
        stddev = np.interp(agent_step, (0, args.stddev_duration), args.stddev)
        if step <= args.learning_starts:
            action = noise_rng.uniform(-1, 1, env.n_act)
        else:
            action = agent.act(obs) + noise_rng.normal(0, stddev, env.n_act)
            run.require_finite(step, action)
        action = action.clip(-1, 1).astype(np.float32)

        # update; before the environment steps, so that on CUDA both run at the same time
        if step > args.learning_starts and agent_step % args.update_frequency == 0:
            progress.updates += 1
            agent.stddev.fill_(stddev)
            # §4.2, experience review
            u = torch.rand((), generator=agent.ne_rng).item()
            review = u > progress.epsilon
            if review:
                progress.reviewed += 1
                buffer.sample(batch, oldest=args.review_fraction)
            else:
                buffer.sample(batch)
            # critic and encoder, then actor and targets
            losses = update(batch)
            if not review:  # old batches would bend the curves
                for key, value in losses.items():
                    progress.losses[key] = value.clone()
            counting = progress.updates % args.review_interval == 0
            if counting and args.review_floor < 1:
                hidden = review_hidden(agent, buffer, ne_batch)
                dormant = len(topology.dormant_neurons(hidden, args.review_tau))
                neurons = 4 * args.hidden_dim
                progress.epsilon = review_threshold(args, progress, dormant, neurons)
                progress.dormant = dormant
            if args.redo_interval > 0 and progress.updates % args.redo_interval == 0:
                buffer.sample(ne_batch, rng=agent.ne_rng)
                redo(args, agent, ne_batch)

        # step and store
        try:
            obs, reward, discount, done = env.step(action)
        except EnvironmentFault as fault:
            run.fail(step, str(fault))
        buffer.add(obs, action, reward, discount)
        episodic_return += reward
        episodic_length += args.action_repeat
        if done:
            run.log(step, "charts/episodic_return", episodic_return)
            run.log(step, "charts/episodic_length", episodic_length)
            progress.returns.append(episodic_return)

        # topology
        if step in rounds:
            buffer.sample(ne_batch, rng=agent.ne_rng)
            topology_round(args, agent, ne_batch, progress, step)
        if step in resets:
            reset(agent)

        # evaluate and log
        run.bar.update(args.action_repeat)
        if step % 1_000 == 0:
            run.log(step, "charts/SPS", (step - start) / (time.time() - started))
            for key, value in progress.losses.items():
                run.log(step, f"losses/{key}", value)
        last = step == args.total_timesteps
        if step % args.eval_frequency == 0 or last:
            run.require_finite(step, *agent.parameters())
            buffer.sample(ne_batch, rng=torch.Generator().manual_seed(step))
            row = measure(agent, ne_batch, progress, step)
            progress.returns = []
            progress.postponed.append((row, policy_weights(agent)))
            evaluate_postponed(run, progress, agent, eval_env, args, last)

        # episode end
        if done:
            # no environment can be saved inside an episode
            stopping = run.stop_signal is not None
            due = step - run.saved >= args.checkpoint_frequency
            if (due or stopping) and not last:
                run.require_finite(step, *agent.parameters())
                run.save(step, parts)
                if stopping:
                    run.leave(step)
            episodic_return = 0.0
            episodic_length = 0
            obs = env.reset()
            buffer.start_episode(obs)

    run.require_finite(step, *agent.parameters())
    del parts["buffer"]  # a finished run needs it no more
    run.save(step, parts, finished=True)
    run.close()
    print(f"finished: {run.folder}, {(step - start) / (time.time() - started):.0f} frames/s")
    for name in agent.networks:
        density = row[f"ne/{name}/density"]
        active = row[f"ne/{name}/active_ratio"]
        print(f"{name}: density {density:.1%}, active neurons {active:.1%}")


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
