"""DrQ-v2 and the rivals of Neuroplastic Expansion on it, continuous control from pixels, in one file.

Paper: Neuroplastic Expansion in Deep Reinforcement Learning, arXiv 2410.07994; §, Eq. and Table below refer to it.
Run:   python baselines/drq_dmc.py --method redo --env-id walker_walk (on a GPU); all flags: --help
With --method none it is DrQ-v2: ne_drq_dmc.py --initial-density 1 --review-floor 1, bit for bit. docs/ne_drq_dmc.md
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
from collections import deque
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


@dataclass
class Args:
    # --- run ---
    exp_name: str = "drq_dmc"  # name of this experiment, part of the run's name
    env_id: str = "walker_walk"  # domain_task of the DeepMind Control Suite
    seed: int = 1  # seed of everything random, >= 0
    total_timesteps: int | None = None  # length in environment frames; default: 1.1M for walker_walk, else 3.1M
    cuda: bool = True  # use the GPU if there is one
    cudagraphs: bool = True  # on CUDA: capture the update once and replay it; off: eager
    torch_threads: int = 1  # CPU threads of torch; a resumed run is exact with the same number only
    bf16: bool = False  # losses and gradients in bfloat16 where autocast holds that to be safe
    run_dir: str | None = None  # where all files go; default runs/{env_id}__{exp_name}__{seed}__{unix_time}
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
    # --- rivals ---
    method: Literal["none", "reset", "redo", "layer-norm", "injection"] = "none"  # none: DrQ-v2
    reset_interval: int = 200_000  # reset: environment frames between two, heads only (Nikishin et al. 2022)
    redo_interval: int = 1_000  # redo: updates between two resets of dormant neurons (Sokar et al. 2023)
    redo_tau: float = 0.1  # redo: a neuron is dormant when its score (Eq. 1) is at most this
    injection_step: int | None = None  # injection: environment frame of it (Nikishin et al. 2024); default: the middle


def die(message: str, code: int = 2) -> NoReturn:
    """One clear line and a non-zero exit: 2 for a mistake on the command line, 1 for what went wrong later."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


PAD = 4  # pixels by which the augmentation shifts at most
RANGES = [  # of each flag; None, where it is a default, is not checked
    ("at least 0", lambda x: x >= 0, "seed noise_clip redo_tau"),
    ("at least 1", lambda x: x >= 1, "total_timesteps torch_threads eval_frequency eval_episodes batch_size n_step"),
    ("at least 1", lambda x: x >= 1, "checkpoint_frequency buffer_size action_repeat frame_stack channels hidden_dim"),
    ("at least 1", lambda x: x >= 1, "update_frequency stddev_duration reset_interval redo_interval injection_step"),
    ("at least 15, for four convolutions", lambda x: x >= 15, "frame_size"),
    ("in [0, 1]", lambda x: 0 <= x <= 1, "gamma tau"),
    ("in (0, 1]", lambda x: 0 < x <= 1, "learning_rate"),
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

    def sample(self, rng: torch.Generator | None = None) -> Batch:
        """A uniform batch, written into the same tensors at every call."""
        args, rng, count = self.args, rng or self.rng, max(1, self.newest - self.oldest)
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


def orthogonal(module: nn.Module) -> None:
    """Initialises a convolution or a linear layer as DrQ-v2 does."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.orthogonal_(module.weight, gain=math.sqrt(2) if isinstance(module, nn.Conv2d) else 1.0)
        nn.init.zeros_(module.bias)


def mlp(sizes: list[int], layer_norm: bool) -> nn.Sequential:
    """Hidden layers (linear, LayerNorm if asked for, ReLU) and a linear output: parts 0, 3, 6 are the linear layers."""
    norm = nn.LayerNorm if layer_norm else nn.Identity
    hidden = [(nn.Linear(n_in, n), norm(n), nn.ReLU()) for n_in, n in zip(sizes, sizes[1:-1], strict=False)]
    return nn.Sequential(*sum(hidden, ()), nn.Linear(*sizes[-2:]))


class Network(nn.Module):
    """A trunk (linear, LayerNorm, tanh) on the encoder's features and MLP heads; actions, if any, join the trunk."""

    def __init__(self, args: Args, n_features: int, n_act: int, n_out: int, heads: int, n: int = 50):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(n_features, n), nn.LayerNorm(n), nn.Tanh())
        sizes = [n + n_act, args.hidden_dim, args.hidden_dim, n_out]
        self.heads = nn.ModuleList(mlp(sizes, args.method == "layer-norm") for _ in range(heads))
        self.injected, self.fresh, self.copied = False, None, None  # after an injection two more MLPs per head

    def forward(self, features: torch.Tensor, *actions: torch.Tensor) -> list[torch.Tensor]:
        """(B, features), (B, act) if any -> [(B, out), ...] of the heads."""
        x = torch.cat((self.trunk(features), *actions), dim=1)  # (B, trunk + act)
        if not self.injected:
            return [head(x) for head in self.heads]
        return [h(x) + (h1(x) - h2(x)) for h, h1, h2 in zip(self.heads, self.fresh, self.copied, strict=True)]


class Agent(nn.Module):
    """Encoder, actor, twin critics on one trunk, their targets and optimisers. An update is all in place."""

    def __init__(self, args: Args, n_act: int, device: torch.device):
        super().__init__()
        self.args, widths = args, [3 * args.frame_stack, *[args.channels] * 4]
        layers = [nn.Conv2d(n, m, 3, s) for n, m, s in zip(widths, widths[1:], (2, 1, 1, 1), strict=False)]
        self.encoder = nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())], nn.Flatten())
        n_features = self.encoder(torch.zeros(1, widths[0], args.frame_size, args.frame_size)).shape[1]
        self.actor, self.critic = Network(args, n_features, 0, n_act, 1), Network(args, n_features, n_act, 1, 2)
        self.apply(orthogonal)
        self.mlps = {"actor": self.actor.heads, "critic": self.critic.heads}
        self.params = {name: [*getattr(self, name).parameters()] for name in ("encoder", "actor", "critic")}  # trained
        if args.method == "injection":
            self.critic.fresh = copy.deepcopy(self.critic.heads).apply(orthogonal)
            self.critic.copied = copy.deepcopy(self.critic.fresh)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.register_buffer("stddev", torch.tensor(args.stddev[0]))  # of the action noise
        self.features = torch.zeros(args.batch_size, n_features, device=device)  # of the newest critic loss
        self.to(device).encoder.to(memory_format=torch.channels_last)
        self.online, self.targets = [p.detach() for p in self.critic.parameters()], [*self.target_critic.parameters()]
        adam = {"lr": args.learning_rate, "fused": True, "capturable": device.type == "cuda"}
        self.optimizers = {name: torch.optim.Adam(getattr(self, name).parameters(), **adam) for name in self.params}
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

    def update(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One step of critics and encoder, which nothing else trains, one of the policy, then Polyak averaging."""
        qf_loss, qf_values = self.critic_loss(batch)
        self.adam_step(qf_loss, "encoder", "critic")
        self.adam_step(actor_loss := self.actor_loss(batch), "actor")
        torch._foreach_lerp_(self.targets, self.online, self.args.tau)
        return qf_loss.detach(), qf_values.detach(), actor_loss.detach()

    def adam_step(self, loss: torch.Tensor, *names: str) -> None:
        loss.backward(inputs=[p for name in names for p in self.params[name]])
        for name in names:
            self.optimizers[name].step(), self.optimizers[name].zero_grad()

    @torch.no_grad()
    def hidden(self, batch: Batch) -> dict[str, list[list[torch.Tensor]]]:
        """Activations [(B, n), ...] of the hidden layers, for each MLP of each network."""
        h = self.encode(batch.obs, batch.shifts[:, 0])  # (B, features)
        x = {"actor": self.actor.trunk(h), "critic": torch.cat((self.critic.trunk(h), batch.actions), dim=1)}
        return {name: [[mlp[:3](x[name]), mlp[:6](x[name])] for mlp in mlps] for name, mlps in self.mlps.items()}

    @torch.inference_mode()
    def act(self, obs: np.ndarray) -> np.ndarray:  # (C, H, W) uint8 -> (act,)
        obs = torch.from_numpy(obs).to(self.stddev.device)[None]
        return torch.tanh(self.actor(self.encoder(obs / 255 - 0.5))[0])[0].cpu().numpy()


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


@torch.no_grad()
def reset(agent: Agent) -> None:
    """Reset (Nikishin et al. 2022): heads, their targets and Adam's state start anew; encoder, trunks, buffer stay."""
    for name, mlps in agent.mlps.items():
        mlps.load_state_dict(copy.deepcopy(mlps).cpu().apply(orthogonal).state_dict())
        for x in (x for p in mlps.parameters() for x in agent.optimizers[name].state[p].values()):
            x.zero_()
    agent.target_critic.heads.load_state_dict(agent.critic.heads.state_dict())


@torch.no_grad()
def redo(agent: Agent, batch: Batch) -> None:
    """ReDo (Sokar et al. 2023): dormant neurons start anew, silent and without Adam's moments; the targets stay."""
    for name, hidden in agent.hidden(batch).items():
        state = agent.optimizers[name].state
        for mlp, activations in zip(agent.mlps[name], hidden, strict=True):
            dormant = [dormancy_scores(h) <= agent.args.redo_tau for h in activations]  # [(n,), ...]
            for layer, neurons in zip(mlp[::3], dormant, strict=False):  # incoming weights (out, in) and bias (out,)
                drawn = nn.Linear(layer.in_features, layer.out_features).apply(orthogonal).to(neurons.device)
                for old, new in ((layer.weight, drawn.weight), (layer.bias, drawn.bias)):
                    old[neurons] = new[neurons]
                    state[old]["exp_avg"][neurons] = state[old]["exp_avg_sq"][neurons] = 0.0
            for layer, neurons in zip(mlp[3::3], dormant, strict=True):  # outgoing weights; last: 0 wins
                for old in (layer.weight, state[layer.weight]["exp_avg"], state[layer.weight]["exp_avg_sq"]):
                    old[:, neurons] = 0.0


def inject(agent: Agent) -> None:
    """Plasticity Injection (Nikishin et al. 2024): Q heads h(x) become h(x) + fresh(x) - copied(x); `fresh` learns."""
    agent.critic.injected = agent.target_critic.injected = True
    agent.mlps["critic"] = agent.critic.fresh
    agent.params["critic"] = [*agent.critic.trunk.parameters(), *agent.critic.fresh.parameters()]


def dormancy_scores(hidden: torch.Tensor) -> torch.Tensor:
    """Eq. 1: each neuron's mean |activation| over its layer's; 0 if the layer is silent. (B, n) -> (n,)."""
    mean = hidden.abs().mean(0)  # (n,)
    return mean / mean.mean().clamp_min(torch.finfo(mean.dtype).tiny)  # tiny: 0 / 0 is 0, dormant


def metrics(prefix: str, hidden: list[torch.Tensor]) -> dict[str, float]:
    """What plasticity is measured by, on one batch of activations [(B, n), ...]; explained in docs/ne_td3.md."""
    scores = torch.cat([dormancy_scores(h) for h in hidden])  # (neurons,)
    values = {f"{prefix}/density": 1.0, f"{prefix}/dormant": int((scores <= 0).sum())}
    for name, tau in (("active_ratio", 0.0), ("active_ratio_0.025", 0.025), ("active_ratio_0.1", 0.1)):
        values[f"{prefix}/{name}"] = 1 - int((scores <= tau).sum()) / len(scores)
    return values | {f"{prefix}/fau": sum(int((h > 0).sum()) for h in hidden) / sum(h.numel() for h in hidden)}


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
        if content["format"] == "drq_dmc 1":
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
        may_change = ("resume", "cudagraphs", "capture_video")
        for name, value in vars(stored).items():
            if name not in may_change and getattr(args, name) != value:
                die(f"--{name.replace('_', '-')} must be {value} or left out with --resume, got {getattr(args, name)}")
    for allowed, holds, names in RANGES:
        for name in names.split():
            if (value := getattr(args, name)) is not None and not holds(value):
                die(f"--{name.replace('_', '-')} must be {allowed}, got {value}")
    args.total_timesteps = args.total_timesteps or (1_100_000 if args.env_id == "walker_walk" else 3_100_000)
    args.stddev_duration = args.stddev_duration or (100_000 if args.env_id == "walker_walk" else 500_000)
    whole = ["total_timesteps", "eval_frequency", "injection_step"] + ["reset_interval"] * (args.method == "reset")
    limits = [(x, (getattr(args, x) or 0) % args.action_repeat == 0, "a multiple of --action-repeat") for x in whole]
    least = max(args.batch_size, 2 * (args.n_step + args.frame_stack))
    limits += [("buffer_size", args.buffer_size >= least, f"at least {least} for such batches and windows")]
    limits += [("learning_starts", args.learning_starts >= (n := args.n_step * args.action_repeat), f"at least {n}")]
    limits += [("injection_step", (args.injection_step or 1) <= (n := args.total_timesteps), f"at most {n}")]
    for name, holds, allowed in limits:
        if not holds:
            die(f"--{name.replace('_', '-')} must be {allowed}, got {getattr(args, name)}")
    for name in ("reset_interval", "redo_interval", "redo_tau", "injection_step"):
        if getattr(args, name) != getattr(Args, name) and args.method != name.split("_")[0]:
            die(f"--{name.replace('_', '-')} needs --method {name.split('_')[0]}, got --method {args.method}")
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
        return folder, SummaryWriter(str(folder), purge_step=checkpoint and checkpoint["run"]["step"] + 1)
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
    torch.manual_seed(seeds[0])  # initial weights, and what a rival draws later
    noise_rng = np.random.default_rng(seeds[1])  # exploration
    env = PixelEnv(args)
    agent = Agent(args, env.n_act, device)
    run = {"args": vars(args), "device": device.type, "step": 0, "updates": 0, "saved": 0, "results_bytes": 0}
    run["returns"] = []
    inject_at = args.injection_step or args.total_timesteps // args.action_repeat // 2 * args.action_repeat
    if checkpoint is not None:
        agent.load_state_dict(checkpoint["agent"])
        run = checkpoint["run"]
        if args.method == "injection" and run["step"] >= inject_at:
            inject(agent)
    if run["step"] == args.total_timesteps:
        return print(f"{args.resume} is finished, there is nothing to resume")
    buffer = ReplayBuffer(args, env.n_act, seeds[2], device)
    if checkpoint is not None:
        if run["device"] != device.type:
            die(f"--resume must continue on {run['device']}, where the run was started, got {device.type}")
        buffer.load_state_dict(checkpoint["buffer"])
        torch.set_rng_state(checkpoint["torch_rng"])
        for name, adam in agent.optimizers.items():
            adam.load_state_dict(checkpoint["optimizers"][name])
        noise_rng.bit_generator.state, task_state = map(json.loads, checkpoint["numpy_rngs"])
        env.rng.set_state(task_state)
    run_dir, writer = open_run(args, checkpoint)
    eval_env = PixelEnv(args)
    graphed = CudaGraph if device.type == "cuda" and args.cudagraphs else lambda update: update
    update = graphed(agent.update)
    due = {"reset": range(args.reset_interval, args.total_timesteps, args.reset_interval), "injection": [inject_at]}
    print(f"{args.env_id}, seed {args.seed}, {device}: {run_dir}\nmethod: {args.method}", *due.get(args.method, []))
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
        content = {"format": "drq_dmc 1", "run": run, "agent": agent.state_dict()}
        content |= {"torch_rng": torch.get_rng_state(), "buffer": None if finished else buffer.state_dict()}
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
            batch = buffer.sample()
            qf_loss, qf_values, actor_loss = update(batch)
            if args.method == "redo" and run["updates"] % args.redo_interval == 0:
                redo(agent, batch)
        # step and store
        obs, reward, discount, done = env.step(action)
        buffer.add(obs, action, reward, discount)
        episodic_return, episodic_length = episodic_return + reward, episodic_length + args.action_repeat
        # rivals
        if step in due.get(args.method, []):
            reset(agent) if args.method == "reset" else inject(agent)
            update = graphed(agent.update)
        # evaluate, log
        if step % args.eval_frequency == 0 or step == args.total_timesteps:
            video = run_dir / f"videos/step_{step}.gif" if args.capture_video else None
            returns = evaluate(agent, eval_env, args.eval_episodes, args.seed, video)
            row = {"step": step, "eval/return_mean": np.mean(returns), "eval/return_std": np.std(returns)}
            row["charts/episodic_return"] = np.mean(run["returns"] or [math.nan])
            row |= {"losses/qf_loss": float(qf_loss), "losses/qf_values": float(qf_values)}
            for name, hidden in agent.hidden(buffer.sample(rng=torch.Generator().manual_seed(step))).items():
                row |= metrics(f"ne/{name}", sum(hidden, []))
            log({key: value for key, value in row.items() if key.startswith(("eval/", "ne/", "losses/"))})
            log({"losses/actor_loss": actor_loss, "charts/SPS": (step - first_step) / (time.time() - start)})
            print(*(f"{key} {row[key]:.7g}" for key in row if key.endswith(("step", "mean", "active_ratio"))), sep=", ")
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
