"""Neuroplastic Expansion (NE) on DrQ-v2, continuous control from pixels, in one file.

Paper: Neuroplastic Expansion in Deep Reinforcement Learning, arXiv 2410.07994.
       §, Eq. and Table refer to it; docs/ne_drq_dmc.md numbers the deviations from it.
Run:   python ne_drq_dmc.py --env-id walker_walk    (--help lists all flags)
       on a GPU: an update of the default size takes four CPU seconds; the score published
       for DrQ-v2 on walker_walk is 767 after a million frames
With --initial-density 1 --review-floor 1 it is DrQ-v2, bit for bit (on a CPU).

A step is an environment frame, --action-repeat of them an agent step.
Part one is the algorithm, to be read beside the paper. Part two, from `die` to the end,
surrounds a run and is the same text in every script.
"""

import contextlib
import copy
import csv
import difflib
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
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import filelock
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


# --- flags; the comments are what --help says ---------------------------------
@dataclass
class RunArgs:
    """What is run, and what it writes. Steps are environment frames."""

    exp_name: str = "ne_drq_dmc"  # part of the run's name
    env_id: str = "walker_walk"  # domain_task of the DeepMind Control Suite
    seed: int = 1  # of everything random
    total_timesteps: int | None = None  # default: 1.1M for walker_walk, else 3.1M (DrQ-v2)
    cuda: bool = True  # use the GPU if there is one
    cudagraphs: bool = True  # on CUDA: capture the update once and replay it
    compile: bool = False  # losses and gradients: a minute, and a C++ compiler
    bf16: bool = False  # losses in bfloat16 where autocast holds that to be safe
    torch_threads: int = 1  # of the CPU; a resumed run is exact with the same number
    run_dir: str | None = None  # default: runs/{env_id}__{exp_name}__{seed}__{time}
    eval_frequency: int = 10_000  # steps between two rows of results.csv (DrQ-v2)
    eval_episodes: int = 10  # per evaluation, deterministic policy (DrQ-v2)
    checkpoint_frequency: int = 250_000  # steps between two, each at an episode's end
    resume: str | None = None  # folder of an interrupted run: continue it exactly
    track: bool = False  # log to W&B as well, which reads WANDB_PROJECT, WANDB_ENTITY


@dataclass
class DrQArgs:
    """DrQ-v2 (Yarats et al. 2022); values of its reference code, Table 3."""

    action_repeat: int = 2  # steps per agent step
    frame_size: int = 84  # height and width in pixels
    frame_stack: int = 3  # frames per observation
    channels: int = 32  # of each of the four convolutions
    hidden_dim: int = 1024  # width of the two hidden layers of policy and Q heads
    learning_rate: float = 1e-4  # of Adam: encoder, critic and actor
    batch_size: int = 256  # per update
    buffer_size: int = 1_000_000  # single frames, 19.8 GiB
    buffer_device: Literal["cpu", "cuda"] = "cpu"  # of the frames, if a GPU is used
    gamma: float = 0.99  # discount per agent step
    n_step: int = 3  # agent steps of a return
    tau: float = 0.01  # Polyak step of targets
    learning_starts: int = 4_000  # uniform random actions before the first update
    update_frequency: int = 2  # agent steps between two updates
    replay_ratio: int = 1  # updates each time
    stddev: tuple[float, float] = (1.0, 0.1)  # of all noise, first and last; unit as below
    stddev_duration: int | None = None  # agent steps; default: 100k walker_walk, else 500k
    noise_clip: float = 0.3  # of the noise in the losses; unit: half the action range

    @property
    def critic_hidden(self) -> tuple[int, int]:
        """Widths of the hidden layers of each Q head."""
        return self.hidden_dim, self.hidden_dim


@dataclass
class NEArgs:
    """Neuroplastic Expansion on the MLP heads, and what it is combined with (§C)."""

    ne_actor: bool = True  # or dense (Figure 7b)
    ne_critic: bool = True  # or dense (Figure 7b)
    sparse_trunk: bool = False  # trunks too, one density budget with the heads (ours)
    initial_density: float = 0.25  # D, share of connections at the start (ours)
    sparse_init: Literal["erdos-renyi", "uniform"] = "erdos-renyi"  # D over layers (§4.2)
    growth: Literal["gradient", "random", "none"] = "gradient"  # §4.2, §4.1, static
    grow_interval: int | None = None  # Delta T in steps (ours); default: run / 100
    actor_grow_rate: float | None = None  # alpha (§4.2); default: solved for the density
    critic_grow_rate: float | None = None  # larger (§B.2); default: solved likewise
    actor_final_density: float = 0.75  # at the end of growth when alpha is solved (ours)
    critic_final_density: float = 0.95  # at the end of growth when alpha is solved (ours)
    growth_end: int | None = None  # T_end, last step of growth (§B.2); default: the run's
    prune: bool = True  # dormant neurons (§4.2)
    prune_ratio: float = 0.4  # omega, share of the grown that may go (authors' code)
    weight_clip: float = 2.0  # kappa / sqrt(n_in) bounds reset neurons (§B.2); 0: off
    review_fraction: float = 0.25  # oldest share of the buffer that is reviewed (§4.2)
    review_rule: Literal["slope", "level", "fau"] = "slope"  # see review_threshold (ours)
    review_interval: int | None = None  # c, updates; default: all / 1,000, at least 10
    review_decay: float | None = None  # of epsilon; default: floor met at half the run
    review_floor: float = 0.65  # slope's least epsilon (ours); 1: no reviews
    review_tau: float = 0.1  # for the review, dormant is a score (Eq. 1) up to this (ours)
    layer_norm: bool = False  # NE + LayerNorm (Lyle et al. 2024), in every hidden layer
    redo_interval: int | None = None  # NE + ReDo (Sokar et al. 2023): updates between two
    redo_tau: float = 0.1  # NE + ReDo: dormant is a score (Eq. 1) up to this
    reset_interval: int | None = None  # NE + Reset of the heads (Nikishin et al.): steps


@dataclass
class Args(NEArgs, DrQArgs, RunArgs):
    """Neuroplastic Expansion (arXiv 2410.07994) on DrQ-v2."""


# --- replay buffer ------------------------------------------------------------
class Batch(NamedTuple):
    """B windows of n agent steps, with all the randomness of the losses."""

    pixels: torch.Tensor  # (B, 2, C, H, W) uint8, C = 3 * stack; obs, next_obs are views
    rows: torch.Tensor  # (B, act + 2); actions, rewards and discounts are views
    obs: torch.Tensor  # (B, C, H, W) uint8
    next_obs: torch.Tensor  # (B, C, H, W) uint8, n agent steps later
    actions: torch.Tensor  # (B, act) in [-1, 1]
    rewards: torch.Tensor  # (B,), sum of n steps, discounted
    discounts: torch.Tensor  # (B,), gamma ** n; 0 where the task terminated
    noise: torch.Tensor  # (B, 2, act) standard normal, for next and own actions
    shifts: torch.Tensor  # (B, 2, 2) in [0, 2 * PAD], down and right, of obs and next_obs

    def copy_(self, other: "Batch") -> None:  # into the batch that a CUDA graph reads
        self.pixels.copy_(other.pixels)
        self.rows.copy_(other.rows)
        self.noise.copy_(other.noise)
        self.shifts.copy_(other.shifts)


class ReplayBuffer:
    """A ring of single frames, each with the action, reward and discount that led to it.

    Frame i of the run is at i % capacity. A window is a frame and the n after it in its
    episode. `windows` is a ring of (frame, first of its episode, first of its stack), oldest
    first; a window is dropped when the first frame of its stack is overwritten.
    """

    def __init__(self, args: DrQArgs, n_act: int, seed: int, device: torch.device):
        self.args = args
        self.capacity = args.buffer_size
        self.n_act = n_act
        self.device = device
        where = args.buffer_device if device.type == "cuda" else "cpu"
        shape = (self.capacity, 3, args.frame_size, args.frame_size)
        print(f"replay buffer: {math.prod(shape) / 2**30:.2f} GiB on {where}")
        # filled, so that too little memory shows at once
        self.frames = torch.full(shape, 0, dtype=torch.uint8, device=where)
        self.steps = torch.zeros(self.capacity, n_act + 2)  # action | reward | discount
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
        self.frames[place] = torch.from_numpy(obs[-3:])
        self.steps[place] = torch.tensor([*action, reward, discount])
        self.count += 1
        # the window that ends with this frame
        window = self.count - 1 - self.args.n_step
        if window >= self.start:
            first = max(window - self.args.frame_stack + 1, self.start)
            new = torch.tensor([window, self.start, first])
            self.windows[self.newest % self.capacity] = new
            self.newest += 1
        # windows of which a frame is gone
        first_kept = self.count - self.capacity
        while self.oldest < self.newest:
            if self.windows[self.oldest % self.capacity, 2] >= first_kept:
                break
            self.oldest += 1

    def sample(self, size: int, oldest=1.0, rng: torch.Generator | None = None) -> Batch:
        """Uniformly from the oldest share of the windows."""
        rng = rng or self.rng
        count = max(1, int(oldest * (self.newest - self.oldest)))
        age = torch.randint(count, (size,), generator=rng)
        index = (self.oldest + age) % self.capacity  # (B,), age 0 is the oldest
        frame, start, _ = self.windows[index].unbind(1)  # (B,), (B,)

        # two stacks each, in which the first frame of an episode is repeated
        newest = torch.stack((frame, frame + self.args.n_step), dim=1)  # (B, 2)
        back = torch.arange(1 - self.args.frame_stack, 1)  # (stack,)
        stacks = newest[:, :, None] + back  # (B, 2, stack)
        stacks = torch.maximum(stacks, start[:, None, None])
        pixels = self.gather(stacks % self.capacity)  # (B, 2, C, H, W)

        # action, n-step reward and discount
        following = frame[:, None] + torch.arange(1, self.args.n_step + 1)  # (B, n)
        steps = self.steps[following % self.capacity]  # (B, n, act + 2)
        actions, rewards, discounts = steps.split([self.n_act, 1, 1], dim=2)
        discounts = (self.args.gamma * discounts).cumprod(1)  # (B, n, 1)
        later = (discounts[:, :-1] * rewards[:, 1:]).sum(1)  # (B, 1)
        columns = (actions[:, 0], rewards[:, 0] + later, discounts[:, -1])
        rows = torch.cat(columns, dim=1).to(self.device)  # (B, act + 2)

        noise = torch.randn(size, 2, self.n_act, generator=rng)
        shifts = torch.randint(2 * PAD + 1, (size, 2, 2), generator=rng)
        return Batch(
            pixels=pixels,
            rows=rows,
            obs=pixels[:, 0],
            next_obs=pixels[:, 1],
            actions=rows[:, : self.n_act],
            rewards=rows[:, -2],
            discounts=rows[:, -1],
            noise=noise.to(self.device),
            shifts=shifts.to(self.device),
        )

    def gather(self, places: torch.Tensor) -> torch.Tensor:
        """Stacks of frames at (B, 2, stack): (B, 2, C, H, W), on the agent's device."""
        where = self.frames.device
        pinned = where.type != self.device.type  # fastest to the GPU
        shape = (places.numel(), *self.frames.shape[1:])
        frames = torch.empty(shape, dtype=torch.uint8, device=where, pin_memory=pinned)
        torch.index_select(self.frames, 0, places.flatten().to(where), out=frames)
        stacks = frames.view(*places.shape[:2], -1, *shape[2:])
        return stacks.to(self.device, non_blocking=True)

    def state_dict(self) -> dict:
        state = {"device": self.device.type, "rng": self.rng.get_state()}
        # through NumPy, because torch would save the whole storage of a slice
        for name in ("frames", "steps", "windows"):
            filled = getattr(self, name)[: self.count]
            state[name] = torch.from_numpy(filled.cpu().numpy())
        state["counters"] = [self.count, self.start, self.oldest, self.newest]
        return state

    def load_state_dict(self, state: dict) -> None:
        """Raises: ValueError for the buffer of a run on another device."""
        if state["device"] != self.device.type:
            raise ValueError(f"the run was on {state['device']}, this is {self.device.type}")
        self.count, self.start, self.oldest, self.newest = state["counters"]
        for name in ("frames", "steps", "windows"):
            getattr(self, name)[: self.count] = state[name]
        self.rng.set_state(state["rng"])


# --- networks, MLP heads with masks -------------------------------------------
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
        """Weights (neurons, in), biases (neurons,): `orthogonal`, of one neuron such a row."""
        weights = torch.empty(neurons, self.in_features)
        if neurons == self.out_features:
            nn.init.orthogonal_(weights, generator=rng)
        else:
            length = math.sqrt(min(1.0, self.in_features / self.out_features))
            directions = torch.randn(weights.shape, generator=rng)
            weights = length * F.normalize(directions, dim=1)
        biases = torch.zeros(neurons)
        return weights.to(self.weight.device), biases.to(self.bias.device)


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
        n_in = 3 * args.frame_stack
        blank = torch.zeros(1, n_in, args.frame_size, args.frame_size)
        self.convolutions = nn.ModuleList()
        for stride in (2, 1, 1, 1):
            self.convolutions.append(nn.Conv2d(n_in, args.channels, 3, stride))
            n_in = args.channels
        self.n_features = self(blank).shape[1]

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        x = obs / 255 - 0.5
        for convolution in self.convolutions:
            x = F.relu(convolution(x))
        return x.flatten(1)


def orthogonal(module: nn.Module) -> None:
    """Initialises a convolution or a linear layer as DrQ-v2 does."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        gain = math.sqrt(2) if isinstance(module, nn.Conv2d) else 1.0
        nn.init.orthogonal_(module.weight, gain)
        nn.init.zeros_(module.bias)


class Trunk(MLP):
    """Linear, LayerNorm, tanh: (B, features) -> (B, TRUNK). It has no hidden layer."""

    def __init__(self, n_features: int):
        super().__init__([n_features, TRUNK], layer_norm=False)
        self.norm = nn.LayerNorm(TRUNK)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.norm(self.layers[0](features)))


class Heads(nn.Module):
    """Some MLPs of the same sizes on a trunk."""

    def __init__(self, args: Args, n_features: int, sizes: list[int], count: int):
        super().__init__()
        self.trunk = Trunk(n_features)
        self.heads = nn.ModuleList(MLP(sizes, args.layer_norm) for _ in range(count))
        # where NE works
        self.mlps = list(self.heads)
        if args.sparse_trunk:
            self.mlps.insert(0, self.trunk)
        self.layers = [layer for mlp in self.mlps for layer in mlp.layers]


class Actor(Heads):
    """Deterministic tanh policy: (B, features) -> (B, act) in [-1, 1]."""

    def __init__(self, args: Args, n_features: int, n_act: int):
        sizes = [TRUNK, args.hidden_dim, args.hidden_dim, n_act]
        super().__init__(args, n_features, sizes, count=1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.heads[0](self.trunk(features)))


class Critic(Heads):
    """Two action-value functions on one trunk: (B, features), (B, act) -> (B,), (B,)."""

    def __init__(self, args: Args, n_features: int, n_act: int):
        sizes = [TRUNK + n_act, *args.critic_hidden, 1]
        super().__init__(args, n_features, sizes, count=2)

    def forward(self, features: torch.Tensor, actions: torch.Tensor):
        x = torch.cat((self.trunk(features), actions), dim=1)  # (B, TRUNK + act)
        q_1, q_2 = [head(x)[:, 0] for head in self.heads]
        return q_1, q_2


# --- agent: DrQ-v2 on masked heads --------------------------------------------
class Network:
    """What one optimiser trains, the actor or the critic, and the critic's target."""

    def __init__(self, module: Heads, target: Heads | None, learning_rate: float):
        self.heads = module.heads
        self.mlps = module.mlps
        self.layers = module.layers
        self.params = list(module.parameters())
        if target is not None:
            self.target_layers = target.layers
            self.target_params = list(target.parameters())
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

    def density(self) -> float:
        """Share of active connections."""
        return topology.network_density(self.layers)


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
        # of all that NE draws: it must not shift exploration noise and batches
        self.rng = torch.Generator().manual_seed(ne_seed)
        self.critic = Critic(args, encoder.n_features, n_act)
        self.apply(orthogonal)
        # §4.2, sparse start
        sparse = []
        if args.ne_actor:
            sparse += [self.actor]
        if args.ne_critic:
            sparse += [self.critic]
        for module in sparse:
            budgets = [head.layers for head in module.heads]
            if args.sparse_trunk:  # one for all
                budgets = [module.layers]
            for layers in budgets:
                topology.sparsify(layers, args.initial_density, args.sparse_init, self.rng)
        self.target_critic = copy.deepcopy(self.critic)
        self.register_buffer("stddev", torch.tensor(args.stddev[0]))  # of the action noise
        self.to(device)
        self.encoder.to(memory_format=torch.channels_last)
        self.networks = {
            "actor": Network(self.actor, None, args.learning_rate),
            "critic": Network(self.critic, self.target_critic, args.learning_rate),
        }
        self.encoder_optimizer = topology.Adam(list(encoder.parameters()), args.learning_rate)
        self.optimizers = [network.optimizer for network in self.networks.values()]
        self.optimizers.append(self.encoder_optimizer)

    def precision(self):
        """For losses: bfloat16 where autocast holds that to be safe, if asked for."""
        if not self.args.bf16:
            return contextlib.nullcontext()
        device = self.stddev.device.type
        return torch.autocast(device, torch.bfloat16, cache_enabled=False)

    def noisy_actions(self, features: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """(B, features), (B, act) -> (B, act) in [-1, 1]; gradients pass the bounds."""
        clip = self.args.noise_clip
        actions = self.actor(features) + (self.stddev * noise).clamp(-clip, clip)
        return actions + (actions.clamp(-1, 1) - actions).detach()

    def critic_gradients(self, batch: Batch):
        """Eq. 3 over n steps with clipped double Q; it trains the encoder, too.

        Returns: loss, mean Q, the features (B, features) of the observations without a
            graph, and the dense gradients of the encoder's and of the critic's parameters.
        """
        with self.precision():
            features = self.encoder(random_shift(batch.obs, batch.shifts[:, 0]))
            with torch.no_grad():
                next_obs = random_shift(batch.next_obs, batch.shifts[:, 1])
                next_features = self.encoder(next_obs)  # (B, features)
                next_actions = self.noisy_actions(next_features, batch.noise[:, 0])
                next_q_1, next_q_2 = self.target_critic(next_features, next_actions)
                next_q = torch.minimum(next_q_1, next_q_2)  # (B,)
                target_q = batch.rewards + batch.discounts * next_q  # (B,)
            q_1, q_2 = self.critic(features, batch.actions)  # (B,), (B,)
            loss = F.mse_loss(q_1, target_q) + F.mse_loss(q_2, target_q)  # ()
        encoder_params = list(self.encoder.parameters())
        gradients = torch.autograd.grad(loss, encoder_params + self.networks["critic"].params)
        of_encoder = gradients[: len(encoder_params)]
        of_critic = gradients[len(encoder_params) :]
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

    def update(self, batch: Batch) -> dict[str, torch.Tensor]:
        """One step of critic, encoder, policy and targets. Returns the losses before."""
        qf_loss, mean_q, features, of_encoder, of_critic = self.critic_gradients(batch)
        self.networks["critic"].step(of_critic)
        self.encoder_optimizer.apply(of_encoder)
        actor_loss, of_actor = self.actor_gradients(batch, features)
        self.networks["actor"].step(of_actor)
        self.networks["critic"].update_targets(self.args.tau)
        return {"qf_loss": qf_loss, "qf_values": mean_q, "actor_loss": actor_loss}

    @torch.no_grad()
    def hidden(self, batch: Batch) -> dict[str, list[list[torch.Tensor]]]:
        """Activations [(B, n), ...] of the hidden layers of each MLP of each network."""
        features = self.encoder(random_shift(batch.obs, batch.shifts[:, 0]))
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
    for name in ("actor", "critic"):
        rate = f"{name}_grow_rate"
        if args.growth == "none" or not getattr(args, f"ne_{name}"):
            setattr(args, rate, 0.0)
        if getattr(args, rate) is None:
            setattr(args, rate, solve_grow_rate(args, name))
    per_update = args.action_repeat * args.update_frequency  # steps
    updates = max(1, (args.total_timesteps - args.learning_starts) // per_update)
    if args.review_interval is None:
        # a count costs about as much as two updates
        args.review_interval = max(10, args.replay_ratio * updates // 1_000)
    if args.review_decay is None:
        # with no reduction, (1 - decay)^counts meets the floor at half the run
        until_half = (args.total_timesteps // 2 - args.learning_starts) // per_update
        counts = args.replay_ratio * until_half // args.review_interval
        counts = max(1, counts - 1)  # the first has no reduction
        floor = max(0.01, args.review_floor)  # 0 would never be met
        args.review_decay = 1 - floor ** (1 / counts)


def growth_rounds(args: Args) -> range:
    """Environment steps of the rounds: from the first update until the cosine is 0."""
    first = (args.learning_starts // args.grow_interval + 1) * args.grow_interval
    return range(first, args.growth_end, args.grow_interval)


def growth_fraction(args: Args, step: int, alpha: float) -> float:
    """Share of a layer's candidates that is born at `step`, cosine-annealed (§4.2)."""
    return alpha / 2 * (1 + math.cos(math.pi * step / args.growth_end))


def solve_grow_rate(args: Args, name: str) -> float:
    """alpha that takes a network from --initial-density to about its final density.

    All rounds leave the product of 1 - growth_fraction of the inactive connections inactive.
    With ln(1 - x) = -x, (1 - final) / (1 - initial density) = exp(-sum of the fractions).
    """
    final_density = getattr(args, f"{name}_final_density")
    inactive = 1 - args.initial_density
    total = sum(growth_fraction(args, step, alpha=1.0) for step in growth_rounds(args))
    if total == 0 or inactive == 0:
        return 0.0
    if not args.initial_density <= final_density < 1:
        low = f"--initial-density ({args.initial_density})"
        flag = f"--{name}-final-density"
        die(f"{flag} must be below 1 and at least {low}, got {final_density}")
    return min(1.0, 1 / total * math.log(inactive / (1 - final_density)))


def growth_plan(args: Args) -> str:
    """One line that says what density to expect."""
    rounds = [step for step in growth_rounds(args) if step <= args.total_timesteps]
    plans = []
    for name in ("actor", "critic"):
        density = args.initial_density if getattr(args, f"ne_{name}") else 1.0
        inactive = 1 - density
        for step in rounds:
            inactive *= 1 - growth_fraction(args, step, getattr(args, f"{name}_grow_rate"))
        plans.append(f"{name} {density:.0%} -> {1 - inactive:.0%}")
    return f"topology: {', '.join(plans)} in {len(rounds)} rounds, less what is pruned"


def topology_round(agent: Agent, batch: Batch, step: int) -> None:
    """§4.2, Eq. 2: grows, then prunes and resets; the target takes over the masks."""
    args = agent.args
    # dense; no step is taken with them
    gradients = {}
    _, _, features, _, gradients["critic"] = agent.critic_gradients(batch)
    _, gradients["actor"] = agent.actor_gradients(batch, features)
    # §B.2, slower for the actor
    grow_rates = {"actor": args.actor_grow_rate, "critic": args.critic_grow_rate}
    rng = agent.rng
    hidden_of = agent.hidden(batch)
    for name, network in agent.networks.items():
        fraction = growth_fraction(args, step, grow_rates[name])
        gradient_of = dict(zip(network.params, gradients[name], strict=True))
        for mlp, hidden in zip(network.mlps, hidden_of[name], strict=True):
            layers, counts, adam = mlp.layers, mlp.counts, network.optimizer
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
    critic = agent.networks["critic"]
    topology.copy_masks(critic.layers, critic.target_layers)


@dataclass
class Progress:
    """What a run has done so far, beside its networks."""

    updates: int = 0
    reviewed: int = 0  # updates whose batch was a review
    epsilon: float = 1.0  # a batch is a review with probability 1 - epsilon
    dormant: int | None = None  # the critics' dormant neurons when last counted
    losses: dict[str, torch.Tensor] = field(default_factory=dict)  # of a uniform batch
    returns: list[float] = field(default_factory=list)  # since the last evaluation


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


def review_hidden(agent: Agent, buffer: ReplayBuffer) -> list[torch.Tensor]:
    """Activations [(1024 or more, n), ...] of the Q heads, a batch at a time."""
    size = agent.args.batch_size
    chunks = []
    for _ in range(math.ceil(1_024 / size)):
        batch = buffer.sample(size, rng=agent.rng)
        chunks.append(itertools.chain(*agent.hidden(batch)["critic"]))
    return [torch.cat(layer) for layer in zip(*chunks, strict=True)]


def redo(agent: Agent, batch: Batch) -> None:
    """NE + ReDo (§C) on the heads."""
    tau = agent.args.redo_tau
    hidden_of = agent.hidden(batch)
    for name, network in agent.networks.items():
        for mlp, hidden in zip(network.mlps, hidden_of[name], strict=True):
            topology.redo(mlp.layers, hidden, tau, network.optimizer, agent.rng, mlp.norms)


@torch.no_grad()
def reset(agent: Agent) -> None:
    """NE + Reset (§C): heads, their targets and Adam's state start anew; the masks stay."""
    for network in agent.networks.values():
        for head in network.heads:
            topology.reset(head.layers, agent.rng)
            for norm in head.norms:
                if isinstance(norm, nn.LayerNorm):
                    norm.reset_parameters()
            for p in head.parameters():
                for value in network.optimizer.state[p].values():
                    value.zero_()
    agent.target_critic.heads.load_state_dict(agent.critic.heads.state_dict())


# --- environment and evaluation -----------------------------------------------
def load_task(env_id: str, rng: np.random.RandomState) -> tuple:
    """A dm_control task, and what renders it. Raises: SystemExit(2), with what to do."""
    backend = os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        from dm_control import suite
        from OpenGL.GL import GL_RENDERER, glGetString

        tasks = {f"{domain}_{task}": (domain, task) for domain, task in suite.ALL_TASKS}
        if env_id not in tasks or env_id.startswith("lqr"):  # actions without bounds
            near = ", ".join(difflib.get_close_matches(env_id, tasks, cutoff=0.5) or tasks)
            die(f"--env-id must be a task of dm_control's suite, got {env_id}; there is {near}")
        task = suite.load(*tasks[env_id], task_kwargs={"random": rng})
        task.physics.render(8, 8)
        with task.physics.contexts.gl.make_current() as context:
            renderer = context.call(glGetString, GL_RENDERER).decode()
    except Exception as e:  # each backend has errors of its own
        sys.unraisablehook = lambda failure: None  # a renderer half made fails once more
        pip = "pip install -r requirements-pixels.txt"
        hint = f"{pip}; Debian: apt-get install libegl1 libgl1, or libosmesa6 for osmesa"
        reason = " ".join(str(e).split())
        die(f"cannot render with MUJOCO_GL={backend}: {reason} ({hint})")
    return task, f"{backend}, {renderer}"


class PixelEnv:
    """A task seen by a camera; an action is repeated.

    Observations are (C, H, W) uint8, C = 3 * stack, newest frame last; actions are (act,)
    in [-1, 1].
    """

    def __init__(self, args: Args):
        self.args = args
        self.np_random = np.random.RandomState(args.seed)  # the task draws from it
        self.task, self.backend = load_task(args.env_id, self.np_random)
        self.camera = 2 if args.env_id.startswith("quadruped") else 0  # as in DrQ-v2
        self.spec = self.task.action_spec()
        self.n_act = self.spec.shape[0]
        self.stack = deque(maxlen=args.frame_stack)

    def render(self) -> np.ndarray:
        """(3, H, W)."""
        size = self.args.frame_size
        frame = self.task.physics.render(size, size, camera_id=self.camera)  # (H, W, 3)
        return frame.transpose(2, 0, 1).copy()

    def reset(self, seed: int | None = None) -> np.ndarray:
        if seed is not None:
            self.np_random.seed(seed)
        self.task.reset()
        self.episodic_return = 0.0
        self.episodic_length = 0
        self.stack.extend([self.render()] * self.args.frame_stack)
        return np.concatenate(self.stack)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, float, bool]:
        """Returns: observation, reward, discount (0 where the task terminated), ended."""
        low, high = self.spec.minimum, self.spec.maximum
        # rescaling may pass a bound by the last bit
        scaled = (low + (action + 1) / 2 * (high - low)).clip(low, high)
        reward = 0.0
        discount = 1.0
        for _ in range(self.args.action_repeat):
            moment = self.task.step(scaled)
            reward += discount * float(moment.reward)
            discount *= float(moment.discount)
            self.episodic_length += 1
            if moment.last():
                break
        self.episodic_return += reward
        self.stack.append(self.render())
        return np.concatenate(self.stack), reward, discount, moment.last()


def evaluate(policy: Policy, env: PixelEnv, episodes: int, seed: int) -> list[float]:
    """Returns of the deterministic policy, from the same starts at every call."""
    returns = []
    for episode in range(episodes):
        obs = env.reset(seed=100 + seed + episode)  # not the seed of training
        ended = False
        while not ended:
            obs, _, _, ended = env.step(policy.act(obs))
        returns.append(env.episodic_return)
    return returns


# --- training -----------------------------------------------------------------
def measure(agent: Agent, buffer: ReplayBuffer, progress: Progress, env, step: int) -> dict:
    """A row of results.csv: an evaluation, then of a uniform batch."""
    args = agent.args
    returns = evaluate(agent, env, args.eval_episodes, args.seed)
    row = {"step": step, "eval/return_mean": float(np.mean(returns))}
    row["eval/return_std"] = float(np.std(returns))
    row["charts/episodic_return"] = float(np.mean(progress.returns or math.nan))
    progress.returns = []
    batch = buffer.sample(args.batch_size, rng=torch.Generator().manual_seed(step))
    for key in ("qf_loss", "qf_values"):
        row[f"losses/{key}"] = float(progress.losses.get(key, math.nan))
    hidden_of = agent.hidden(batch)
    for name, network in agent.networks.items():
        values = {"density": network.density()}
        values |= topology.activity(list(itertools.chain(*hidden_of[name])))
        for key in ("planned", "grown", "pruned"):
            values[key] = sum(mlp.counts[key] for mlp in network.mlps)
        for key, value in values.items():
            row[f"ne/{name}/{key}"] = value
    row["ne/review_epsilon"] = progress.epsilon
    row["ne/review_share"] = progress.reviewed / max(1, progress.updates)
    return row


def fast_update(args: RunArgs, agent: Agent, buffer: ReplayBuffer):
    """The agent's update, compiled and captured if asked for."""
    if args.compile:
        print("compiling losses and gradients, which takes half a minute or more")
        example = buffer.sample(args.batch_size, rng=torch.Generator().manual_seed(0))
        features = agent.critic_gradients(example)[2]
        of_critic = compiled(agent.critic_gradients, example)
        of_actor = compiled(agent.actor_gradients, example, features)
        agent.critic_gradients, agent.actor_gradients = of_critic, of_actor
    if buffer.device.type == "cuda" and args.cudagraphs:
        return CudaGraph(agent.update)
    return agent.update


def check_steps(args: DrQArgs, *names: str) -> None:
    """Raises: SystemExit(2) for parts of agent steps, and for less than a window."""
    window = args.n_step * args.action_repeat
    if args.learning_starts < window:
        die(f"--learning-starts must be at least {window}, got {args.learning_starts}")
    for name in ("total_timesteps", "eval_frequency", *names):
        value = getattr(args, name)
        if value is not None and value % args.action_repeat != 0:
            flag = "--" + name.replace("_", "-")
            die(f"{flag} must be a multiple of --action-repeat, got {value}")


def main() -> None:
    # --- setup ---
    args, checkpoint = parse_args(Args)
    scale_to_task(args)
    check_steps(args, "grow_interval", "reset_interval")
    scale_to_run(args)
    device = set_up(args)
    seeds = np.random.SeedSequence(args.seed).generate_state(4).tolist()
    weight_seed, noise_seed, batch_seed, ne_seed = seeds
    torch.manual_seed(weight_seed)
    noise_rng = np.random.default_rng(noise_seed)
    env = PixelEnv(args)
    eval_env = PixelEnv(args)
    agent = Agent(args, env.n_act, ne_seed, device)
    buffer = ReplayBuffer(args, env.n_act, batch_seed, device)
    progress = Progress()
    parts = (agent, buffer, progress, noise_rng, [env])  # all that a resumed run needs
    start = 0
    if checkpoint is not None:
        start = checkpoint["step"]
        restore(parts, checkpoint.pop("parts"))
    folder, lock = open_folder(args, checkpoint, args.env_id)
    log = Log(args, folder, start)
    stop = Stop()
    print(f"{args.env_id}, seed {args.seed}, {device}: {folder}\n{growth_plan(args)}")
    print(f"rendering: {env.backend}")
    update = fast_update(args, agent, buffer)
    rounds = growth_rounds(args)
    obs = env.reset()
    buffer.start_episode(obs)

    # --- the loop ---
    saved = start
    started = time.time()
    last = args.total_timesteps
    repeat = args.action_repeat
    steps = range(start + repeat, last + 1, repeat)
    for step in tqdm(steps, initial=start // repeat, total=last // repeat, disable=None):
        # act
        agent_step = step // repeat
        stddev = np.interp(agent_step, (0, args.stddev_duration), args.stddev)
        if step <= args.learning_starts:
            action = noise_rng.uniform(-1, 1, env.n_act)
        else:
            action = agent.act(obs) + noise_rng.normal(0, stddev, env.n_act)
        action = action.clip(-1, 1).astype(np.float32)
        require_finite(step, action=action)

        # update; before the environment steps, so that on CUDA both run at the same time
        due = step > args.learning_starts and agent_step % args.update_frequency == 0
        updates = args.replay_ratio if due else 0
        for _ in range(updates):
            progress.updates += 1
            agent.stddev.fill_(stddev)
            # §4.2, experience review
            u = torch.rand((), generator=agent.rng).item()
            review = u > progress.epsilon
            progress.reviewed += review
            oldest = args.review_fraction if review else 1.0
            batch = buffer.sample(args.batch_size, oldest)
            # critic and encoder, then actor and targets
            losses = update(batch)
            if not review:  # old batches would bend the curves
                progress.losses |= {key: value.clone() for key, value in losses.items()}
            counting = progress.updates % args.review_interval == 0
            if counting and args.review_floor < 1:
                hidden = review_hidden(agent, buffer)
                dormant = len(topology.dormant_neurons(hidden, args.review_tau))
                fau = topology.activity(hidden)["fau"]
                progress.epsilon = review_threshold(args, progress, dormant, fau)
                progress.dormant = dormant
            if args.redo_interval and progress.updates % args.redo_interval == 0:
                redo(agent, buffer.sample(args.batch_size, rng=agent.rng))

        # step and store
        obs, reward, discount, ended = env.step(action)
        require_finite(step, reward=reward)
        buffer.add(obs, action, reward, discount)
        if ended:
            progress.returns.append(env.episodic_return)
            log.scalar("charts/episodic_return", env.episodic_return, step)
            log.scalar("charts/episodic_length", env.episodic_length, step)

        # §4.2, Eq. 2: grow, then prune and reset neurons
        if step in rounds:
            topology_round(agent, buffer.sample(args.batch_size, rng=agent.rng), step)
        if args.reset_interval and step % args.reset_interval == 0 and step < last:
            reset(agent)

        # evaluate and log
        if step % 1_000 == 0:
            log.scalar("charts/SPS", (step - start) / (time.time() - started), step)
            for key, value in progress.losses.items():
                log.scalar(f"losses/{key}", value, step)
        if step % args.eval_frequency == 0 or step == last:
            row = measure(agent, buffer, progress, eval_env, step)
            write_row(folder, row)
            log.row(row, step)
            tqdm.write(f"step {step:,}: return {row['eval/return_mean']:,.1f}")

        # episode end; no environment can be saved inside an episode
        if ended and step < last:
            if stop.signal or step - saved >= args.checkpoint_frequency:
                save(folder, args, checkpoint, step, parts)
                saved = step
            if stop.signal:
                log.close()
                stop.leave(step, folder)
            obs = env.reset()
            buffer.start_episode(obs)

    save(folder, args, checkpoint, step, parts, finished=True)
    log.close()
    print(f"finished: {folder}, {(step - start) / (time.time() - started):.0f} steps/s")


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
