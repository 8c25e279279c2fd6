"""Neuroplastic Expansion (NE) on DrQ-v2, continuous control from pixels, in one file.

Paper: Neuroplastic Expansion in Deep Reinforcement Learning, arXiv 2410.07994; §, Eq. and Table below refer to it.
Run:   python ne_drq_dmc.py --env-id walker_walk (on a GPU); with --initial-density 1 --review-floor 1 it is DrQ-v2
All flags: --help. Deviations from the paper, numbered: docs/ne_drq_dmc.md
"""

import copy
import csv
import difflib
import json
import math
import os
import signal
import sys
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

import utils_topology as topology


@dataclass
class Args:
    # --- run ---
    exp_name: str = "ne_drq_dmc"  # name of this experiment, part of the run's name
    env_id: str = "walker_walk"  # domain_task of the DeepMind Control Suite
    seed: int = 1  # seed of everything random, >= 0
    total_timesteps: int | None = None  # length in environment frames; default: 1.1M for walker_walk, else 3.1M
    cuda: bool = True  # use the GPU if there is one
    cudagraphs: bool = True  # on CUDA: capture the two updates once and replay them; off: eager
    torch_threads: int = 1  # CPU threads of torch; a resumed run is exact with the same number only
    bf16: bool = False  # losses and gradients in bfloat16 where autocast holds that to be safe
    run_dir: str | None = None  # where all files go; default runs/{env_id}__{exp_name}__{seed}__{unix_time}
    track: bool = False  # also log to Weights & Biases (needs `pip install wandb`)
    wandb_project_name: str = "neuroplastic-expansion"  # project on Weights & Biases
    wandb_entity: str | None = None  # team on Weights & Biases
    capture_video: bool = False  # write the first episode of each evaluation as a GIF, as the agent sees it
    eval_frequency: int = 10_000  # environment frames between two rows of results.csv (DrQ-v2)
    eval_episodes: int = 10  # per evaluation: deterministic policy, own environment and seed (DrQ-v2)
    checkpoint_frequency: int = 250_000  # environment frames; written at the first episode end after each
    resume: str | None = None  # RUN_DIR of an interrupted run: continue it exactly, with its own arguments
    # --- DrQ-v2 (Yarats et al. 2022; values of its reference code, Table 3) ---
    action_repeat: int = 2  # environment frames per agent step
    frame_size: int = 84  # height and width of a frame in pixels
    frame_stack: int = 3  # frames per observation
    channels: int = 32  # of each convolution
    hidden_dim: int = 1024  # width of the two hidden layers of policy and Q heads
    learning_rate: float = 1e-4  # Adam's step size, encoder, critic and actor
    batch_size: int = 256  # windows per update
    buffer_size: int = 1_000_000  # single frames kept
    buffer_device: Literal["cpu", "cuda"] = "cpu"  # where the frames are kept, if a GPU is used
    gamma: float = 0.99  # discount factor per agent step
    n_step: int = 3  # agent steps per window
    tau: float = 0.01  # Polyak step of the target networks, per update
    learning_starts: int = 4_000  # environment frames with uniform random actions before the first update
    update_frequency: int = 2  # agent steps per update
    stddev: tuple[float, float] = (1.0, 0.1)  # of all action noise, first and last; unit: half the action range
    stddev_duration: int | None = None  # agent steps from first to last; default: 100k for walker_walk, else 500k
    noise_clip: float = 0.3  # bound of the noise in the losses; unit: half the action range
    layer_norm: bool = False  # Linear -> LayerNorm -> ReLU on the hidden layers of the heads (Lyle et al. 2024)
    # --- Neuroplastic Expansion, on the MLP heads ---
    ne_actor: bool = True  # NE on the policy; off: dense from the start (Figure 7b)
    ne_critic: bool = True  # NE on both Q heads; off: dense from the start (Figure 7b)
    sparse_trunk: bool = False  # NE on the trunks' linear layers, too: one network, one budget with the heads
    initial_density: float = 0.25  # D, share of connections active at the start (ours); 1 = dense, nothing to grow
    sparse_init: Literal["erdos-renyi", "uniform"] = "erdos-renyi"  # how D is spread over the layers (§4.2)
    growth: Literal["gradient", "random", "none"] = "gradient"  # largest |gradient| (§4.2), any (§4.1), static
    grow_interval: int = 10_000  # Delta T, environment frames between two rounds (ours)
    actor_grow_rate: float | None = None  # alpha of the policy (§4.2); default: solved for --actor-final-density (ours)
    critic_grow_rate: float | None = None  # alpha of the Q heads, larger (§B.2); default: solved likewise
    actor_final_density: float = 0.75  # density of the policy at the end of growth when alpha is solved (ours)
    critic_final_density: float = 0.95  # the same for the Q heads (ours)
    growth_end: int | None = None  # T_end, environment frame after which nothing grows; default: the last (§B.2)
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
    reset_interval: int = 0  # NE + Reset (§C): environment frames between two, heads only (Nikishin et al. 2022)


def die(message: str, code: int = 2) -> NoReturn:
    """One clear line and a non-zero exit: 2 for a mistake on the command line, 1 for what went wrong later."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


PAD = 4  # pixels by which the augmentation shifts at most
RANGES = [  # of each flag; None, where it is a default, is not checked
    ("at least 0", lambda x: x >= 0, "seed noise_clip weight_clip review_tau redo_interval redo_tau reset_interval"),
    ("at least 1", lambda x: x >= 1, "total_timesteps torch_threads eval_frequency eval_episodes batch_size n_step"),
    ("at least 1", lambda x: x >= 1, "checkpoint_frequency buffer_size action_repeat frame_stack channels hidden_dim"),
    ("at least 1", lambda x: x >= 1, "update_frequency stddev_duration grow_interval growth_end review_interval"),
    ("at least 15, for four convolutions", lambda x: x >= 15, "frame_size"),
    ("in [0, 1]", lambda x: 0 <= x <= 1, "gamma tau actor_grow_rate critic_grow_rate review_decay review_floor"),
    ("in (0, 1]", lambda x: 0 < x <= 1, "learning_rate initial_density review_fraction"),
    ("in [0, 1), so that every round grows on net", lambda x: 0 <= x < 1, "prune_ratio"),
    ("two numbers of at least 0", lambda x: min(x) >= 0, "stddev"),
]


def load_task(env_id: str, rng: np.random.RandomState) -> tuple:
    """A dm_control task and what renders it. Raises: SystemExit(2), with what to do, where either cannot be had."""
    backend = os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        from dm_control import suite
        from OpenGL.GL import GL_RENDERER, glGetString

        names = {"_".join(names): names for names in suite.ALL_TASKS if "lqr" not in names}  # of unbounded actions
        if env_id not in names:
            near = difflib.get_close_matches(env_id, names, n=5, cutoff=0.5) or names
            die(f"--env-id must be a task of the DeepMind Control Suite, got {env_id}; there is {', '.join(near)}")
        task = suite.load(*names[env_id], task_kwargs={"random": rng})
        task.physics.render(8, 8)
        with task.physics.contexts.gl.make_current() as context:
            return task, f"{backend}, {context.call(glGetString, GL_RENDERER).decode()}"
    except Exception as e:  # each backend has errors of its own; a missing library is one of them
        packages = "libosmesa6" if backend == "osmesa" else "libegl1 libgl1, or libosmesa6 with MUJOCO_GL=osmesa"
        die(f"cannot render with MUJOCO_GL={backend} (Debian: apt-get install {packages}): {' '.join(str(e).split())}")


class PixelEnv:
    """A task seen by camera 0. Observations (3 * stack, H, W) uint8, newest frame last; actions in [-1, 1]."""

    def __init__(self, args: Args):
        self.args, self.rng, self.frames = args, np.random.RandomState(args.seed), deque(maxlen=args.frame_stack)
        self.task, self.backend = load_task(args.env_id, self.rng)
        spec = self.task.action_spec()
        self.n_act, self.low, self.high = spec.shape[0], spec.minimum, spec.maximum

    def observe(self, copies: int = 1) -> np.ndarray:
        frame = self.task.physics.render(self.args.frame_size, self.args.frame_size, camera_id=0)  # (H, W, 3)
        self.frames.extend([frame.transpose(2, 0, 1)] * copies)
        return np.concatenate(self.frames)

    def reset(self) -> np.ndarray:
        self.task.reset()
        return self.observe(copies=self.args.frame_stack)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, float, bool]:
        """Returns observation, reward, discount (0 only where the task terminated) and whether the episode is over."""
        action = (self.low + (action + 1) / 2 * (self.high - self.low)).clip(self.low, self.high)
        total, discount = 0.0, 1.0
        for _ in range(self.args.action_repeat):
            _, reward, step_discount, _ = moment = self.task.step(action)
            total, discount = total + discount * reward, discount * step_discount
            if moment.last():
                break
        return self.observe(), float(total), float(discount), moment.last()


class Batch(NamedTuple):
    """Views of preallocated tensors. All randomness of the losses comes with the batch."""

    obs: torch.Tensor  # (B, C, H, W) uint8, C = 3 * stack
    next_obs: torch.Tensor  # (B, C, H, W) uint8, n agent steps later
    actions: torch.Tensor  # (B, act) in [-1, 1]
    rewards: torch.Tensor  # (B,), of n steps, discounted
    discounts: torch.Tensor  # (B,), gamma ** n; 0 where the task terminated
    noise: torch.Tensor  # (B, 2, act) standard normal, for the target's action and for the policy's
    shifts: torch.Tensor  # (B, 2, 2) in [0, 2 * PAD], down and right, of observation and next observation


class ReplayBuffer:
    """A ring of single frames. Frame i of the run is at i % capacity, with action | reward | discount that led to it.

    A window is a frame and the n after it in its episode. `windows` is a ring of (frame, first of the episode, first of
    the stack), oldest first; a window is dropped when the first frame of its stack is overwritten.
    """

    def __init__(self, args: Args, n_act: int, seed: int, device: torch.device):
        self.args, self.capacity, size = args, args.buffer_size, args.frame_size
        self.columns, self.rng = [n_act, 1, 1], torch.Generator().manual_seed(seed)
        self.count = self.start = self.oldest = self.newest = 0  # frames, start of the episode, range of the windows
        where = args.buffer_device if device.type == "cuda" else "cpu"
        kilobytes = Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]
        free = torch.cuda.mem_get_info()[0] if where == "cuda" else 1024 * int(kilobytes)
        each = 3 * size**2 + 4 * (n_act + 2) + 24  # bytes
        memory = f"{self.capacity * each / 2**30:.2f} GiB on {where}, where {free / 2**30:.2f} GiB are free"
        if self.capacity * each > free:
            die(f"--buffer-size must be at most {free // each} to fit, got {self.capacity}, which takes {memory}")
        print(f"replay buffer: {self.capacity:,} frames, {memory}")
        self.frames = torch.empty(self.capacity, 3, size, size, dtype=torch.uint8, device=where)
        self.steps = torch.empty(self.capacity, n_act + 2)
        self.windows = torch.empty(self.capacity, 3, dtype=torch.int64)
        shape = (args.batch_size, 2, 3 * args.frame_stack, size, size)
        self.pixels = torch.empty(shape, dtype=torch.uint8, device=device)  # every batch is written here
        self.gathered = torch.empty(shape, dtype=torch.uint8, device=where, pin_memory=where != device.type)
        self.rows = torch.empty(args.batch_size, n_act + 2, device=device)
        actions, rewards, discounts = self.rows.split(self.columns, dim=1)
        noise = torch.empty(args.batch_size, 2, n_act, device=device)
        shifts = torch.empty(args.batch_size, 2, 2, dtype=torch.int64, device=device)
        self.batch = Batch(*self.pixels.unbind(1), actions, rewards[:, 0], discounts[:, 0], noise, shifts)

    def add(self, obs: np.ndarray, action: np.ndarray | None = None, reward: float = 0.0, discount: float = 1.0):
        """The newest frame of an observation and what led to it: no action where an episode starts."""
        row, window = self.count % self.capacity, self.count - self.args.n_step
        self.start = self.count if action is None else self.start
        self.frames[row].copy_(torch.from_numpy(obs[-3:]))
        self.steps[row] = torch.tensor([*([0.0] * self.columns[0] if action is None else action), reward, discount])
        self.count += 1
        if window >= self.start:
            needs = max(window - self.args.frame_stack + 1, self.start)
            self.windows[self.newest % self.capacity] = torch.tensor([window, self.start, needs])
            self.newest += 1
        while self.oldest < self.newest and self.windows[self.oldest % self.capacity, 2] < self.count - self.capacity:
            self.oldest += 1

    def sample(self, oldest: float = 1.0, rng: torch.Generator | None = None) -> Batch:
        """A uniform batch from the oldest share of the windows, written into the same tensors at every call."""
        args, rng, count = self.args, rng or self.rng, max(1, int(oldest * (self.newest - self.oldest)))
        index = (self.oldest + torch.randint(count, (len(self.rows),), generator=rng)) % self.capacity
        frame, start, _ = self.windows[index].unbind(1)  # (B,), (B,)
        stacks = torch.stack((frame, frame + args.n_step), dim=1)[:, :, None] + torch.arange(1 - args.frame_stack, 1)
        stacks = torch.maximum(stacks, start[:, None, None]) % self.capacity  # (B, 2, stack)
        stacks, out = stacks.flatten().to(self.frames.device), self.gathered.view(-1, *self.frames.shape[1:])
        self.pixels.copy_(torch.index_select(self.frames, 0, stacks, out=out).view_as(self.pixels))
        led = self.steps[(frame[:, None] + torch.arange(1, args.n_step + 1)) % self.capacity]  # (B, n, act + 2)
        actions, rewards, discounts = led.split(self.columns, dim=2)
        discounts = (args.gamma * discounts).cumprod(1)  # (B, n, 1)
        rewards = rewards[:, 0] + (discounts[:, :-1] * rewards[:, 1:]).sum(1)  # (B, 1)
        self.rows.copy_(torch.cat((actions[:, 0], rewards, discounts[:, -1]), dim=1))
        self.batch.noise.copy_(torch.randn(self.batch.noise.shape, generator=rng))
        self.batch.shifts.copy_(torch.randint(2 * PAD + 1, self.batch.shifts.shape, generator=rng))
        return self.batch

    def state_dict(self) -> dict:
        """The filled part only; on the CPU a view with a storage of its own length, so that saving copies nothing."""
        parts = ("frames", "steps", "windows")
        state = {name: torch.from_numpy(getattr(self, name)[: self.count].cpu().numpy()) for name in parts}
        return state | {"numbers": [self.count, self.start, self.oldest, self.newest], "rng": self.rng.get_state()}

    def load_state_dict(self, state: dict) -> None:
        self.count, self.start, self.oldest, self.newest = state["numbers"]
        for name in ("frames", "steps", "windows"):
            getattr(self, name)[: self.count] = state[name]
        self.rng.set_state(state["rng"])


def random_shift(obs: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
    """Repeats the border PAD times, then crops (Yarats et al. 2022): (B, C, H, W), (B, 2) -> (B, C, H, W)."""
    places = torch.arange(obs.shape[-1], device=obs.device)  # frames are square
    rows, columns = (places + shifts.T[:, :, None] - PAD).clamp(0, len(places) - 1)  # (B, H), (B, W)
    batch = torch.arange(len(obs), device=obs.device)[:, None, None]
    return obs[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)  # channels last in memory


class Network(nn.Module):
    """A trunk (linear, LayerNorm, tanh) on the encoder's features and MLP heads; actions, if any, join the trunk."""

    def __init__(self, args: Args, n_features: int, n_act: int, n_out: int, heads: int, n: int = 50):
        super().__init__()
        self.trunk = nn.Sequential(topology.MaskedLinear(n_features, n), nn.LayerNorm(n), nn.Tanh())
        sizes = [n + n_act, args.hidden_dim, args.hidden_dim, n_out]
        self.heads = nn.ModuleList(topology.MaskedMLP(sizes, args.layer_norm) for _ in range(heads))
        self.masked = [layer for layer in self.modules() if isinstance(layer, topology.MaskedLinear)]

    def forward(self, features: torch.Tensor, *actions: torch.Tensor, method: str = "forward") -> list:
        """(B, features), (B, act) if any -> [(B, out), ...] of the heads, or what another method of theirs returns."""
        x = torch.cat((self.trunk(features), *actions), dim=1)  # (B, trunk + act)
        return [getattr(head, method)(x) for head in self.heads]


class Agent(nn.Module):
    """Encoder, actor, twin critics on one trunk, their targets and optimisers. Both updates are all in place."""

    def __init__(self, args: Args, n_act: int, ne_seed: int, device: torch.device):
        super().__init__()
        self.ne_rng = torch.Generator().manual_seed(ne_seed)  # all that NE draws, so that it shifts nothing else
        self.args, widths = args, [3 * args.frame_stack, *[args.channels] * 4]
        layers = [nn.Conv2d(n, m, 3, s) for n, m, s in zip(widths, widths[1:], (2, 1, 1, 1), strict=False)]
        self.encoder = nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())], nn.Flatten())
        n_features = self.encoder(torch.zeros(1, widths[0], args.frame_size, args.frame_size)).shape[1]
        self.actor, self.critic = Network(args, n_features, 0, n_act, 1), Network(args, n_features, n_act, 1, 2)
        self.apply(topology.orthogonal)
        networks = {"actor": self.actor, "critic": self.critic}
        self.mlps = {name: [*network.heads] for name, network in networks.items()}
        self.groups = {name: [[network.trunk[0]]] * args.sparse_trunk for name, network in networks.items()}  # under NE
        for name, groups in self.groups.items():
            groups += [[*mlp.layers] for mlp in self.mlps[name]]
            for layers in ([sum(groups, [])] if args.sparse_trunk else groups) * getattr(args, f"ne_{name}"):
                topology.sparsify(layers, args.initial_density, args.sparse_init, self.ne_rng)  # §4.2
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.register_buffer("stddev", torch.tensor(args.stddev[0]))  # of the action noise
        self.features = torch.zeros(args.batch_size, n_features, device=device)  # of the newest critic loss
        self.to(device).encoder.to(memory_format=torch.channels_last)
        self.layers = {name: sum(groups, []) for name, groups in self.groups.items()}
        self.params = {name: [*part.parameters()] for name, part in [("encoder", self.encoder), *networks.items()]}
        self.online, self.targets = [p.detach() for p in self.params["critic"]], [*self.target_critic.parameters()]
        self.head_targets = [*self.actor.heads.parameters(), *self.target_critic.heads.parameters()]
        self.optimizers = {name: topology.adam(p, args.learning_rate) for name, p in self.params.items()}
        self.online_layers = self.actor.masked + self.critic.masked
        self.target_layers = self.actor.masked + self.target_critic.masked  # the policy is its own target
        topology.apply_masks(self.online_layers, self.target_layers)
        if args.bf16:
            autocast = torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
            self.critic_loss, self.actor_loss = autocast(self.critic_loss), autocast(self.actor_loss)

    def encode(self, obs: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:  # (B, C, H, W) uint8 -> (B, features)
        return self.encoder(random_shift(obs, shifts) / 255 - 0.5)

    def noisy_actions(self, features: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """(B, features), (B, act) -> (B, act) in [-1, 1]. The gradient passes the bounds as if there were none."""
        noise = (noise * self.stddev).clamp(-self.args.noise_clip, self.args.noise_clip)
        actions = torch.tanh(self.actor(features)[0]) + noise
        return actions + (actions.clamp(-1, 1) - actions).detach()

    def critic_loss(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Eq. 3 over n steps with clipped double Q. Keeps the features for the actor. Returns loss and mean Q."""
        features = self.encode(batch.obs, batch.shifts[:, 0])  # (B, features)
        with torch.no_grad():
            self.features.copy_(features)
            next_features = self.encode(batch.next_obs, batch.shifts[:, 1])
            next_actions = self.noisy_actions(next_features, batch.noise[:, 0])  # (B, act)
            next_q = torch.minimum(*self.target_critic(next_features, next_actions))[:, 0]  # (B,)
            target_q = batch.rewards + batch.discounts * next_q  # (B,)
        q1, q2 = (q[:, 0] for q in self.critic(features, batch.actions))  # (B,), (B,)
        return F.mse_loss(q1, target_q) + F.mse_loss(q2, target_q), q1.mean()

    def actor_loss(self, batch: Batch) -> torch.Tensor:
        """Eq. 4 with clipped double Q on the features of the newest critic loss, through which no gradient goes."""
        actions = self.noisy_actions(self.features, batch.noise[:, 1])  # (B, act)
        return -torch.minimum(*self.critic(self.features, actions)).mean()

    def update_critic(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """One step of critics and encoder, which nothing else trains."""
        loss, mean_q = self.critic_loss(batch)
        gradients = torch.autograd.grad(loss, (encoder := self.params["encoder"]) + self.params["critic"])
        topology.masked_step(self.optimizers["critic"], self.critic.masked, gradients[len(encoder) :])
        gradients = [torch.empty_like(p).copy_(g) for p, g in zip(encoder, gradients, strict=False)]  # channels last
        topology.masked_step(self.optimizers["encoder"], [], gradients)
        return loss.detach(), mean_q.detach()

    def update_actor(self, batch: Batch) -> torch.Tensor:
        """One step of the policy, after the critics' on the same batch, then Polyak averaging of all targets."""
        gradients = torch.autograd.grad(loss := self.actor_loss(batch), self.params["actor"])
        topology.masked_step(self.optimizers["actor"], self.actor.masked, gradients)
        torch._foreach_lerp_(self.targets, self.online, self.args.tau)
        return loss.detach()

    @torch.no_grad()
    def hidden(self, batch: Batch) -> dict[str, list[list[torch.Tensor]]]:
        """Activations [(B, n), ...] of the hidden layers, for each MLP of each network."""
        features = self.encode(batch.obs, batch.shifts[:, 0])
        inputs, method = {"actor": (features,), "critic": (features, batch.actions)}, "activations"
        return {name: getattr(self, name)(*x, method=method) for name, x in inputs.items()}

    @torch.inference_mode()
    def act(self, obs: np.ndarray) -> np.ndarray:  # (C, H, W) uint8 -> (act,)
        obs = torch.from_numpy(obs).to(self.stddev.device)[None]
        return torch.tanh(self.actor(self.encoder(obs / 255 - 0.5))[0])[0].cpu().numpy()


def topology_round(agent: Agent, batch: Batch, step: int, schedules: dict[str, tuple]) -> dict[str, int]:
    """§4.2, Eq. 2: grows, then prunes and resets every NE network in place. Returns {"ne/{network}/grown": n, ...}."""
    args, counts, hidden = agent.args, Counter(), agent.hidden(batch)
    losses = {"critic": agent.critic_loss(batch)[0], "actor": agent.actor_loss(batch)}  # no step is taken with them
    for name, groups in agent.groups.items():
        optimizer = agent.optimizers[name]
        fraction = topology.growth_fraction(schedules[name][1], step, args.growth_end or args.total_timesteps)
        for layers, activations in zip(groups, [[]] * args.sparse_trunk + hidden[name], strict=True):
            # Elastic neuron generation
            scores = torch.autograd.grad(losses[name], [layer.weight for layer in layers], retain_graph=True)
            if args.growth == "random":
                scores = [torch.rand(g.shape, generator=agent.ne_rng).to(g.device) for g in scores]
            grown = topology.grow(layers, scores, fraction, optimizer)
            # Dormant neuron pruning
            budget = int(args.prune_ratio * grown) if args.prune else 0
            pruned = topology.prune(layers, activations, budget, optimizer, args.weight_clip, agent.ne_rng)
            counts.update({f"ne/{name}/grown": grown, f"ne/{name}/pruned": pruned})
    topology.apply_masks(agent.online_layers, agent.target_layers)
    return counts


def review_threshold(epsilon: float, before: int | None, now: int, args: Args) -> float:
    """§4.2, next threshold from the critics' dormant neurons before and now. A batch is a review if u > epsilon."""
    if before is None:  # the first count
        return epsilon
    r = max(0, before - now) / max(before, 1)  # in [0, 1]: large while growth wakes neurons up, then near 0
    return max(args.review_floor, (1 - args.review_decay) * epsilon + args.review_decay * r)


def evaluate(agent: Agent, env: PixelEnv, episodes: int, seed: int, video: Path | None = None) -> list[float]:
    """Undiscounted returns of the policy without noise; the same seeds, hence the same starts, at every call."""
    returns, images = [], []
    for episode in range(episodes):
        env.rng.seed(100 + seed + episode)  # not the seed of training
        obs, done, total = env.reset(), False, 0.0
        while not done:
            obs, reward, _, done = env.step(agent.act(obs))
            total += reward
            images += [Image.fromarray(obs[-3:].transpose(1, 2, 0))] * (video is not None and episode == 0)
        returns.append(total)
    if video:
        video.parent.mkdir(exist_ok=True)
        milliseconds = max(20, round(1000 * env.task.control_timestep() * env.args.action_repeat))
        images[0].save(video, save_all=True, append_images=images[1:], duration=milliseconds, loop=0)
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
        if content["format"] == "ne_drq_dmc 1":
            return content
    except FileNotFoundError:
        die(f"there is no checkpoint {path}", code=1)
    except Exception:  # torch raises many kinds for a damaged or foreign file
        pass
    die(f"{path} is damaged or not a checkpoint of {Path(__file__).name}", code=1)


def parse_args() -> tuple[Args, dict | None]:
    """The arguments and, with --resume, the checkpoint. Raises: SystemExit(2) for what cannot be."""
    args, checkpoint = tyro.cli(Args), None
    if args.resume is not None:
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
    args.total_timesteps = args.total_timesteps or (1_100_000 if args.env_id == "walker_walk" else 3_100_000)
    args.stddev_duration = args.stddev_duration or (100_000 if args.env_id == "walker_walk" else 500_000)
    start, whole = args.initial_density, ("total_timesteps", "eval_frequency", "grow_interval", "reset_interval")
    limits = [(name, getattr(args, name) % args.action_repeat == 0, "a multiple of --action-repeat") for name in whole]
    least = max(args.batch_size, 2 * (args.n_step + args.frame_stack))
    limits += [("buffer_size", args.buffer_size >= least, f"at least {least} for such batches and windows")]
    limits += [("learning_starts", args.learning_starts >= (n := args.n_step * args.action_repeat), f"at least {n}")]
    for name in ("actor_final_density", "critic_final_density"):
        limits += [(name, start == 1 or start <= getattr(args, name) < 1, f"in [--initial-density ({start}), 1)")]
    for name, holds, allowed in limits:
        if not holds:
            die(f"--{name.replace('_', '-')} must be {allowed}, got {getattr(args, name)}")
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
        torch.cuda.set_stream(torch.cuda.Stream())  # a graph cannot be captured on the default stream
    torch.set_num_threads(args.torch_threads)
    torch.set_flush_denormal(True)  # denormal numbers make long runs slow
    seeds = [int(s) for s in np.random.SeedSequence(args.seed).generate_state(4)]
    torch.manual_seed(seeds[0])  # initial weights
    noise_rng = np.random.default_rng(seeds[1])  # exploration
    env = PixelEnv(args)
    agent = Agent(args, env.n_act, seeds[3], device)
    run = {"args": vars(args), "device": device.type, "step": 0, "updates": 0, "saved": 0, "results_bytes": 0}
    run |= {"returns": [], "epsilon": 1.0, "dormant": None, "reviewed": 0}
    run["counts"] = {f"ne/{name}/{change}": 0 for name in agent.layers for change in ("grown", "pruned")}
    if checkpoint is not None:
        agent.load_state_dict(checkpoint["agent"])
        topology.apply_masks(agent.online_layers, agent.target_layers)
        run = checkpoint["run"]
    if run["step"] == args.total_timesteps:
        return print(f"{args.resume} is finished, there is nothing to resume")
    buffer = ReplayBuffer(args, env.n_act, seeds[2], device)
    if checkpoint is not None:
        if run["device"] != device.type:
            die(f"--resume must continue on {run['device']}, where the run was started, got {device.type}")
        buffer.load_state_dict(checkpoint["buffer"])
        agent.ne_rng.set_state(checkpoint["ne_rng"])
        for name, adam in agent.optimizers.items():
            adam.load_state_dict(checkpoint["optimizers"][name])
        noise_rng.bit_generator.state, task_state = map(json.loads, checkpoint["numpy_rngs"])
        env.rng.set_state(task_state)
    run_dir, writer = open_run(args, checkpoint)
    eval_env = PixelEnv(args)
    graphed = topology.CudaGraph if device.type == "cuda" and args.cudagraphs else lambda update: update
    update_critic, update_actor = graphed(agent.update_critic), graphed(agent.update_actor)
    schedules = {name: topology.growth_schedule(args, name) for name in agent.layers}
    print(f"{args.env_id}, seed {args.seed}, {device}: {run_dir}", *(plan for *_, plan in schedules.values()), sep="\n")
    print(f"{env.n_act} actions, {args.frame_stack} frames of {args.frame_size}x{args.frame_size}, {env.backend}")
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
        content = {"format": "ne_drq_dmc 1", "run": run, "agent": agent.state_dict()}
        content |= {"ne_rng": agent.ne_rng.get_state(), "buffer": None if finished else buffer.state_dict()}
        content["optimizers"] = {name: adam.state_dict() for name, adam in agent.optimizers.items()}
        states = noise_rng.bit_generator.state, env.rng.get_state(legacy=False)
        content["numpy_rngs"] = [json.dumps(state, default=np.ndarray.tolist) for state in states]
        save_checkpoint(run_dir / "checkpoint.pt", content)

    # --- the loop ---
    qf_loss = qf_values = actor_loss = math.nan
    episodic_return, episodic_length, start, first_step = 0.0, 0, time.time(), run["step"]
    obs = env.reset()
    buffer.add(obs)
    for step in range(run["step"] + args.action_repeat, args.total_timesteps + 1, args.action_repeat):
        run["step"], agent_step = step, step // args.action_repeat
        # act
        stddev = np.interp(agent_step, (0, args.stddev_duration), args.stddev)
        if step <= args.learning_starts:
            action = noise_rng.uniform(-1, 1, env.n_act)
        else:
            action = agent.act(obs) + noise_rng.normal(0, stddev, env.n_act)
            stop_unless_finite(action)
        action = action.clip(-1, 1).astype(np.float32)
        # update; queued before the environment steps and renders, so that on CUDA both run at the same time
        if step > args.learning_starts and agent_step % args.update_frequency == 0:
            run["updates"] += 1
            agent.stddev.fill_(stddev)
            # §4.2, experience review
            review = torch.rand((), generator=agent.ne_rng).item() > run["epsilon"]
            run["reviewed"] += review
            batch = buffer.sample(args.review_fraction if review else 1.0)
            # critic, then actor and targets
            qf_loss, qf_values = update_critic(batch)
            actor_loss = update_actor(batch)
            if run["updates"] % args.review_interval == 0:
                dormant = topology.count_dormant(sum(agent.hidden(batch)["critic"], []), args.review_tau)
                run["epsilon"] = review_threshold(run["epsilon"], run["dormant"], dormant, args)
                run["dormant"] = dormant
            if args.redo_interval and run["updates"] % args.redo_interval == 0:
                topology.redo(agent.mlps, agent.hidden(batch), args.redo_tau, agent.optimizers, agent.ne_rng)
        # step and store
        obs, reward, discount, done = env.step(action)
        buffer.add(obs, action, reward, discount)
        episodic_return, episodic_length = episodic_return + reward, episodic_length + args.action_repeat
        # topology
        if step in schedules["critic"][0]:
            for key, count in topology_round(agent, buffer.sample(rng=agent.ne_rng), step, schedules).items():
                run["counts"][key] += count
        if args.reset_interval and step % args.reset_interval == 0 and step < args.total_timesteps:
            topology.reset(agent.mlps, agent.head_targets, agent.optimizers, agent.ne_rng)
        # evaluate, log
        if step % args.eval_frequency == 0 or step == args.total_timesteps:
            video = run_dir / f"videos/step_{step}.gif" if args.capture_video else None
            returns = evaluate(agent, eval_env, args.eval_episodes, args.seed, video)
            row = {"step": step, "eval/return_mean": np.mean(returns), "eval/return_std": np.std(returns)}
            row["charts/episodic_return"] = np.mean(run["returns"] or [math.nan])
            row |= {"losses/qf_loss": float(qf_loss), "losses/qf_values": float(qf_values)}
            for name, hidden in agent.hidden(buffer.sample(rng=torch.Generator().manual_seed(step))).items():
                row |= topology.metrics(f"ne/{name}", agent.layers[name], sum(hidden, []))
            row |= run["counts"] | {"ne/review_epsilon": run["epsilon"]}
            row["ne/review_share"] = run["reviewed"] / max(run["updates"], 1)
            log({key: value for key, value in row.items() if key.startswith(("eval/", "ne/", "losses/"))})
            log({"losses/actor_loss": actor_loss, "charts/SPS": (step - first_step) / (time.time() - start)})
            print(*(f"{key} {row[key]:.7g}" for key in row if key.endswith(("step", "mean", "density"))), sep=", ")
            with open(run_dir / "results.csv", "a", newline="") as file:
                csv.writer(file).writerows([row.values()] if file.tell() else [row.keys(), row.values()])
                run["returns"], run["results_bytes"] = [], file.tell()
        # episode end: log, checkpoint, reset
        if done:
            log({"charts/episodic_return": episodic_return, "charts/episodic_length": episodic_length})
            run["returns"].append(episodic_return)
            if stops or step // args.checkpoint_frequency > run["saved"] // args.checkpoint_frequency:
                save()
            if stops:
                print(f"stopped at step {step}; continue with: python {sys.argv[0]} --resume {run_dir}")
                raise SystemExit(0 if stops[0] == signal.SIGTERM else 130)
            episodic_return, episodic_length = 0.0, 0
            obs = env.reset()
            buffer.add(obs)

    save(finished=True)
    writer.close()


if __name__ == "__main__":
    try:
        main()
    except (KeyboardInterrupt, BrokenPipeError):
        raise SystemExit(130) from None
    except OSError as e:  # a full disk, a folder that went away
        die(f"cannot write: {e}; make room and continue the last checkpoint with --resume", code=1)
